"""varlen_attention's kernels against the reference: the error of the output and of every gradient, each alone.

In the interpreter with the launches of an H100, and on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from attention_checks import (
    AWKWARD,
    BF16,
    CROSS,
    FP16,
    FP32,
    KINDS,
    MAIN,
    Case,
    assert_matches_reference,
    kernels_on_cpu,
)


def hard(case: Case) -> Iterator[Case]:
    """Keys far from zero, logits of ±100, heavy tails."""
    yield from (replace(case, mean=10.0), replace(case, spread=30.0), replace(case, heavy_tails=True))


def odd(case: Case) -> Iterator[Case]:
    """Scales below and at 0; each norm's own eps, as large as a variance; weights of two shapes, in bfloat16."""
    yield from (replace(case, spread=-3.0), replace(case, spread=0.0), replace(case, eps=(0.7, 0.2)))
    yield replace(case, weight="mixed", parameters=BF16)


def rotation(*choices: tuple) -> Iterator[tuple]:
    """One of each, round and round, each at its own pace."""
    return zip(*map(itertools.cycle, choices), strict=False)


def interpreted_cases() -> Iterator[Case]:
    """Every length with every head width and with every norm, everything else in rotation; then the hard inputs."""
    packs = ((17, 63, 0), (129, 1), (65, 0, 15), (1, 64, 16), (257,))
    others = rotation(("shared", "per head", "absent"), (True, True, False, False, True), (True, False, False, True))
    for (d, dtype), (w, width), (n, kind) in itertools.product(
        *map(enumerate, ((BF16, FP16), (24, 64, 72, 128), KINDS))
    ):
        lengths, (weight, bias, planned) = packs[(w + n + 4 * d) % 5], next(others)
        yield Case(lengths, 1 if max(lengths) > 100 else 2, width, dtype, kind, kind, weight, bias, planned=planned)
    cross = Case((20, 260, 31, 0, 5), 1, 64, BF16, lengths_k=(260, 20, 0, 7, 140))
    yield from (cross, replace(cross, planned=False, q_kind=None, weight="per head"), replace(cross, k_kind=None))
    every_kernel = Case((60, 100, 130), 1, 64, BF16)
    yield from hard(every_kernel)
    yield from hard(replace(every_kernel, dtype=FP16, q_kind="rms_norm", k_kind="l2"))
    yield from hard(replace(every_kernel, q_kind=None, k_kind=None))
    yield from hard(Case((60, 130), 1, 72, FP16))
    yield from odd(replace(every_kernel, heads=2))
    yield replace(every_kernel, q_kind="l2", k_kind="rms_norm", eps=(20.0, 0.5))


def interpreted_float32_cases() -> Iterator[Case]:
    for lengths, width, kind in zip(((17, 63), (129,), (1, 15), (16, 65)), (64, 24, 128, 72), KINDS, strict=True):
        yield Case(lengths, 1, width, FP32, kind, kind, "per head")
    case = Case((20, 40), 2, 64, FP32)
    yield from (*hard(case), replace(case, q_kind=None, k_kind=None, spread=30.0))


@pytest.mark.interpreter
@pytest.mark.parametrize("case", list(interpreted_cases()), ids=str)
def test_kernels_match_reference(case: Case) -> None:
    with kernels_on_cpu():
        assert_matches_reference(case, "cpu", draws=3 if case.heavy_tails else 1)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", list(interpreted_float32_cases()), ids=str)
def test_kernels_match_reference_in_float32(case: Case) -> None:
    with kernels_on_cpu():
        assert_matches_reference(case, "cpu", draws=3 if case.heavy_tails else 2)


@pytest.mark.interpreter
@pytest.mark.parametrize("length", [20, 200, 300])
def test_keys_alone_are_normed_and_far_from_zero(length: int) -> None:
    with kernels_on_cpu():
        case = Case((length,), 1, 16, BF16, None, "layer_norm", "absent", False, mean=3.0)
        assert_matches_reference(case, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [64, 72])
def test_kernels_of_other_architectures_match_reference(width: int) -> None:
    with kernels_on_cpu(arch=0):
        assert_matches_reference(Case((20, 65, 0, 129, 1), 1, width), "cpu")


def gpu_cases() -> Iterator[Case]:
    """Every head width, with norms, dtypes and all else in rotation; the fast widths in bfloat16; the hard inputs."""
    weights, biases = ("shared", "per head", "absent", "shared", "per head"), (True, True, False)
    everything = rotation(range(16, 129, 8), KINDS, (BF16, FP16, FP32), weights, biases, (True, False))
    for width, kind, dtype, weight, bias, planned in itertools.islice(everything, len(range(16, 129, 8))):
        yield Case(AWKWARD, 2, width, dtype, kind, kind, weight, bias, planned=planned)
    for width, planned in zip((72, 80, 96, 128), (True, False, True, False), strict=True):
        yield replace(MAIN, width=width, planned=planned)
    for width in (80, 128):
        yield replace(MAIN, width=width, dtype=FP16)
    for dtype in (BF16, FP16, FP32):
        yield from hard(replace(MAIN, dtype=dtype))
    for width in (72, 128):
        yield from hard(replace(MAIN, width=width))
        yield from hard(replace(MAIN, width=width, q_kind=None, k_kind=None))
    for kinds in ({"q_kind": "rms_norm", "k_kind": "l2"}, {"q_kind": None, "k_kind": None}):
        yield from (replace(MAIN, **kinds), *hard(replace(MAIN, **kinds)))
    yield from (CROSS, replace(CROSS, planned=False), replace(MAIN, q_kind=None), replace(MAIN, k_kind=None))
    yield replace(MAIN, lengths=(300, 20, 600, 0, 300), lengths_k=(20, 300, 1000, 257, 0))
    yield from odd(MAIN)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(gpu_cases()), ids=str)
def test_gpu_matches_reference(case: Case) -> None:
    assert_matches_reference(case, "cuda", draws=8)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 72, 128])
def test_gpu_portable_kernels_match_reference_without_gluon(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    from navit_kernels.self_attention import launch

    monkeypatch.setattr(launch, "gluon_is_supported", lambda: False)
    assert_matches_reference(Case(AWKWARD, 2, width, planned=width == 64), "cuda", draws=8)
