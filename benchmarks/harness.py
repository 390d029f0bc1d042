"""Shared by all benchmarks: a correctness gate, GPU kernel time, floors from written formulas, one results format.

A benchmark is a script with these steps, in this order (bench_self_attention.py is the worked example):

    options = parse_options(parser("patches"))
    gate({"navit_kernels": check_ours, "torch_loop": check_loop})         # nothing is reported on red
    timing = measure([partial(run, buffers) for buffers in buffer_sets])  # median µs of one call, sets taken in turn
    rows.append({"case": ..., "contender": ..., "us": timing.us, "floor_us": ceilings().floor_us(bytes_moved, flops)})
    print_table(rows)
    write_results("patches", rows, options)                               # last line on stdout: the file's path

Three timers. "graph" replays a CUDA graph that holds the calls, so launch gaps of the host are gone: the default.
"events" queues the calls behind a device-side sleep and puts events around each: for a peer that cannot be captured.
"kernels" sums the durations of the GPU kernels that the profiler saw: for code whose launches leave gaps even so.
On a CPU (--smoke) the timer is a clock; such numbers only show that a benchmark runs, and never land in results/.
"""

import argparse
import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from timing import (
    Ceilings,
    Kernel,
    Run,
    Timing,
    assert_same_function,
    ceilings,
    gate,
    host_us,
    kernel_times,
    measure,
    outcome_checks,
    peak_mib,
    sets_beyond_cache,
    synchronize,
    without_gradients,
)

__all__ = [
    "Ceilings", "Kernel", "Row", "Run", "Timing", "assert_same_function", "ceilings", "gate", "host_us", "kernel_times",
    "measure", "outcome_checks", "parse_options", "parser", "peak_mib", "print_table", "sets_beyond_cache",
    "synchronize", "without_gradients", "write_results",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CEILING_KEYS = ("copy_tb_s", "matmul_tflop_s")  # measured anew in every run, so not part of a machine's identity
UNITS = (
    "us",
    "ms",
    "mib",
    "gib",
    "mfu",
    "_per_s",
    "by_kind",
    "timer",
    "compiled",
)  # what a row measured, as opposed to what it is

Row = dict[str, Any]


# Results


def machine() -> Row:
    """What the numbers depend on. Two runs on the same card with the same software agree in all but CEILING_KEYS."""
    on_gpu = timing.device == "cuda"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    driver = uuid = None
    if on_gpu:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
    limits = ceilings()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_uuid": uuid,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "copy_tb_s": round(limits.bytes_per_s / 1e12, 3),
        "matmul_tflop_s": round(limits.flops_per_s / 1e12, 1),
    }


@functools.cache
def commit() -> str:
    """The commit measured, "+dirty" if tracked files differ; $BENCHMARK_COMMIT where a copy has no .git folder."""
    if stated := os.environ.get("BENCHMARK_COMMIT"):
        return stated
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changed else "")


def gpu_slug(name: str | None) -> str:
    """Folder name of a GPU: "NVIDIA H100 80GB HBM3" gives "h100", "NVIDIA GeForce RTX 4090" "rtx4090", None "cpu"."""
    if name is None:
        return "cpu"
    name = re.sub(r"\b(NVIDIA|GeForce|AMD|Tesla|Instinct|PCIe|SXM\d?|HBM\w*|\d+GB)\b|-", " ", name)
    return "".join(name.split()).lower()


def row_key(row: Row) -> tuple[tuple[str, Any], ...]:
    """What a row is about: all of it but what was measured."""
    return tuple(sorted((key, value) for key, value in row.items() if not key.endswith(UNITS)))


def merge(old: Row, new: Row) -> Row:
    """Join two results of one run, in which a row of `new` replaces the row of `old` about the same thing.

    Raises:
        ValueError: if commit or machine differ; numbers of different runs are not put side by side.
    """
    for key in [*sorted({*old["machine"], *new["machine"]} - {*CEILING_KEYS}), "commit"]:
        before, after = (part["commit"] if key == "commit" else part["machine"].get(key) for part in (old, new))
        if before != after:
            raise ValueError(f"not one run: {key} is {before!r} in the older results, {after!r} in the newer ones")
    joined = {**old, **new, "machine": old["machine"]}
    for section in {key for key in joined if isinstance(joined[key], list)}:
        by_key = {row_key(row): row for row in [*old.get(section, []), *new.get(section, [])]}
        joined[section] = list(by_key.values())
    return joined


def results_path(bench: str, options: argparse.Namespace) -> Path:
    """--out, or results/<gpu>/<bench>.json; in smoke mode a file in the temporary folder."""
    if options.out:
        return Path(options.out)
    if timing.device == "cpu":
        return Path(tempfile.gettempdir()) / "navit-benchmarks-smoke" / f"{bench}.json"
    return RESULTS / gpu_slug(torch.cuda.get_device_name()) / f"{bench}.json"


def write_results(bench: str, rows: list[Row], options: argparse.Namespace, **sections: list[Row]) -> Path:
    """Write {"machine", "commit", "rows", **sections}, joined with the file there if --merge; print its path last.

    If --merge meets the results of another run, they stay as they are, these are written beside them under a name of
    their own, and the exit code is 1.
    """
    path, refused = results_path(bench, options), None
    results: Row = {"machine": machine(), "commit": commit(), "rows": rows, **sections}
    if options.merge and path.exists():
        try:
            results = merge(json.loads(path.read_text()), results)
        except ValueError as error:
            refused, path = str(error), path.with_suffix(f".{int(time.time())}.json")
    save(path, results)
    if refused:
        sys.exit(refused)
    return path


def save(path: Path, results: Row) -> None:
    """Write results with one row a line, so that a diff shows which rows moved; print the machine, then the path."""
    parts = []
    for key, value in results.items():
        lines = ",\n  ".join(json.dumps(_rounded(row)) for row in value) if isinstance(value, list) else ""
        parts.append(f' "{key}": ' + (f"[\n  {lines}\n ]" if lines else json.dumps(value)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(describe(results))
    print(path)


def _rounded(row: Row) -> Row:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def describe(results: Row) -> str:
    """The machine and the commit in one line."""
    facts = [f"{key} {value}" for key, value in results["machine"].items() if value is not None]
    return " · ".join([*facts, f"commit {results['commit']}"])


def print_table(rows: Iterable[Row]) -> None:
    """Print rows under the keys of the first one, numbers to three digits, and % of floor where there is a floor."""
    shown = [_formatted(row) for row in rows]
    if not shown:
        return
    columns = list(shown[0])
    widths = [max(len(column), *(len(row.get(column, "")) for row in shown)) for column in columns]
    for cells in [columns, *([row.get(column, "") for column in columns] for row in shown)]:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _formatted(row: Row) -> dict[str, str]:
    cells = {}
    for key, value in row.items():
        if isinstance(value, float):
            cells[key] = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        else:
            cells[key] = str(value)
    if "us" in row and "floor_us" in row:
        cells["% of floor"] = f"{100 * row['floor_us'] / row['us']:.0f}"
    return cells


# Options


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--out", help="write here instead of benchmarks/results/<gpu>/<bench>.json")
    options.add_argument("--merge", action="store_true", help="add to the results there, if machine and commit agree")
    options.add_argument("--quick", action="store_true", help="a third of the repetitions")
    options.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, to see that the script runs")
    options.add_argument("--budget-seconds", type=float, default=1e9, help="start nothing new after this long")
    return options


def parse_options(options: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse; refuse to run for real without a GPU; note the deadline (`.deadline`, of time.monotonic) and `.device`.

    On a GPU all work goes to a stream of its own from here on: a backward runs where its forward ran, and the default
    stream cannot be captured.
    """
    parsed = options.parse_args(arguments)
    parsed.device = timing.device = "cpu" if parsed.smoke else "cuda"
    ceilings.cache_clear()
    if parsed.device == "cuda":
        if not torch.cuda.is_available():
            options.error("there is no CUDA GPU; --smoke tries the script on the CPU")
        torch.cuda.set_stream(torch.cuda.Stream())
    parsed.deadline = time.monotonic() + parsed.budget_seconds
    parsed.milliseconds = 5.0 if parsed.smoke else 30.0 if parsed.quick else 100.0
    return parsed


def main() -> None:
    """Join results files of one run: harness.py RESULT... (the first one is rewritten with the rows of them all)."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("results", type=Path, nargs="+")
    paths = options.parse_args().results
    try:
        save(paths[0], functools.reduce(merge, [json.loads(path.read_text()) for path in paths]))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
