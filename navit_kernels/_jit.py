"""Triton helpers with two or more callers. T tokens, S segments (images)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability × 10 (90 for an H100), as the launch tables take it; 0 for anything that is not CUDA."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def gluon_is_supported() -> bool:
    """Gluon is experimental: its names move between releases. These are tested."""
    return (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


class _CallSite:
    """What calls of one kernel with the same argument names have in common: where tensors and free numbers stand."""

    def __init__(self, kernel: Any, arguments: dict[str, Any]) -> None:
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        self.tensors = [i for i, value in enumerate(arguments.values()) if isinstance(value, Tensor)]
        self.numbers = [i for i, name in enumerate(arguments) if name in free]
        self.compiled: dict[tuple, tuple[Any, list, list[tuple[int, int]]]] = {}


_call_sites: dict[tuple, _CallSite] = {}


def launch_kernel(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """kernel[grid](**arguments), at less cost on the host.

    Triton inspects every argument of every call. Here a compiled kernel is found by what it was compiled for: the dtype
    and 16-byte alignment of each tensor, and the value of all else but the kernel's do_not_specialize numbers.
    """
    name = (id(kernel), *arguments)
    values = list(arguments.values())
    site = _call_sites.get(name)
    if site is None:
        if all(value.device.type != "cuda" for value in values if isinstance(value, Tensor)):
            kernel[grid](**arguments)  # interpreted, or compiled ahead of time
            return
        site = _call_sites[name] = _CallSite(kernel, arguments)
    key = values.copy()
    for i in site.tensors:
        tensor = values[i]
        values[i] = address = tensor.data_ptr()
        key[i] = (tensor.dtype, address % 16 == 0)
    for i in site.numbers:
        key[i] = None
    key.append(tensor.device.index)
    found = site.compiled.get(tuple(key))
    if found is None:
        places = {name: place for place, name in enumerate(kernel.arg_names)}
        names = list(arguments)
        changing = [(places[names[i]], i) for i in (*site.tensors, *site.numbers)]
        template = [arguments.get(name) for name in kernel.arg_names]
        for place, _ in changing:
            template[place] = None
        site.compiled[tuple(key)] = (kernel[grid](**arguments), template, changing)
        return
    compiled, template, changing = found
    positional = template.copy()
    for place, i in changing:
        positional[place] = values[i]
    compiled[(*grid, 1, 1)[:3]](*positional, stream=torch._C._cuda_getCurrentRawStream(tensor.device.index))


@triton.jit
def segment_of(offs_t, mask_t, cu_seqlens_ptr, segments):
    """The segment that owns each token: the last one that starts at or before it, found by bisection."""
    first = tl.zeros_like(offs_t)
    size = segments
    while size > 1:
        half = size // 2
        starts = tl.load(cu_seqlens_ptr + first + half, mask=mask_t, other=0)
        first = tl.where(starts <= offs_t, first + half, first)
        size -= half
    return first
