"""Hopper's backward of short segments, compiled ahead of time: what keeps its programs side by side and its products
asynchronous. What it computes is tested with varlen_attention's other kernels, on a GPU."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import SHARED_MEMORY_LIMIT, Compiled, assert_products_are_asynchronous, compile_launches
from attention_checks import BF16, FP16, Case
from compile_table import call_on_meta

PER_MULTIPROCESSOR = 228 << 10  # bytes of shared memory, of which each program takes 1 KB more than it asks for


def compile_case(case: Case, block: int, warps: int, use_lse: bool = True) -> Compiled:
    from navit_kernels.self_attention import hopper_backward_tile

    tensors = case.inputs("meta")
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    call = call_on_meta(case, tensors)
    index = {64: 1, 128: 2}[block]
    floats = torch.empty(16, device="meta")
    weight_grads = call.norms.q_weight is not None

    def backward() -> None:
        grads = (torch.empty_like(x) for x in (q, k, v))
        hopper_backward_tile.backward_tile(
            call, index, dout, floats, *grads, floats, 1, weight_grads, block=block, warps=warps, use_lse=use_lse,
            registers=128 if (block, case.width) == (64, 64) else None,
        )  # fmt: skip

    (compiled,) = compile_launches("sm_90", backward)
    return compiled


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("case", "block", "warps", "programs", "spills"),
    [
        # Triton 3.9.0 spills more than 3.6.0, whose most is 16 bytes here
        (Case((128,), 16, 64, BF16), 128, 4, 2, 320),
        (Case((128,), 16, 64, FP16, "l2", "rms_norm", "per head", bias=False), 128, 4, 2, 320),
        (Case((128,), 16, 64, BF16, None, None), 128, 4, 2, 320),
        (Case((64,), 16, 64, BF16), 64, 4, 4, 128),
        (Case((128,), 16, 72, BF16), 128, 8, 1, 64),
        (Case((64,), 16, 80, FP16), 64, 4, 2, 0),
        (Case((128,), 8, 128, BF16, bias=False), 128, 8, 1, 256),
        (Case((64,), 8, 24, BF16), 64, 4, 2, 0),
    ],
    ids=str,
)
def test_programs_fit_and_products_are_asynchronous(
    case: Case, block: int, warps: int, programs: int, spills: int
) -> None:
    one = compile_case(case, block, warps, use_lse=case.width != 72)
    assert one.spills <= spills, f"spills {one.spills} bytes"
    assert one.registers * 32 * warps * programs <= 1 << 16
    assert one.shared <= SHARED_MEMORY_LIMIT["sm_90"]
    assert (one.shared + 1024) * programs <= PER_MULTIPROCESSOR
    assert_products_are_asynchronous(one, at_least=5 * 4)
