"""Compile every attention kernel of the launch table for GPUs that need not be there, and print what each takes.

    python tests/compile_table.py sm_90 sm_89 --head-dims 64 72 80 96 128 --dtypes bf16 fp16 --kind layer_norm

T tokens, H heads, D head width.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from ahead_of_time import (
    ARCHS,
    SHARED_MEMORY_LIMIT,
    Compiled,
    compile_launches,
    machine_code,
    unwritten_descriptors,
)
from attention_checks import BF16, FP16, FP32, Case
from torch import Tensor

from navit_kernels.head_norm import NORM_CODES
from navit_kernels.plan import CLASS_LIMITS
from navit_kernels.self_attention.config import ClassConfig, Launch, choose_config

CLASS_NAMES = [*(f"≤{limit}" for limit in CLASS_LIMITS), f">{CLASS_LIMITS[-1]}"]
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}


def call_on_meta(case: Case, tensors: dict[str, Tensor]) -> Any:
    """The Launcher of a call on a case's tensors without memory."""
    from navit_kernels.self_attention import launch

    codes = [NORM_CODES[kind] for kind in (case.q_kind, case.k_kind)]
    norms = launch.Norms(
        codes[0], tensors.get("q_weight"), tensors.get("q_bias"), 1e-6, codes[1], tensors.get("k_weight"), 1e-6
    )
    plan = replace(case, planned=True).plan("meta")
    assert plan is not None
    host_offsets = plan.host_offsets if case.planned else None
    q, k, v = (tensors[name] for name in "qkv")
    return launch.Launcher(q, k, v, norms, case.width**-0.5, plan.items, plan.offsets, host_offsets)


def launch_on_meta(case: Case, arch: str) -> None:
    """Forward and backward of a case, on tensors without memory, as on a GPU of that architecture."""
    from navit_kernels.self_attention import launch

    tensors = case.inputs("meta")
    capability = 0 if arch.startswith("gfx") else int(arch[3:])
    with mock.patch.object(launch, "architecture", return_value=capability):
        if not case.planned:
            cu_seqlens = torch.empty(len(case.lengths) + 1, dtype=torch.int32, device="meta")
            launch.plan_on_device(cu_seqlens, cu_seqlens, len(tensors["q"]), len(tensors["k"]))
        call = call_on_meta(case, tensors)
        out, lse, r = launch.forward(call, True)
        dq, dk, dv = (torch.empty_like(tensors[name]) for name in "qkv")
        launch.backward(call, tensors["dout"], out, lse, r, dq, dk, dv, call.norms.q_weight is not None)


def config_of(width: int, index: int, bits: int = 16, capability: int = 90) -> ClassConfig:
    """What the launch table has with this Triton, Hopper's own kernels included."""
    from navit_kernels._jit import triton_version

    return choose_config(capability, width, index, bits, gluon=True, triton=triton_version())


def launches_of(arch: str, index: int, width: int, dtype: torch.dtype) -> dict[str, Launch]:
    """The launch table's row for each kernel that multiplies tiles, by the kernel's name."""
    capability = 0 if arch.startswith("gfx") else int(arch[3:])
    config = config_of(width, index, dtype.itemsize * 8, capability)
    forward = ("forward_tile", "forward_stream", "hopper_forward_tile", "hopper_forward_stream")
    names = dict.fromkeys(forward, config.forward)
    backward = ("backward_tile", "backward_resident", "backward_keys")
    backward += ("hopper_backward_tile", "hopper_backward_resident", "hopper_keys", "hopper_queries")
    names |= dict.fromkeys(backward, config.backward)
    queries = ("backward_queries", "hopper_queries")
    return names if config.queries is None else names | dict.fromkeys(queries, config.queries)


def compile_class(arch: str, index: int, width: int, dtype: torch.dtype, kind: str | None) -> list[Compiled]:
    """All kernels that a pack of images of one class takes."""
    length = (*CLASS_LIMITS, 300)[index]
    case = Case((length,), 16, width, dtype, kind, kind, bias=False)
    return compile_launches(arch, lambda: launch_on_meta(case, arch))


def matrix_instructions(compiled: Compiled) -> str:
    """Which matrix instructions a kernel uses, and how many."""
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    names = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
    return " ".join(f"{text.count(name)} {name}" for name in names if name in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", default=["sm_90"], choices=ARCHS)
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 72, 80, 96, 128])
    parser.add_argument("--dtypes", nargs="*", default=["bf16"], choices=DTYPES)
    parser.add_argument("--kind", default="layer_norm", help="of both norms; 'none' for none")
    options = parser.parse_args()
    print(f"{'arch':6} {'D':>3} {'dtype':5} {'tokens':6} {'kernel':18} {'registers':>9} {'spills':>6} {'shared':>7}")
    faults = 0
    for arch in options.archs:
        for width in options.head_dims:
            for name in options.dtypes:
                for index, tokens in enumerate(CLASS_NAMES):
                    kind = None if options.kind == "none" else options.kind
                    launches = launches_of(arch, index, width, DTYPES[name])
                    for one in compile_class(arch, index, width, DTYPES[name], kind):
                        allowed = launches[one.name].spills if one.name in launches else 0
                        faulty = one.spills > allowed or one.shared > SHARED_MEMORY_LIMIT[arch]
                        if "wgmma" in one.asm.get("ptx", ""):
                            faulty |= unwritten_descriptors(machine_code(one)) != []
                        faults += faulty
                        print(
                            f"{arch:6} {width:3} {name:5} {tokens:6} {one.name:18} {one.registers:9} {one.spills:6} "
                            f"{one.shared:7} {matrix_instructions(one)}{'  <- faulty' if faulty else ''}",
                            flush=True,
                        )
    sys.exit(
        f"{faults} kernels spill more than the table says, take more shared memory than there is or multiply by matrix "
        "descriptors that nobody wrote"
        if faults
        else 0
    )


if __name__ == "__main__":
    main()
