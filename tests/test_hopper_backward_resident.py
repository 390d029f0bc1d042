"""Hopper's backward of 129 to 256 tokens, compiled ahead of time: two programs side by side, products asynchronous.
What it computes is tested with varlen_attention's other kernels, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ahead_of_time import SHARED_MEMORY_LIMIT, Compiled, assert_products_are_asynchronous, compile_launches
from attention_checks import BF16, FP16, Case
from compile_table import call_on_meta
from test_hopper_backward_tile import PER_MULTIPROCESSOR

MAIN = Case((256,), 16, 64, BF16)


def compile_case(case: Case, use_lse: bool) -> Compiled:
    from navit_kernels.self_attention import hopper_backward_resident

    tensors = case.inputs("meta")
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    call = call_on_meta(case, tensors)
    floats = torch.empty(16, device="meta")

    def backward() -> None:
        grads = (torch.empty_like(x) for x in (q, k, v))
        hopper_backward_resident.backward_resident(
            call, 3, dout, q, floats, *grads, floats, 1, call.norms.q_weight is not None, block=256, use_lse=use_lse
        )

    (compiled,) = compile_launches("sm_90", backward)
    return compiled


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("case", "use_lse", "spills"),
    [
        (MAIN, True, 64),
        (MAIN, False, 64),
        (replace(MAIN, dtype=FP16, q_kind="l2", k_kind="rms_norm", weight="per head", bias=False), True, 64),
        (replace(MAIN, q_kind=None, k_kind=None), True, 0),
        (replace(MAIN, width=72), True, 256),
        (replace(MAIN, width=24, dtype=FP16), True, 64),
    ],
    ids=str,
)
def test_two_programs_fit_side_by_side(case: Case, use_lse: bool, spills: int) -> None:
    one = compile_case(case, use_lse)
    assert one.spills <= spills, f"spills {one.spills} bytes"
    assert one.registers * 32 * 4 * 2 <= 1 << 16
    assert one.shared <= SHARED_MEMORY_LIMIT["sm_90"]
    assert (one.shared + 1024) * 2 <= PER_MULTIPROCESSOR
    assert_products_are_asynchronous(one, at_least=7 * 4)
