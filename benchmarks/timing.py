"""Timers, floors and the correctness gate of the benchmarks; harness.py explains how they are used."""

import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from navit_kernels.testing import assert_error_within

Run = Callable[[], Any]
MARK = "spin_kernel"  # torch.cuda._sleep's

device = "cuda" if torch.cuda.is_available() else "cpu"  # what is timed; harness.parse_options sets it


class Timing(NamedTuple):
    """Median µs of one call, the interquartile range relative to it, and the timer used."""

    us: float
    spread: float
    timer: str


class Kernel(NamedTuple):
    """A kernel, copy or fill on the GPU: how long it took, and when it started on the trace's clock."""

    name: str
    us: float
    start_us: float


class Ceilings(NamedTuple):
    """What the machine reaches: bytes read plus written per second by a copy, FLOP/s by a large bf16 matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def floor_us(self, bytes_moved: float, flops: float = 0.0) -> float:
        """Time below which no version can run: the larger of the memory time and the arithmetic time, in µs."""
        return 1e6 * max(bytes_moved / self.bytes_per_s, flops / self.flops_per_s)


# Correctness


def gate(checks: dict[str, Run]) -> None:
    """Run every contender's check, a function that raises AssertionError when a result is wrong; exit if one is red."""
    red = {}
    for name, check in checks.items():
        try:
            check()
        except AssertionError as error:
            red[name] = str(error)
    if red:
        sys.exit(
            "wrong results, so nothing is measured:\n" + "\n".join(f"  {name}: {why}" for name, why in red.items())
        )


def assert_same_function(name: str, actual: torch.Tensor, expected: torch.Tensor, limit: float = 0.02) -> None:
    """Raise unless ‖actual − expected‖ ≤ limit·‖expected‖: whether a peer does the same thing, not how exactly."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    if not difference <= limit:  # NaN is a difference
        raise AssertionError(f"{name}: relative difference {difference:.2e}, expected at most {limit:.0e}")


def outcome_checks(
    contenders: dict[str, Callable[..., Any]],
    ours: str,
    reference: Callable[..., Any],
    outcome: Callable[..., list[torch.Tensor]],
    case: Any,
    x: Any,
    limit: float = 0.02,
    compared: int | None = None,
) -> dict[str, Run]:
    """What `gate` takes: ours within the project's bound of the reference in float64, the others close to it.

    outcome: (contender, case, x) -> its results and gradients. x: inputs at our dtype, with .double(). limit: the
    relative difference allowed to the others. compared: how many of their tensors count, all by default.
    """
    exact = outcome(reference, case, x.double())

    def check_ours() -> None:
        results = outcome(contenders[ours], case, x), exact, outcome(reference, case, x)
        for actual, expected, at_dtype in zip(*results, strict=True):
            assert_error_within(actual, expected, at_dtype, ours)

    def check(other: str) -> None:
        for actual, expected in list(zip(outcome(contenders[other], case, x), exact, strict=True))[:compared]:
            assert_same_function(other, actual, expected, limit)

    return {name: check_ours if name == ours else functools.partial(check, name) for name in contenders}


def without_gradients(run: Callable[..., Any], *arguments: Any) -> None:
    with torch.no_grad():
        run(*arguments)


# Time


def measure(runs: Sequence[Run], timer: str = "graph", milliseconds: float = 100.0) -> Timing:
    """Median time of one call.

    Args:
        runs: functions of the same work on different buffers, taken in turn. Together they should touch several times
            the L2 cache: `sets_beyond_cache` says how many sets that takes.
        timer: "graph", "events" or "kernels" (see harness.py); "clock" wherever no GPU is used.
        milliseconds: how much GPU time to spend, roughly, warm-up apart.
    """
    if device != "cuda":
        timer = "clock"
    for run in runs:
        run()
    samples = {"graph": _by_graph, "events": _by_events, "kernels": _by_kernels, "clock": _by_clock}[timer](
        runs, milliseconds
    )
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return Timing(statistics.median(samples), (quartiles[2] - quartiles[0]) / quartiles[1], timer)


def sets_beyond_cache(bytes_per_set: float) -> int:
    """How many sets of buffers to rotate so that four L2 caches of other data pass before one returns; at least 2."""
    if device != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, int(4 * cache / bytes_per_set) + 2)


def kernel_times(run: Run, before: int = 0) -> list[Kernel]:
    """Every kernel, copy and fill that `run` puts on the GPU, in the order they started.

    before: so many calls are queued ahead of the one that counts, so that it meets the clocks of a GPU under load: the
        first 0.1 s after a pause run at clocks that the power limit then takes back.

    Read from the exported trace, where a category tells kernels from the annotated ranges that surround them.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(before):
            run()
        torch.cuda._sleep(1)  # its kernel marks the start
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(trace)
        events = json.loads(Path(trace).read_text())["traceEvents"]
    on_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = sorted((Kernel(e["name"], float(e["dur"]), float(e["ts"])) for e in on_gpu), key=lambda k: k.start_us)
    start = next(i for i, kernel in enumerate(kernels) if MARK in kernel.name)
    return kernels[start + 1 :]


def _by_graph(runs: Sequence[Run], milliseconds: float) -> list[float]:
    rounds = max(1, int(5.0 / (len(runs) * max(_elapsed_ms(runs[0]), 1e-3))))  # about 5 ms a replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):  # see harness.parse_options
        for _ in range(rounds):
            for run in runs:
                run()
    graph.replay()
    replay_ms = _elapsed_ms(graph.replay)
    samples = [_elapsed_ms(graph.replay) for _ in range(max(10, int(milliseconds / max(replay_ms, 1e-3))))]
    return [1e3 * sample / (rounds * len(runs)) for sample in samples]


def _elapsed_ms(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _by_events(runs: Sequence[Run], milliseconds: float) -> list[float]:
    calls = max(10, int(milliseconds / max(min(_elapsed_ms(run) for run in runs), 1e-3)))
    samples: list[float] = []
    while len(samples) < calls:
        torch.cuda._sleep(40_000_000)  # about 20 ms: the host queues a batch of calls before the GPU reaches the first
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(1 + 10)]
        marks[0].record()
        for index, mark in enumerate(marks[1:]):
            runs[index % len(runs)]()
            mark.record()
        torch.cuda.synchronize()
        samples += [1e3 * before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return samples


def _by_kernels(runs: Sequence[Run], milliseconds: float) -> list[float]:
    del milliseconds  # ten calls: every one costs trace, and kernel durations spread little
    samples = [0.0]

    def calls() -> None:
        for index in range(10):
            runs[index % len(runs)]()
            torch.cuda._sleep(1)  # its kernel marks the end of a call: one profile for all of them

    for kernel in kernel_times(calls):
        if MARK in kernel.name:
            samples.append(0.0)
        else:
            samples[-1] += kernel.us
    assert len(samples) == 11, "a call's end was not found in the trace"
    return samples[:-1]


def _by_clock(runs: Sequence[Run], milliseconds: float) -> list[float]:
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - begin < milliseconds / 1e3 and len(samples) < 100):
        start = time.perf_counter()
        runs[len(samples) % len(runs)]()
        samples.append(1e6 * (time.perf_counter() - start))
    return samples


def host_us(run: Run, calls: int = 50, batches: int = 10) -> float:
    """Median CPU time of one eager call in µs. `run` must be small work, so that the GPU's queue does not fill up."""
    samples = []
    for _ in range(batches + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append(1e6 * (time.perf_counter() - start) / calls)
    synchronize()
    return statistics.median(samples[1:])


def peak_mib(run: Run) -> float:
    """MiB that `run` adds at its peak to what was allocated before it."""
    run()
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def synchronize() -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# Floors


@functools.cache
def ceilings() -> Ceilings:
    """Measure this machine's copy bandwidth and matrix rate, once per run, on random data."""
    size, width, dtype = (2**30, 8192, torch.bfloat16) if device == "cuda" else (2**20, 128, torch.float32)
    sources = [torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    # not by graph: there a copy is a node of its own, on an H100 at 2.4 TB/s for a kernel's 3.0
    copy = measure([functools.partial(target.copy_, source) for source in sources], "events")
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    matmul = measure([functools.partial(torch.mm, left, right, out=product)])
    return Ceilings(bytes_per_s=2 * size / copy.us * 1e6, flops_per_s=2 * width**3 / matmul.us * 1e6)
