"""launch_kernel finds the compiled kernel that Triton would have taken, whatever changes between two calls."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from navit_kernels._jit import launch_kernel  # noqa: E402


@triton.jit(do_not_specialize=["n"])
def scaled_sum(x_ptr, y_ptr, out_ptr, n, stride, scale, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    total = tl.load(x_ptr + offs * stride, mask=mask, other=0.0).to(tl.float32) * scale
    if y_ptr is not None:
        total += tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (total + SHIFT).to(out_ptr.dtype.element_ty), mask=mask)


def check_all_kinds_of_calls(device: str) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(2):  # the second time they are found
        for n, stride, scale, shift, with_y, first, dtype in itertools.product(
            (1, 16, 37), (1, 2), (1.0, 3.0), (0, 1), (True, False), (0, 1), (torch.float32, torch.float16)
        ):
            source = x.to(dtype)[first:]
            y = source[100:] if with_y else None
            out = torch.full((64,), 7.0, device=device, dtype=dtype)
            launch_kernel(scaled_sum, (1,), source, y, out, n, stride, scale, SHIFT=shift, BLOCK=64, num_warps=1)
            expected = source[: n * stride : stride].float() * scale + shift
            if y is not None:
                expected = expected + y[:n].float()
            torch.testing.assert_close(out[:n], expected.to(dtype))
            assert (out[n:] == 7).all()


@pytest.mark.interpreter
def test_interpreted_calls() -> None:
    check_all_kinds_of_calls("cpu")


@pytest.mark.gpu
def test_gpu_calls() -> None:
    check_all_kinds_of_calls("cuda")


@pytest.mark.gpu
def test_gpu_named_and_positional_arguments_are_told_apart() -> None:
    x = torch.arange(8.0, device="cuda")
    for _ in range(2):
        out, other = torch.empty_like(x), torch.empty_like(x)
        launch_kernel(scaled_sum, (1,), x, None, out, 8, 1, 2.0, SHIFT=0, BLOCK=8)
        launch_kernel(scaled_sum, (1,), y_ptr=x, x_ptr=x, out_ptr=other, SHIFT=1, BLOCK=8, n=8, scale=1.0, stride=1)
        assert torch.equal(out, 2 * x)
        assert torch.equal(other, 2 * x + 1)
