"""Functions whose kernels and torch ops are written down once, and run again for other tensors of the same kind.

What a function launches depends on options, shapes and dtypes alone, and to find it out takes the host longer than to
launch it, while a model's layers and steps ask for the same again and again. A `Replayed` function runs its own code
until a kind of arguments has come often. Then a Recorder watches, and notes each allocation, torch op and launch, and
where the tensors among its arguments came from. Later calls take the same steps on the tensors given: the same kernels
in the same order, and so the same bits.

A program holds no tensors. Each has a slot instead, a number: the arguments first, then what is made on the way.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import attrgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._jit import DTYPE, has_launch_hooks, recording

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default,
    aten.new_empty_strided.default,
}  # fmt: skip
# by a way that takes the host two thirds as long
QUICKER: dict[Any, Callable[..., Any]] = {
    aten.addmm.default: torch.addmm, aten.mm.default: torch.mm, aten.t.default: torch.t, aten.view.default: Tensor.view,
    aten.sum.dim_IntList: torch.sum,
}  # fmt: skip
# Recorded when a kind has come this often, more than a model has layers: to record a block takes the host as long as to
# run it ten times. Forward and backward of 12 blocks on 4,000 tokens, ms of the host's: 17 + 27; replayed 12 + 17; on
# packs that are all different, each of whose kinds was recorded when it first came, 16 + 30.
CALLS = 32
KINDS = 256  # that are counted, and that are recorded, per function: beyond them the oldest are forgotten

Slots = list[Any]
Step = Callable[[Slots, int], None]  # of the slots and the stream


class Slot(NamedTuple):
    """Of a tensor, or where a view starts: so many bytes into it."""

    number: int
    offset: int = 0


class Recorded(NamedTuple):
    """reads, writes: slots. needed: also where nobody reads what it writes."""

    step: Step
    reads: Sequence[int]
    writes: Sequence[int]
    needed: bool


class Replayed:
    """function(tensors, *options): a list of tensors and Nones, from another.

    It launches by BoundKernel alone, changes no argument and looks at no value in one. Its steps may depend on the
    options, which are hashable, and on the shapes, strides, dtypes and alignments of the tensors.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor | None]]) -> None:
        self.function = function
        self.calls: dict[tuple, int] = {}  # of the kinds that are not recorded yet
        self.programs: dict[tuple, Program | None] = {}  # None: recorded in vain

    def __call__(self, tensors: Sequence[Tensor | None], *options: Hashable) -> Sequence[Tensor | None]:
        """The first of the tensors is there."""
        first = tensors[0]
        assert first is not None
        given = [x for x in tensors if x is not None]
        addresses = [*map(Tensor.data_ptr, given)]
        if len({*addresses}) < len(given) or not may_replay(first):  # one of two may be another the next time
            return self.function(tensors, *options)
        device = first.get_device()
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (options, device, autocast, *map(type, tensors), *map(SHAPE, given), *map(DTYPE, given))
        key += tuple(map(Tensor.stride, given))
        if functools.reduce(or_, addresses) % 16:
            key += tuple(address % 16 for address in addresses)
        program = self.programs.get(key, _unknown)
        if program is _unknown:
            return self._run_unknown(key, tensors, options)
        if program is None:
            return self.function(tensors, *options)
        return program.run(tensors, torch._C._cuda_getCurrentRawStream(device))

    def _run_unknown(self, key: tuple, tensors: Sequence[Tensor | None], options: Any) -> Sequence[Tensor | None]:
        """The function itself, recorded or counted."""
        calls = self.calls.get(key, 0)
        if calls < CALLS or not _one_recorder.acquire(blocking=False):
            if len(self.calls) >= KINDS:
                self.calls.clear()
            self.calls[key] = calls + 1
            return self.function(tensors, *options)
        try:
            with Recorder(tensors) as recorder:
                results = self.function(tensors, *options)
            if len(self.programs) >= KINDS:
                del self.programs[next(iter(self.programs))]
            self.programs[key] = recorder.program(results)
        finally:
            _one_recorder.release()
        self.calls.pop(key, None)
        return results


def may_replay(x: Tensor) -> bool:
    """Whether launches go to this tensor's GPU now, and nobody but the GPU takes them."""
    return (
        x.is_cuda
        and x.get_device() == torch.cuda.current_device()
        and not torch.cuda.is_current_stream_capturing()
        and not has_launch_hooks()
    )


_unknown: Any = object()
_one_recorder = threading.Lock()  # held by one thread: torch's count of dispatch modes knows no threads
SHAPE = attrgetter("shape")


class Program:
    """Recorded steps, as far as the results need them, each tensor dropped behind its last use."""

    def __init__(self, recorded: Sequence[Recorded], inputs: int, slots: int, results: Sequence[int | None]) -> None:
        self.results, self.spare = results, [None] * (slots - inputs)
        used = {slot for slot in results if slot is not None} | {*range(inputs)}
        steps: list[Step] = []
        for part in reversed(recorded):
            if not part.needed and used.isdisjoint(part.writes):
                continue
            touched = {*part.reads, *part.writes}
            if last := touched - used:
                steps.append(_drop(last))
            steps.append(part.step)
            used |= touched
        self.steps = steps[::-1]

    def run(self, tensors: Sequence[Tensor | None], stream: int) -> list[Tensor | None]:
        slots = [*tensors, *self.spare]
        for step in self.steps:
            step(slots, stream)
        return [None if slot is None else slots[slot] for slot in self.results]


class Recorder(TorchDispatchMode):
    """Notes what runs on this thread."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.inputs, self.count = len(tensors), 0
        self.numbers: dict[int, int] = {}  # slots of the tensors that are alive, by id
        self.alive: dict[int, weakref.ref] = {}
        self.views: dict[int, Slot] = {}
        self.recorded: list[Recorded] = []
        self.repeatable = True  # every tensor's origin is known
        self.device = next(x.device for x in tensors if x is not None)
        for tensor in tensors:
            if tensor is not None:
                self._number(tensor)
            else:
                self.count += 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here; to make sure of it takes the host longer than all else

    def __enter__(self) -> Recorder:
        recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        recording.recorder = None
        super().__exit__(*error)

    def program(self, results: Sequence[Tensor | None]) -> Program | None:
        slots = [None if x is None else self._slot(x) for x in results]
        return Program(self.recorded, self.inputs, self.count, slots) if self.repeatable else None

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """arguments: a compiled kernel's, with tensors where it takes their addresses."""
        places = {}
        for place, value in enumerate(arguments):
            base = value.base if hasattr(value, "block_shape") else value
            if isinstance(base, Tensor):
                number = self._slot(base)
                places[place] = self.views.get(number, Slot(number))
        step = _launch(compiled, (*grid, 1, 1)[:3], arguments, places)
        self.recorded.append(Recorded(step, [slot.number for slot in places.values()], (), True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        several = isinstance(result, (list, tuple))
        outputs = [x for x in (result if several else (result,)) if isinstance(x, Tensor)]
        new = [x for x in outputs if id(x) not in self.numbers]
        if func in ALLOCATIONS:
            number = self._number(result)
            self.recorded.append(Recorded(_allocate(result, number), (), (number,), False))
            self.repeatable &= result.device == self.device
            return result
        reads: list[int] = []
        arguments = [self._marked(value, reads) for value in (*args, *kwargs.values())]
        writes = [self._number(x) for x in new]
        function, is_view, mutates = _facts(func)
        if new and (mutates or len(new) < len(outputs)):
            self.repeatable = False
        if is_view and new:
            origin, memory = self.views.get(reads[0], Slot(reads[0])), args[0].untyped_storage().data_ptr()
            for x, number in zip(new, writes, strict=True):
                if x.untyped_storage().data_ptr() == memory:  # contiguous() and its like may have made a copy
                    self.views[number] = Slot(origin.number, origin.offset + x.data_ptr() - args[0].data_ptr())
        step = _call(function, arguments, [*kwargs], writes, several)
        self.recorded.append(Recorded(step, reads, writes, mutates))
        return result

    def _number(self, tensor: Tensor) -> int:
        key, number = id(tensor), self.count
        self.numbers[key], self.count = number, number + 1
        self.alive[key] = weakref.ref(tensor, functools.partial(self._forget, key))
        return number

    def _forget(self, key: int, _: Any) -> None:
        del self.numbers[key], self.alive[key]  # another tensor may get this id

    def _slot(self, tensor: Tensor) -> int:
        number = self.numbers.get(id(tensor))
        if number is None:
            self.repeatable = False
            return 0
        return number

    def _marked(self, value: Any, reads: list[int]) -> Any:
        """With a Slot, or a list of them, for tensors; their numbers go to reads."""
        if isinstance(value, Tensor):
            reads.append(self._slot(value))
            return Slot(reads[-1])
        if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
            return [self._marked(part, reads) for part in value]
        return value


@functools.cache
def _facts(func: Any) -> tuple[Callable[..., Any], bool, bool]:
    """What to call; whether its results are views of its first argument; whether it changes an argument."""
    return QUICKER.get(func, func), func.is_view, func._schema.is_mutable


def _allocate(tensor: Tensor, number: int) -> Step:
    shape, strides, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
    dense = tensor.is_contiguous()

    def step(slots: Slots, stream: int) -> None:
        like = slots[0]
        slots[number] = (
            like.new_empty(shape, dtype=dtype) if dense else like.new_empty_strided(shape, strides, dtype=dtype)
        )

    return step


def _call(
    function: Callable[..., Any], arguments: list[Any], names: list[str], writes: list[int], several: bool
) -> Step:
    """A torch op; the last of the arguments go by names."""
    one = [(place, value.number) for place, value in enumerate(arguments) if isinstance(value, Slot)]
    many = [
        (place, value)
        for place, value in enumerate(arguments)
        if isinstance(value, list) and any(isinstance(part, Slot) for part in value)
    ]
    positional = len(arguments) - len(names)

    def step(slots: Slots, stream: int) -> None:
        values = arguments.copy()
        for place, number in one:
            values[place] = slots[number]
        for place, parts in many:
            values[place] = [slots[part.number] if isinstance(part, Slot) else part for part in parts]
        if names:
            result = function(*values[:positional], **dict(zip(names, values[positional:], strict=True)))
        else:
            result = function(*values)
        if several:
            for number, x in zip(writes, result, strict=True):
                slots[number] = x
        elif writes:
            slots[writes[0]] = result

    return step


class _At:
    """What a launch asks of a descriptor's tensor."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _launch(compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], places: dict[int, Slot]) -> Step:
    template, pointers, descriptors = list(arguments), [], []
    for place, (number, offset) in places.items():
        if isinstance(template[place], Tensor):
            pointers.append((place, number, offset))
        else:
            descriptor = template[place]
            fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
            descriptors.append((place, number, offset, type(descriptor), fields))
        template[place] = None
    (x, y, z), run, function, metadata = grid, compiled.run, compiled.function, compiled.packed_metadata

    def step(slots: Slots, stream: int) -> None:
        values = template.copy()
        for place, number, offset in pointers:
            values[place] = slots[number].data_ptr() + offset
        for place, number, offset, kind, fields in descriptors:
            values[place] = descriptor = object.__new__(kind)
            descriptor.__dict__.update(fields, base=_At(slots[number].data_ptr() + offset))
        run(x, y, z, stream, function, metadata, None, None, None, *values)

    return step


def _drop(numbers: Iterable[int]) -> Step:
    numbers = tuple(numbers)

    def step(slots: Slots, stream: int) -> None:
        for number in numbers:
            slots[number] = None

    return step
