"""A transformer block as one op: the numbers of its ops one by one, forward and backward."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from exact_interpreter import exact_interpreter
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from navit_kernels import (
    PackPlan,
    plan_pack,
)
from navit_kernels import _block_passes as passes
from navit_kernels import block as op
from navit_kernels._block_arguments import Work
from navit_kernels._block_reference import block as by_ops
from navit_kernels.block import Options, Parameters, block
from navit_kernels.head_norm import NORM_CODES
from navit_kernels.testing import assert_error_within

LENGTHS = [5, 0, 17, 1, 9]


@dataclass(frozen=True)
class Case:
    parts: int = 1  # that qkv comes in
    biases: bool = False
    kind: str | None = None  # of the norms of q and k
    per_head: int = 0  # their weights are (D,), (H, D) or (H, 1, D)
    scales: bool = False
    keep: bool = False
    centred: bool = True
    activation: str = "gelu"
    recompute: bool = False
    x_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32  # of the products
    parameter_dtype: torch.dtype = torch.float32
    heads: int = 2
    head_width: int = 16
    width: int = 24
    mlp_width: int = 40

    def inputs(self, lengths: list[int], device: str = "cpu") -> tuple[Tensor, Tensor, Parameters, Options, list[Any]]:
        random = torch.Generator().manual_seed(0)

        def make(*shape: int, mean: float = 0.0, wanted: bool = True) -> Any:
            if not wanted:
                return None
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
            return (mean + scale * torch.randn(shape, generator=random)).to(device, self.parameter_dtype)

        inner, width = self.heads * self.head_width, self.width
        hidden = self.mlp_width * (2 if self.activation == "swiglu" else 1)
        rows = {1: [3 * inner], 2: [inner, 2 * inner], 3: [inner] * 3}[self.parts]
        qkv = [make(count, width) for count in rows]
        of_heads = [(self.head_width,), (self.heads, self.head_width), (self.heads, 1, self.head_width)][self.per_head]
        normed = self.kind is not None
        parameters = Parameters(
            qkv=qkv[0], qkv_2=qkv[1] if self.parts > 1 else None, qkv_3=qkv[2] if self.parts > 2 else None,
            out=make(width, inner), up=make(hidden, width), down=make(width, self.mlp_width),
            qkv_bias=make(3 * inner, wanted=self.biases), out_bias=make(width, wanted=self.biases),
            up_bias=make(hidden, wanted=self.biases), down_bias=make(width, wanted=self.biases),
            q_weight=make(*of_heads, mean=1, wanted=normed), q_bias=make(*of_heads, wanted=normed and self.biases),
            k_weight=make(*of_heads, mean=1, wanted=normed), k_bias=make(*of_heads, wanted=normed and self.biases),
            norm_weight=make(width, mean=1), norm_bias=make(width, wanted=self.biases),
            following_weight=make(width, mean=1), following_bias=make(width, wanted=self.biases),
            scale_1=make(width, wanted=self.scales), scale_2=make(width, wanted=self.scales),
        )  # fmt: skip
        code = NORM_CODES[self.kind]
        options = Options(
            self.heads,
            0.3,
            self.activation,
            code,
            1e-5,
            code,
            1e-6,
            self.centred,
            1e-5,
            self.centred,
            1e-6,
            self.recompute,
        )
        x_TE, normed_TE = (torch.randn(sum(lengths), width, generator=random) for _ in range(2))
        keep = [torch.rand(len(lengths), generator=random).round() * 2 if self.keep else None for _ in range(2)]
        keep = [None if part is None else part.to(device) for part in keep]
        return x_TE.to(device, self.x_dtype), normed_TE.to(device, self.dtype), parameters, options, keep


def as_node(
    x_TE: Tensor, normed_TE: Tensor, p: Parameters, o: Options, cu_seqlens: Tensor, plan: PackPlan,
    keep_1: Tensor | None = None, keep_2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `block` does on a GPU; on CPU tensors, with Triton interpreting."""
    work = (plan.items, plan.offsets, plan.host_offsets, cu_seqlens, keep_1, keep_2)
    return op._Block.apply(o, x_TE, normed_TE, *work, *p)


def results(case: Case, run: Any, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and all gradients, in `dtype` where one is given."""
    x_TE, normed_TE, parameters, options, keep = case.inputs(LENGTHS, device)

    def leaf(tensor: Tensor) -> Tensor:
        return (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_()

    x_TE, normed_TE = leaf(x_TE), leaf(normed_TE)
    parameters = Parameters(*(None if part is None else leaf(part) for part in parameters))  # type: ignore[arg-type]
    leaves = {"x": x_TE, "normed": normed_TE, **{n: p for n, p in parameters._asdict().items() if p is not None}}
    plan = plan_pack(LENGTHS, device)
    outputs = run(x_TE, normed_TE, parameters, options, plan.cu_seqlens, plan, *keep)
    random = torch.Generator().manual_seed(1)
    kinds = (case.x_dtype, case.dtype)
    cotangents = [torch.randn(x.shape, generator=random).to(t).to(x) for x, t in zip(outputs, kinds, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {
        "x out": outputs[0], "normed out": outputs[1], **{f"d_{n}": g for n, g in zip(leaves, gradients, strict=True)}
    }  # fmt: skip


CASES = [
    Case(),
    Case(parts=2, kind="l2", per_head=2, dtype=torch.float16),
    Case(parts=3, kind="layer_norm", biases=True, x_dtype=torch.float16, dtype=torch.float16),
    Case(biases=True, scales=True, keep=True, kind="rms_norm", per_head=1, centred=False, activation="swiglu"),
    Case(scales=True, dtype=torch.float16, activation="gelu_tanh", recompute=True),
    Case(keep=True, biases=True, x_dtype=torch.float16, dtype=torch.float16, parameter_dtype=torch.float16),
]


def assert_gives_the_numbers_of_its_ops(case: Case, run: Any, device: str = "cpu") -> None:
    exact, at_dtype = results(case, by_ops, dtype=torch.float64), results(case, by_ops)
    for name, actual in results(case, run, device).items():
        assert actual.dtype == at_dtype[name].dtype, name
        assert_error_within(actual, exact[name], at_dtype[name], name)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_node_gives_the_numbers_of_its_ops(case: Case) -> None:
    with exact_interpreter():
        assert_gives_the_numbers_of_its_ops(case, as_node)


@pytest.mark.interpreter
def test_frozen_parameters_get_no_gradients_and_inputs_theirs() -> None:
    case = Case(biases=True, kind="rms_norm")
    x_TE, normed_TE, parameters, *rest, keep = case.inputs(LENGTHS)
    plan = plan_pack(LENGTHS)
    grads = []
    for run in (as_node, by_ops):
        x_TE, normed_TE = x_TE.detach().requires_grad_(), normed_TE.detach().requires_grad_()
        x_out, normed_out = run(x_TE, normed_TE, parameters, *rest, plan.cu_seqlens, plan, *keep)
        grads.append(torch.autograd.grad(x_out.sum() + normed_out.square().sum(), (x_TE, normed_TE)))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("used", [0, 1], ids=["stream", "normed"])
def test_either_result_alone_has_its_gradient(used: int) -> None:
    case = Case(parts=2, kind="l2", per_head=2)
    x_TE, normed_TE, parameters, *rest, keep = case.inputs(LENGTHS)
    trained = [parameters.qkv_2, parameters.up, parameters.k_weight, parameters.following_weight]
    trained = [part.requires_grad_() for part in trained if part is not None]
    plan = plan_pack(LENGTHS)
    grads = [
        torch.autograd.grad(run(x_TE, normed_TE, parameters, *rest, plan.cu_seqlens, plan, *keep)[used].square().sum(),
                            trained, allow_unused=True, materialize_grads=True)
        for run in (as_node, by_ops)
    ]  # fmt: skip
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def assert_replays_give_the_bits_of_the_steps_themselves(
    case: Case, mode: Any, run: Any, lengths: list[int], device: str = "cpu"
) -> None:
    """For other tensors of the kind that was recorded."""

    def results(scale: float) -> list[Tensor]:
        with mode():
            x_TE, normed_TE, parameters, options, keep = case.inputs(lengths, device)
            plan = plan_pack(lengths, device)
            leaves = [x_TE, normed_TE, *(p for p in parameters if p is not None)]
            trained = torch.is_grad_enabled()
            for leaf in leaves:
                leaf.mul_(scale).requires_grad_(trained)
            outputs = run(x_TE, normed_TE, parameters, options, plan.cu_seqlens, plan, *keep)
            cotangents = [x.detach().sin() for x in outputs]
            return [*outputs, *(torch.autograd.grad(outputs, leaves, cotangents) if trained else ())]

    themselves = (op._forward_steps, op._backward_steps)
    op._replayed.cache_clear()
    results(1.0)
    for scale in (1.0, 0.7):
        replayed = results(scale)
        with mock.patch.object(op, "_replayed", return_value=themselves):
            expected = results(scale)
        assert all(torch.equal(*pair) for pair in zip(replayed, expected, strict=True))
        assert [x.stride() for x in replayed] == [x.stride() for x in expected]
    forward, backward = op._replayed()
    op._replayed.cache_clear()
    assert [len(part.programs) for part in (forward, backward)] == [1, int(mode is torch.enable_grad)]
    assert None not in [*forward.programs.values(), *backward.programs.values()]


class Interpreted:
    """Stands for a compiled kernel: takes addresses, as that does, and has the kernel interpreted on what is there."""

    function = packed_metadata = None

    def __init__(self, bound: Any, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        self.bound, self.grid, self.names = bound, grid, list(named)
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
        self.parts = {
            name: (x.dtype, x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize)
            for name, x in tensors.items()
        }

    def run(self, x: int, y: int, z: int, stream: int, function: None, metadata: None, *rest: Any) -> None:
        named = dict(zip(self.names, rest[3:], strict=True))
        for name, (dtype, size) in self.parts.items():
            memory = (ctypes.c_char * max(size, 1)).from_address(named[name] or id(self))
            named[name] = torch.frombuffer(memory, dtype=torch.uint8, count=max(size, 1))[:size].view(dtype)
        self.bound.kernel[self.grid](**self.bound.bound, **named)


@contextmanager
def interpreted_replays() -> Iterator[None]:
    """Kernels on CPU tensors are recorded, and replayed by addresses."""
    from navit_kernels import _jit

    def launch(bound: Any, grid: tuple[int, ...], named: dict[str, Any]) -> None:
        with _disable_current_modes():
            bound.kernel[grid](**bound.bound, **named)
            kernel = Interpreted(bound, grid, named)
        if _jit.recording.recorder is not None:
            _jit.recording.recorder.launched(kernel, grid, list(named.values()))

    with (
        exact_interpreter(),
        mock.patch.object(_jit.BoundKernel, "launch", launch),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True),
        mock.patch("navit_kernels._replay.may_replay", return_value=True),
        mock.patch("navit_kernels._replay.CALLS", 0),
    ):
        yield


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("case", "mode"),
    [(CASES[1], torch.enable_grad), (CASES[2], torch.no_grad), *((CASES[3], mode) for mode in (MODES[0], MODES[2]))],
    ids=str,
)
def test_replays_give_the_bits_of_the_steps_themselves(case: Case, mode: Any) -> None:
    def run(x: Tensor, normed: Tensor, p: Parameters, o: Options, cu: Tensor, plan: PackPlan, *keep: Any) -> Any:
        if torch.is_grad_enabled():
            return as_node(x, normed, p, o, cu, plan, *keep)
        return op._run_forward(x, normed, Work(plan.items, plan.offsets, plan.host_offsets, cu, *keep), p, o, False)[:2]

    with interpreted_replays():
        assert_replays_give_the_bits_of_the_steps_themselves(case, mode, run, LENGTHS)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_torch_compile_is_told_is_what_the_kernels_give(case: Case) -> None:
    x_TE, normed_TE, parameters, options, keep = case.inputs(LENGTHS)
    plan = plan_pack(LENGTHS)
    work = (plan.items, plan.offsets, plan.host_offsets, plan.cu_seqlens, *keep)
    shared = (*work, *parameters, *options)

    def on_meta(values: Any) -> list[Any]:
        return [x.to("meta") if isinstance(x, Tensor) else x for x in values]

    def kinds(outputs: Any) -> list[Any]:
        return [(x.shape, x.dtype) for x in outputs]

    for trained in (False, True):
        inputs = (x_TE, normed_TE, *shared, trained)
        outputs = op._registered_forward(passes.kernels, *inputs)
        assert kinds(outputs) == kinds(torch.ops.navit_kernels.block(*on_meta(inputs)))
    for weight_grads in (False, True):
        inputs = (x_TE, normed_TE, outputs[0], normed_TE, *outputs[2:], *shared, weight_grads)
        gradients = op._registered_backward(passes.kernels, *inputs)
        assert kinds(gradients) == kinds(torch.ops.navit_kernels.block_backward(*on_meta(inputs)))


def test_what_the_kernels_do_not_have_is_not_taken() -> None:
    case = Case()
    for device, changes, taken in (
        ("cpu", {}, False), ("meta", {}, True), ("meta", {"head_width": 12}, False),
        ("meta", {"head_width": 136}, False), ("meta", {"dtype": torch.float64}, False),
        ("meta", {"x_dtype": torch.float64}, False),
    ):  # fmt: skip
        case = Case(**changes)
        x_TE, normed_TE, parameters, options, _ = case.inputs(LENGTHS, device)
        assert op._takes(x_TE, normed_TE, parameters, options.heads) == taken, (device, changes)
    mixed = parameters._replace(up=parameters.up.to(torch.bfloat16))
    assert not op._takes(normed_TE.float(), normed_TE.float(), mixed, options.heads)


# On a GPU


def by_registered_op(
    x_TE: Tensor,
    normed_TE: Tensor,
    p: Parameters,
    o: Options,
    cu_seqlens: Tensor,
    plan: PackPlan,
    *keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    work = (plan.items, plan.offsets, plan.host_offsets, cu_seqlens, *keep)
    return torch.ops.navit_kernels.block(x_TE, normed_TE, *work, *p, *o, True)[:2]


GPU_CASES = [
    dataclasses.replace(case, head_width=64, width=128, mlp_width=256, **{
        name: torch.bfloat16 for name in ("x_dtype", "dtype", "parameter_dtype") if getattr(case, name) == torch.float16
    })
    for case in CASES
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("run", [block, by_registered_op], ids=["eager", "registered"])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_one_node_gives_the_numbers_of_its_ops(case: Case, run: Any) -> None:
    assert_gives_the_numbers_of_its_ops(case, run, "cuda")


@pytest.mark.gpu
def test_gpu_opcheck() -> None:
    """In float32, which leaves no part of an output unwritten."""
    everywhere = dict.fromkeys(("x_dtype", "dtype", "parameter_dtype"), torch.float32)
    x_TE, normed_TE, parameters, options, keep = dataclasses.replace(GPU_CASES[1], **everywhere).inputs(LENGTHS, "cuda")
    parameters = Parameters(*(None if p is None else p.requires_grad_() for p in parameters))  # type: ignore[arg-type]
    plan = plan_pack(LENGTHS, "cuda")
    work = (plan.items, plan.offsets, plan.host_offsets, plan.cu_seqlens, *keep)
    inputs = (x_TE.requires_grad_(), normed_TE.requires_grad_(), *work, *parameters, *options, True)
    torch.library.opcheck(torch.ops.navit_kernels.block.default, inputs)


@pytest.mark.gpu
def test_gpu_inference_and_training_give_the_same_bits() -> None:
    x_TE, normed_TE, parameters, options, keep = GPU_CASES[1].inputs(LENGTHS, "cuda")
    plan = plan_pack(LENGTHS, "cuda")
    without = block(x_TE, normed_TE, parameters, options, plan.cu_seqlens, plan, *keep)
    with_gradients = block(x_TE.requires_grad_(), normed_TE, parameters, options, plan.cu_seqlens, plan, *keep)
    assert all(torch.equal(*pair) for pair in zip(without, with_gradients, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_replays_give_the_bits_of_the_steps_themselves(case: Case, mode: Any) -> None:
    """Of segments of all classes."""
    with mock.patch("navit_kernels._replay.CALLS", 0):
        assert_replays_give_the_bits_of_the_steps_themselves(case, mode, block, [5, 0, 130, 1, 300, 1100], "cuda")
