"""backend="fa3" and "fa4": the norm pass, and the hand-over to flash-attn. T tokens, H heads, D head width."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from ahead_of_time import assert_fits
from attention_checks import BF16, FP16, FP32, FP64, KINDS, Case, poisoned_memory
from torch import Tensor

from navit_kernels import HeadNorm, plan_pack, varlen_attention
from navit_kernels.head_norm import NORM_CODES
from navit_kernels.self_attention import flash
from navit_kernels.self_attention.reference import head_norm
from navit_kernels.testing import assert_error_within, cu_seqlens_of

BACKENDS = ("fa3", "fa4")
NAMES = ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias")


# The norm pass


def norm_pass(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of the kernels, by their launchers."""
    from navit_kernels.self_attention import kernel_flash

    eps = {None: 1e-6, **{kind: HeadNorm(kind).eps for kind in KINDS if kind}}
    q, k = (
        kernel_flash.Side(tensors[x], NORM_CODES[kind], tensors.get(f"{x}_weight"), bias, eps[kind])
        for x, kind, bias in (("q", case.q_kind, tensors.get("q_bias")), ("k", case.k_kind, None))
    )
    q_out, k_out = kernel_flash.forward(q, k)
    sums = [any(f"{x}_{part}" in tensors for part in ("weight", "bias")) for x in "qk"]
    dq, dk, q_sums, k_sums = kernel_flash.backward(q, k, tensors["q_dout"], tensors["k_dout"], *sums)
    results = {}
    for name, side, out, dx, sums_H2D in (("q", q, q_out, dq, q_sums), ("k", k, k_out, dk, k_sums)):
        if side.kind == 0:
            assert out.numel() == dx.numel() == 0
            continue
        results |= {f"{name}_out": out, f"d{name}": dx}
        for i, part in enumerate(("weight", "bias")):
            if (vector := tensors.get(f"{name}_{part}")) is not None and (name, part) != ("k", "bias"):
                results[f"d{name}_{part}"] = sums_H2D[:, i] if vector.dim() == 2 else sums_H2D[:, i].sum(0)
    return results


def exact_norms(case: Case, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same by the reference and autograd."""
    results: dict[str, Tensor] = {}
    for x, kind in (("q", case.q_kind), ("k", case.k_kind)):
        if kind is None:
            continue
        names = [n for n in (x, f"{x}_weight", f"{x}_bias") if n in tensors and n != "k_bias"]
        leaves = [tensors[n].to(dtype or tensors[n].dtype).detach().requires_grad_() for n in names]
        vectors = dict(zip(names, leaves, strict=True))
        y = head_norm(leaves[0], HeadNorm(kind, vectors.get(f"{x}_weight"), vectors.get(f"{x}_bias")))
        grads = torch.autograd.grad(y, leaves, tensors[f"{x}_dout"].to(y.dtype))
        results |= {f"{x}_out": y.detach(), **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}
    return results


def norm_inputs(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    tensors = case.inputs(device)
    generator = torch.Generator().manual_seed(1)
    for x in "qk":
        tensors[f"{x}_dout"] = torch.randn(tensors[x].shape, generator=generator).to(device, case.dtype)
    return tensors


def assert_norms_match_reference(case: Case, device: str) -> None:
    tensors = norm_inputs(case, device)
    with poisoned_memory():
        actual = norm_pass(case, tensors)
    exact, at_dtype = exact_norms(case, tensors, FP64), exact_norms(case, tensors, None)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        assert_error_within(result, exact[name], at_dtype[name], name)


def assert_gradients_reach_every_input(case: Case, device: str) -> None:
    """Autograd through the op gives what the kernels give, and zeros to a bias of k; no norm, no change."""
    tensors = norm_inputs(case, device)
    leaves = {n: tensors[n].detach().requires_grad_() for n in NAMES if n in tensors}
    norms = [
        kind and HeadNorm(kind, leaves.get(f"{x}_weight"), leaves.get(f"{x}_bias"))
        for x, kind in (("q", case.q_kind), ("k", case.k_kind))
    ]
    outs = dict(zip("qk", flash.normalize(leaves["q"], leaves["k"], *norms), strict=True))
    expected = norm_pass(case, tensors)
    for x, norm in zip("qk", norms, strict=True):
        if norm is None:
            assert outs.pop(x) is leaves.pop(x)
        else:
            assert torch.equal(outs[x], expected[f"{x}_out"])
    grads = torch.autograd.grad(list(outs.values()), list(leaves.values()), [tensors[f"{x}_dout"] for x in outs])
    for name, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, expected.get(f"d{name}", torch.zeros_like(grad))), name


def assert_opcheck(case: Case, device: str) -> None:
    tensors = case.inputs(device)
    arguments = [tensors[name].requires_grad_() if name in tensors else None for name in NAMES]
    codes = (NORM_CODES[case.q_kind], 1e-6, NORM_CODES[case.k_kind], 1e-6)
    with poisoned_memory():
        torch.library.opcheck(torch.ops.navit_kernels.head_norms.default, (*arguments, *codes))


LENGTHS = {"lengths": (50, 0, 37), "lengths_k": (3, 60, 80)}  # more tokens of k than of q
NORM_CASES = [
    Case(**LENGTHS),
    Case(**LENGTHS, width=24, q_kind="rms_norm", k_kind="l2", weight="per head"),
    Case(**LENGTHS, width=72, dtype=FP32, k_kind="rms_norm"),
    Case(**LENGTHS, width=72, weight="per head", mean=10.0),
    Case(**LENGTHS, width=24, dtype=FP32, q_kind="l2", weight="absent", bias=False),
    Case(**LENGTHS, q_kind="rms_norm", weight="absent", heads=3, heavy_tails=True),
    Case(**LENGTHS, q_kind=None, weight="per head", heads=3),
    Case(**LENGTHS, width=72, k_kind=None, bias=False),
    Case(lengths=(1,), lengths_k=(0,), width=24),
]
OPCHECK_CASES = [Case(lengths=(9, 4), width=16, **kinds) for kinds in ({}, {"q_kind": None}, {"k_kind": None})]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_norm_pass_matches_reference(case: Case) -> None:
    assert_norms_match_reference(case, "cpu")


@pytest.mark.interpreter
def test_norm_pass_reads_views_in_place() -> None:
    tensors = norm_inputs(Case(lengths=(70,)))
    assert not tensors["q"].is_contiguous()
    views = tensors | {x: tensors[x].transpose(0, 1).contiguous().transpose(0, 1) for x in "qk"}
    views["q_dout"] = views["q_dout"].new_ones(()).expand(views["q_dout"].shape)
    expected = norm_pass(Case(), {name: tensor.contiguous() for name, tensor in views.items()})
    for name, result in norm_pass(Case(), views).items():
        assert torch.equal(result, expected[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "l2"])
def test_rows_past_the_last_token_do_not_count_without_eps(kind: str) -> None:
    from navit_kernels.self_attention.kernel_flash import Side, backward

    x_THD, dy_THD, weight_D = torch.randn(5, 2, 24), torch.randn(5, 2, 24), torch.ones(24)
    sides = Side(x_THD, NORM_CODES[kind], weight_D, None, 0.0), Side(x_THD, 0, None, None, 0.0)
    assert all(result.isfinite().all() for result in backward(*sides, dy_THD, dy_THD, True, False))


@pytest.fixture
def op_on_cpu() -> Iterator[None]:
    """The op runs its kernels on CPU tensors, in the interpreter."""
    with torch.library._scoped_library("navit_kernels", "IMPL") as library:
        library.impl("head_norms", flash._forward, "CPU")
        library.impl("head_norms_backward", flash._backward_kernel, "CPU")
        yield


@pytest.mark.interpreter
@pytest.mark.parametrize("case", [NORM_CASES[i] for i in (1, 5, 6, 7)], ids=str)
def test_gradients_reach_every_input(case: Case, op_on_cpu: None) -> None:
    assert_gradients_reach_every_input(case, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck(case: Case, op_on_cpu: None) -> None:
    assert_opcheck(case, "cpu")


# Ahead of time


def launch_on_meta(case: Case) -> None:
    norm_pass(case, {name: tensor.to("meta") for name, tensor in norm_inputs(case).items()})


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("sm_90", Case(dtype=BF16)),
        ("sm_90", Case(dtype=BF16, width=72, weight="per head")),
        ("sm_90", Case(dtype=BF16, width=128, k_kind="rms_norm")),
        ("sm_80", Case(dtype=FP16, width=96, q_kind="l2", k_kind=None)),
        ("sm_89", Case(dtype=FP16, width=24, k_kind="l2")),
        ("sm_100", Case(dtype=BF16, width=80)),
        ("gfx942", Case(dtype=BF16)),
    ],
    ids=str,
)
def test_norm_pass_fits_without_spills(arch: str, case: Case) -> None:
    forward, backward = assert_fits(arch, lambda: launch_on_meta(case))
    if (arch, case.width) == ("sm_90", 64):  # enough programs at a time to keep the memory busy
        assert forward.registers <= 64
        assert backward.registers <= 96


# The door


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_flash_attn_says_what_to_install(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch.ops, "flash_attn_3", object(), raising=False)
    install = {"fa3": "install flash_attn_3", "fa4": r"pip install 'navit-kernels\[fa\]'"}[backend]
    with pytest.raises(ImportError, match=f"backend='{backend}' needs FlashAttention-{backend[2]}: {install}"):
        flash.load(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_cpu_tensors_are_refused(backend: str, dtype: torch.dtype) -> None:
    q_THD = torch.randn(4, 2, 64, dtype=dtype)
    with pytest.raises(ValueError, match=f"q must be on a GPU for backend='{backend}', got cpu"):
        varlen_attention(q_THD, q_THD, q_THD, cu_seqlens_of([4]), backend=backend)


@pytest.mark.parametrize("lengths_k", [None, [2, 9, 0]])
def test_the_longest_segments_are_the_same_with_and_without_a_plan(lengths_k: list[int] | None) -> None:
    lengths = [5, 0, 7]
    plan = plan_pack(lengths, lengths_k=lengths_k)
    expected = [7, max(lengths_k or lengths)]
    for known in (plan, plan.without_host_offsets(), None):
        assert flash._longest(known, plan.cu_seqlens, plan.cu_seqlens_k) == expected


# On a GPU


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """An installed flash-attn."""
    if request.param == "fa3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FlashAttention-3 needs a Hopper GPU")
    try:
        flash.load(request.param)
    except ImportError as error:
        pytest.skip(str(error))
    return request.param


FLASH_CASES = [
    Case(dtype=BF16, bias=False),
    Case(dtype=FP16, q_kind="rms_norm", k_kind="l2", weight="per head"),
    Case(dtype=BF16, width=128, q_kind=None, k_kind=None),
    Case(dtype=BF16, q_kind=None, heads=3, planned=False),
    Case(dtype=BF16, lengths=(17, 300, 60, 1), lengths_k=(64, 1, 130, 257)),
    Case(dtype=BF16, k_kind=None, weight="absent", spread=2.0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", FLASH_CASES, ids=str)
def test_gpu_attention_matches_reference(case: Case, backend: str) -> None:
    tensors = case.inputs("cuda")
    exact, at_dtype = case.results(tensors, "reference", FP64), case.results(tensors, "reference")
    actual = case.results(tensors, backend)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        assert result.dtype == at_dtype[name].dtype, name
        if name == "dk_bias":
            assert not result.any(), "a bias of k changes no output"
            continue
        assert_error_within(result, exact[name], at_dtype[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [replace(case, dtype=BF16) for case in NORM_CASES if case.dtype == FP16], ids=str)
def test_gpu_norm_pass_matches_reference(case: Case) -> None:
    assert_norms_match_reference(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_gpu_opcheck(case: Case) -> None:
    assert_gradients_reach_every_input(case, "cuda")
    assert_opcheck(case, "cuda")


@pytest.mark.gpu
def test_gpu_norm_pass_repeats_bit_by_bit() -> None:
    case = Case(dtype=BF16, lengths=(5000, 300), heads=3)
    tensors = norm_inputs(case, "cuda")
    first, again = (norm_pass(case, tensors) for _ in range(2))
    assert all(torch.equal(again[name], result) for name, result in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "lengths_k"), [((), ()), ((0, 0), None), ((3, 2), (0, 0)), ((0,), (4,))])
def test_gpu_packs_without_queries_or_keys(
    lengths: tuple[int, ...], lengths_k: tuple[int, ...] | None, backend: str
) -> None:
    case = Case(dtype=BF16, lengths=lengths, lengths_k=lengths_k)
    for name, result in case.results(case.inputs("cuda"), backend).items():
        assert (result == -torch.inf).all() if name == "lse" else not result.any(), name


@pytest.mark.gpu
def test_gpu_does_not_wait_for_the_device_with_a_plan(backend: str) -> None:
    case = Case(dtype=BF16)
    tensors = case.inputs("cuda")
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "dout"}
    attend = partial(
        varlen_attention, leaves["q"], leaves["k"], leaves["v"], cu_seqlens_of(list(case.lengths), "cuda"),
        plan=case.plan("cuda"), backend=backend, **case.options(leaves),
    )  # fmt: skip
    attend().backward(tensors["dout"])  # compiled now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend().backward(tensors["dout"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
