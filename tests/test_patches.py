"""patchify: images of any sizes to packed, scaled and normalized patches, all of them or the kept ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from ahead_of_time import assert_fits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from navit_kernels.patches import KeptPatches, PixelBuffer, patchify
from navit_kernels.testing import assert_error_within, cu_seqlens_of

BF16, FP16, FP32, U8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
GRIDS = [(2, 3), (1, 1), (1, 7), (5, 2)]  # rows and columns of patches
MEANS, DEVIATIONS = (0.48, 0.46, 0.41, 0.5), (0.27, 0.26, 0.28, 0.25)


@dataclass(frozen=True)
class Case:
    patch_size: int = 4
    channels: int = 3
    pixel: torch.dtype = U8
    dtype: torch.dtype = BF16
    keep: bool = False
    norm: bool = False
    bias: bool = False

    @property
    def values(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def constants(self) -> dict[str, object]:
        mean, std = MEANS[: self.channels], DEVIATIONS[: self.channels]
        return {"patch_size": self.patch_size, "mean": mean, "std": std, "dtype": self.dtype}

    def inputs(self, grids: list[tuple[int, int]], device: str = "cpu", seed: int = 0) -> dict[str, object]:
        random = torch.Generator().manual_seed(seed)
        images = []
        for rows, columns in grids:
            image = torch.randint(
                256, (self.channels, rows * self.patch_size, columns * self.patch_size), generator=random
            )
            images.append(image.to(U8) if self.pixel == U8 else (image / 255).to(self.pixel))
        weight_P, bias_P = (torch.randn(self.values, generator=random).to(device) for _ in range(2))
        return {
            "images": PixelBuffer.from_images(images).to(device),
            "keep": some_patches(grids, random).to(device) if self.keep else None,
            "norm": (weight_P, bias_P if self.bias else None, 1e-6) if self.norm else None,
        }


def some_patches(grids: list[tuple[int, int]], random: torch.Generator) -> KeptPatches:
    """About half of each image's patches, in random order; none of the second image's."""
    kept, lengths = [torch.zeros(0, 2)], []
    for index, (rows, columns) in enumerate(grids):
        count = 0 if index == 1 else (rows * columns + 1) // 2
        places = torch.randperm(rows * columns, generator=random)[:count]
        kept.append(torch.stack([places // columns, places % columns], 1))
        lengths.append(count)
    return KeptPatches(cu_seqlens_of(lengths), torch.cat(kept).int())


def results(
    case: Case, inputs: dict[str, object], backend: str, exact: bool = False, op: Callable = patchify
) -> dict[str, Tensor]:
    """Patches and the gradients of all inputs that have one, under fixed random cotangents; in float64 if exact."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        leaves.append((tensor.double() if exact else tensor).detach().requires_grad_())
        return leaves[-1]

    leaves: list[Tensor] = []
    images, norm = inputs["images"], inputs["norm"]
    images = replace(images, pixels=leaf(images.pixels))
    norm = None if norm is None else (leaf(norm[0]), leaf(norm[1]), norm[2])
    constants = {**case.constants, "dtype": torch.float64 if exact else case.dtype}
    patches_TP = op(images, keep=inputs["keep"], norm=norm, backend=backend, **constants)
    cotangent = torch.randn(patches_TP.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype).to(patches_TP)
    gradients = torch.autograd.grad(patches_TP, leaves, cotangent) if leaves else ()
    return {"patches": patches_TP.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}


def assert_matches_reference(case: Case, grids: list[tuple[int, int]], device: str) -> None:
    """Every result's error is within its bound: the mean of some draws in float32, where one's largest is luck."""
    runs = []
    for seed in range(4 if case.dtype == FP32 else 1):
        inputs = case.inputs(grids, device, seed)
        exact = results(case, inputs, "reference", exact=True)
        runs.append((results(case, inputs, "triton"), exact, results(case, inputs, "reference")))
    for name in runs[0][0]:
        actual, exact_draws, at_dtype = ([run[i][name] for run in runs] for i in range(3))
        assert actual[0].dtype == at_dtype[0].dtype, name
        assert_error_within(actual, exact_draws, at_dtype, name)


def cases(patch_size: int, channels: int) -> Iterator[Case]:
    for keep, (pixel, dtype) in itertools.product((False, True), ((U8, BF16), (U8, FP32), (FP32, FP16), (BF16, FP32))):
        yield Case(patch_size, channels, pixel, dtype, keep)
    for keep, bias in itertools.product((False, True), repeat=2):
        yield Case(patch_size, channels, FP32, FP32, keep, True, bias)
        yield Case(patch_size, channels, U8, BF16, keep, True, bias)


def name_of(case: Case) -> str:
    parts = [f"{case.channels}x{case.patch_size}", str(case.pixel)[6:], str(case.dtype)[6:]]
    return "-".join([*parts, *(flag for flag in ("keep", "norm", "bias") if getattr(case, flag))])


# The reference


def test_patches_are_row_major_and_their_values_channel_first() -> None:
    image = torch.arange(2 * 4 * 6).view(2, 4, 6).float()
    patches_TP = patchify([image], 2, (0, 0), (1, 1))
    expected = [
        image[:, row : row + 2, column : column + 2].flatten().tolist() for row in (0, 2) for column in (0, 2, 4)
    ]
    assert patches_TP.tolist() == expected


def test_images_are_packed_in_order() -> None:
    images = [torch.rand(3, 4 * rows, 4 * columns) for rows, columns in GRIDS]
    alone = [patchify([image], 4, MEANS[:3], DEVIATIONS[:3]) for image in images]
    assert torch.equal(patchify(images, 4, MEANS[:3], DEVIATIONS[:3]), torch.cat(alone))


def test_uint8_is_scaled_and_float_is_not() -> None:
    image = torch.randint(256, (1, 8, 8), dtype=U8)
    from_bytes = patchify([image], 8, (0.4,), (0.2,), dtype=torch.float64)
    torch.testing.assert_close(from_bytes, (image.double().view(1, 64) / 255 - 0.4) / 0.2)
    torch.testing.assert_close(patchify([image / 255], 8, (0.4,), (0.2,)), from_bytes.float())


def test_kept_patches_are_those_of_the_whole_images() -> None:
    case = Case(keep=True)
    inputs = case.inputs(GRIDS)
    whole = patchify(inputs["images"], **case.constants)
    keep, rows, start = inputs["keep"], [], 0
    for s, (rows_s, columns_s) in enumerate(GRIDS):
        place = keep.coords_T2[keep.cu_seqlens[s] : keep.cu_seqlens[s + 1]].long()
        rows.append(start + place[:, 0] * columns_s + place[:, 1])
        start += rows_s * columns_s
    assert torch.equal(patchify(inputs["images"], keep=keep, **case.constants), whole[torch.cat(rows)])


def test_norm_is_layer_norm_of_each_patch() -> None:
    case = Case(dtype=FP32, norm=True, bias=True)
    inputs = case.inputs(GRIDS)
    weight_P, bias_P, eps = inputs["norm"]
    expected = F.layer_norm(patchify(inputs["images"], **case.constants), (case.values,), weight_P, bias_P, eps)
    torch.testing.assert_close(patchify(**inputs, **case.constants), expected)


def test_reference_gradients() -> None:
    case = Case(2, 1, torch.float64, torch.float64, keep=True, norm=True, bias=True)
    inputs = case.inputs([(2, 3), (1, 1), (2, 1)])
    buffer, (weight_P, bias_P, eps) = inputs["images"], inputs["norm"]

    def op(pixels: Tensor, weight_P: Tensor, bias_P: Tensor) -> Tensor:
        images = replace(buffer, pixels=pixels)
        return patchify(images, keep=inputs["keep"], norm=(weight_P, bias_P, eps), **case.constants)

    leaves = [t.double().requires_grad_() for t in (buffer.pixels, weight_P, bias_P)]
    assert torch.autograd.gradcheck(op, leaves)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6), st.integers(1, 4))
def test_a_buffer_holds_every_image(sides: list[tuple[int, int]], channels: int) -> None:
    images = [torch.rand(channels, *side) for side in sides]
    buffer = PixelBuffer.from_images(images)
    assert buffer.pixels.numel() == sum(image.numel() for image in images)
    for image, offset, size in zip(images, buffer.offsets_S.tolist(), buffer.sizes_S2.tolist(), strict=True):
        assert torch.equal(buffer.pixels[offset : offset + image.numel()].view(channels, *size), image)


def test_inference_mode_and_a_strided_image() -> None:
    image = torch.rand(8, 4, 3).permute(2, 0, 1)
    with torch.inference_mode():
        patches_TP = patchify([image], 4, (0, 0, 0), (1, 1, 1))
    assert torch.equal(patches_TP, patchify([image.contiguous()], 4, (0, 0, 0), (1, 1, 1)))


IMAGE = torch.zeros(3, 8, 4, dtype=U8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [IMAGE, IMAGE[:, :6]]}, r"images\[1\] must be of sides .* patch size 4, got \(6, 4\)"),
        ({"images": [IMAGE, IMAGE[:1]]}, r"images\[1\] must be like images\[0\]: 3 channels.* got 1 channels"),
        ({"images": [IMAGE, IMAGE.float()]}, r"images\[1\] must be like images\[0\].*uint8.* got .*float32"),
        ({"images": []}, "images must be at least one image, got none"),
        ({"patch_size": 33}, "patch_size must be an int from 1 to 32, got 33"),
        ({"mean": (0.5,)}, r"mean must be 3 floats, one a channel, got \(0.5,\)"),
        ({"norm": (torch.ones(47), None, 1e-6)}, r"norm weight must be \(P,\) = \(48\), got \(47,\)"),
        ({"dtype": U8}, "dtype must be .*float32.* got torch.uint8"),
        (
            {"keep": KeptPatches(cu_seqlens_of([1, 1]), torch.zeros(2, 2, dtype=torch.int32))},
            r"keep.cu_seqlens must be \(S \+ 1,\) = \(2\), got \(3,\)",
        ),
    ],
)
def test_errors_say_name_expected_and_got(change: dict[str, object], message: str) -> None:
    arguments = {"images": [IMAGE], "patch_size": 4, "mean": (0, 0, 0), "std": (1, 1, 1)}
    with pytest.raises(ValueError, match=message):
        patchify(**{**arguments, **change})


# The kernel, in the interpreter and on a GPU


def assert_other_images_and_dropped_patches_do_not_leak(case: Case, device: str) -> None:
    """Fill all pixels but those of one image's kept patches with NaN: its patches and gradients keep every bit."""
    inputs = case.inputs(GRIDS, device)
    buffer, keep = inputs["images"], inputs["keep"]
    first, last = keep.cu_seqlens[2:4].tolist()
    start, (height, width) = int(buffer.offsets_S[2]), buffer.sizes_S2[2].tolist()
    own_CHW = torch.zeros(case.channels, height, width, dtype=torch.bool, device=device)
    for row, column in keep.coords_T2[first:last].tolist():
        size = case.patch_size
        own_CHW[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = True
    own = torch.zeros_like(buffer.pixels, dtype=torch.bool)
    own[start : start + own_CHW.numel()] = own_CHW.flatten()
    poisoned = replace(buffer, pixels=buffer.pixels.where(own, float("nan")))
    clean = results(case, inputs, "triton")
    dirty = results(case, {**inputs, "images": poisoned}, "triton")
    assert torch.equal(clean["patches"][first:last], dirty["patches"][first:last])
    assert torch.equal(clean["gradient 0"][own], dirty["gradient 0"][own])
    assert dirty["patches"].isnan().any()


def assert_alone_as_in_company(case: Case, device: str) -> None:
    inputs = case.inputs(GRIDS, device)
    together = patchify(**inputs, **case.constants, backend="triton")
    start = 0
    for index, (rows, columns) in enumerate(GRIDS):
        offset = int(inputs["images"].offsets_S[index])
        pixels = inputs["images"].pixels[offset : offset + rows * columns * case.values]
        image = pixels.view(case.channels, rows * case.patch_size, columns * case.patch_size)
        alone = patchify([image], **case.constants, norm=inputs["norm"], backend="triton")
        assert torch.equal(together[start : start + rows * columns], alone)
        start += rows * columns


def assert_opcheck(case: Case, device: str) -> None:
    inputs = case.inputs(GRIDS, device)
    buffer, keep = inputs["images"], inputs["keep"]
    weight_P, bias_P, eps = inputs["norm"] or (None, None, 0.0)
    for tensor in (buffer.pixels, weight_P, bias_P):
        if tensor is not None and tensor.is_floating_point():
            tensor.requires_grad_()
    constants = case.constants
    arguments = (
        buffer.pixels, buffer.offsets_S, buffer.sizes_S2, buffer.channels,
        None if keep is None else keep.cu_seqlens, None if keep is None else keep.coords_T2,
        case.patch_size, [*constants["mean"]], [*constants["std"]], weight_P, bias_P, eps, case.dtype,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.navit_kernels.patchify.default, arguments)


def assert_compiles_once(case: Case, device: str, compiler: str) -> None:
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(patchify, backend=counter, fullgraph=True)

    def op(images: PixelBuffer, keep: KeptPatches | None, **others: object) -> Tensor:
        tensors = [images.pixels, images.offsets_S, images.sizes_S2]
        for tensor in tensors if keep is None else [*tensors, keep.cu_seqlens, keep.coords_T2]:
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(images, keep=keep, **others)

    for grids in ([(2, 3), (1, 1)], GRIDS, [(1, 2), (3, 1), (2, 2)], [(4, 4), (3, 3)]):
        inputs = case.inputs(grids, device)
        actual = results(case, inputs, "triton", op=op)
        for name, expected in results(case, inputs, "triton").items():
            assert torch.equal(actual[name], expected), name
    assert counter.frame_count == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("case", [*cases(4, 3), *cases(14, 1)], ids=name_of)
def test_kernel_matches_reference(case: Case) -> None:
    assert_matches_reference(case, GRIDS, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(("patch_size", "channels"), [(1, 4), (2, 2), (13, 3), (16, 3), (32, 4)])
@pytest.mark.parametrize("norm", [False, True])
def test_kernel_at_other_patch_sizes(patch_size: int, channels: int, norm: bool) -> None:
    case = Case(patch_size, channels, FP32, FP32, norm=norm, bias=norm)
    assert_matches_reference(case, [(1, 2), (3, 1)], "cpu")
    assert_matches_reference(replace(case, pixel=U8, keep=True), [(2, 2), (1, 1), (1, 3)], "cpu")


@pytest.mark.interpreter
def test_tokens_that_no_image_owns_are_zero() -> None:
    case = Case(dtype=FP32, norm=True, bias=True)
    inputs = case.inputs(GRIDS)
    buffer, tokens = inputs["images"], inputs["images"].pixels.numel() // case.values
    longer = replace(buffer, pixels=torch.cat([buffer.pixels, torch.full((3 * case.values,), 7, dtype=U8)]))
    for backend in ("triton", "reference"):
        patches_TP = patchify(**{**inputs, "images": longer}, **case.constants, backend=backend)
        assert torch.equal(patches_TP[:tokens], patchify(**inputs, **case.constants, backend=backend))
        assert patches_TP.shape[0] == tokens + 3
        assert not patches_TP[tokens:].any()


@pytest.mark.interpreter
def test_kernel_gives_zeros_for_a_patch_outside_its_image() -> None:
    from navit_kernels.patches import kernel

    buffer = PixelBuffer.from_images([torch.full((1, 4, 8), 9.0), torch.full((1, 4, 4), 9.0)])
    coords_T2 = torch.tensor([[0, 1], [1, 0], [0, 2], [-1, 0], [0, 0], [0, 1]], dtype=torch.int32)
    patches_TP = kernel.patchify(
        buffer.pixels, buffer.offsets_S, buffer.sizes_S2, 1, cu_seqlens_of([4, 2]), coords_T2, 4, [0.0], [1.0],
        None, None, 0.0, FP32,
    )  # fmt: skip
    assert patches_TP.mean(1).tolist() == [9, 0, 0, 0, 9, 0]


@pytest.mark.interpreter
def test_no_patch_kept() -> None:
    case = Case(pixel=FP32, keep=True, norm=True, bias=True)
    inputs = case.inputs(GRIDS)
    inputs["keep"] = KeptPatches(cu_seqlens_of([0] * len(GRIDS)), torch.zeros(0, 2, dtype=torch.int32))
    found = results(case, inputs, "triton")
    assert found["patches"].shape == (0, case.values)
    assert not any(found[f"gradient {i}"].any() for i in range(3))


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", [False, True])
def test_other_images_and_dropped_patches_do_not_leak(norm: bool) -> None:
    assert_other_images_and_dropped_patches_do_not_leak(Case(pixel=FP32, keep=True, norm=norm), "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", [False, True])
def test_an_image_alone_gives_the_same_bits(norm: bool) -> None:
    assert_alone_as_in_company(Case(norm=norm), "cpu")


OPCHECKED = [Case(), Case(keep=True, norm=True), Case(pixel=FP32, keep=True), Case(pixel=FP32, norm=True, bias=True)]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", OPCHECKED, ids=name_of)
def test_opcheck(case: Case) -> None:
    assert_opcheck(case, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", [Case(), Case(pixel=FP32, keep=True, norm=True, bias=True)], ids=name_of)
def test_compile_once_for_all_batches(case: Case) -> None:
    assert_compiles_once(case, "cpu", "aot_eager")


# Ahead of time


def launch_on_meta(case: Case) -> None:
    from navit_kernels.patches import kernel

    inputs = case.inputs([(3, 4), (1, 1), (5, 5)], "meta")
    buffer, keep = inputs["images"], inputs["keep"]
    weight_P, bias_P, eps = inputs["norm"] or (None, None, 0.0)
    mean, std = case.constants["mean"], case.constants["std"]
    cu_seqlens, coords_T2 = (None, None) if keep is None else (keep.cu_seqlens, keep.coords_T2)
    pixels = (buffer.pixels, buffer.offsets_S, buffer.sizes_S2, buffer.channels, cu_seqlens, coords_T2)
    patches_TP = kernel.patchify(*pixels, case.patch_size, mean, std, weight_P, bias_P, eps, case.dtype)
    if case.pixel != U8 or case.norm:
        kernel.patchify_backward(
            patches_TP, *pixels, case.patch_size, mean, std, weight_P, case.bias, eps, case.pixel != U8
        )


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("sm_90", Case(16)),
        ("sm_90", Case(16, keep=True, norm=True, bias=True)),
        ("sm_90", Case(14, keep=True)),
        ("sm_80", Case(14, pixel=FP32, dtype=FP32, norm=True, bias=True)),
        ("sm_89", Case(16, pixel=FP32, keep=True)),
        ("sm_100", Case(32, 4, FP32, norm=True, bias=True)),
        ("gfx942", Case(16, norm=True)),
        ("gfx942", Case(14)),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_kernels_fit_without_spills(arch: str, case: Case) -> None:
    assert_fits(arch, lambda: launch_on_meta(case))


@pytest.mark.compile_only
def test_bytes_are_read_and_written_in_vectors() -> None:
    forward = assert_fits("sm_90", lambda: launch_on_meta(Case(16)))[0]
    assert "ld.global.b8" not in forward.asm["ptx"]
    assert "st.global.v4.b32" in forward.asm["ptx"]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("patch_size", "channels"), [(1, 3), (7, 4), (14, 3), (16, 1), (16, 3), (30, 3), (32, 4)])
def test_gpu_matches_reference(patch_size: int, channels: int) -> None:
    for case in cases(patch_size, channels):
        assert_matches_reference(case, [(9, 21), (1, 1), (1, 65), (63, 1), (24, 24)], "cuda")


@pytest.mark.gpu
def test_gpu_isolation_opcheck_and_one_compilation() -> None:
    for norm in (False, True):
        assert_other_images_and_dropped_patches_do_not_leak(Case(16, pixel=FP32, keep=True, norm=norm), "cuda")
        assert_alone_as_in_company(Case(14, norm=norm), "cuda")
    for case in OPCHECKED:
        assert_opcheck(case, "cuda")
    assert_compiles_once(Case(16, pixel=FP32, keep=True, norm=True, bias=True), "cuda", "inductor")


@pytest.mark.gpu
def test_gpu_results_repeat_bitwise_and_never_wait_for_the_gpu() -> None:
    case = Case(16, pixel=FP32, keep=True, norm=True, bias=True)
    inputs = case.inputs([(20, 30), (4, 4), (50, 3), (16, 16)], "cuda")
    first = results(case, inputs, "auto")
    for name, again in results(case, inputs, "auto").items():
        assert torch.equal(again, first[name]), name
    weight_P = inputs["norm"][0].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        patches_TP = patchify(**inputs, **case.constants)
        torch.autograd.grad(patches_TP, weight_P, torch.ones_like(patches_TP))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_takes_a_list_and_a_pinned_buffer() -> None:
    images = [torch.randint(256, (3, 32 * rows, 32 * columns), dtype=U8) for rows, columns in GRIDS]
    constants = Case(32).constants
    expected = patchify(images, **constants)
    from_list = patchify([image.cuda() for image in images], **constants)
    from_buffer = patchify(PixelBuffer.from_images(images, pin_memory=True).to("cuda", non_blocking=True), **constants)
    assert_error_within(from_list, patchify(images, **{**constants, "dtype": torch.float64}), expected)
    assert torch.equal(from_list, from_buffer)


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_images() -> None:
    case = Case(16, keep=True)
    inputs = case.inputs([(4, 6), (2, 2), (3, 8)], "cuda")
    patchify(**inputs, **case.constants)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = patchify(**inputs, **case.constants)
    changed = case.inputs([(8, 3), (2, 2), (6, 4)], "cuda", seed=3)
    for kind, names in (("images", ("pixels", "offsets_S", "sizes_S2")), ("keep", ("cu_seqlens", "coords_T2"))):
        for name in names:
            getattr(inputs[kind], name).copy_(getattr(changed[kind], name))
    graph.replay()
    assert torch.equal(captured, patchify(**changed, **case.constants))


@pytest.mark.gpu
def test_gpu_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    pixels = torch.zeros((2**31 // 768 + 7) * 768, dtype=U8, device="cuda")
    pixels[-5 * 768 :] = torch.randint(256, (5 * 768,), device="cuda").to(U8)
    last = pixels[-5 * 768 :].clone().view(3, 16, 80)
    images = PixelBuffer(
        pixels,
        torch.tensor([0, pixels.numel() - 5 * 768], device="cuda"),
        torch.tensor([[16, (pixels.numel() // 768 - 5) * 16], [16, 80]], dtype=torch.int32, device="cuda"),
        3,
    )
    constants = Case(16).constants
    assert torch.equal(patchify(images, **constants)[-5:], patchify([last], **constants))
