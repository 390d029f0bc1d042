"""varlen_attention: what it computes on a CPU, its checks, and its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import attention_checks
import pytest
import torch
from attention_checks import (
    BF16,
    FP16,
    FP32,
    FP64,
    KINDS,
    Case,
    assert_a_tile_chooses_its_own_maximum,
    assert_alone_as_in_company,
    assert_checkpointing_changes_nothing,
    assert_compiles_once,
    assert_opcheck,
    assert_other_images_do_not_leak,
    assert_packed_is_unpacked,
    assert_same_bits,
    assert_saved_tensors_may_move,
    assert_strides_do_not_matter,
)
from torch import Tensor
from torch.nn import functional as F

from navit_kernels import HeadNorm, plan_pack, varlen_attention, varlen_attention_qkvpacked
from navit_kernels.testing import cu_seqlens_of

SMALL = Case((3, 0, 1, 5), heads=2, width=16, dtype=FP64)


# The reference


@pytest.mark.parametrize("spread", [1.0, 7.0])
def test_reference_is_attention_inside_each_image(spread: float) -> None:
    case = replace(SMALL, q_kind=None, k_kind=None, spread=spread)
    tensors = case.inputs()
    out_THD = case.attend(tensors)[0]
    images = zip(*(tensors[name].split(case.lengths) for name in "qkv"), out_THD.split(case.lengths), strict=True)
    for q, k, v, out in images:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(q, k, v, scale=case.options({}).get("softmax_scale"))
        torch.testing.assert_close(out, expected.transpose(0, 1))


def test_reference_layer_norm_is_torch_layer_norm() -> None:
    tensors = SMALL.inputs()
    normed = dict(tensors)
    for side in "qk":
        weight, bias = tensors[f"{side}_weight"], tensors[f"{side}_bias"]
        normed[side] = F.layer_norm(tensors[side], (16,), weight.double(), bias.double(), 1e-6)
    plain = replace(SMALL, q_kind=None, k_kind=None)
    torch.testing.assert_close(SMALL.attend(tensors)[0], plain.attend(normed)[0])


@pytest.mark.parametrize("kind", ["rms_norm", "l2"])
def test_reference_norms_of_one_size(kind: str) -> None:
    q_THD, k_THD = torch.randn(2, 6, 3, 16, dtype=FP64)
    weight_HD, bias_D = torch.randn(3, 16, dtype=FP64), torch.randn(16, dtype=FP64)
    unit = F.rms_norm(q_THD, (16,), eps=1e-6) if kind == "rms_norm" else F.normalize(q_THD, dim=-1) * 16**0.5
    cu_seqlens = cu_seqlens_of([6])
    expected = varlen_attention(unit * weight_HD + bias_D, k_THD, k_THD, cu_seqlens)
    actual = varlen_attention(q_THD, k_THD, k_THD, cu_seqlens, q_norm=HeadNorm(kind, weight_HD, bias_D))
    torch.testing.assert_close(actual, expected)


def test_images_of_different_lengths_on_the_two_sides() -> None:
    case = replace(SMALL, lengths=(3, 0, 2, 4), lengths_k=(5, 2, 0, 1))
    tensors = case.inputs()
    out_THD, lse_HT = case.attend(tensors)
    assert not out_THD[3:5].any(), "queries without keys get zeros"
    assert (lse_HT[:, 3:5] == -float("inf")).all()
    torch.testing.assert_close(out_THD[5:], tensors["v"][7:].expand(4, -1, -1))
    alone = replace(case, lengths=(3,), lengths_k=(5,))
    first = {k: v[:3] if k == "q" else v[:5] if k in ("k", "v") else v for k, v in tensors.items()}
    assert torch.equal(alone.attend(first)[0], out_THD[:3])


def test_log_sum_exp_is_that_of_the_scores_and_carries_no_gradient() -> None:
    case = replace(SMALL, q_kind=None, k_kind=None, lengths=(4,))
    tensors = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    _, lse_HT = case.attend(tensors)
    scores_HQK = torch.einsum("qhd,khd->hqk", tensors["q"], tensors["k"]) / 4
    torch.testing.assert_close(lse_HT, scores_HQK.logsumexp(-1))
    assert not lse_HT.requires_grad
    assert case.results(case.inputs(), dtype=FP32)["lse"].dtype == FP32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths_k", [None, (2, 3, 0)])
def test_reference_gradients(kind: str | None, lengths_k: tuple[int, ...] | None) -> None:
    case = Case((3, 0, 1), 2, 3, FP64, kind, kind, "per head", lengths_k=lengths_k)
    tensors = {name: tensor.double().requires_grad_() for name, tensor in case.inputs().items() if name != "dout"}
    attend = lambda *values: case.attend(dict(zip(tensors, values, strict=True)))[0]  # noqa: E731
    assert torch.autograd.gradcheck(attend, tuple(tensors.values()))


def test_every_parameter_gets_a_gradient_and_the_bias_of_k_gets_zero() -> None:
    results = SMALL.results(SMALL.inputs(), dtype=FP64)
    for name in ("dq", "dk", "dv", "dq_weight", "dq_bias", "dk_weight"):
        assert results[name].any(), name
    assert results["dk_bias"].abs().max() < 1e-15


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (0, 1, 0)], ids=str)
def test_empty_and_tiny_packs(lengths: tuple[int, ...]) -> None:
    case = replace(SMALL, lengths=lengths)
    tensors = case.inputs()
    results = case.results(tensors)
    assert results["out"].shape == (sum(lengths), 2, 16)
    assert results["lse"].shape == (2, sum(lengths))
    torch.testing.assert_close(results["out"], tensors["v"], rtol=0, atol=0)  # of one token: its own value
    assert not results["dq"].any()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_packed_is_unpacked(dtype: torch.dtype) -> None:
    assert_packed_is_unpacked(replace(SMALL, dtype=dtype), "cpu")


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_input_dtype() -> None:
    case = replace(SMALL, dtype=FP32)
    tensors = case.inputs()
    qkv_T3HD = torch.stack([tensors[name] for name in "qkv"], 1).requires_grad_()
    cu_seqlens = cu_seqlens_of(list(case.lengths))
    with torch.autocast("cpu", BF16):
        out_THD = varlen_attention(*qkv_T3HD.unbind(1), cu_seqlens)
        assert torch.equal(varlen_attention_qkvpacked(qkv_T3HD, cu_seqlens), out_THD)
    assert torch.equal(out_THD, varlen_attention(*qkv_T3HD.to(BF16).unbind(1), cu_seqlens))
    assert torch.autograd.grad(out_THD.sum(), qkv_T3HD)[0].dtype == FP32


def test_checkpointing_changes_nothing() -> None:
    assert_checkpointing_changes_nothing(replace(SMALL, dtype=FP32), "cpu")


# The kernels, in the interpreter


@pytest.fixture
def kernels_on_cpu() -> Iterator[None]:
    with attention_checks.kernels_on_cpu():
        yield


@pytest.mark.interpreter
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.usefixtures("kernels_on_cpu")
def test_other_images_do_not_leak(planned: bool) -> None:
    assert_other_images_do_not_leak(Case((100, 260, 40, 130), 1, 16, planned=planned), "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_other_images_do_not_leak_across() -> None:
    cross = Case((20, 260, 5), 1, 16, lengths_k=(40, 20, 130))
    assert_other_images_do_not_leak(cross, "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_an_image_has_the_same_bits_alone_and_in_any_pack() -> None:
    assert_alone_as_in_company(Case((1, 40, 100, 130, 260), 1, 16), "cpu", packs=1)


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_a_tile_chooses_its_own_maximum() -> None:
    assert_a_tile_chooses_its_own_maximum(Case((1, 300), 1, 16, BF16, None), "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.usefixtures("kernels_on_cpu")
def test_kernels_of_empty_and_tiny_packs(lengths: tuple[int, ...], planned: bool) -> None:
    case = Case(lengths, 2, 16, planned=planned)
    tensors = case.inputs()
    results = case.results(tensors)
    assert torch.equal(results["out"], tensors["v"])
    assert torch.equal(results["dv"], tensors["dout"])
    assert not any(results[name].any() for name in ("dq", "dk", "dq_weight", "dq_bias", "dk_weight", "dk_bias"))
    assert_packed_is_unpacked(case, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(("lengths_k", "others"), [(None, ((40, 6), None)), ((2, 6), ((40, 5), (3, 2)))], ids=str)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_a_plan_of_other_numbers_of_tokens_is_refused(lengths_k: tuple[int, ...] | None, others: tuple) -> None:
    """As on a GPU, where nobody compares its lengths."""
    case = Case((40, 5), 1, 16, lengths_k=lengths_k)
    plan = replace(case.plan("cpu"), host_offsets=plan_pack(others[0], lengths_k=others[1]).host_offsets)
    with (
        mock.patch.object(Case, "plan", return_value=plan),
        pytest.raises(ValueError, match=r"plan must be of 45 tokens of q and (45|8) of k, got of"),
    ):
        case.attend(case.inputs())


@pytest.mark.interpreter
@pytest.mark.parametrize(("lengths", "lengths_k"), [((2, 3), (0, 0)), ((0, 0), (2, 3)), ((0, 3), (2, 0))], ids=str)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_kernels_of_queries_without_keys(lengths: tuple[int, ...], lengths_k: tuple[int, ...]) -> None:
    for planned in (True, False):
        case = Case(lengths, 2, 16, lengths_k=lengths_k, planned=planned)
        results = case.results(case.inputs())
        assert (results.pop("lse") == -float("inf")).all()
        assert not any(tensor.any() for tensor in results.values())


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_kernels_packed_is_unpacked() -> None:
    assert_packed_is_unpacked(Case((20, 0, 130), 1, 24), "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_strides_do_not_matter() -> None:
    assert_strides_do_not_matter(Case((5, 130), 2, 16, weight="per head"), "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_saved_tensors_may_move() -> None:
    assert_saved_tensors_may_move(Case((5, 130), 2, 16), "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_kernels_under_autocast() -> None:
    case = Case((5, 130), 2, 16, FP32)
    tensors = case.inputs()
    halved = {name: tensor.to(BF16) if tensor.dim() == 3 else tensor for name, tensor in tensors.items()}
    with torch.autocast("cpu", BF16):
        results = case.results(tensors | {"dout": halved["dout"]})
    assert {name for name, tensor in results.items() if tensor.dtype == BF16} == {"out"}
    expected = replace(case, dtype=BF16).results(halved)
    assert_same_bits({k: v.float() for k, v in results.items()}, {k: v.float() for k, v in expected.items()})


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_frozen_parameters_and_inference_save_no_state() -> None:
    from navit_kernels.self_attention import launch

    case = Case((5, 40), 2, 16)
    tensors = case.inputs()
    expected = case.results(tensors)
    saved = []
    forward = launch.forward

    def spy(*arguments: object) -> tuple[Tensor | None, ...]:
        outputs = forward(*arguments)
        saved.append(outputs[1:])
        return outputs

    with mock.patch.object(launch, "forward", spy):
        q, k, v = (tensors[name] for name in "qkv")
        out_THD = varlen_attention(q, k, v, cu_seqlens_of([5, 40]), **case.options(tensors))
        assert torch.equal(out_THD, expected["out"])
        assert saved.pop() == (None, None)
        v.requires_grad_()
        out_THD = varlen_attention(q, k, v, cu_seqlens_of([5, 40]), **case.options(tensors))
        assert [None if tensor is None else tuple(tensor.shape) for tensor in saved.pop()] == [(2, 45), None]
    assert torch.equal(torch.autograd.grad(out_THD, v, tensors["dout"])[0], expected["dv"])


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_opcheck() -> None:
    assert_opcheck("cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(("planned", "packed"), [(True, True), (False, False)])
@pytest.mark.usefixtures("kernels_on_cpu")
def test_compile_once_for_all_batches(planned: bool, packed: bool) -> None:
    assert_compiles_once("cpu", "aot_eager", planned, packed)


@pytest.mark.interpreter
@pytest.mark.usefixtures("kernels_on_cpu")
def test_checkpointing_changes_nothing_for_kernels() -> None:
    assert_checkpointing_changes_nothing(Case((5, 70), 2, 16), "cpu")
