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
def read_item(items_ptr, first_item, w, work, H: gl.constexpr, tokens, tokens_k):
    """Of the w-th pair of an item and a head: (q_start, q_length, k_start, k_length, tile); past the last pair zeros.
    Read one pair ahead, as the loads take a microsecond."""
    base = items_ptr + (first_item + w // H) * 8
    some = w < work
    q_start, k_start = gl.load(base, mask=some, other=0), gl.load(base + 2, mask=some, other=0)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1, mask=some, other=0), tokens - q_start)
    k_length = gl.minimum(gl.load(base + 3, mask=some, other=0), tokens_k - k_start)
    return q_start, q_length, k_start, k_length, gl.load(base + 4, mask=some, other=0)


@gluon.jit
def kept(x):
    """x, by an instruction that has to stay. What a loop hands on to its next round and only bounds a loop inside it,
    Triton takes for unused, and keeps the first round's (triton-lang/triton#9036)."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


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
def pass_by(full, empty, step, blocks, STAGES: gl.constexpr):
    """Let all blocks pass unused; returns the next step."""
    for _ in range(blocks):
        s = step % STAGES
        mbarrier.wait(full.index(s), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(s), count=1)
        step += 1
    return step


@gluon.jit
def left_operand(x, layouts, HOLD: gl.constexpr):
    """A matrix in shared memory as left operand, in registers with HOLD."""
    if not HOLD:
        return x
    else:
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
