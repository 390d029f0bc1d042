"""add_norm: residual addition, LayerScale, stochastic depth per image, and the next norm, in one pass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from ahead_of_time import assert_fits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from navit_kernels.residual_norm import add_norm
from navit_kernels.testing import assert_error_within, cu_seqlens_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = [0, 1, 3, 0, 7, 2]


@dataclass(frozen=True)
class Case:
    width: int = 48
    x_dtype: torch.dtype = BF16
    branch_dtype: torch.dtype | None = BF16
    kind: str = "layer_norm"
    bias: bool = False
    layer_scale: bool = False
    keep: bool = False
    mean: float = 0.0  # of the channels of x, in standard deviations

    def inputs(self, lengths: list[int], device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
        random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        tokens, width = sum(lengths), self.width
        tensors = {
            "x_TE": (random(tokens, width) + self.mean).to(self.x_dtype),
            "branch_TE": None if self.branch_dtype is None else random(tokens, width).to(self.branch_dtype),
            "weight_E": random(width),
            "bias_E": random(width) if self.bias else None,
            "layer_scale_E": random(width) if self.layer_scale else None,
            "keep_scale_S": random(len(lengths)).gt(0) * 1.5 if self.keep else None,
            "cu_seqlens": cu_seqlens_of(lengths) if self.keep else None,
        }
        return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def results(
    case: Case,
    inputs: dict[str, Tensor | None],
    backend: str,
    dtype: torch.dtype | None = None,
    op: Callable = add_norm,
) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs under fixed random cotangents; in `dtype` where one is given."""
    leaves = {
        name: (t if dtype is None else t.to(dtype)).detach().requires_grad_()
        for name, t in inputs.items()
        if t is not None and name not in ("keep_scale_S", "cu_seqlens")
    }
    outputs = op(**{**inputs, **leaves}, kind=case.kind, backend=backend)
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=random).to(case.x_dtype).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {"x_new": outputs[0], "normed": outputs[1], **dict(zip(leaves, gradients, strict=True))}


def assert_matches_reference(case: Case, lengths: list[int], device: str) -> None:
    inputs = case.inputs(lengths, device)
    exact = results(case, inputs, "reference", torch.float64)
    at_dtype = results(case, inputs, "reference")
    for name, actual in results(case, inputs, "triton").items():
        assert actual.dtype == at_dtype[name].dtype, name
        assert_error_within(actual, exact[name], at_dtype[name], name)


def cases(width: int) -> Iterator[Case]:
    for x_dtype, branch_dtype in ((BF16, BF16), (FP32, BF16), (FP32, FP32), (FP16, FP16), (BF16, None)):
        for kind, bias in itertools.product(("layer_norm", "rms_norm"), (False, True)):
            yield Case(width, x_dtype, branch_dtype, kind, bias)
    for layer_scale, keep in ((True, False), (False, True), (True, True)):
        yield Case(width, FP32, BF16, "layer_norm", True, layer_scale, keep)
        yield Case(width, BF16, BF16, "rms_norm", False, layer_scale, keep)
    yield Case(width, FP32, FP32, mean=30.0)


def name_of(case: Case) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in dataclasses.astuple(case))


# The reference


def test_reference_is_layer_norm_of_the_sum() -> None:
    inputs = Case(x_dtype=FP32, branch_dtype=FP32, bias=True).inputs(LENGTHS)
    x_TE, normed_TE = add_norm(**inputs)
    torch.testing.assert_close(x_TE, inputs["x_TE"] + inputs["branch_TE"])
    torch.testing.assert_close(
        normed_TE, F.layer_norm(x_TE, x_TE.shape[1:], inputs["weight_E"], inputs["bias_E"], 1e-6)
    )


def test_reference_is_rms_norm_of_x_without_a_branch() -> None:
    inputs = Case(x_dtype=FP32, branch_dtype=None).inputs(LENGTHS)
    x_TE, normed_TE = add_norm(**inputs, kind="rms_norm", eps=1e-3)
    assert x_TE is inputs["x_TE"]
    torch.testing.assert_close(normed_TE, F.rms_norm(x_TE, x_TE.shape[1:], inputs["weight_E"], 1e-3))


def test_a_dropped_image_keeps_its_residual_stream() -> None:
    inputs = Case(keep=True, layer_scale=True).inputs(LENGTHS)
    inputs["keep_scale_S"] = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 2.0])
    x_TE, _ = add_norm(**inputs)
    kept_T = inputs["keep_scale_S"].repeat_interleave(torch.tensor(LENGTHS)) > 0
    assert torch.equal(x_TE[~kept_T], inputs["x_TE"][~kept_T])
    assert not torch.equal(x_TE[kept_T], inputs["x_TE"][kept_T])


def test_reference_gradients() -> None:
    case = Case(width=5, x_dtype=torch.float64, branch_dtype=torch.float64, bias=True, layer_scale=True, keep=True)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs([2, 0, 3]).items()}
    names = ["x_TE", "branch_TE", "weight_E", "bias_E", "layer_scale_E"]
    leaves = tuple(inputs[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(lambda *values: add_norm(**{**inputs, **dict(zip(names, values))}), leaves)  # noqa: B905


def test_normed_has_the_branch_dtype_unless_told_otherwise() -> None:
    inputs = Case(x_dtype=FP32).inputs(LENGTHS)
    x_TE, normed_TE = add_norm(**inputs)
    assert (x_TE.dtype, normed_TE.dtype) == (FP32, BF16)
    assert add_norm(**inputs, out_dtype=FP32)[1].dtype == FP32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_E": torch.ones(47)}, r"weight must be \(E,\) = \(48\), got \(47,\)"),
        ({"branch_TE": torch.ones(12, 48)}, r"branch must be \(T, E\) = \(13, 48\), got \(12, 48\)"),
        ({"branch_TE": None}, "branch must be given where layer_scale or keep_scale is"),
        ({"cu_seqlens": None}, "cu_seqlens must be given where keep_scale is"),
        ({"keep_scale_S": torch.ones(5)}, r"keep_scale must be \(S,\) = \(6\), got \(5,\)"),
        ({"kind": "batch_norm"}, "kind must be 'layer_norm' or 'rms_norm', got 'batch_norm'"),
    ],
)
def test_errors_say_name_expected_and_got(change: dict[str, object], message: str) -> None:
    inputs = Case(layer_scale=True, keep=True).inputs(LENGTHS)
    with pytest.raises(ValueError, match=message):
        add_norm(**{**inputs, **change})


# The kernel, in the interpreter and on a GPU


def assert_other_images_do_not_leak(case: Case, device: str) -> None:
    """Fill the neighbours of one image with NaN, before and after it: nothing of its own changes a bit."""
    inputs = case.inputs(LENGTHS, device)
    own = slice(4, 11)
    poisoned = {name: None if t is None else t.clone() for name, t in inputs.items()}
    for name in ("x_TE", "branch_TE"):
        poisoned[name][: own.start] = poisoned[name][own.stop :] = float("nan")
    poisoned["keep_scale_S"][:4] = poisoned["keep_scale_S"][5:] = float("inf")
    clean, dirty = results(case, inputs, "triton"), results(case, poisoned, "triton")
    for name in ("x_new", "normed", "x_TE", "branch_TE"):
        assert torch.equal(clean[name][own], dirty[name][own]), name
        assert dirty[name][: own.start].isnan().all()


def assert_alone_as_in_company(case: Case, device: str) -> None:
    """Three images, each alone and all together, give the same bits."""
    lengths = [5, 1, 6]
    inputs = case.inputs(lengths, device)
    together = add_norm(**inputs, kind=case.kind, backend="triton")
    start = 0
    for image, length in enumerate(lengths):
        own = slice(start, start + length)
        alone = {**inputs, "x_TE": inputs["x_TE"][own], "branch_TE": inputs["branch_TE"][own]}
        alone["keep_scale_S"] = inputs["keep_scale_S"][image : image + 1]
        alone["cu_seqlens"] = cu_seqlens_of([length], device)
        for packed, single in zip(together, add_norm(**alone, kind=case.kind, backend="triton"), strict=True):
            assert torch.equal(packed[own], single)
        start += length


def assert_opcheck(case: Case, device: str) -> None:
    inputs = case.inputs(LENGTHS, device)
    for name in ("x_TE", "branch_TE", "weight_E", "bias_E", "layer_scale_E"):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    out_dtype = case.branch_dtype or case.x_dtype
    names = ("x_TE", "branch_TE", "weight_E", "bias_E", "layer_scale_E", "keep_scale_S", "cu_seqlens")
    arguments = (*(inputs[name] for name in names), case.kind == "layer_norm", 1e-6, out_dtype)
    torch.library.opcheck(torch.ops.navit_kernels.add_norm.default, arguments)


def assert_compiles_once(device: str, compiler: str) -> None:
    case = Case(keep=True, layer_scale=True)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(add_norm, backend=counter, fullgraph=True)

    def op(**inputs: object) -> tuple[Tensor, Tensor]:
        for name in ("x_TE", "branch_TE", "keep_scale_S", "cu_seqlens"):
            torch._dynamo.mark_dynamic(inputs[name], 0)
        return compiled(**inputs)

    for lengths in ([3, 4], [5, 0, 1], [1, 1, 1, 9], [16, 16], [2, 7, 1]):
        inputs = case.inputs(lengths, device)
        actual = results(case, inputs, "triton", op=op)
        for name, expected in results(case, inputs, "triton").items():
            assert_error_within(actual[name], expected.double(), expected, name)
    assert counter.frame_count == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("case", list(cases(48)), ids=name_of)
def test_kernel_matches_reference(case: Case) -> None:
    assert_matches_reference(case, LENGTHS, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [1, 17, 130, 1032])
@pytest.mark.parametrize("lengths", [[0, 0], [1], [0, 5]], ids=str)
def test_kernel_at_awkward_sizes(width: int, lengths: list[int]) -> None:
    assert_matches_reference(Case(width, FP32, FP32, bias=True, keep=True), lengths, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_other_images_do_not_leak(kind: str) -> None:
    assert_other_images_do_not_leak(Case(kind=kind, keep=True, layer_scale=True), "cpu")


@pytest.mark.interpreter
def test_an_image_alone_gives_the_same_bits() -> None:
    assert_alone_as_in_company(Case(keep=True), "cpu")


@pytest.mark.interpreter
def test_strided_inputs() -> None:
    case = Case()
    inputs = case.inputs(LENGTHS)
    strided = {**inputs, "x_TE": inputs["x_TE"].repeat(1, 2)[:, :48], "branch_TE": inputs["branch_TE"].t().clone().t()}
    for name, expected in results(case, inputs, "triton").items():
        assert torch.equal(results(case, strided, "triton")[name], expected), name


@pytest.mark.interpreter
@pytest.mark.parametrize("unused", [0, 1])
def test_an_unused_output_gives_the_gradient_of_the_other(unused: int) -> None:
    inputs = Case(x_dtype=FP32, branch_dtype=FP32).inputs(LENGTHS)
    inputs["x_TE"].requires_grad_()
    gradients = [
        torch.autograd.grad(add_norm(**inputs, backend=backend)[1 - unused].square().sum(), inputs["x_TE"])[0]
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case", [Case(), Case(branch_dtype=None), Case(bias=True, layer_scale=True, keep=True)], ids=name_of
)
def test_opcheck(case: Case) -> None:
    assert_opcheck(case, "cpu")


@pytest.mark.interpreter
def test_compile_once_for_all_batches() -> None:
    assert_compiles_once("cpu", "aot_eager")


# Ahead of time


def launch_on_meta(case: Case, linear_bias: bool = False) -> None:
    from navit_kernels.residual_norm import kernel

    inputs = case.inputs([3, 97], "meta")
    x_TE, branch_TE, weight_E, _, layer_scale_E, *_ = inputs.values()
    centred = case.kind == "layer_norm"
    x_new_TE, normed_TE, stats_RT = kernel.add_norm(*inputs.values(), centred, 1e-6, case.branch_dtype or case.x_dtype)
    scaled = case.layer_scale or case.keep or case.branch_dtype not in (None, case.x_dtype)
    kernel.add_norm_backward(
        None if branch_TE is None else x_new_TE, normed_TE, x_TE if branch_TE is None else x_new_TE, stats_RT,
        branch_TE, weight_E, layer_scale_E, centred, case.bias, case.branch_dtype if scaled else None, linear_bias,
    )  # fmt: skip


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("sm_90", Case(768)),
        ("sm_90", Case(1152, bias=True, layer_scale=True, keep=True)),
        ("sm_80", Case(1024, kind="rms_norm")),
        ("sm_89", Case(4096, x_dtype=FP32, layer_scale=True, keep=True)),
        ("sm_100", Case(1280, branch_dtype=None, bias=True)),
        ("gfx942", Case(1152, x_dtype=FP32, keep=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_kernels_fit_without_spills(arch: str, case: Case) -> None:
    assert_fits(arch, lambda: launch_on_meta(case))


@pytest.mark.compile_only
@pytest.mark.parametrize("linear_bias", [False, True])
@pytest.mark.parametrize(
    "case",
    [Case(768), Case(768, bias=True), Case(1152, bias=True), Case(768, bias=True, layer_scale=True, keep=True),
     Case(1152, layer_scale=True)],
    ids=name_of,
)  # fmt: skip
def test_programs_of_the_backward_run_at_once(case: Case, linear_bias: bool) -> None:
    from navit_kernels.residual_norm.kernel import choose_config, programs_of_backward

    *_, backward = assert_fits("sm_90", lambda: launch_on_meta(case, linear_bias))
    assert backward.name == "backward_kernel"
    biases = case.bias + linear_bias
    programs = programs_of_backward(torch.device("meta"), case.width, biases, case.layer_scale) // 132
    assert programs * choose_config(case.width)["num_warps"] * 32 * backward.registers <= 1 << 16
    assert programs * backward.shared <= 227 * 1024


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("width", [24, 768, 1024, 1152, 1280, 4096])
@pytest.mark.parametrize("lengths", [[1], [63, 64, 65, 0, 1, 1000, 257]], ids=str)
def test_gpu_matches_reference(width: int, lengths: list[int]) -> None:
    for case in cases(width):
        assert_matches_reference(case, lengths, "cuda")


@pytest.mark.gpu
def test_gpu_isolation_opcheck_and_one_compilation() -> None:
    full = Case(bias=True, layer_scale=True, keep=True)
    assert_other_images_do_not_leak(full, "cuda")
    assert_alone_as_in_company(Case(1152, keep=True), "cuda")
    for case in (Case(), Case(branch_dtype=None), full):
        assert_opcheck(case, "cuda")
    assert_compiles_once("cuda", "inductor")


@pytest.mark.gpu
def test_gpu_results_repeat_bitwise_and_never_wait_for_the_gpu() -> None:
    case = Case(768, bias=True, layer_scale=True, keep=True)
    inputs = case.inputs([1000, 0, 3000, 77], "cuda")
    first = results(case, inputs, "auto")
    leaves = [inputs[name].requires_grad_() for name in ("x_TE", "branch_TE", "weight_E", "bias_E", "layer_scale_E")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        x_TE, normed_TE = add_norm(**inputs)
        torch.autograd.grad([x_TE, normed_TE], leaves, [torch.ones_like(x_TE), torch.ones_like(normed_TE)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, again in results(case, inputs, "auto").items():
        assert torch.equal(again, first[name]), name


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_values() -> None:
    case = Case(768, keep=True)
    inputs = case.inputs([100, 28], "cuda")
    add_norm(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = add_norm(**inputs)
    changed = case.inputs([60, 68], "cuda", seed=3)
    for name, tensor in inputs.items():
        if tensor is not None:
            tensor.copy_(changed[name])
    graph.replay()
    for replayed, expected in zip(captured, add_norm(**changed), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.gpu
def test_gpu_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB")
    x_TE = torch.zeros(2**21 + 5, 1024, dtype=BF16, device="cuda")
    tail = torch.randn(5, 1024, device="cuda").to(BF16)
    x_TE[-5:] = tail
    weight_E = torch.ones(1024, device="cuda")
    whole = add_norm(x_TE, x_TE, weight_E)
    for packed, single in zip(whole, add_norm(tail, tail, weight_E), strict=True):
        assert torch.equal(packed[-5:], single)
