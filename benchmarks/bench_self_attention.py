"""Attention inside each image of a pack, forward and backward, with and without QK LayerNorm, against every peer.

Peers have no norm inside: theirs is F.layer_norm over D of q and k, compiled by torch.compile, timed as GPU kernel time
and added to the attention's. Ours is one call. Backward means what autograd runs for the gradients of q, k, v (views of
one (T, 3, H, D) tensor) and, with norms, of both weights.

Floors, for b bytes an element and the machine's measured copy and matmul rates (the larger of the two times):
    forward   bytes 4·T·H·D·b (read q, k, v; write out)                flops  4·D·H·ΣL²
    backward  bytes 7·T·H·D·b (read q, k, v, dout; write dq, dk, dv)   flops 10·D·H·ΣL²
The same with and without norms, whose parameters are small.

T tokens, S images, H heads, D head width, L tokens of an image.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence

import peers
import torch
from attention_cases import (
    ITEMSIZE,
    Case,
    Expected,
    Inputs,
    compiled_norm_qk,
    forward_backward,
    leaves,
    make_inputs,
    norm_qk,
    our_attention,
    peer_attention,
)
from harness import (
    Row,
    Timing,
    assert_same_function,
    ceilings,
    gate,
    host_us,
    measure,
    parse_options,
    parser,
    peak_mib,
    print_table,
    sets_beyond_cache,
    write_results,
)
from report_self_attention import HANDED_OVER, OURS, TARGETS, ratios
from torch import Tensor

from navit_kernels.testing import image_lengths

TOKENS, SMOKE_TOKENS = 65536, 256
SMOKE = (("U16", 2, 16), ("pt", 2, 24))
HANDED_OVER_CASES, PEAK_CASES = ("hr", "U4096"), ("pt", "ft", "hr")
BACKENDS = {OURS: "auto", HANDED_OVER: "fa4"}
TIMERS = {OURS: "events", HANDED_OVER: "events"}  # a captured graph would count its work on the device
NORM_BACKWARD_LIMIT = (
    1.2  # × its floor (6 tensors): 320 µs of 268 at 65,536 tokens × 16 × 64. Compiled code reaches 290
)


Contenders = dict[str, peers.Peer | None]  # None: our own


class MeasuringFault(RuntimeError):
    """A time that cannot be right."""


# Time


def time_both(run: Callable[[Inputs], Tensor], sets: list[Inputs], qk_norm: str, timer: str, ms: float) -> list[Timing]:
    """Forward without saved state, and backward."""

    def forward(x: Inputs) -> None:
        with torch.no_grad():
            run(x)

    forwards = [functools.partial(forward, x) for x in sets]
    backwards = [
        functools.partial(torch.autograd.grad, run(x), leaves(x, qk_norm), x.dout_THD, retain_graph=True) for x in sets
    ]
    return [measure(forwards, timer, ms), measure(backwards, timer, ms)]


@functools.cache
def norm_us(heads: int, head_dim: int, smoke: bool, ms: float) -> tuple[float, float]:
    """µs of the peers' norm, forward and backward, at TOKENS tokens; it does not depend on the images' lengths."""
    tokens, device = (SMOKE_TOKENS, "cpu") if smoke else (TOKENS, "cuda")
    norm = norm_qk if smoke else compiled_norm_qk()
    sets = [make_inputs(tokens, heads, head_dim, device, seed) for seed in range(2)]
    arguments = (*sets[0].qkv[:2], *sets[0].weights)
    for actual, expected in zip(norm(*arguments), norm_qk(*arguments), strict=True):
        assert_same_function("compiled norm", actual, expected)

    def forward(x: Inputs) -> None:
        with torch.no_grad():
            norm(*x.qkv[:2], *x.weights)

    def backward(x: Inputs, normed: tuple[Tensor, Tensor]) -> None:
        torch.autograd.grad(normed, (*x.qkv[:2], *x.weights), (x.dout_THD, x.dout_THD), retain_graph=True)

    forward_us = measure([functools.partial(forward, x) for x in sets], "graph", ms).us
    backwards = [functools.partial(backward, x, norm(*x.qkv[:2], *x.weights)) for x in sets]
    backward_us = measure(backwards, "kernels", ms).us
    if not smoke:
        assert_norm_backward_is_sane(backward_us, tokens, heads, head_dim)
    return forward_us, backward_us


def assert_norm_backward_is_sane(us: float, tokens: int, heads: int, head_dim: int) -> None:
    """Raise MeasuringFault when it is far off its floor; compilers have trouble of their own with odd head widths."""
    limit = NORM_BACKWARD_LIMIT * ceilings().floor_us(6 * ITEMSIZE * tokens * heads * head_dim)
    if us > limit and head_dim & (head_dim - 1) == 0:
        raise MeasuringFault(f"norm backward at {heads} × {head_dim}: {us:.0f} µs, expected at most {limit:.0f}")


def time_contender(
    name: str, peer: peers.Peer | None, case: Case, sets: list[Inputs], options: argparse.Namespace
) -> dict[str, list[Timing]]:
    """{qk_norm: [forward, backward]}; a peer's attention is timed once and its norm added."""
    pack, ms = case.pack(options.device), options.milliseconds
    if peer is None:
        return {
            qk_norm: time_both(our_attention(pack, qk_norm, BACKENDS[name]), sets, qk_norm, TIMERS[name], ms)
            for qk_norm in options.qk_norms
        }
    attention = time_both(peer_attention(peer.prepare(pack), "none"), sets, "none", peer.timer, ms)
    share = sum(case.lengths) / (SMOKE_TOKENS if options.smoke else TOKENS)
    times = {}
    for qk_norm in options.qk_norms:
        extra = (0.0, 0.0) if qk_norm == "none" else norm_us(case.heads, case.head_dim, options.smoke, ms)
        times[qk_norm] = [
            timing._replace(us=timing.us + share * us) for timing, us in zip(attention, extra, strict=True)
        ]
    return times


def time_case(case: Case, contenders: Contenders, options: argparse.Namespace) -> list[Row]:
    shape = (sum(case.lengths), case.heads, case.head_dim, options.device)
    count = sets_beyond_cache(5 * ITEMSIZE * shape[0] * case.heads * case.head_dim)
    sets = [make_inputs(*shape, seed) for seed in range(count)]
    rows = []
    for name, peer in contenders.items():
        if time.monotonic() > options.deadline:
            print(f"{case.name}: no time left for {name}")
            continue
        for qk_norm, both in time_contender(name, peer, case, sets, options).items():
            for direction, timing in zip(("fwd", "bwd"), both, strict=True):
                row = {**case.shape, "qk_norm": qk_norm, "direction": direction, "contender": name}
                row |= {"us": timing.us, "floor_us": case.floor_us(direction), "timer": timing.timer}
                if row["us"] < 0.8 * row["floor_us"] and not options.smoke:
                    raise MeasuringFault(f"faster than its floor, so not all of it was timed: {row}")
                rows.append(row)
    return rows


# Memory and host cost


def peak_rows(case: Case, contenders: Contenders, options: argparse.Namespace) -> list[Row]:
    """MiB that forward and backward with norms add at their peak; least_mib: out, dq, dk and dv alone."""
    x, pack = make_inputs(sum(case.lengths), case.heads, case.head_dim, options.device), case.pack(options.device)
    least = 4 * x.dout_THD.nbytes / 2**20
    rows = []
    for name, peer in contenders.items():
        if peer is None:
            run = our_attention(pack, "layer_norm", BACKENDS[name])
        else:
            run = peer_attention(peer.prepare(pack), "layer_norm", compiled_norm_qk())
        peak = peak_mib(functools.partial(forward_backward, run, x, "layer_norm"))
        rows.append({**case.shape, "qk_norm": "layer_norm", "contender": name, "peak_mib": peak, "least_mib": least})
    return rows


def host_rows(contenders: Contenders, options: argparse.Namespace) -> list[Row]:
    """CPU µs of one eager forward call on a small pack, without gradients and with; peers without any norm."""
    case = Case("U16", 16, 64, (16,) * 16)
    x, pack = make_inputs(sum(case.lengths), case.heads, case.head_dim, options.device), case.pack(options.device)
    rows = []
    for name, peer in contenders.items():
        if name in peers.OPTIONAL:
            continue
        for qk_norm in ("none", "layer_norm") if peer is None else ("none",):
            run = peer_attention(peer.prepare(pack), "none") if peer else our_attention(pack, qk_norm, BACKENDS[name])
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    us = host_us(functools.partial(run, x), *((1, 2) if options.smoke else (50, 10)))
                rows.append({**case.shape, "qk_norm": qk_norm, "grad": grad, "contender": name, "us": us})
    return rows


# The run


def select_contenders(options: argparse.Namespace) -> Contenders:
    """Those asked for that can be had; a message for each of the others."""
    found: Contenders = {}
    for name in options.contenders:
        if name in BACKENDS:
            if name == OURS or "fa4" in found:
                found[name] = None
            continue
        try:
            found[name] = peers.load(name, options.fa3_dir, options.fa4_dir)
        except peers.PeerMissing as error:
            print(f"without {name}: {error}")
    return found


def select_cases(options: argparse.Namespace) -> list[Case]:
    shapes = SMOKE if options.smoke else tuple(TARGETS)
    tokens = SMOKE_TOKENS if options.smoke else TOKENS
    names = {f"{name}:{heads}x{width}": (name, heads, width) for name, heads, width in shapes}
    chosen = [
        shape for label, shape in names.items() if not options.cases or {label, shape[0]}.intersection(options.cases)
    ]
    return [Case(name, heads, width, tuple(image_lengths(name, tokens))) for name, heads, width in chosen]


def contenders_of(case: Case, contenders: Contenders) -> Contenders:
    return {name: peer for name, peer in contenders.items() if name != HANDED_OVER or case.name in HANDED_OVER_CASES}


def check_all(
    cases: list[Case], contenders: Contenders, options: argparse.Namespace
) -> tuple[dict[Case, Contenders], dict[Case, list[Row]]]:
    """The gate: every contender on every case, with and without norms. Returns who takes part in a case, and who not.

    A peer that cannot run a case, or runs it wrongly, is left out of it, and why is kept; a fault of ours ends the run.
    """
    taking_part, left_out = {}, {}
    for case in cases:
        mine, left_out[case] = contenders_of(case, contenders), []
        for qk_norm in options.qk_norms:
            expected = Expected(case, qk_norm, options.device)
            ours = {}
            for name, peer in list(mine.items()):
                if peer is None:
                    prepare = functools.partial(our_attention, qk_norm=qk_norm, backend=BACKENDS[name])
                    ours[name] = functools.partial(expected.check, name, prepare, exactly=True)
                    continue
                try:
                    expected.check(name, functools.partial(_prepare_peer, peer, qk_norm), exactly=False)
                except Exception as error:
                    why = str(error).splitlines()[0]
                    print(f"{case.name} {case.heads} × {case.head_dim}: without {name}: {why}")
                    left_out[case].append({**case.shape, "contender": name, "why": why})
                    del mine[name]
            gate(ours)
        taking_part[case] = mine
    return taking_part, left_out


def _prepare_peer(peer: peers.Peer, qk_norm: str, pack: peers.Pack) -> Callable[[Inputs], Tensor]:
    return peer_attention(peer.prepare(pack), qk_norm)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--cases", type=lambda text: text.split(","), help="as in U64,pt,ft:16x72; all by default")
    options.add_argument(
        "--contenders", type=lambda text: text.split(","), default=[*peers.REQUIRED, *peers.OPTIONAL, OURS, HANDED_OVER]
    )
    options.add_argument("--qk-norms", type=lambda text: text.split(","), default=["layer_norm", "none"])
    options.add_argument("--fa3-dir", help="folder of FlashAttention-3 (README.md)")
    options.add_argument("--fa4-dir", help="site folder of FlashAttention-4 (README.md); by default, wherever it is")
    options.add_argument("--require-peers", action="store_true", help=f"fail without {', '.join(peers.REQUIRED)}")
    options = parse_options(options, arguments)
    contenders, cases = select_contenders(options), select_cases(options)
    if absent := [name for name in peers.REQUIRED if options.require_peers and name not in contenders]:
        raise SystemExit(f"required, but not here: {', '.join(absent)}")
    every_row: list[Row] = []
    taking_part, left_out = check_all(cases, contenders, options)
    for case, mine in taking_part.items():
        rows = time_case(case, mine, options)
        every_row += rows
        print_table(with_rates(rows, case))
        peaks = peak_rows(case, mine, options) if case.name in PEAK_CASES and options.device == "cuda" else []
        host = host_rows(mine, options) if case is cases[-1] and time.monotonic() < options.deadline else []
        if case is cases[-1]:
            print_table(peaks)
            print_table(host)
            print_table(ratios(every_row))
        write_results("self_attention", rows, options, peak_mib=peaks, host_us=host, left_out=left_out[case])
        options.merge = True  # the next case joins the file of this one


def with_rates(rows: list[Row], case: Case) -> list[Row]:
    """The rows with the arithmetic rate reached, for reading."""
    return [{**row, "TFLOP/s": case.flops(row["direction"]) / row["us"] / 1e6} for row in rows]


if __name__ == "__main__":
    main()
