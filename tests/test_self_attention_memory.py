"""What varlen_attention holds and copies on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_checks import BF16, MAIN
from torch import Tensor

from navit_kernels import varlen_attention, varlen_attention_qkvpacked
from navit_kernels.testing import cu_seqlens_of

pytestmark = pytest.mark.gpu

LARGE = replace(MAIN, lengths=(256,) * 4096)
MEBIBYTE = 1 << 20


def peak_memory(function: Callable[[], object]) -> tuple[int, object]:
    """The most bytes held at once beyond what was held before, and the result."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    return torch.cuda.max_memory_allocated() - before, result


def large_inputs(width: int = 64) -> tuple[Tensor, Tensor, Tensor, dict[str, object]]:
    """qkv of 2²⁰ tokens, dout, cu_seqlens, and the options."""
    inputs = replace(MAIN, width=width).inputs("cuda")
    parameters = {name: tensor.requires_grad_() for name, tensor in inputs.items() if "_" in name}
    tokens = sum(LARGE.lengths)
    qkv_T3HD = torch.randn(tokens, 3, 2, width, device="cuda", dtype=BF16).requires_grad_()
    options = LARGE.options(parameters) | {"plan": LARGE.plan("cuda")}
    dout_THD = torch.randn(tokens, 2, width, device="cuda", dtype=BF16)
    return qkv_T3HD, dout_THD, cu_seqlens_of(list(LARGE.lengths), "cuda"), options


def test_gpu_inference_holds_no_more_than_its_output_and_the_sizes_of_keys() -> None:
    qkv_T3HD, _, cu_seqlens, options = large_inputs()
    with torch.no_grad():
        varlen_attention(*qkv_T3HD.unbind(1), cu_seqlens, **options)
        peak, out_THD = peak_memory(lambda: varlen_attention(*qkv_T3HD.unbind(1), cu_seqlens, **options))
        lse = 4 * out_THD.shape[0] * out_THD.shape[1]
        assert lse == 8 * MEBIBYTE
        assert peak <= out_THD.nbytes + 2 * lse + lse // 2, "r and mean of keys"
        del out_THD
        plain = {"plan": options["plan"]}
        peak, out_THD = peak_memory(lambda: varlen_attention(*qkv_T3HD.unbind(1), cu_seqlens, **plain))
        assert peak <= out_THD.nbytes + lse // 2


@pytest.mark.parametrize("width", [64, 72], ids=str)  # 72: nothing as wide as the next power of two
def test_gpu_training_holds_no_copies(width: int) -> None:
    qkv_T3HD, dout_THD, cu_seqlens, options = large_inputs(width)

    def forward() -> Tensor:
        return varlen_attention_qkvpacked(qkv_T3HD, cu_seqlens, **options)

    torch.autograd.grad(forward(), qkv_T3HD, dout_THD)
    peak, out_THD = peak_memory(forward)
    size = out_THD.nbytes
    assert peak <= size + 12 * out_THD.shape[0] * out_THD.shape[1] + 4 * MEBIBYTE, "also lse, and r and mean of keys"
    peak, (grad_T3HD,) = peak_memory(lambda: torch.autograd.grad(out_THD, qkv_T3HD, dout_THD))
    assert peak <= 3 * size + size // 2, "the gradients and small change, no float32 dq, no normalized q or k"
    assert grad_T3HD.is_contiguous()


def test_gpu_packed_calls_copy_nothing() -> None:
    qkv_T3HD, dout_THD, cu_seqlens, options = large_inputs()
    leaves = [qkv_T3HD, options["q_norm"].weight, options["q_norm"].bias, options["k_norm"].weight]

    def train() -> None:
        out_THD = varlen_attention_qkvpacked(qkv_T3HD, cu_seqlens, **options)
        torch.autograd.grad(out_THD, leaves, dout_THD)

    train()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train()
        torch.cuda.synchronize()
    names = {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    assert any("forward_" in name for name in names), f"the profiler saw only {names}"
    assert not {name for name in names if any(word in name for word in ("copy", "CatArray", "DtoD"))}
