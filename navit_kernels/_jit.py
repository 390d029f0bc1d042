"""Triton helpers with two or more callers. T tokens, S segments (images)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter, or_
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
def triton_version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def gluon_is_supported() -> bool:
    """Gluon is experimental: its names move between releases. 3.6 and 3.9 are tested on a GPU; 3.7 and 3.8 compile."""
    return (3, 6) <= triton_version() <= (3, 9)


class BoundKernel:
    """A kernel with those of its arguments that stay the same from call to call; calls bring the others by name.

    Triton inspects every argument of every call. Here a compiled kernel is found by what it was compiled for: the dtype
    and 16-byte alignment of each tensor, the kind of each tensor descriptor (_descriptors.py), and the value of all
    else but the kernel's do_not_specialize numbers. What is bound, which tensors cannot be, is looked at once, and so
    are the names and types of a call's arguments: no loop in Python goes over them again.
    """

    def __init__(self, kernel: Any, **bound: Any) -> None:
        self.kernel, self.bound, self.values = kernel, bound, (*bound.values(), None)
        # an interpreted kernel has no parameters to specialize
        self.free = {parameter.name for parameter in getattr(kernel, "params", ()) if parameter.do_not_specialize}
        self.sorted: dict[tuple, tuple[list[str], list[Callable[[tuple], tuple]]]] = {}
        self.compiled: dict[tuple, tuple[Any, Callable[[Sequence], tuple]]] = {}

    def __call__(self, grid: tuple[int, ...], /, **named: Any) -> None:
        """kernel[grid](**bound, **named), at less cost on the host."""
        self.launch(grid, named)

    def launch(self, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        given = tuple(named.values())
        types = (*named, *map(type, given))
        names, pickers = self.sorted.get(types) or self._sort(types, named)
        tensors, descriptors, specialized, free = [pick(given) for pick in pickers]
        device = tensors[0].get_device() if tensors else -1
        if device < 0 or not tensors[0].is_cuda:
            self.kernel[grid](**self.bound, **named)  # interpreted, or compiled ahead of time
            return
        addresses = [*map(Tensor.data_ptr, tensors)]
        key = (device, types, *map(DTYPE, tensors), *map(KIND, descriptors), *specialized)
        if functools.reduce(or_, addresses) % 16:
            key += tuple(address % 16 == 0 for address in addresses)
        found = self.compiled.get(key)
        if found is None:
            names = [*names, *self.bound]
            places = [names.index(name) if name in names else -1 for name in self.kernel.arg_names]
            found = self.compiled[key] = self.kernel[grid](**self.bound, **named), itemgetter(*places)
        else:
            compiled, in_order = found
            arguments = in_order((*addresses, *descriptors, *specialized, *free, *self.values))
            stream = torch._C._cuda_getCurrentRawStream(device)
            x, y, z = (*grid, 1, 1)[:3]
            if has_launch_hooks():
                compiled[x, y, z](*arguments, stream=stream)
            else:  # what that does, without the hooks' arguments
                compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
        if recording.recorder is not None:
            compiled, in_order = found
            values = in_order((*tensors, *descriptors, *specialized, *free, *self.values))
            recording.recorder.launched(compiled, grid, values)

    def _sort(self, types: tuple, named: dict[str, Any]) -> tuple[list[str], list[Callable[[tuple], tuple]]]:
        """The names of tensors, descriptors, specialized arguments and free ones; and what takes each from all."""
        kinds: tuple[list[str], ...] = ([], [], [], [])
        for name, value in named.items():
            free = 3 if name in self.free and value is not None else 2
            kinds[0 if isinstance(value, Tensor) else 1 if hasattr(value, "block_shape") else free].append(name)
        order = [*named]
        pickers = [_picker([order.index(name) for name in kind]) for kind in kinds]
        self.sorted[types] = [name for kind in kinds for name in kind], pickers
        return self.sorted[types]


def has_launch_hooks() -> bool:
    """Whether somebody, a profiler say, wants to hear of Triton's launches."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class _Recording(threading.local):
    """Who notes this thread's launches (_replay.py)."""

    recorder: Any = None


recording = _Recording()
DTYPE, KIND = attrgetter("dtype"), attrgetter("kind")


def _picker(places: list[int]) -> Callable[[tuple], tuple]:
    """itemgetter, which returns no tuple of one or none."""
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[place] for place in places)


_kernels: dict[int, BoundKernel] = {}


def launch_kernel(kernel: Any, grid: tuple[int, ...], /, *positional: Any, **named: Any) -> None:
    """kernel[grid](*positional, **named), at less cost on the host; see BoundKernel."""
    bound = _kernels.get(id(kernel))
    if bound is None:
        bound = _kernels[id(kernel)] = BoundKernel(kernel)
    bound.launch(grid, {**dict(zip(kernel.arg_names, positional, strict=False)), **named} if positional else named)


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
