"""A recorded program gives, for other tensors, what the function itself gives for them."""

import ctypes
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

pytest.importorskip("triton")
from navit_kernels import _replay
from navit_kernels._jit import recording
from navit_kernels._replay import Program, Recorder


def record(function: Any, tensors: list[Tensor | None]) -> tuple[Any, Program | None]:
    with torch.no_grad(), Recorder(tensors) as recorder:
        results = function(*tensors)
    return results, recorder.program(results)


def inputs(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=random) for shape in ((6, 8), (24, 8), (24,), (24, 8))]


def torch_ops(x: Tensor, w: Tensor, b: Tensor, other: Tensor) -> list[Tensor | None]:
    cast = w.new_empty(48, 8, dtype=torch.float64)
    torch._foreach_copy_([*cast.split([24, 24])], [w, other])
    q, k, v = linear(x, w, b).view(6, 3, 8).unbind(1)
    grads = x.new_empty(6, 2, 8)
    first, second = grads.unbind(1)
    torch.mul(q, k, out=first)
    second.zero_()
    second += v
    total = (first.T @ second).sum(0, dtype=torch.float32)
    return [grads, total, None, cast, torch.zeros_like(b), linear(x, other), v.to(torch.float64)]


def test_torch_ops_and_views() -> None:
    results, program = record(torch_ops, inputs(0))
    assert program is not None
    for seed in (0, 1):
        expected, given = torch_ops(*inputs(seed)), program.run(inputs(seed), 0)
        assert [x is None for x in given] == [x is None for x in expected]
        for mine, theirs in zip(given, expected, strict=True):
            if theirs is not None:
                assert torch.equal(mine, theirs)
                assert (mine.dtype, mine.stride()) == (theirs.dtype, theirs.stride())
    assert not torch.equal(results[0], program.run(inputs(1), 0)[0])


def test_a_kind_of_arguments_is_recorded_once_it_has_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def function(tensors: list[Tensor], factor: float) -> list[Tensor | None]:
        calls.append(tensors[0].shape)
        return [factor * tensors[0] + tensors[1]]

    monkeypatch.setattr(_replay, "may_replay", lambda x: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    replayed = _replay.Replayed(function)
    for i in range(2 * _replay.CALLS):
        for factor in (2.0, 3.0):
            x, y = torch.full((4, 4), float(i)), torch.ones(4, 4)
            assert torch.equal(replayed((x, y), factor)[0], factor * x + y)
    assert len(calls) == 2 * (_replay.CALLS + 1)
    replayed((x.to(torch.float64), y), 2.0)
    replayed((x.t(), y), 2.0)
    replayed((x, x), 2.0)  # which of the two an argument came from is not known
    assert len(calls) == 2 * (_replay.CALLS + 1) + 3
    for rows in range(2 * _replay.KINDS):
        replayed((torch.ones(rows + 5, 4), y[:1]), 2.0)
    assert len(replayed.calls) <= _replay.KINDS
    count = len(calls)
    replayed((x, y), 3.0)
    assert len(calls) == count  # what came often is not forgotten for what came once


def test_what_cannot_be_recorded_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    constant = torch.ones(4)
    monkeypatch.setattr(_replay, "may_replay", lambda x: True)
    replayed = _replay.Replayed(lambda tensors: [tensors[0] + constant])
    for i in range(2 * _replay.CALLS):
        assert replayed((torch.full((4,), float(i)),))[0].tolist() == [i + 1.0] * 4
    assert [*replayed.programs.values()] == [None]


def test_alignment_is_part_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "may_replay", lambda x: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(_replay, "CALLS", 0)
    replayed, memory = _replay.Replayed(lambda tensors: [tensors[0] + 1]), torch.zeros(64)
    for start in (0, 16, 1, 2, 5):
        assert replayed((memory[start : start + 8],))[0].tolist() == [1.0] * 8
    assert len(replayed.programs) == 3


@pytest.mark.parametrize("strided", [False, True])
def test_in_inference_mode_a_copy_is_no_view(strided: bool) -> None:
    def function(x: Tensor, *_: Tensor) -> list[Tensor | None]:
        out = x.new_empty(2, 8)
        add_rows(x.contiguous()[1], x.contiguous().flatten()[16:], out[0])
        return [out[:1]]

    def given(seed: int) -> list[Tensor]:
        x = inputs(seed)[0]
        return [x.t().contiguous().t() if strided else x]

    with torch.inference_mode():
        program = record(function, given(0))[1]
        assert program is not None
        for seed in (0, 1):
            assert torch.equal(program.run(given(seed), 7)[0], function(*given(seed))[0])


def test_one_thread_records_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "may_replay", lambda x: True)
    monkeypatch.setattr(_replay, "CALLS", 0)
    inside, other_is_done = threading.Event(), threading.Event()

    def slow(tensors: list[Tensor]) -> list[Tensor | None]:
        inside.set()
        assert other_is_done.wait(10)
        return [tensors[0] + 1]

    replayed, others = _replay.Replayed(slow), _replay.Replayed(lambda tensors: [tensors[0] + 2])
    thread = threading.Thread(target=lambda: replayed((torch.ones(4),)))
    thread.start()
    assert inside.wait(10)
    assert others((torch.ones(4),))[0].tolist() == [3.0] * 4
    assert not others.programs
    other_is_done.set()
    thread.join()
    assert len(replayed.programs) == 1
    assert not is_in_torch_dispatch_mode()


class Descriptor:
    """Of a tensor, as Triton's."""

    def __init__(self, base: Any) -> None:
        self.base, self.block_shape = base, [1]


class AddRows:
    """A compiled kernel: out[i] = a[i] + b[i] over 8 numbers at three addresses, the last behind a descriptor."""

    function, packed_metadata = "function", "metadata"

    def run(self, x: int, y: int, z: int, stream: int, function: str, metadata: str, *rest: Any) -> None:
        *hooks, a, b, out, scale = rest
        assert (x, y, z, stream, function, metadata, hooks) == (2, 1, 1, 7, "function", "metadata", [None] * 3)
        a, b, out = (ctypes.cast(at, ctypes.POINTER(ctypes.c_float)) for at in (a, b, out.base.data_ptr()))
        for i in range(8):
            out[i] = scale * (a[i] + b[i])


def add_rows(a: Tensor, b: Tensor, out: Tensor) -> None:
    AddRows().run(2, 1, 1, 7, "function", "metadata", *[None] * 3, a.data_ptr(), b.data_ptr(), Descriptor(out), 2.0)
    if recording.recorder is not None:
        recording.recorder.launched(AddRows(), (2,), [a, b, Descriptor(out), 2.0])


def launches(x: Tensor, w: Tensor, *_: Tensor) -> list[Tensor | None]:
    room, out = x.new_empty(3, 8), x.new_empty(2, 8)
    add_rows(x[1], w[20], room[2])  # views: addresses inside
    add_rows(room[2], w[21], out[0])
    add_rows(out[0], out[0], out.view(16)[8:])
    return [out]


def test_launches_get_the_addresses_of_this_call() -> None:
    _, program = record(launches, inputs(0))
    assert program is not None
    for seed in (0, 1):
        assert torch.equal(program.run(inputs(seed), 7)[0], launches(*inputs(seed))[0])
    # allocations and launches are left, and what drops a tensor; views are addresses
    assert len(program.steps) == 2 + 3 + 1


def test_what_is_not_needed_is_dropped() -> None:
    seen = []

    def function(x: Tensor, *_: Tensor) -> list[Tensor | None]:
        x.new_empty(5)  # nobody reads it
        once = x + 1
        return [(once * 2).exp()]

    tensors = inputs(0)
    _, program = record(function, tensors)
    assert program is not None

    class Watched(list):
        def __setitem__(self, place: int, value: Any) -> None:
            if isinstance(value, Tensor):
                seen.append(weakref.ref(value))
            super().__setitem__(place, value)

    slots = Watched([*tensors, *program.spare])
    for step in program.steps:
        step(slots, 0)
    assert len(seen) == 3
    assert [x() is None for x in seen] == [True, True, False]


def test_what_cannot_be_run_again_is_not() -> None:
    constant = torch.ones(6, 8)
    assert record(lambda x, *_: [x + constant], inputs(0))[1] is None  # would stay this tensor
    assert record(lambda x, *_: [constant], inputs(0))[1] is None
    assert record(lambda x, *_: [x], inputs(0))[1] is not None
