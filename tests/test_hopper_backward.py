"""Hopper's backward of long segments, compiled ahead of time: that its rows fit registers and its products stay
asynchronous. What it computes is tested with varlen_attention's other kernels, on a GPU."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from ahead_of_time import SHARED_MEMORY_LIMIT, Compiled, assert_products_are_asynchronous, compile_launches
from attention_checks import BF16, FP16, Case
from compile_table import call_on_meta, config_of

from navit_kernels.plan import CLASSES


@functools.cache
def compile_case(case: Case) -> list[Compiled]:
    from navit_kernels.self_attention import hopper_backward

    tensors = case.inputs("meta")
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    call = call_on_meta(case, tensors)
    config = config_of(case.width, CLASSES - 1)
    floats = torch.empty(16, device="meta")

    def backward() -> None:
        grads = (torch.empty_like(x) for x in (q, k, v))
        hopper_backward.backward_stream(
            call, CLASSES - 1, dout, *grads, floats, floats, floats, 2, call.norms.q_weight is not None,
            stages=(config.backward.stages, config.queries.stages),
        )  # fmt: skip

    return compile_launches("sm_90", backward)


@pytest.mark.compile_only
@pytest.mark.parametrize(
    "case",
    [
        Case((300,), 16, 64, BF16),
        Case((300,), 16, 64, FP16, "l2", "rms_norm", "per head", bias=False),
        Case((300,), 16, 64, BF16, None, None),
        Case((300,), 16, 72, BF16),
        Case((300,), 16, 96, BF16),
        Case((300,), 8, 128, BF16, bias=False),
        Case((300,), 8, 24, BF16),
    ],
    ids=str,
)
def test_rows_stay_in_registers(case: Case) -> None:
    from navit_kernels.self_attention.hopper_backward import schedule_of
    from navit_kernels.self_attention.hopper_steps import parts

    config = config_of(case.width, CLASSES - 1)
    assert config.queries is not None
    _, overlap, _ = schedule_of(case.width)
    column_parts = sum(columns > 0 for columns in parts(case.width))
    # of two owners, in steps of 16: two products along the head; along the rows two, in column parts
    each_once = 2 * (2 * sum(parts(case.width)) // 16 + 2 * 4 * column_parts)
    for one in compile_case(case):
        allowed = (config.backward if one.name == "hopper_keys" else config.queries).spills
        assert one.spills <= allowed, f"{one.name} spills {one.spills} bytes"  # at most 16 with Triton 3.6.0
        assert one.shared <= SHARED_MEMORY_LIMIT["sm_90"]
        assert_products_are_asynchronous(one, at_least=56 if overlap or one.name != "hopper_keys" else each_once)


@pytest.mark.compile_only
@pytest.mark.parametrize(
    "case", [Case((300,), 16, 64, BF16), Case((300,), 16, 72, BF16), Case((300,), 8, 128, BF16, bias=False)], ids=str
)
def test_every_pair_has_its_own_lengths(case: Case) -> None:
    """The compiler can take what is read ahead for unused and leave each pair with the first one's, whose blocks are
    another number than those that come: the program then waits for ever."""
    for one in compile_case(case):
        read = re.findall(r"tt\.load .*: !tt\.ptr<i32>", one.asm["ttgir"])
        # by each partition, before its loop and in it, an item's five numbers; once, where the class's items are
        assert len(read) == 3 * 2 * 5 + 2, one.name
