"""What varlen_attention refuses, and in which words."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from attention_checks import BF16, FP16, FP64
from torch import Tensor

from navit_kernels import HeadNorm, plan_pack, varlen_attention, varlen_attention_qkvpacked
from navit_kernels._checks import check_cu_seqlens_values
from navit_kernels.self_attention import arguments
from navit_kernels.testing import cu_seqlens_of


def call(**changes: object) -> object:
    """A good call, on two images of 2 and 4 tokens, two heads of width 16, with some arguments changed."""
    x_THD = torch.ones(6, 2, 16)
    usual = {"q": x_THD, "k": x_THD, "v": x_THD, "cu_seqlens": cu_seqlens_of([2, 4]), "cu_seqlens_k": None}
    q, k, v, cu_seqlens, cu_seqlens_k = (changes.pop(name, value) for name, value in usual.items())
    return varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k, **changes)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_a_good_call_is_not_refused() -> None:
    call()
    call(plan=plan_pack([2, 4]), backend="reference", softmax_scale=0.5)
    call(cu_seqlens_k=int32(0, 6, 6), plan=plan_pack([2, 4], lengths_k=[6, 0]))


BAD_CALLS = [
    ({"q": torch.ones(6, 16)}, r"q must be \(T, H, D\) = \(any, any, any\), got \(6, 16\)"),
    ({"q": [1.0]}, r"q must be a tensor \(T, H, D\), got list"),
    ({"k": torch.ones(6, 2, 24)}, r"k must be \(T, H, D\) = \(any, any, 16\), got \(6, 2, 24\)"),
    ({"k": torch.ones(6, 1, 16)}, r"k must be of q's head count 2 \(grouped and multi-query.*got 1"),
    ({"v": torch.ones(6, 4, 16)}, r"v must be of q's head count 2 .*got 4"),
    ({"v": torch.ones(5, 2, 16)}, r"v must be \(T, H, D\) = \(6, 2, 16\), got \(5, 2, 16\)"),
    ({"k": torch.ones(5, 2, 16), "v": torch.ones(5, 2, 16)}, r"k must be \(T, H, D\) = \(6, 2, 16\), got \(5"),
    ({"k": torch.ones(6, 2, 16, dtype=FP16)}, r"k must be of q's dtype torch.float32, got torch.float16"),
    ({"v": torch.ones(6, 2, 16, device="meta")}, r"v must be on q's device cpu, got meta"),
    ({"cu_seqlens": [0, 2, 6]}, r"cu_seqlens must be a tensor \(S \+ 1,\), got list"),
    ({"cu_seqlens": int32(0, 6)[None]}, r"cu_seqlens must be a tensor \(S \+ 1,\), got \(1, 2\)"),
    ({"cu_seqlens": int32()}, r"cu_seqlens must be a tensor \(S \+ 1,\), got \(0,\)"),
    ({"cu_seqlens": int32(0, 2, 6).long()}, r"cu_seqlens must be int32, got torch.int64"),
    ({"cu_seqlens": int32(0, 2, 6).to("meta")}, r"cu_seqlens must be on q's device cpu, got meta"),
    ({"cu_seqlens_k": int32(0, 6)}, r"cu_seqlens_k must be \(S \+ 1,\) = \(3,?\), got \(2,\)"),
    ({"q_norm": "layer_norm"}, r"q_norm must be a HeadNorm or None, got str"),
    ({"q_norm": HeadNorm(weight=torch.ones(6, 16))}, r"q_norm.weight must be \(D,\) = \(16,\) or \(H, D\)"),
    ({"k_norm": HeadNorm(bias=torch.ones(1, 16))}, r"k_norm.bias must be \(D,\) = \(16,\) or \(H, D\) = \(2, 16\)"),
    ({"k_norm": HeadNorm(weight=torch.ones(16, device="meta"))}, r"k_norm.weight must be on k's device cpu"),
    ({"backend": "flash"}, r"backend must be 'auto' or 'reference' or 'triton' or 'fa3' or 'fa4', got 'flash'"),
    ({"backend": "triton"}, r"q must be on a GPU for backend='triton', got cpu"),
    ({"plan": [2, 4]}, r"plan must be a PackPlan, got list"),
    ({"plan": plan_pack([2, 3, 1])}, r"plan.cu_seqlens must be \(S \+ 1,\) = \(3,?\), got \(4,\)"),
    ({"plan": plan_pack([2, 4]).to("meta")}, r"plan.* must be on q's device cpu, got meta"),
    ({"plan": plan_pack([2, 4], lengths_k=[1, 5])}, r"plan must be made with lengths_k exactly where cu_seqlens_k"),
    ({"plan": plan_pack([2, 4]), "cu_seqlens_k": int32(0, 1, 6)}, "plan must be made with lengths_k"),
]  # fmt: skip
BAD_VALUES = [
    ({"cu_seqlens": int32(1, 2, 6)}, r"cu_seqlens\[0\] must be 0, got 1"),
    ({"cu_seqlens": int32(0, 2, 5)}, r"cu_seqlens\[-1\] must be the number of tokens, 6, got 5"),
    ({"cu_seqlens": int32(0, 4, 2, 6)}, r"cu_seqlens must be non-decreasing, got 4 followed by 2 at position 1"),
    ({"cu_seqlens_k": int32(0, 2, 7)}, r"cu_seqlens_k\[-1\] must be the number of tokens, 6, got 7"),
    ({"plan": plan_pack([4, 2])}, r"plan.cu_seqlens must be equal to cu_seqlens, 2 at position 1, got 4"),
    (
        {"plan": plan_pack([2, 4], lengths_k=[1, 5]), "cu_seqlens_k": int32(0, 2, 6)},
        r"plan.cu_seqlens_k must be equal to cu_seqlens_k, 2 at position 1, got 1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), BAD_CALLS + BAD_VALUES, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_errors_say_name_expected_and_got(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [((1, 6), r"x\[0\] must be 0, got 1"), ((0, 5), r"x\[-1\] must be"), ((0, 4, 2, 6), "x must be non-decreasing")],
    ids=str,
)
def test_values_of_cu_seqlens_are_checked_on_request(values: tuple[int, ...], message: str) -> None:
    check_cu_seqlens_values("x", int32(0, 2, 6), 6)
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens_values("x", int32(*values), 6)


def test_rope_is_reserved() -> None:
    with pytest.raises(NotImplementedError, match="rope"):
        call(rope=torch.ones(6, 16))


def test_head_norm_errors() -> None:
    with pytest.raises(ValueError, match="HeadNorm kind must be 'layer_norm' or 'rms_norm' or 'l2', got 'batch'"):
        HeadNorm("batch")
    with pytest.raises(ValueError, match="HeadNorm eps must be greater than 0, got -1"):
        HeadNorm(eps=-1)


def test_packed_errors() -> None:
    with pytest.raises(ValueError, match=r"qkv must be \(T, 3, H, D\) = \(any, 3, any, any\), got \(6, 2, 16\)"):
        varlen_attention_qkvpacked(torch.ones(6, 2, 16), cu_seqlens_of([6]))
    with pytest.raises(ValueError, match=r"cu_seqlens\[-1\] must be the number of tokens, 6, got 5"):
        varlen_attention_qkvpacked(torch.ones(6, 3, 2, 16), cu_seqlens_of([5]))


def on_meta(width: int = 16, dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    """Tensors that only the kernels' path takes: it fills shapes in and computes nothing."""
    shapes = {name: torch.empty(6, 2, width, dtype=dtype, device="meta") for name in "qkv"}
    return shapes | {"cu_seqlens": int32(0, 2, 6).to("meta")}


@pytest.mark.parametrize("width", [8, 12, 20, 136, 256])
def test_kernels_refuse_other_head_widths(width: int) -> None:
    with pytest.raises(
        ValueError, match=f"q must be of a head width D that is a multiple of 8 from 16 to 128, got {width}"
    ):
        call(**on_meta(width))


def test_kernels_refuse_other_dtypes() -> None:
    with pytest.raises(ValueError, match="q must be bfloat16 or float16 or float32"):
        call(**on_meta(dtype=FP64))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_kernels_refuse_heads_that_are_not_contiguous(name: str) -> None:
    strided = torch.empty(6, 16, 2, dtype=BF16, device="meta").transpose(1, 2)
    with pytest.raises(ValueError, match=rf"{name} must be contiguous over D, got strides \(32, 1, 2\)"):
        call(**(on_meta() | {name: strided}))


# Eager calls on a GPU are checked once, and then known by their key


class Reached(Exception):
    """The checks that are made once, with the key that a call has there."""


def key_of(**changes: object) -> object:
    """None where a call is checked every time."""

    def stop(*checked: object) -> None:
        raise Reached(arguments._key(*checked))

    with mock.patch.object(arguments, "check_call", stop):
        try:
            call(**changes)
        except Reached as reached:
            return reached.args[0]
        except ValueError:
            return None
    raise AssertionError("no check was made")


STRIDED = torch.ones(6, 16, 2).transpose(1, 2)
REFUSED_BY_KERNELS = [{name: STRIDED} for name in "qkv"] + [{name: torch.ones(6, 2, 20) for name in "qkv"}]


@pytest.mark.parametrize("changes", [changes for changes, _ in BAD_CALLS] + REFUSED_BY_KERNELS, ids="-".join)
def test_no_bad_call_is_known_as_a_good_one(changes: dict[str, object]) -> None:
    across = {"cu_seqlens_k": int32(0, 6, 6)}
    plans = {"plan": plan_pack([2, 4])}, across | {"plan": plan_pack([2, 4], lengths_k=[6, 0])}
    normed = {"q_norm": HeadNorm(weight=torch.ones(16)), "k_norm": HeadNorm("l2", bias=torch.ones(2, 16))}
    good = [key_of(**usual) for usual in ({}, across, *plans, normed)]
    assert None not in good
    assert key_of(**changes) not in good


def test_packs_of_other_lengths_are_known() -> None:
    tokens = {name: torch.ones(9, 2, 16) for name in "qkv"} | {"cu_seqlens": int32(0, 1, 5, 9)}
    assert key_of(**tokens) == key_of()
    assert key_of(**tokens, plan=plan_pack([1, 4, 4])) == key_of(plan=plan_pack([2, 4]))


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax_scale": 0.3},
        {"q_norm": HeadNorm("rms_norm")},
        {"q_norm": HeadNorm(eps=1e-5)},
        {"k_norm": HeadNorm()},
        {"q_norm": HeadNorm(weight=torch.ones(16))},
        {"q_norm": HeadNorm(weight=torch.ones(2, 16))},
        {"q_norm": HeadNorm(bias=torch.ones(16))},
        {name: torch.ones(6, 2, 16, dtype=FP16) for name in "qkv"},
        {name: torch.ones(6, 4, 16) for name in "qkv"},
        {name: torch.ones(6, 2, 24) for name in "qkv"},
        *({name: torch.ones(6, 3, 2, 16)[:, 0]} for name in "qkv"),
    ],
    ids="-".join,
)
def test_what_kernels_are_compiled_for_makes_another_key(changes: dict[str, object]) -> None:
    others = [key_of(), key_of(q_norm=HeadNorm())]
    assert key_of(**changes) not in [None, *others]
