"""The search behind navit_kernels/self_attention/config.py: times launch variants of a length class by kernel.

    python benchmarks/search_self_attention.py --cases U64 ft --head-dim 64 --seconds 300 --out search.json

Variants compile in parallel processes into Triton's cache; then one process times them, one after the other, by the
GPU time of each kernel. A variant that is off from the default by more than bf16 rounding is reported as wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from navit_kernels import plan_pack
from navit_kernels.plan import CLASSES
from navit_kernels.self_attention.config import ClassConfig, Launch, choose_config
from navit_kernels.testing import image_lengths

TOKENS = 65536


def launches(kernel: str, block_m: tuple, block_n: tuple, warps: tuple, stages: tuple, registers: tuple = (None,)):
    return [
        Launch(kernel, m, n, w, s, r) for m, n, w, s, r in itertools.product(block_m, block_n, warps, stages, registers)
    ]


def variants(index: int, head_dim: int) -> list[tuple[str, ClassConfig]]:
    """(what varies, config) of a class: forward and backward launches vary in turn."""
    base = choose_config(90, head_dim, index, 16)
    size = 32 << index
    forward: list[ClassConfig] = []
    backward: list[ClassConfig] = []

    def forwards(launched: list[Launch], **changes: bool) -> list[ClassConfig]:
        return [replace(base, forward=one, **changes) for one in launched]

    streams = launches("stream", (64,), (64,), (4,), (2, 3), (None, 128)) + launches(
        "stream", (64,), (128,), (4,), (3,)
    )
    if index >= 2:
        streams += launches("stream", (128,), (64, 128), (4, 8), (3,))
    if index <= 2:
        forward += forwards(launches("tile", (size,), (size,), (2, 4, 8)[index : index + 2], (1,)))
        caps = (None, 168) if index else (None, 128)
        owned = launches("tile", (size,), (size,), (2, 4, 8)[index : index + 2], (1,), caps)
        if index:
            owned += launches("resident", (size,), (64,), (4, 8)[index - 1 : index], (1, 2), caps)
        backward += [replace(base, backward=one) for one in owned]
    if index == 2:
        forward += forwards(launches("stream", (128,), (32,), (8,), (3,)), normalize_keys=True)
    if index == 3:
        forward += forwards(launches("stream", (128, 256), (32, 64), (8,), (3,)), normalize_keys=True)
    if index >= 2:
        for fixed_max in (True, False):
            forward += forwards(streams, normalize_keys=False, fixed_max=fixed_max)
        keys = launches("stream", (32, 64), (64,), (4,), (2, 3), (None, 168))
        keys += launches("stream", (64,), (128,), (4, 8), (2, 3)) + launches("stream", (128,), (64,), (8,), (2,))
        queries = launches("stream", (64,), (64, 128), (4,), (2, 3), (None, 168))
        queries += launches("stream", (128,), (64, 128), (4, 8), (2,)) + queries[:1]
        backward += [
            replace(base, backward=a, queries=b, normalize_keys=False) for a, b in zip(keys, queries, strict=False)
        ]
    return [("forward", one) for one in forward] + [("backward", one) for one in backward]


def run(case: str, heads: int, head_dim: int, what: str, config: ClassConfig | None, repeats: int, index: int):
    """Times by kernel name in µs, and the outputs."""
    from navit_kernels.self_attention import launch, signature

    torch.manual_seed(0)
    lengths = image_lengths(case, TOKENS)
    tokens = sum(lengths)
    plan = plan_pack(lengths, "cuda")
    qkv = torch.randn(tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(head_dim, device="cuda")
    norms = launch.Norms(1, weight, None, 1e-6, 1, weight, 1e-6)

    def choose(arch: int, width: int, one: int, bits: int, *others: Any) -> ClassConfig:
        return config if config is not None and one == index else choose_config(arch, width, one, bits, *others)

    fresh = mock.patch.object(launch, "known_signature", signature.Signature)
    with fresh, mock.patch.object(signature, "choose_config", choose):
        call = launch.Launcher(*qkv.unbind(1), norms, head_dim**-0.5, plan.items, plan.offsets, plan.host_offsets)
        out, lse, r = launch.forward(call, True)
        grads = torch.empty_like(qkv)
        views = grads.unbind(1)
        both = what == "both"
        if what != "forward":
            launch.backward(call, dout, out, lse, r, *views, True)
        torch.cuda.synchronize()
        if not repeats:
            return {}, ()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                if what == "forward" or both:
                    launch.forward(call, True)
                if what == "backward" or both:
                    launch.backward(call, dout, out, lse, r, *views, True)
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.device_time)
    return {name: round(sum(each) / repeats, 1) for name, each in times.items()}, (out, grads)


def class_of(case: str) -> int:
    offsets = plan_pack(image_lengths(case, TOKENS)).offsets.diff().tolist()
    return max(range(CLASSES), key=lambda c: offsets[c] * min(4 ** min(c, 4), 128))


def compile_one(task: tuple) -> str | None:
    try:
        run(*task[:5], 0, task[5])
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["U32", "U64", "U128", "U256", "ft"])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=400, help="stop timing after this long")
    parser.add_argument("--out", default="search_self_attention.json")
    options = parser.parse_args()
    start = time.time()
    tasks = []
    for case in options.cases:
        index = class_of(case)
        tasks.append((case, options.heads, options.head_dim, "both", None, index))
        for what, config in variants(index, options.head_dim):
            tasks.append((case, options.heads, options.head_dim, what, config, index))
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        failures = pool.map(compile_one, tasks, chunksize=1)
    print(f"{len(tasks)} variants compiled in {time.time() - start:.0f} s", flush=True)
    rows, reference = [], {}
    for task, failure in zip(tasks, failures, strict=True):
        case, heads, head_dim, what, config, index = task
        row = dict(case=case, heads=heads, head_dim=head_dim, what=what, config=str(config), error=failure)
        if failure is None and time.time() - start < options.seconds:
            try:
                row["us"], outputs = run(case, heads, head_dim, what, config, 7, index)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                rows.append(row)
                continue
            if config is None:
                reference[case] = outputs
            off = [(a - b).float().norm() / b.float().norm() for a, b in zip(outputs, reference[case], strict=True)]
            row["wrong"] = not off[0] < 0.01 or (what != "forward" and not off[1] < 0.02)
            row["total"] = round(sum(row["us"].values()), 1)
        rows.append(row)
    with open(options.out, "w") as file:
        json.dump(rows, file, indent=0)
    for case in options.cases:
        for what in ("both", "forward", "backward"):
            best = [row for row in rows if row["case"] == case and row["what"] == what and "total" in row]
            print(f"--- {case} {what}")
            for row in sorted(best, key=lambda row: row["total"])[:1]:
                print(row["total"], "WRONG" if row["wrong"] else "", row["config"])
    print(f"{time.time() - start:.0f} s; failed: {sum(row['error'] is not None for row in rows)}")


if __name__ == "__main__":
    main()
