"""The launch table: how each class of segment lengths is run, by architecture, head width and dtype.

`choose_config` is pure. Every row carries what was measured for it, or says that it is untuned. The search that fills
the table is benchmarks/search_self_attention.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ..plan import CLASS_LIMITS, CLASSES, TILE

SUPPORTED_HEAD_DIMS = range(16, 129, 8)
LARGE_SHARED = (80, 90, 100)  # architectures with the shared memory that the measured tables need


@dataclass(frozen=True)
class Launch:
    """One kernel's compile-time choices. block_m: query rows; block_n: key rows; stages: of the loop's loads."""

    kernel: str  # "tile", "stream", "hopper_tile", "hopper_stream", or in a backward "resident" or "hopper_resident"
    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None  # a cap per thread, for more programs per multiprocessor
    spills: int = 0  # bytes a thread that the compiler may spill, biases included; the time measured has paid for them
    measured: str = "untuned"


@dataclass(frozen=True)
class ClassConfig:
    """All launches of one class. A streamed backward goes with a streamed forward, which computes r_k for both."""

    forward: Launch
    backward: Launch  # for "stream": the programs that own keys
    queries: Launch | None = None  # for "stream": the programs that own queries
    normalize_keys: bool = False  # stream: normalize key tiles in registers instead of scaling score columns
    fixed_max: bool = True  # stream: take the fixed maximum where the bound allows it


def rows_of_class(index: int) -> int:
    """Rows of a work item of a class: its length limit, or TILE in the last class."""
    return CLASS_LIMITS[index] if index < CLASSES - 1 else TILE


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """(D1, D2): the widths of the column parts of a tile; see steps.py."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    return first, 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


@functools.cache
def choose_config(
    arch: int, head_dim: int, class_index: int, dtype_bits: int, gluon: bool = False,
    gluon_backward: bool | None = None, triton: tuple[int, int] = (3, 6),
) -> ClassConfig:  # fmt: skip
    """The launches of a class. arch: compute capability × 10 (90 for an H100); 0 for anything that is not CUDA.

    dtype_bits: 16, or 32 for true float32, which is correct everywhere and tuned nowhere.
    gluon: whether Hopper's own kernels may run: this Triton has Gluon, and TMA reaches the tensors.
    gluon_backward: the same of the backward, which has more tensors to reach; None where they are not known yet.
    triton: its version, major and minor.
    """
    if dtype_bits == 32:
        stream = Launch("stream", 32, 16 if head_dim > 64 else 32, 4, 1)
        return ClassConfig(stream, stream, stream, normalize_keys=True)
    if arch not in LARGE_SHARED:
        return _portable(head_dim, rows_of_class(class_index))
    width = 0 if head_dim <= 64 else 1 if head_dim <= 80 else 2
    config = (NARROW, MIDDLE, WIDE)[width][class_index]
    if arch != 90:
        return _untuned(config)
    row = (width, class_index)
    forwards, backwards = (HOPPER_FORWARD, HOPPER_BACKWARD) if triton < (3, 9) else (FORWARD_3_9, BACKWARD_3_9)
    too_narrow = class_index == CLASSES - 1 and head_dim < 64  # for a stream's tiles of 64 columns; untimed
    if gluon and row in forwards and not too_narrow:
        # a tile's scores are those of k̂: a stream that repeats them takes k̂, too
        forward = forwards[row]
        config = replace(config, forward=forward, normalize_keys=forward.kernel == "hopper_tile")
    if gluon and gluon_backward is not False and row in backwards:
        config = replace(config, backward=backwards[row], queries=HOPPER_QUERIES.get(row))
    return config


@functools.cache
def _portable(head_dim: int, rows: int) -> ClassConfig:
    """Little shared memory and next to no spills, from an L4 to an MI300."""
    block, warps = (min(64, rows), 4) if head_dim <= 64 else (32, 8)
    return ClassConfig(
        Launch("stream", block, block, 4, 1),
        Launch("stream", 32, block, warps, 1, spills=16 if head_dim > 96 else 0),  # of an MI300's
        Launch("stream", block, block, warps, 1),
    )


@functools.cache
def _untuned(config: ClassConfig) -> ClassConfig:
    """A Hopper row on another architecture: the caps on registers were measured there alone."""
    spills = {"forward": 0, "backward": 8, "queries": 0}  # an A100's of a tile, with Triton 3.9
    launches = {name: getattr(config, name) for name in spills}
    return replace(
        config,
        **{k: v and replace(v, registers=None, spills=spills[k], measured="untuned") for k, v in launches.items()},
    )


# One H100, bf16, µs of kernel time for 65,536 tokens, 16 heads; U64 stands for images of 64 tokens each.
NARROW = (  # head widths up to 64, measured at 64
    ClassConfig(
        Launch("tile", 32, 32, 2, 1, measured="U32 180; 4 warps 193"),
        Launch("tile", 32, 32, 2, 1, 128, 192, measured="U32 504; uncapped 741, 4 warps 538"),
    ),
    ClassConfig(
        Launch("tile", 64, 64, 4, 1, measured="U64 189; 8 warps 232"),
        Launch("tile", 64, 64, 4, 1, 168, 96, measured="U64 536; uncapped 696, 8 warps 585, resident 603"),
    ),
    ClassConfig(
        Launch("tile", 128, 128, 8, 1, measured="U128 221; 4 warps 303, streamed 282"),
        Launch("resident", 128, 64, 8, 3, measured="U128 836; 2 stages 880, one tile 893, streamed 918"),
    ),
    ClassConfig(
        Launch("stream", 64, 64, 4, 2, 128, 128, measured="U256 339 + 60; 3 stages uncapped 352"),
        Launch("stream", 64, 64, 4, 3, 168, 96, measured="U256 470; uncapped 492, resident instead of all three 1632"),
        Launch("stream", 64, 64, 4, 3, measured="U256 425; 2 stages 469, 128 keys 517"),
    ),
    ClassConfig(
        Launch("stream", 64, 64, 4, 2, 128, 128, measured="ft 675; 3 stages 700, uncapped 806, running maximum 735"),
        Launch("stream", 64, 64, 4, 3, 168, 96, measured="ft 934; uncapped 975, 2 stages 1001"),
        Launch("stream", 64, 64, 4, 3, measured="ft 752; 2 stages 816, 128 keys 939"),
    ),
)
MIDDLE = (  # 72 and 80, in column parts of 64 and 16, measured at 72
    ClassConfig(Launch("tile", 32, 32, 4, 1), Launch("tile", 32, 32, 4, 1)),
    ClassConfig(
        Launch("tile", 64, 64, 4, 1, measured="U64 278; 8 warps 368"),
        Launch(
            "tile", 64, 64, 4, 1, spills=128, measured="U64 856; capped at 168 registers 812 but spills in other norms"
        ),
    ),
    ClassConfig(
        Launch("stream", 64, 64, 4, 3, measured="U128 426 + 62; 2 stages 451, one tile 533"),
        Launch("tile", 128, 128, 8, 1, spills=128, measured="U128 1125; resident 1308"),
    ),
    ClassConfig(
        Launch("stream", 64, 64, 4, 3, 168, 192, measured="U256 438 + 63; uncapped 535, 2 stages 467"),
        Launch("stream", 64, 64, 4, 3, spills=64, measured="U256 748; 2 stages 777, 32 queries 819"),
        Launch("stream", 64, 64, 4, 3, measured="U256 774; 2 stages 815, 128 keys 791"),
    ),
    ClassConfig(
        Launch("stream", 64, 64, 4, 3, 168, 192, measured="ft 906; uncapped 1082, 2 stages 957"),
        Launch("stream", 64, 64, 4, 3, spills=64, measured="ft 1416; 2 stages 1502, 32 queries 1588"),
        Launch("stream", 64, 64, 4, 3, measured="ft 1350; 2 stages 1489, 128 keys 1426"),
    ),
)
WIDE = (  # from 88 to 128, measured at 128 with 8 heads
    ClassConfig(Launch("tile", 32, 32, 4, 1), Launch("tile", 32, 32, 4, 1, spills=16)),
    ClassConfig(
        Launch("tile", 64, 64, 4, 1, measured="U64 207; 8 warps 230"),
        Launch("tile", 64, 64, 4, 1, measured="U64 735; 8 warps 880, resident 1068"),
    ),
    ClassConfig(
        Launch("tile", 128, 128, 8, 1, measured="U128 346; streamed 402"),
        Launch("tile", 128, 128, 8, 1, measured="U128 882; resident 1023, streamed 1153"),
    ),
    ClassConfig(
        Launch("stream", 64, 64, 4, 3, measured="U256 405 + 59; 2 stages 445"),
        Launch("stream", 32, 64, 4, 3, spills=64, measured="U256 556; 64 queries, 128 keys, 8 warps 628"),
        Launch("stream", 64, 64, 4, 2, spills=32, measured="U256 581; 128 queries, 8 warps 667"),
    ),
    ClassConfig(
        Launch("stream", 64, 64, 4, 3, measured="ft 717; 2 stages 771, running maximum 734"),
        Launch("stream", 32, 64, 4, 3, measured="ft 1035; 2 stages 1166, 64 queries, 128 keys, 8 warps 1168"),
        Launch("stream", 64, 64, 4, 2, measured="ft 924; 128 queries and keys, 8 warps 1121"),
    ),
)

# Gluon, by (NARROW, MIDDLE or WIDE; class). Of hopper_tile block_m is the longest segment, block_n the keys of a chunk.
# Of hopper_stream the warps are those that multiply, the registers every warp's at first, the times key_sizes' too.
HOPPER_FORWARD = {
    (0, 1): Launch("hopper_tile", 64, 64, 4, 1, 128, measured="U64 182 with gaps, portable 195; on an H200 152"),
    (0, 2): Launch("hopper_tile", 128, 64, 4, 1, 168, 192, measured="U128 188; capped at 128 184 or 202, portable 221"),
    (0, 3): Launch("hopper_tile", 256, 64, 4, 1, 168, 320, measured="U256 229; running maximum 242, portable 383"),
    (1, 1): Launch("hopper_tile", 64, 64, 4, 1, 128, 128, measured="on an H200 U64 183; portable 278"),
    (1, 2): Launch("hopper_tile", 128, 64, 4, 1, 168, 512, measured="U128 243; running maximum 254, portable 488"),
    (1, 3): Launch("hopper_tile", 256, 64, 4, 1, spills=256, measured="U256 329; running maximum 342, portable 501"),
    (2, 1): Launch("hopper_tile", 64, 64, 4, 1, measured="on an H200 U64 166; portable 207"),
    (2, 2): Launch("hopper_tile", 128, 64, 4, 1, spills=384, measured="U128 177 with a running maximum; portable 346"),
    (2, 3): Launch("hopper_tile", 256, 64, 8, 1, spills=512, measured="U256 264; running maximum 275, portable 464"),
    (0, 4): Launch(
        "hopper_stream",
        128,
        64,
        4,
        3,
        128,
        192,
        measured="ft 548, hr 1786, U4096 2159; portable 750, 2334, 2780; "
        "without norms 492, 1654, 2229, running maximum 560, 1927, 2583",
    ),
    (1, 4): Launch(
        "hopper_stream",
        128,
        64,
        4,
        3,
        128,
        384,
        measured="ft 669; portable 996; without norms 626, U4096 2616, running maximum 656, 3095",
    ),
    (2, 4): Launch(
        "hopper_stream",
        128,
        64,
        8,
        3,
        168,
        296,
        measured="ft 470; running maximum 544, portable 673; without norms 375, U4096 1559, running maximum 421, 1917",
    ),
}
HOPPER_BACKWARD = {  # Gluon, by (NARROW, MIDDLE or WIDE; class)
    (0, 0): Launch("hopper_tile", 64, 64, 4, 1, 128, 128, measured="U32 488, on the pt mix 31; portable 495, 54"),
    (0, 1): Launch("hopper_tile", 64, 64, 4, 1, 128, 128, measured="U64 325; uncapped 337, portable 507"),
    (0, 2): Launch("hopper_tile", 128, 128, 4, 1, None, 416, measured="U128 367; 8 warps 547, portable 852"),
    (0, 3): Launch("hopper_resident", 256, 64, 4, 1, spills=64, measured="U256 662, pt mix 490; portable 1105, 839"),
    (1, 1): Launch("hopper_tile", 64, 64, 4, 1, measured="U64 423; portable 875"),
    (1, 2): Launch("hopper_tile", 128, 128, 8, 1, spills=64, measured="U128 646; 4 warps 681, portable 1141"),
    (1, 3): Launch(
        "hopper_resident", 256, 64, 4, 1, spills=256, measured="on an H200 U256 926, pt mix 682; portable 1701, 1414"
    ),
    (2, 1): Launch("hopper_tile", 64, 64, 4, 1, spills=32, measured="U64 356; portable 624"),
    (2, 2): Launch("hopper_tile", 128, 128, 8, 1, spills=256, measured="U128 437; portable 899"),
    (0, 4): Launch("hopper_stream", 64, 64, 4, 4, spills=128, measured="ft 650, U4096 3189; portable 913, 4203"),
    (1, 4): Launch("hopper_stream", 64, 64, 4, 4, spills=192, measured="ft 1028, U4096 4480; portable 1397, 6000"),
    (2, 4): Launch("hopper_stream", 64, 64, 4, 3, spills=64, measured="ft 681, U4096 3400; portable 977, 4414"),
}
HOPPER_QUERIES = {  # of the streams above
    (0, 4): Launch("hopper_stream", 64, 64, 4, 6, spills=208, measured="ft 646, U4096 2894; portable 751, 3131"),
    (1, 4): Launch("hopper_stream", 64, 64, 4, 6, spills=416, measured="ft 818, U4096 3890; portable 1329, 5111"),
    (2, 4): Launch("hopper_stream", 64, 64, 4, 4, spills=192, measured="ft 615, U4096 2489; portable 879, 3330"),
}

# Since Triton 3.9, whose assembler (ptxas 13.4) needs more registers for the same, so that a cap costs more.
FORWARD_3_9 = HOPPER_FORWARD | {
    (1, 2): Launch("hopper_tile", 128, 64, 4, 1, spills=256, measured="U128 269; capped at 168 413, at 208 331"),
}
BACKWARD_3_9 = HOPPER_BACKWARD | {
    (0, 0): Launch("hopper_tile", 64, 64, 4, 1, 168, measured="as U64"),
    (0, 1): Launch("hopper_tile", 64, 64, 4, 1, 168, measured="U64 334 with norms, capped at 128 374; 322 without"),
}
