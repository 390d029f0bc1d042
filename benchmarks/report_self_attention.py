"""Tables of bench_self_attention's results, its targets, and what a published file must hold.

python benchmarks/report_self_attention.py benchmarks/results/h100/self_attention.json
"""

import json
import sys
from pathlib import Path

from harness import Row, describe, print_table
from peers import REQUIRED

OURS, HANDED_OVER = "navit_kernels", "navit_kernels_fa4"  # the second: backend="fa4", for images long enough to want it
# speedup of forward + backward with norms over the best required peer, by (case, heads, head_dim): (at least, aim at)
TARGETS = {
    ("U64", 16, 64): (3.3, 3.8),
    ("U128", 16, 64): (2.0, 2.5),
    ("U256", 16, 64): (1.4, 1.8),
    ("pt50", 16, 64): (2.8, 3.3),
    ("pt", 16, 64): (2.0, 2.5),
    ("ft", 16, 64): (0.9, 1.1),
    ("U1024", 16, 64): (0.8, 1.0),
    ("hr", 16, 64): (0.7, 0.8),
    ("U4096", 16, 64): (None, None),
    ("ft", 16, 72): (1.0, None),
    ("ft", 8, 128): (0.8, None),
}
SETTING = ("case", "heads", "head_dim", "dtype", "qk_norm")


def setting(row: Row) -> tuple:
    return tuple(row[key] for key in SETTING)


def missing(results: Row) -> list[str]:
    """Required contenders and directions that a setting lacks without a reason: a published H100 result has none."""
    rows = results["rows"]
    held = {(setting(row), row["contender"], row["direction"]) for row in rows}
    refused = {(*(row[key] for key in SETTING[:-1]), row["contender"]) for row in results.get("left_out", [])}
    return [
        f"{' '.join(map(str, key))}: no {contender} {direction}"
        for key in sorted({setting(row) for row in rows})
        for contender in (OURS, *REQUIRED)
        for direction in ("fwd", "bwd")
        if (key, contender, direction) not in held and (*key[:-1], contender) not in refused
    ]


def ratios(rows: list[Row]) -> list[Row]:
    """Per setting: the best required peer's time over ours, for both directions together and each alone."""
    us = {(setting(row), row["contender"], row["direction"]): row["us"] for row in rows}
    table = []
    for key in dict.fromkeys(setting(row) for row in rows):

        def total(contender: str, *directions: str, key: tuple = key) -> float:
            return sum(us.get((key, contender, direction), float("inf")) for direction in directions)

        line: Row = dict(zip(SETTING, key, strict=True))
        for label, directions in (("fwd+bwd", ("fwd", "bwd")), ("fwd", ("fwd",)), ("bwd", ("bwd",))):
            best = min(REQUIRED, key=lambda peer: total(peer, *directions))
            ours = total(OURS, *directions)
            known = ours < float("inf") and total(best, *directions) < float("inf")
            line |= {label: f"{total(best, *directions) / ours:.2f}× {best}" if known else "-"}
        at_least, aim = TARGETS.get(key[:3], (None, None)) if key[-1] == "layer_norm" else (None, None)
        line |= {"at least": at_least or "-", "aim at": aim or "-"}
        if (handed := total(HANDED_OVER, "fwd", "bwd")) < float("inf"):
            line |= {"fa4 / handed over": f"{total('fa4', 'fwd', 'bwd') / handed:.3f}"}
        table.append(line)
    return table


def show(results: Row) -> None:
    """Print all tables of a results file."""
    print(describe(results))
    print_table(results["rows"])
    for section in ("peak_mib", "host_us", "left_out"):
        if results.get(section):
            print(f"\n{section}")
            print_table(results[section])
    print()
    print_table(ratios(results["rows"]))


if __name__ == "__main__":
    show(json.loads(Path(sys.argv[1]).read_text()))
