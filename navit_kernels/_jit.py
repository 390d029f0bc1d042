"""Triton helpers with two or more callers. T tokens, S segments (images)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
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
def multiprocessors(device: torch.device) -> int:
    """How many a device has; an H100's where there is none, as when kernels are compiled ahead of time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def gluon_is_supported() -> bool:
    """Gluon is experimental: its names move between releases. These are tested."""
    return (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


class _CallSite:
    """What calls of one kernel with the same argument names have in common: the names, and what was compiled."""

    def __init__(self, kernel: Any, positional: int, named: Iterable[str]) -> None:
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        self.names = [*kernel.arg_names[:positional], *named]
        self.numbers = [i for i, name in enumerate(self.names) if name in free]
        self.compiled: dict[tuple, tuple[Any, list, list[tuple[int, int]]]] = {}


_call_sites: dict[tuple, _CallSite] = {}


def launch_kernel(kernel: Any, grid: tuple[int, ...], /, *positional: Any, **named: Any) -> None:
    """kernel[grid](*positional, **named), at less cost on the host.

    Triton inspects every argument of every call. Here a compiled kernel is found by what it was compiled for: the dtype
    and 16-byte alignment of each tensor, the dtype, block and layout of each tensor descriptor, and the value of all
    else but the kernel's do_not_specialize numbers.
    """
    values = [*positional, *named.values()]
    key, pointers, device = values.copy(), [], None
    for i, value in enumerate(values):
        kind = type(value)
        if value is None or kind is int or kind is bool or kind is float:
            continue
        if isinstance(value, Tensor):
            device = value.device
            values[i] = address = value.data_ptr()
            key[i] = (value.dtype, address % 16 == 0)
        elif hasattr(value, "block_shape"):
            device = value.base.device
            key[i] = (value.base.dtype, *value.block_shape, getattr(value, "layout", None))
        else:
            continue
        pointers.append(i)
    if device is None or device.type != "cuda":
        kernel[grid](*positional, **named)  # interpreted, or compiled ahead of time
        return
    call = (id(kernel), len(positional), *named)
    site = _call_sites.get(call)
    if site is None:
        site = _call_sites[call] = _CallSite(kernel, len(positional), named)
    for i in site.numbers:
        key[i] = None
    key.append(device.index)
    found = site.compiled.get(tuple(key))
    if found is None:
        arguments = dict(zip(site.names, values, strict=True))
        moving = [(kernel.arg_names.index(site.names[i]), i) for i in (*pointers, *site.numbers)]
        template = [arguments.get(name) for name in kernel.arg_names]
        for place, _ in moving:
            template[place] = None
        site.compiled[tuple(key)] = (kernel[grid](*positional, **named), template, moving)
        return
    compiled, template, moving = found
    arguments_in_order = template.copy()
    for place, i in moving:
        arguments_in_order[place] = values[i]
    compiled[(*grid, 1, 1)[:3]](*arguments_in_order, stream=torch._C._cuda_getCurrentRawStream(device.index))


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
