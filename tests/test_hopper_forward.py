"""Hopper's forward of long segments, compiled ahead of time: what keeps its programs side by side and its products
asynchronous. What it computes is tested with varlen_attention's other kernels, on a GPU."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import (
    SHARED_MEMORY_LIMIT,
    Compiled,
    assert_products_are_asynchronous,
    compile_launches,
    machine_code,
)
from attention_checks import BF16, FP16, Case
from compile_table import call_on_meta, config_of
from test_hopper_backward_tile import PER_MULTIPROCESSOR

from navit_kernels.plan import CLASSES


def compile_case(case: Case) -> Compiled:
    from navit_kernels.self_attention import hopper_forward

    tensors = case.inputs("meta")
    q = tensors["q"]
    call = call_on_meta(case, tensors)
    index = CLASSES - 1
    config = config_of(case.width, index)
    chosen = config.forward
    assert chosen.kernel == "hopper_stream"
    lse = torch.empty(case.heads, q.shape[0], device="meta")
    fixed_max = config.fixed_max and call.signature.wide_range
    (compiled,) = compile_launches(
        "sm_90",
        lambda: hopper_forward.forward_stream(
            call, index, chosen, torch.empty_like(q), lse, hopper_forward.key_size_tiles(call, index), True,
            fixed_max,
        ),
    )  # fmt: skip
    return compiled


@pytest.mark.compile_only
@pytest.mark.parametrize(
    "case",
    [
        Case((300,), 16, 64, BF16),
        Case((300,), 16, 64, FP16, "l2", "rms_norm", "per head", bias=False),
        Case((300,), 16, 64, BF16, None, None),
        Case((300,), 16, 72, BF16),
        Case((300,), 16, 80, FP16),
        Case((300,), 8, 128, BF16),
        Case((300,), 8, 96, BF16, None, "rms_norm"),
    ],
    ids=str,
)
def test_programs_fit_and_products_are_asynchronous(case: Case) -> None:
    """As many programs side by side as the launch table says, and no fewer waits either than the code has."""
    launch = config_of(case.width, CLASSES - 1).forward
    assert launch.registers is not None
    one = compile_case(case)
    assert one.spills <= launch.spills, f"spills {one.spills} bytes"
    assert one.registers <= launch.registers
    programs = (1 << 16) // (launch.registers * 32 * (launch.warps + 4))
    assert programs == (2 if launch.warps == 4 else 1)
    assert one.shared <= SHARED_MEMORY_LIMIT["sm_90"]
    assert (one.shared + 1024) * programs <= PER_MULTIPROCESSOR
    assert_products_are_asynchronous(one)
    assert machine_code(one).count("WARPGROUP.DEPBAR") == one.asm["ptx"].count("wgmma.wait_group")
