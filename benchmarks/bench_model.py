"""Whole models on packs of native-resolution images, training and inference: ours, hand-assembled, published.

ms: median GPU time of one step, events around steps queued ahead. Weights are float32 under bf16 autocast for everyone.
    "train" is forward and backward, "train+adamw" also the fused AdamW update, "forward" inference without saved state.
mfu: (6 · linear parameters that see every token · T + 12 · depth · E · ΣL²) / time / 989 TFLOP/s for a training step, a
    third of that work for a forward; recomputation and the update are not counted, padding is not work.
peak_gib: the most memory allocated during a step: weights, gradients, inputs and all.
time_by_kind: ms of one step's kernels, behind others as when it is timed: gemm, attention, norm+elementwise, other;
    idle: the rest of the step.
Of several ways to compile a model, the fastest is reported, and named in "compiled"; "graph" is a model that is not
compiled but replayed as one CUDA graph, whose attention reads its work from the device, as it must for other lengths.
navit_mlp and navit_block are ours with checkpointing="mlp" and "block".

T tokens, L tokens of an image, E model width.
"""

import argparse
import contextlib
import functools
import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import model_baselines
import peers
import torch
from harness import (
    Kernel,
    Row,
    assert_same_function,
    ceilings,
    gate,
    gpu_slug,
    kernel_times,
    measure,
    parse_options,
    parser,
    print_table,
    synchronize,
    write_results,
)
from torch import Tensor, nn

from navit import NaViT, NaViTConfig, PackedImages, pack
from navit.graphs import Captured
from navit_kernels.patches import KeptPatches, patchify
from navit_kernels.testing import image_grids

CASES = {"B/16 pt": 65536, "L/16 ft": 32768, "So400m/14 ft": 32768}  # tokens at least
SMOKE_CASE, SMOKE_CONFIG = "Ti/16 pt", {"width": 64, "depth": 2, "heads": 2, "mlp_width": 128}
DIRECTIONS = ("train", "train+adamw", "forward")
CONTENDERS = ("navit", "straw_fa3", "straw_torch_varlen", "vit_pytorch", "vit_pytorch_nested", "timm_naflexvit")
CHECKPOINTED = ("navit_mlp", "navit_block")  # asked for by name
COMPILED = {"vit_pytorch": ["no"], "vit_pytorch_nested": ["no"], "timm_naflexvit": ["blocks"]}  # others: --compiled
UNCOMPILED = ("no", "graph")  # not tried with straws, which leave all that is elementwise to the compiler
LOAD_MS = 400  # of steps ahead of a traced one
PEAK_FLOPS = {
    "h100": 989e12,
    "h200": 989e12,
    "a100": 312e12,
}  # dense bf16, by the vendor; elsewhere what a matmul reaches
KINDS = (  # the first pattern that a kernel's name has
    ("norm+elementwise", r"^triton_(?!tem)"),
    ("attention", r"flash|fmha|attention|attn|^hopper_|forward_(tile|stream)"),
    ("attention", r"backward_(tile|resident|prepare|keys|queries)|key_sizes|sum_partials|write_plan|plan_segments"),
    ("attention", r"^(forward|backward)_norms|^pool_"),
    ("gemm", r"gemm|^up_kernel|^down_backward_kernel|nvjet|cutlass|cublas|triton_tem|wgmma|splitK|mma_"),
    ("norm+elementwise", r"elementwise|norm|^(table_)?(forward|backward|partial|combine)_kernel|gelu|reduce_kernel"),
)


class Workload(NamedTuple):
    """Images of one case. patches_TP: what baselines are given ready-made, in the dtype of the products."""

    name: str
    config: NaViTConfig
    lengths: list[int]
    packed: PackedImages
    images: list[Tensor]
    patches_TP: Tensor

    @property
    def pack(self) -> peers.Pack:
        return peers.Pack(self.lengths, self.packed.cu_seqlens)

    def flops(self, direction: str) -> float:
        c, tokens = self.config, sum(self.lengths)
        linear = c.channels * c.patch_size**2 * c.width + c.depth * (4 * c.width**2 + 2 * c.width * c.mlp_width)
        linear += 2 * c.width**2  # keys and values of the pool
        training = 6 * linear * tokens + 12 * c.depth * c.width * sum(length**2 for length in self.lengths)
        return training / 3 if direction == "forward" else training


def make_workload(name: str, config: NaViTConfig, grids: Sequence[tuple[int, int]], device: str) -> Workload:
    rng, size = torch.Generator().manual_seed(0), config.patch_size
    images = [
        torch.randint(256, (config.channels, rows * size, columns * size), dtype=torch.uint8, generator=rng)
        for rows, columns in grids
    ]
    (packed,) = pack(images, None, **config.pack_options)
    packed = packed.to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    keep = KeptPatches(packed.cu_seqlens, packed.coords)
    patches_TP = patchify(packed.pixels, size, config.mean, config.std, keep=keep, dtype=dtype)
    return Workload(name, config, [rows * columns for rows, columns in grids], packed, images, patches_TP)


class Candidate(NamedTuple):
    """run() gives one row per image, differentiable; parts: what "blocks" compiles one by one."""

    model: nn.Module
    run: Callable[[], Tensor]
    parts: Sequence[nn.Module]


def make_candidate(
    name: str, work: Workload, state: dict[str, Tensor] | None, options: argparse.Namespace
) -> Candidate:
    """Build a contender on the device, with a NaViT's weights where it can take them. Raises peers.PeerMissing."""
    device, packed = options.device, work.packed
    torch.manual_seed(0)
    with torch.device(device):
        if name.startswith("navit"):
            model = NaViT(replace(work.config, checkpointing=name.partition("_")[2] or "none"))
            run = functools.partial(model, packed)
        elif name.startswith("straw_"):
            model = model_baselines.straw(work.config, work.pack, name.removeprefix("straw_"), options.fa3_dir)
            run = functools.partial(model, work.patches_TP, packed.coords, len(packed))
        elif name.startswith("vit_pytorch"):
            mean, std = (torch.tensor(part)[:, None, None] for part in (work.config.mean, work.config.std))
            images = [(image.to(device) / 255 - mean) / std for image in work.images]
            model, run = model_baselines.vit_pytorch(work.config, images, name.endswith("nested"))
        else:
            model, run = model_baselines.timm_naflexvit(work.config, work.patches_TP, packed.coords, work.lengths)
    if state is not None and not is_package(name):
        model.load_state_dict(state)
    return Candidate(model.to(device), run, getattr(model, "parts", None) or getattr(model, "blocks", ()))


def compile_candidate(candidate: Candidate, how: str) -> None:
    """how: "no" or "graph"; "blocks"; "whole"; or "whole-dynamic", in which token and image counts stay free."""
    if how == "blocks":
        for part in candidate.parts:
            part.compile()
    elif how not in UNCOMPILED:
        candidate.model.compile(fullgraph=True, dynamic=how == "whole-dynamic")


def is_package(name: str) -> bool:
    return not name.startswith(("navit", "straw_"))


def autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


# Correctness


def check(name: str, options: argparse.Namespace, exact: NaViT, work: Workload) -> None:
    """Output and some gradients at full width and little depth, near those of the references in float64 on the CPU."""
    candidate = make_candidate(name, work, {k: v.float() for k, v in exact.state_dict().items()}, options)
    dout_SE = torch.randn(len(work.lengths), work.config.width, generator=torch.Generator().manual_seed(1))
    with autocast(options.device):
        actual = candidate.run()
    actual.backward(dout_SE.to(actual))
    exact.zero_grad()
    expected = exact(work.packed.to("cpu"))
    expected.backward(dout_SE.double())
    assert_same_function(f"{name} output", actual.cpu(), expected, limit=0.05)
    ours, theirs = dict(candidate.model.named_parameters()), dict(exact.named_parameters())
    for key in ("embed.row_table", "blocks.0.qkv.weight", "blocks.0.k_norm_weight", "pool.query_HD"):
        assert_same_function(f"{name} gradient of {key}", ours[key].grad.cpu(), theirs[key].grad, limit=0.05)


def check_all(names: Sequence[str], config: NaViTConfig, options: argparse.Namespace) -> None:
    """The gate. Published packages compute something else by design, so there is nothing to compare them with."""
    config = replace(config, depth=2)
    work = make_workload("check", config, [(3, 5), (1, 1), (8, 4), (2, 7)], options.device)
    torch.manual_seed(0)
    exact = NaViT(config).double()
    gate({name: functools.partial(check, name, options, exact, work) for name in names if not is_package(name)})


# Time


def make_step(candidate: Candidate, direction: str, work: Workload, device: str) -> Callable[[], None]:
    model, run = candidate.model, candidate.run
    model.train(direction != "forward")
    dout_SE = torch.randn(len(work.lengths), work.config.width, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if direction == "train+adamw" else None

    def step() -> None:
        if direction == "forward":
            with torch.no_grad(), autocast(device):
                run()
            return
        with autocast(device):
            out_SE = run()
        out_SE.backward(dout_SE.to(out_SE.dtype))
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def time_by_kind(kernels: list[Kernel], ms: float) -> dict[str, float]:
    kinds = dict.fromkeys(("gemm", "attention", "norm+elementwise", "other"), 0.0)
    for kernel in kernels:
        kinds[kind_of(kernel.name)] += kernel.us / 1e3
    kinds["idle"] = max(0.0, ms - sum(kinds.values()))
    return {kind: round(value, 3) for kind, value in kinds.items()}


@contextlib.contextmanager
def fresh_memory(device: str) -> Iterator[None]:
    """Leave nothing of one contender to the next."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def with_peak(run: Callable[[], Any]) -> tuple[Any, float]:
    """What run returns, and the most GiB allocated while it ran."""
    torch.cuda.reset_peak_memory_stats()
    returned = run()
    return returned, torch.cuda.max_memory_allocated() / 2**30


def time_candidate(name: str, how: str, work: Workload, options: argparse.Namespace) -> list[Row]:
    """Rows of one contender compiled in one way, one per direction."""
    if options.prepare and how != "whole":  # the blocks are alike
        work = work._replace(config=replace(work.config, depth=2))
    if how == "graph" and work.packed.plan is not None:
        plan = work.packed.plan.without_host_offsets()
        work = work._replace(packed=replace(work.packed, plan=plan))
    candidate = make_candidate(name, work, None, options)
    compile_candidate(candidate, how)
    peak = PEAK_FLOPS.get(gpu_slug(torch.cuda.get_device_name())) if options.device == "cuda" else None
    rows = []
    for direction in options.directions:
        if direction == "forward" and name in CHECKPOINTED:
            continue  # nothing is kept
        if (direction, how) == ("train+adamw", "graph"):
            continue  # an optimizer's step is not recorded
        step = make_step(candidate, direction, work, options.device)
        began, on_gpu, peak_gib = time.monotonic(), options.device == "cuda", 0.0
        if how == "graph" and on_gpu:
            step, peak_gib = with_peak(lambda step=step: Captured(step))  # a replay allocates nothing
        for _ in range(3):
            step()
        synchronize()
        print(f"{work.name} {name} ({how}) {direction}: ready after {time.monotonic() - began:.0f} s", flush=True)
        if options.prepare:
            continue
        if how != "graph" and on_gpu:
            _, peak_gib = with_peak(step)
        ms = measure([step], "events", options.milliseconds).us / 1e3
        print(f"{ms:.2f} ms, {peak_gib:.2f} GiB", flush=True)
        kernels = kernel_times(step, before=math.ceil(LOAD_MS / ms)) if on_gpu else []
        if options.profile:
            print_kernels(kernels, options.profile)
        tokens, mfu = sum(work.lengths), work.flops(direction) / ms * 1e3 / (peak or ceilings().flops_per_s)
        row: Row = {"case": work.name, "direction": direction, "contender": name, "ms": ms}
        row |= {"images_per_s": len(work.lengths) / ms * 1e3, "tokens_per_s": tokens / ms * 1e3, "mfu": mfu}
        rows.append({**row, "peak_gib": peak_gib, "time_by_kind": time_by_kind(kernels, ms), "compiled": how})
    return rows


def print_kernels(kernels: list[Kernel], count: int) -> None:
    """How a step's time is spent, and the kernels that take most of it, all calls of one name together."""
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        totals.setdefault(kernel.name, []).append(kernel.us)
    busy_ms = sum(kernel.us for kernel in kernels) / 1e3
    span_ms = (max(kernel.start_us + kernel.us for kernel in kernels) - kernels[0].start_us) / 1e3
    print(f"{len(kernels)} launches; traced {span_ms:.2f} ms, of which {span_ms - busy_ms:.2f} between kernels")
    ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))[:count]
    print_table(
        {"ms": sum(us) / 1e3, "calls": len(us), "kind": kind_of(name), "name": name[:90]} for name, us in ranked
    )


def fastest(rows: list[Row]) -> list[Row]:
    """Per case, direction and contender the row of the fastest way to compile it."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row["case"], row["direction"], row["contender"])
        if key not in best or row["ms"] < best[key]["ms"]:
            best[key] = row
    return list(best.values())


def comparison(rows: list[Row]) -> list[Row]:
    """Per case and direction: the best straw's time, and each published package's, over ours; memory likewise."""
    table = []
    by_key = {(row["case"], row["direction"], row["contender"]): row for row in rows}
    for case, direction in dict.fromkeys((row["case"], row["direction"]) for row in rows):
        ours = by_key.get((case, direction, "navit"))
        others = {name: row for (*key, name), row in by_key.items() if key == [case, direction] and name != "navit"}
        straws = [row for name, row in others.items() if name.startswith("straw_")]
        if ours is None:
            continue
        line: Row = {"case": case, "direction": direction, "ms": ours["ms"], "mfu": f"{100 * ours['mfu']:.1f}%"}
        if straws:
            best = min(straws, key=lambda row: row["ms"])
            memory = f"{ours['peak_gib'] / best['peak_gib']:.2f}" if best["peak_gib"] else "-"
            line |= {"× straw": f"{best['ms'] / ours['ms']:.2f}", "memory / straw": memory}
        packages = [name for name in others if is_package(name)]
        line["× packages"] = ", ".join(f"{others[name]['ms'] / ours['ms']:.1f} {name}" for name in packages) or "-"
        table.append(line)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    listed: dict[str, Any] = {"type": lambda text: text.split(",")}
    options.add_argument("--cases", **listed, help=f"of {', '.join(CASES)}; all by default")
    options.add_argument("--contenders", **listed, default=list(CONTENDERS))
    options.add_argument("--directions", **listed, default=list(DIRECTIONS))
    options.add_argument("--compiled", **listed, default=["no", "graph", "blocks", "whole"], help="also: whole-dynamic")
    options.add_argument("--profile", type=int, default=0, metavar="N", help="print each step's N slowest kernels")
    options.add_argument("--prepare", action="store_true", help="fill the compilers' caches: two blocks, nothing timed")
    options.add_argument("--fa3-dir", help="folder of FlashAttention-3 (README.md)")
    options = parse_options(options, arguments)
    torch._dynamo.config.recompile_limit = 64  # blocks, directions
    cases = {SMOKE_CASE: 256} if options.smoke else {name: CASES[name] for name in options.cases or CASES}
    every_row: list[Row] = []
    for case, tokens in cases.items():
        preset, mix = case.split()
        config = NaViTConfig.preset(preset, **(SMOKE_CONFIG if options.smoke else {}))
        names = available(options, config)
        check_all(names, config, options)
        work = make_workload(case, config, image_grids(mix, tokens, config.patch_size), options.device)
        for name in names:
            rows = []
            for how in ways(name, options):
                if time.monotonic() > options.deadline:
                    print(f"{case}: no time left for {name} ({how})")
                    continue
                try:
                    with fresh_memory(options.device):
                        rows += time_candidate(name, how, work, options)
                except Exception as error:  # of a published package: its own limits, such as memory
                    if not is_package(name):
                        raise
                    print(f"{case}: without {name}, which fails: {type(error).__name__}: {str(error)[:200]}")
            if options.prepare:
                continue
            every_row += fastest(rows)
            if name == names[-1]:
                print_table(every_row)
                print_table(comparison(every_row))
            write_results("model", fastest(rows), options)
            options.merge = True  # the next contender joins the file of this one
        del work


def ways(name: str, options: argparse.Namespace) -> list[str]:
    """How a contender is compiled, one after the other."""
    if options.smoke:
        return ["no"]
    straw = name.startswith("straw_")
    return [how for how in COMPILED.get(name, options.compiled) if not (straw and how in UNCOMPILED)]


def available(options: argparse.Namespace, config: NaViTConfig) -> list[str]:
    """The contenders that can be built here; a message for each of the others."""
    work, found = make_workload("try", replace(config, depth=1), [(1, 2)], options.device), []
    for name in options.contenders:
        try:
            make_candidate(name, work, None, options)
            found.append(name)
        except Exception as error:
            if not (is_package(name) or isinstance(error, peers.PeerMissing)):
                raise
            print(f"without {name}: {error}")
    return found


if __name__ == "__main__":
    main()
