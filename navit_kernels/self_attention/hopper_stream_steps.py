"""Steps of Hopper's backward of long segments, in Gluon: what its loading warp and its owning warpgroups do; see
hopper_backward.py. A tile of rows is a tuple of one or two column parts; see hopper_steps.py."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_steps import PART

BLOCK = gl.constexpr(64)  # rows of a warpgroup, and of a block that passes
GROUPS = gl.constexpr(2)  # warpgroups of a program; BLOCK · GROUPS = TILE


@gluon.jit
def read_item(items_ptr, item, tokens, tokens_k):
    base = items_ptr + item * 8
    q_start, k_start = gl.load(base), gl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1), tokens - q_start)
    k_length = gl.minimum(gl.load(base + 3), tokens_k - k_start)
    return q_start, q_length, k_start, k_length, gl.load(base + 4)


@gluon.jit
def tiles_of(source_1, source_2, COUNT: gl.constexpr, D2: gl.constexpr):
    first = gl.allocate_shared_memory(source_1.dtype, [COUNT, 1, 1, 1, BLOCK, PART], source_1.layout)
    if D2 == 0:
        return (first,)
    else:
        return (first, gl.allocate_shared_memory(source_1.dtype, [COUNT, 1, 1, 1, BLOCK, D2], source_2.layout))


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(memory.index(i), count=ARRIVALS)
    return memory


@gluon.jit
def left_operand(x, layouts):
    """A matrix in shared memory as left operand in registers."""
    first = x[0].load(gl.DotOperandLayout(0, layouts[0], 2))
    if len(x) == 1:
        return (first,)
    else:
        return (first, x[1].load(gl.DotOperandLayout(0, layouts[0], 2)))


@gluon.jit
def zeros(layouts, D2: gl.constexpr):
    first = gl.zeros([BLOCK, PART], gl.float32, layouts[0])
    if D2 == 0:
        return (first,)
    else:
        return (first, gl.zeros([BLOCK, D2], gl.float32, layouts[1]))
