"""flash-attn's and torch's names: their signatures, what attention is, and a refusal of everything else."""

import inspect
import math
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from navit_kernels import HeadNorm, flash_attn_interface, plan_pack, varlen_attention
from navit_kernels.flash_attn_interface import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, varlen_attn
from navit_kernels.testing import assert_error_within, cu_seqlens_of, relative_errors

LENGTHS, LENGTHS_K = [3, 0, 7, 1], [5, 2, 0, 4]
FLASH_ATTN_2 = {  # by position: name -> default
    "q": None, "k": None, "v": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None,
    "max_seqlen_k": None, "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "return_attn_probs": False, "block_table": None,
}  # fmt: skip
FLASH_ATTN_3 = {"seqused_q", "seqused_k", "qv", "q_descale", "k_descale", "v_descale", "attention_chunk", "num_splits",
                "pack_gqa", "sm_margin"}  # fmt: skip
REFUSED = {
    "dropout_p": 0.1, "causal": True, "window_size": (16, 16), "softcap": 30.0, "alibi_slopes": torch.ones(2),
    "block_table": torch.zeros(4, 1, dtype=torch.int32), "seqused_q": torch.ones(4), "seqused_k": torch.ones(4),
    "qv": torch.ones(1), "q_descale": torch.ones(1), "k_descale": torch.ones(1), "v_descale": torch.ones(1),
    "attention_chunk": 4, "num_splits": 2, "pack_gqa": True, "sm_margin": 8,
}  # fmt: skip


def inputs(lengths: list[int], lengths_k: list[int], heads: int = 2, width: int = 16, **options) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    options = {"dtype": torch.float64, **options}
    return [
        torch.randn(sum(side), heads, width, generator=generator, dtype=torch.float64).to(**options).requires_grad_()
        for side in (lengths, lengths_k, lengths_k)
    ]


def flash(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], lengths_k: list[int], **options):
    sides = (cu_seqlens_of(lengths, q.device), cu_seqlens_of(lengths_k, q.device))
    return flash_attn_varlen_func(q, k, v, *sides, max(lengths), max(lengths_k), **options)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], lengths_k: list[int], scale: float | None = None):
    """Segment by segment with torch's own attention; zeros without keys."""
    outs = []
    for query, key, value in zip(q.split(lengths), k.split(lengths_k), v.split(lengths_k), strict=True):
        heads_first = [part.transpose(0, 1) for part in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=scale).transpose(0, 1)
        outs.append(out if len(key) else 0 * query)
    return torch.cat(outs)


# Signatures


def test_arguments_stand_as_in_flash_attn_2_and_flash_attn_3s_are_known_by_name():
    parameters = inspect.signature(flash_attn_varlen_func).parameters
    by_position = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == list(FLASH_ATTN_2)
    assert [parameters[n].default for n in by_position[7:]] == list(FLASH_ATTN_2.values())[7:]
    assert {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} >= FLASH_ATTN_3
    packed = inspect.signature(flash_attn_varlen_qkvpacked_func).parameters
    by_position = [name for name, p in packed.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ["qkv", "cu_seqlens", "max_seqlen", *list(FLASH_ATTN_2)[7:-1]]


def test_arguments_stand_as_in_the_torch_that_is_installed():
    ours, theirs = (inspect.signature(function).parameters for function in (varlen_attn, torch_varlen.varlen_attn))
    assert [n for n in ours if n not in ("q_norm", "k_norm", "plan")][: len(theirs)] == [*theirs]
    assert all((ours[name].kind, ours[name].default) == (p.kind, p.default) for name, p in theirs.items())


# What is computed


@settings(max_examples=25, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    width=st.sampled_from([4, 8, 24]),
    scale=st.sampled_from([None, 0.3]),
)
def test_attention_of_cross_lengths_and_its_gradients(sides, heads, width, scale):
    lengths, lengths_k = (list(side) for side in zip(*sides, strict=True))
    q, k, v = inputs(lengths, lengths_k, heads, width)
    results = flash(q, k, v, lengths, lengths_k, softmax_scale=scale), attention(q, k, v, lengths, lengths_k, scale)
    dout = torch.randn_like(results[0])
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(out, (q, k, v), dout, materialize_grads=True) for out in results]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_three_functions_compute_the_same():
    q, k, v = inputs(LENGTHS, LENGTHS)
    cu_seqlens = cu_seqlens_of(LENGTHS)
    expected = varlen_attention(q, k, v, cu_seqlens)
    qkv = torch.stack([q, k, v], 1)
    assert torch.equal(flash(q, k, v, LENGTHS, LENGTHS), expected)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 7), expected)
    assert torch.equal(varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 7, 7), expected)
    doubled = varlen_attention(q, k, v, cu_seqlens, softmax_scale=0.5)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 7, 0.0, 0.5), doubled)
    assert torch.equal(varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 7, 7, scale=0.5), doubled)


def test_norms_and_a_plan_are_taken_too():
    q, k, v = inputs(LENGTHS, LENGTHS)
    cu_seqlens = cu_seqlens_of(LENGTHS)
    norms = {"q_norm": HeadNorm("layer_norm", torch.rand(16).double()), "k_norm": HeadNorm("l2")}
    expected = varlen_attention(q, k, v, cu_seqlens, **norms)
    norms["plan"] = plan_pack(LENGTHS)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 7, 7, **norms), expected)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), cu_seqlens, 7, **norms), expected)
    assert torch.equal(varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 7, 7, **norms), expected)


def test_the_log_sum_exp_comes_in_the_form_of_either_library():
    q, k, v = inputs(LENGTHS, LENGTHS_K)
    sides = [cu_seqlens_of(LENGTHS), cu_seqlens_of(LENGTHS_K), 7, 5]
    out, lse, empty = flash_attn_varlen_func(q, k, v, *sides, return_attn_probs=True)
    parts = zip(q.split(LENGTHS), k.split(LENGTHS_K), strict=True)
    expected = torch.cat([(a.transpose(0, 1) @ b.permute(1, 2, 0) * 16**-0.5).logsumexp(-1) for a, b in parts], 1)
    torch.testing.assert_close(lse, expected.detach())
    assert (lse[:, 3:10] == -math.inf).all()
    assert empty.numel() == 0
    pair = varlen_attn(q, k, v, *sides, return_aux=torch_varlen.AuxRequest(lse=True))
    assert torch.equal(pair[0], out)
    assert torch.equal(pair[1], lse)
    assert isinstance(varlen_attn(q, k, v, *sides, return_aux=torch_varlen.AuxRequest()), Tensor)
    qkv = torch.stack(inputs(LENGTHS, LENGTHS), 1)
    _, packed_lse, _ = flash_attn_varlen_qkvpacked_func(qkv, sides[0], 7, return_attn_probs=True)
    assert packed_lse.shape == (2, 11)


# Refusals


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name):
    q, k, v = inputs(LENGTHS, LENGTHS)
    cu_seqlens = cu_seqlens_of(LENGTHS)
    refused = {name: REFUSED[name]}
    with pytest.raises(NotImplementedError, match=f"^{name} must be"):
        flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 7, 7, **refused)
    if name in inspect.signature(flash_attn_varlen_qkvpacked_func).parameters:
        for probs in (False, True):
            with pytest.raises(NotImplementedError, match=f"^{name} must be"):
                flash_attn_varlen_qkvpacked_func(
                    torch.stack([q, k, v], 1), cu_seqlens, 7, return_attn_probs=probs, **refused
                )
    if name in inspect.signature(varlen_attn).parameters:
        with pytest.raises(NotImplementedError, match=f"^{name} must be"):
            varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 7, 7, **refused)


def test_every_argument_is_either_used_or_refused():
    used = {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale",
            "deterministic", "return_attn_probs", "q_norm", "k_norm", "plan"}  # fmt: skip
    assert set(inspect.signature(flash_attn_varlen_func).parameters) - used == set(REFUSED)
    assert set(flash_attn_interface.DEFAULTS) == set(REFUSED)


def test_values_that_change_nothing_are_taken():
    q, k, v = inputs(LENGTHS, LENGTHS)
    cu_seqlens = cu_seqlens_of(LENGTHS)
    expected = varlen_attention(q, k, v, cu_seqlens)
    for options in ({"deterministic": True}, {"window_size": [-1, -1]}, {"dropout_p": 0}, {"num_splits": 1}):
        assert torch.equal(flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 7, 7, **options), expected)
    for options in ({"num_splits": 1}, {"enable_gqa": True}):
        assert torch.equal(varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 7, 7, **options), expected)


def test_grouped_queries_and_paged_keys_are_refused():
    q, k, v = inputs(LENGTHS, LENGTHS)
    cu_seqlens = cu_seqlens_of(LENGTHS)
    with pytest.raises(NotImplementedError, match=r"k must be of the query's 2 heads, got 1"):
        flash_attn_varlen_func(q, k[:, :1], v[:, :1], cu_seqlens, cu_seqlens, 7, 7)
    with pytest.raises(NotImplementedError, match=r"key must be of the query's 2 heads, got 1"):
        varlen_attn(q, k[:, :1], v[:, :1], cu_seqlens, cu_seqlens, 7, 7, enable_gqa=True)
    with pytest.raises(NotImplementedError, match="cu_seq_k"):
        varlen_attn(q, k, v, cu_seqlens, None, 7, 7)


def test_a_longest_segment_that_is_too_short_is_noticed_where_that_costs_nothing():
    q, k, v = inputs(LENGTHS, LENGTHS_K)
    sides = [cu_seqlens_of(LENGTHS), cu_seqlens_of(LENGTHS_K)]
    with pytest.raises(ValueError, match=r"max_seqlen_q must be at least .* 7, got 6"):
        flash_attn_varlen_func(q, k, v, *sides, 6, 5)
    with pytest.raises(ValueError, match=r"max_seqlen_k must be at least .* 5, got 4"):
        flash_attn_varlen_func(q, k, v, *sides, 7, 4)
    with pytest.raises(ValueError, match=r"max_k must be"):
        varlen_attn(q, k, v, *sides, 7, 4)
    assert flash_attn_varlen_func(q, k, v, *sides, 100, 100).shape == q.shape


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "from_flash_attn.py"), run_name="__main__")
    assert "refused: causal must be False" in capsys.readouterr().out


# On a GPU


@pytest.mark.gpu
def test_in_the_place_of_torchs_attention_on_a_gpu():
    lengths, lengths_k = [65, 300, 1, 128, 700], [64, 20, 3, 500, 129]
    parts = inputs(lengths, lengths_k, 4, 64, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn_like(parts[0])
    sides = [cu_seqlens_of(lengths, "cuda"), cu_seqlens_of(lengths_k, "cuda"), 700, 500]

    def outcome(function, *tensors):
        out = function(*tensors, *sides)
        return [out, *torch.autograd.grad(out, tensors, dout.to(out))]

    def reference(q, k, v, cu_seqlens, cu_seqlens_k, *_):
        return varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k, backend="reference")

    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = outcome(lambda q, k, v, *_: attention(q, k, v, lengths, lengths_k), *exact)
    at_dtype = outcome(reference, *parts)
    for theirs, exactly in zip(outcome(torch_varlen.varlen_attn, *parts), expected, strict=True):
        assert max(relative_errors(theirs, exactly)) < 0.05
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True)
    for function in (flash_attn_varlen_func, varlen_attn, compiled):
        for results in zip(outcome(function, *parts), expected, at_dtype, strict=True):
            assert_error_within(*results)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_varlen_func(*parts, *sides)
        varlen_attn(*parts, *sides)
    finally:
        torch.cuda.set_sync_debug_mode("default")
