"""varlen_attention's launch table, and its kernels compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import bisect
import itertools

import pytest
from ahead_of_time import SHARED_MEMORY_LIMIT, compile_launches, machine_code, unwritten_descriptors
from attention_checks import BF16, FP16, Case
from compile_table import launch_on_meta, launches_of, matrix_instructions

from navit_kernels.plan import CLASS_LIMITS, CLASSES
from navit_kernels.self_attention.config import SUPPORTED_HEAD_DIMS, choose_config, rows_of_class, split_head_dim
from navit_kernels.self_attention.launch import programs_per_item


@pytest.mark.parametrize("arch", [0, 80, 89, 90, 100])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(("gluon", "triton"), [(False, (3, 6)), (True, (3, 6)), (True, (3, 9))])
def test_every_launch_covers_its_class(arch: int, bits: int, gluon: bool, triton: tuple[int, int]) -> None:
    for width, index in itertools.product(SUPPORTED_HEAD_DIMS, range(CLASSES)):
        config, rows = choose_config(arch, width, index, bits, gluon, triton=triton), rows_of_class(index)
        assert config.forward.kernel in ("tile", "stream", "hopper_tile", "hopper_stream")
        assert (config.queries is not None) == (config.backward.kernel in ("stream", "hopper_stream"))
        assert programs_per_item(index, config) * (config.queries or config.backward).block_m >= rows
        for launch in filter(None, (config.forward, config.backward, config.queries)):
            assert all(size >= 16 and size & (size - 1) == 0 for size in (launch.block_m, launch.block_n))
            if launch.kernel == "hopper_tile":
                assert launch.block_m >= rows
                assert launch.block_m % launch.block_n == 0
                assert index < CLASSES - 1
                continue
            assert rows % launch.block_m == 0
            if launch is config.forward and launch.kernel == "hopper_stream":
                assert index == CLASSES - 1
                assert rows % launch.block_n == 0, "r of a key tile lies in one item"
                assert launch.block_m in (64 * launch.warps // 4, 128 * launch.warps // 4)
                continue
            if launch.kernel not in ("stream", "hopper_stream"):
                assert launch.block_m == rows
                assert index < CLASSES - 1, "the last class has no longest image"
        if config.queries:
            assert rows % config.backward.block_n == 0


@pytest.mark.parametrize("width", SUPPORTED_HEAD_DIMS)
def test_column_parts_cover_a_head(width: int) -> None:
    first, second = split_head_dim(width)
    assert all(size & (size - 1) == 0 for size in (first, second))
    assert first <= width <= first + second
    assert first >= 16
    assert second == 0 or 16 <= second <= first


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("sm_90", Case((300,), 16, 72, BF16)),  # long and of two column parts: the most that can go wrong
        ("sm_90", Case((32,), 16, 64, BF16)),
        ("sm_90", Case((64,), 16, 64, BF16)),
        ("sm_90", Case((128,), 16, 64, FP16)),
        ("sm_90", Case((300,), 16, 64, FP16, "l2", "rms_norm", "per head", bias=False)),
        ("sm_90", Case((64,), 16, 80, FP16, "l2", "l2", "per head")),
        ("sm_90", Case((300,), 8, 128, BF16, bias=False)),
        ("sm_80", Case((64,), 16, 64, BF16)),
        ("sm_89", Case((300,), 16, 64, FP16)),
        ("sm_89", Case((128,), 8, 128, BF16)),
        ("sm_100", Case((64,), 16, 64, BF16)),
        ("gfx942", Case((64,), 16, 64, BF16)),
    ],
    ids=str,
)
def test_kernels_fit_and_run_on_the_matrix_unit(arch: str, case: Case) -> None:
    index = bisect.bisect_left(CLASS_LIMITS, case.lengths[0])
    launches = launches_of(arch, index, case.width, case.dtype)
    compiled = compile_launches(arch, lambda: launch_on_meta(case, arch))
    assert any(one.name.startswith("hopper_") for one in compiled) == (arch == "sm_90")
    for one in compiled:
        launch = launches.get(one.name)
        allowed = launch.spills if launch else 0
        assert one.spills <= allowed, f"{one.name} on {arch} spills {one.spills} ({one.registers} registers)"
        assert one.shared <= SHARED_MEMORY_LIMIT[arch], (
            f"{one.name} on {arch} needs {one.shared} bytes of shared memory"
        )
        if launch:
            assert matrix_instructions(one), f"{one.name} on {arch} multiplies without the matrix unit"
            if arch == "sm_90" and index > 0:
                assert "wgmma.mma_async" in one.asm["ptx"], f"{one.name} misses the matrix unit's fast path"
                assert unwritten_descriptors(machine_code(one)) == [], one.name


@pytest.mark.compile_only
def test_an_image_meets_the_same_kernels_with_any_plan_and_in_any_pack() -> None:
    """Kernels that differ in something else may round differently, too."""

    def kernels(lengths: tuple[int, ...], planned: bool) -> set[tuple[str, str]]:
        case = Case(lengths, 16, 72, BF16, planned=planned)
        return {(one.name, one.asm["ptx"]) for one in compile_launches("sm_90", lambda: launch_on_meta(case, "sm_90"))}

    alone = kernels((20, 60), True)
    assert {name for name, _ in alone} >= {"forward_tile", "backward_tile", "hopper_backward_tile"}
    assert alone <= kernels((20, 60), False)
    assert alone <= kernels((20, 60, 300), True)
