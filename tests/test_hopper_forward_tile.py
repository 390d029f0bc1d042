"""Hopper's forward of short segments, compiled ahead of time: what keeps its programs side by side and its products
asynchronous. What it computes is tested with varlen_attention's other kernels, on a GPU."""

from __future__ import annotations

import bisect
import re
from unittest import mock

import pytest
from ahead_of_time import SHARED_MEMORY_LIMIT, Compiled, assert_products_are_asynchronous, compile_launches
from attention_checks import BF16, FP16, Case
from compile_table import call_on_meta, config_of
from test_hopper_backward_tile import PER_MULTIPROCESSOR

from navit_kernels.plan import CLASS_LIMITS
from navit_kernels.self_attention.config import Launch


def launch_of(case: Case) -> Launch:
    return config_of(case.width, bisect.bisect_left(CLASS_LIMITS, case.lengths[0])).forward


def compile_forward(case: Case) -> Compiled:
    """As the launch table has it, for a pack on tensors without memory."""
    from navit_kernels.self_attention import launch

    with mock.patch.object(launch, "architecture", return_value=90):
        call = call_on_meta(case, case.inputs("meta"))
        (compiled,) = compile_launches("sm_90", lambda: launch.forward(call, True))
    assert compiled.name == "hopper_forward_tile"
    return compiled


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("case", "programs"),
    [
        (Case((256,), 16, 64, BF16), 3),
        (Case((200,), 16, 64, FP16, "l2", "rms_norm", "per head", bias=False), 3),
        (Case((200,), 16, 64, BF16, None, None), 3),
        (Case((128,), 16, 64, BF16), 3),
        (Case((200,), 16, 72, BF16), 2),
        (Case((100,), 16, 80, FP16), 3),
        (Case((256,), 8, 128, BF16), 1),
        (Case((128,), 8, 96, BF16, bias=False), 2),
        (Case((128,), 8, 128, BF16), 1),
        (Case((100,), 8, 24, BF16), 3),
    ],
    ids=str,
)
def test_programs_fit_and_products_are_asynchronous(case: Case, programs: int) -> None:
    launch, one = launch_of(case), compile_forward(case)
    assert one.spills <= launch.spills, f"spills {one.spills} bytes"
    programs = programs if launch.registers is not None else min(programs, 2)
    assert one.registers * 32 * launch.warps * programs <= 1 << 16
    assert one.shared <= SHARED_MEMORY_LIMIT["sm_90"]
    assert (one.shared + 1024) * programs <= PER_MULTIPROCESSOR
    assert_products_are_asynchronous(one, at_least=2 * 4)


@pytest.mark.compile_only
@pytest.mark.parametrize("case", [Case((100,), 16, 64, BF16), Case((256,), 16, 64, BF16)], ids=str)
def test_no_barrier_lies_where_outputs_change_their_layout(case: Case) -> None:
    """A live barrier's memory, written by a plain store, is undefined; the compiler reuses what it sees no use of."""
    one = compile_forward(case)
    ptx = one.asm["ptx"]
    offsets = {name: int(offset) for name, offset in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    barriers = [offsets[name] for name in re.findall(r"mbarrier\.init\.\S+ \[(%r\d+)\]", ptx)]
    stores = re.findall(r"st\.shared\S*\s+\[ ?(%r\d+) ?\+ ?(\d+) ?\]", ptx)
    exchanges = [offsets.get(name, 0) + int(offset) for name, offset in stores]
    assert barriers == [one.shared - 24, one.shared - 16, one.shared - 8]
    assert exchanges
    assert max(exchanges) + 4 * 512 <= barriers[0]  # 512 bytes a warp


@pytest.mark.compile_only
def test_outputs_leave_in_sixteen_bytes_a_thread() -> None:
    """And by way of a warp's own exchange, without room for the whole tile: a third program would not fit."""
    one = compile_forward(Case((256,), 16, 64, BF16))
    assert "st.global.v4.b32" in one.asm["ptx"]
    assert one.shared < (2 * 256 + 64) * 64 * 2 + 3 * 1024
