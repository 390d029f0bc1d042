"""varlen_attention's launch table, and its kernels compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import itertools

import pytest
from ahead_of_time import SHARED_MEMORY_LIMIT, compile_launches
from attention_checks import BF16, FP16, FP32, Case
from compile_table import launch_on_meta, matrix_instructions

from navit_kernels.plan import CLASSES
from navit_kernels.self_attention.config import SUPPORTED_HEAD_DIMS, choose_config, rows_of_class, split_head_dim

LONGER = (64, 128, 256, 300)  # of at least the 64 rows that a warp group multiplies
CAPPED_SPILLS = 128  # bytes a thread, where the table caps registers and measured that more programs are worth it


@pytest.mark.parametrize("arch", [0, 80, 89, 90, 100])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_launch_covers_its_class(arch: int, bits: int) -> None:
    for width, index in itertools.product(SUPPORTED_HEAD_DIMS, range(CLASSES)):
        config, rows = choose_config(arch, width, index, bits), rows_of_class(index)
        assert config.forward.kernel in ("tile", "stream")
        assert (config.queries is not None) == (config.backward.kernel == "stream")
        for launch in filter(None, (config.forward, config.backward, config.queries)):
            assert all(size >= 16 and size & (size - 1) == 0 for size in (launch.block_m, launch.block_n))
            assert rows % launch.block_m == 0
            if launch.kernel != "stream":
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
        ("sm_90", Case(LONGER, 16, 64, BF16)),
        ("sm_90", Case(LONGER, 16, 72, FP16, "rms_norm", "rms_norm", planned=False)),
        ("sm_90", Case(LONGER, 16, 80, BF16, None, None)),
        ("sm_90", Case(LONGER, 16, 96, BF16, "l2", "l2", "per head")),
        ("sm_90", Case(LONGER, 8, 128, BF16)),
        ("sm_90", Case((32,), 16, 64, BF16)),
        ("sm_90", Case((20, 300), 8, 64, FP32)),
        ("sm_80", Case((32, *LONGER), 16, 64, BF16)),
        ("sm_89", Case((32, *LONGER), 16, 64, BF16)),
        ("sm_89", Case((32, *LONGER), 8, 128, FP16, None, None)),
        ("sm_100", Case((64, 300), 16, 64, BF16)),
        ("gfx942", Case((64, 300), 16, 64, BF16)),
    ],
    ids=str,
)
def test_kernels_fit_and_run_on_the_matrix_unit(arch: str, case: Case) -> None:
    capability = 0 if arch.startswith("gfx") else int(arch[3:])
    configs = [choose_config(capability, case.width, index, case.dtype.itemsize * 8) for index in range(CLASSES)]
    caps = {
        launch.registers for config in configs for launch in (config.forward, config.backward, config.queries) if launch
    }
    for one in compile_launches(arch, lambda: launch_on_meta(case, arch)):
        allowed = CAPPED_SPILLS if one.registers in caps else 0
        assert one.spills <= allowed, f"{one.name} on {arch} spills {one.spills} ({one.registers} registers)"
        assert one.shared <= SHARED_MEMORY_LIMIT[arch], (
            f"{one.name} on {arch} needs {one.shared} bytes of shared memory"
        )
        if one.name.startswith(("forward", "backward")) and one.name != "backward_prepare" and case.dtype != FP32:
            assert matrix_instructions(one), f"{one.name} on {arch} multiplies without the matrix unit"
            if arch == "sm_90" and min(case.lengths) >= 64:
                assert "wgmma.mma_async" in one.asm["ptx"], f"{one.name} misses the matrix unit's fast path"
