"""Sums over tokens: exact as torch's, the same every time."""

import pytest
import torch
from ahead_of_time import assert_fits
from torch import Tensor

from navit_kernels.testing import assert_error_within

SHAPES = [(0, 24), (1, 8), (17, 24), (300, 264), (3000, 768)]


def draw(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Tensor:
    return (0.5 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)


def column_sums(x_TN: Tensor) -> Tensor:
    from navit_kernels._column_sums import partial_sums, sum_rows

    return sum_rows([partial_sums(x_TN)])[0]


def assert_sums(x_TN: Tensor) -> None:
    actual = column_sums(x_TN)
    assert actual.dtype == torch.float32
    assert_error_within(actual, x_TN.double().sum(0), x_TN.sum(0, dtype=torch.float32))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_sums_are_those_of_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_sums(draw(shape, dtype))


@pytest.mark.interpreter
def test_rows_need_not_lie_one_after_another() -> None:
    assert_sums(draw((40, 48), torch.float32)[:, 8:32])


PARTIALS = [(1056, 2, 768), (7, 40), (264, 3072), (128, 1)]


def assert_sums_of_all(shapes: list[tuple[int, ...]], device: str = "cpu") -> list[Tensor]:
    from navit_kernels._column_sums import sum_rows

    random = torch.Generator().manual_seed(0)
    partials = [torch.randn(shape, generator=random).to(device) for shape in shapes]
    sums = sum_rows(partials)
    for part, actual in zip(partials, sums, strict=True):
        assert actual.shape == part.shape[1:]
        assert_error_within(actual, part.double().sum(0), part.sum(0))
    return sums


@pytest.mark.interpreter
@pytest.mark.parametrize("shapes", [[(65, 2, 24), (7, 40), (1, 33), (70, 1)], [(3, 5), (0, 8)], [(64, 32)]], ids=str)
def test_several_sums_at_once(shapes: list[tuple[int, ...]]) -> None:
    assert_sums_of_all(shapes)


@pytest.mark.compile_only
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_the_kernels_fit_without_spills(arch: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert_fits(arch, lambda dtype=dtype: column_sums(draw((3000, 2304), dtype, "meta")))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_gpu_several_sums_at_once(count: int) -> None:
    first, again = (assert_sums_of_all(PARTIALS[:count], "cuda") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (32961, 2304)], ids=str)
def test_gpu_sums_are_those_of_float64_and_repeat(shape: tuple[int, int]) -> None:
    x_TN = draw(shape, device="cuda")
    assert_sums(x_TN)
    first = column_sums(x_TN)
    assert all(torch.equal(column_sums(x_TN), first) for _ in range(5))
