"""Compile what a launcher launches, with its own arguments and options, for a GPU that need not be there.

compiled = compile_launches("sm_90", lambda: kernel.add_norm(*meta_tensors, ...))
assert not any(one.spills for one in compiled)
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

SHARED_MEMORY_LIMIT = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
ARCHS = tuple(SHARED_MEMORY_LIMIT)


@dataclass(frozen=True)
class Compiled:
    """One compiled launch. registers: per thread. spills: bytes of local memory (NVIDIA) or spilled registers (AMD)."""

    name: str
    registers: int
    spills: int
    shared: int
    asm: dict[str, Any]


class _AbsentGPU:
    """What Triton's JIT asks of a driver while it compiles without launching."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)

    def get_current_device(self) -> str:
        return self.arch  # the JIT caches by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_launches(arch: str, launch: Callable[[], object]) -> list[Compiled]:
    """Call `launch`, which runs a launcher on meta tensors; every kernel is compiled for `arch`, none launched."""
    import triton
    from triton.runtime import JITFunction

    kernels = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    driver = triton.runtime.driver
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(driver, "_active", _AbsentGPU(arch)):
        launch()
    assert kernels, "nothing was launched"
    return [_resources(kernel) for kernel in kernels]


def _resources(kernel: Any) -> Compiled:
    import triton

    if "cubin" in kernel.asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, *local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        spills = sum(local)
    else:
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
    return Compiled(kernel.metadata.name, registers, spills, kernel.metadata.shared, kernel.asm)


def machine_code(compiled: Compiled) -> str:
    """An NVIDIA launch, disassembled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def assert_fits(arch: str, launch: Callable[[], object]) -> list[Compiled]:
    """Compile and assert that nothing spills and that shared memory suffices."""
    compiled = compile_launches(arch, launch)
    for one in compiled:
        assert one.spills == 0, f"{one.name} on {arch} spills {one.spills} ({one.registers} registers)"
        assert one.shared <= SHARED_MEMORY_LIMIT[arch], (
            f"{one.name} on {arch} needs {one.shared} bytes of shared memory"
        )
    return compiled


def assert_products_are_asynchronous(compiled: Compiled, at_least: int = 1) -> None:
    """So many products on wgmma, and a wait for each that the code waits for: the compiler can serialize them, with a
    wait after every instruction. Every way to a product writes its matrix descriptors."""
    ptx, code = compiled.asm["ptx"], machine_code(compiled)
    assert ptx.count("wgmma.mma_async") >= at_least, compiled.name
    assert "HGMMA" in code, compiled.name
    assert code.count("WARPGROUP.DEPBAR") <= ptx.count("wgmma.wait_group"), compiled.name
    assert unwritten_descriptors(code) == [], compiled.name


def unwritten_descriptors(code: str) -> list[str]:
    """The products of sm_90 machine code whose matrix descriptors, four uniform registers, not every way there writes.

    ptxas 12.8 has left one so where two ways multiplied by the same matrix: the product then reads any address.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    written = [0] * len(instructions)  # bits: registers that every way to an instruction has written
    reached = [False] * len(instructions)
    reached[0], todo = True, [0]
    while todo:
        at = todo.pop()
        text = re.sub(r"^@!?U?P\d+ +", "", instructions[at])
        name, _, operands = text.partition(" ")
        after = written[at]
        if re.match(r"U(?!TMA|SETMAX)|R2UR|S2UR|VOTEU", name):
            target = next(filter(None, (re.match(r" *UR(\d+)$", x) for x in operands.split(",")[:2])), None)
            if target:
                after |= (3 if ".64" in name or "WIDE" in name else 1) << int(target[1])
        conditional = instructions[at].startswith("@") or re.search(r"!?U?P\d,", operands) is not None
        ways = [labels[x] for x in re.findall(r"\.L_x_\d+", operands) if x in labels] if name.startswith("BR") else []
        if not name.startswith(("BRA", "BRX", "EXIT")) or (not name.startswith("BRX") and conditional):
            ways.append(at + 1)
        for way in ways:
            if way < len(instructions):
                before = written[way] & after if reached[way] else after
                if not reached[way] or before != written[way]:
                    reached[way], written[way] = True, before
                    todo.append(way)
    faults = []
    for at, text in enumerate(instructions):
        product = re.search(r"HGMMA\S* +R\d+, +(R\d+, +)?gdesc\[UR(\d+)\]", text)
        if product and reached[at]:
            needed = (12 if product[1] else 15) << int(product[2])  # a left operand in registers has no descriptor
            if needed & ~written[at]:
                faults.append(text)
    return faults
