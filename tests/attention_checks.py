"""Cases of varlen_attention and what must hold of them, in the interpreter as on a GPU.

T tokens, S segments (images), H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from unittest import mock

import torch
from exact_interpreter import exact_interpreter
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from navit_kernels import HeadNorm, PackPlan, plan_pack, varlen_attention, varlen_attention_qkvpacked
from navit_kernels.head_norm import NORM_CODES
from navit_kernels.plan import TILE
from navit_kernels.self_attention import arguments, op
from navit_kernels.self_attention.config import ClassConfig, choose_config
from navit_kernels.testing import assert_error_within, cu_seqlens_of

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = ("layer_norm", "rms_norm", "l2", None)
EVERY_CLASS = (17, 300, 60, 0, 1, 200, 100, 20)  # tokens: each of the plan's classes, in no order
AWKWARD = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 513, 0)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN and of the largest integers: what a kernel forgets to write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def launch_table(choose: Callable[..., ClassConfig]) -> Iterator[None]:
    """Calls inside are launched as `choose` says instead of choose_config."""
    from navit_kernels.self_attention import launch, signature

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(signature, "choose_config", choose))
        stack.enter_context(mock.patch.object(launch, "known_signature", signature.Signature))
        stack.enter_context(mock.patch.dict(arguments._known, clear=True))
        yield


@contextmanager
def kernels_on_cpu(arch: int = 90) -> Iterator[None]:
    """The kernels' way through the public op for CPU tensors, in the interpreter, with an architecture's launches."""
    from navit_kernels.self_attention import launch

    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("navit_kernels", "IMPL"))
        library.impl("plan", op._plan, "CPU")
        library.impl("varlen_attention", op._forward, "CPU")
        library.impl("varlen_attention_backward", op._backward_kernels, "CPU")
        takes_reference = mock.patch.object(arguments, "takes_reference", lambda backend, q_THD: backend == "reference")
        stack.enter_context(takes_reference)
        stack.enter_context(mock.patch.object(launch, "architecture", return_value=arch))
        stack.enter_context(exact_interpreter())
        yield


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = EVERY_CLASS
    heads: int = 2
    width: int = 64
    dtype: torch.dtype = FP16
    q_kind: str | None = "layer_norm"
    k_kind: str | None = "layer_norm"
    weight: str = "shared"  # by all heads, "per head", "mixed": per head for q alone, or "absent"
    bias: bool = True
    lengths_k: tuple[int, ...] | None = None
    planned: bool = True  # by plan_pack, or on the device from cu_seqlens alone
    eps: tuple[float | None, float | None] = (None, None)  # of q's norm and of k's
    parameters: torch.dtype = FP32
    mean: float = 0.0  # of the keys, in standard deviations
    spread: float = 1.0  # of the scores, roughly
    heavy_tails: bool = False  # Student's t of 2 degrees of freedom, cut at 100, and a few entries of ±100

    def __str__(self) -> str:
        """What differs from the default, short enough for a test's name."""
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        short = {
            name: f"{len(value)} images"
            if isinstance(value, tuple) and len(value) > 6
            else str(value).removeprefix("torch.")
            for name, value in changed.items()
        }
        return ", ".join(f"{name}={value}" for name, value in short.items()).replace("lengths=", "") or "default"

    def inputs(self, device: str = "cpu", seed: int = 0, drawn_on: str = "cpu") -> dict[str, Tensor]:
        """All tensors of a call: q, k, v (views of one qkv where lengths agree), the norms' parameters, dout.

        drawn_on: where numbers are drawn; they are the same on every machine if that is the CPU.
        """
        generator = torch.Generator(drawn_on).manual_seed(seed)
        random = partial(torch.randn, generator=generator, device=drawn_on)
        tokens, tokens_k = sum(self.lengths), sum(self.lengths if self.lengths_k is None else self.lengths_k)
        x_T4HD = random(max(tokens, tokens_k), 4, self.heads, self.width)
        if self.heavy_tails:
            x_T4HD = (x_T4HD / random(2, *x_T4HD.shape).square().mean(0).sqrt()).clamp(-100, 100)
            few = x_T4HD[:: max(1, len(x_T4HD) // 4)]
            columns = torch.randint(self.width, (*few.shape[:3], 1), generator=generator, device=drawn_on)
            few.scatter_(-1, columns, 100 * random(columns.shape).sign())
        x_T4HD[:, 1] += self.mean
        dout_THD = x_T4HD[:tokens, 3].to(self.dtype)
        q_THD, k_THD, v_THD = x_T4HD[:, :3].contiguous().to(device, self.dtype).unbind(1)
        tensors = {"q": q_THD[:tokens], "k": k_THD[:tokens_k], "v": v_THD[:tokens_k]}
        for side, kind in (("q", self.q_kind), ("k", self.k_kind)):
            per_head = self.weight == "per head" or (self.weight, side) == ("mixed", "q")
            shape = (self.heads, self.width) if per_head else (self.width,)
            if kind is not None and self.weight != "absent":
                tensors[f"{side}_weight"] = (1 + 0.3 * random(shape)).to(self.parameters)
            if kind is not None and self.bias:
                tensors[f"{side}_bias"] = (0.3 * random(shape)).to(self.parameters)
        tensors["dout"] = dout_THD.contiguous()
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def options(self, tensors: dict[str, Tensor]) -> dict[str, object]:
        """The keyword arguments that a call takes besides the pack's."""
        norms = {
            f"{side}_norm": kind and HeadNorm(kind, tensors.get(f"{side}_weight"), tensors.get(f"{side}_bias"), eps)
            for side, kind, eps in zip("qk", (self.q_kind, self.k_kind), self.eps, strict=True)
        }
        return norms if self.spread == 1.0 else norms | {"softmax_scale": self.spread * self.width**-0.5}

    def plan(self, device: torch.device | str) -> PackPlan | None:
        return plan_pack(self.lengths, device, self.lengths_k) if self.planned else None

    def attend(self, tensors: dict[str, Tensor], backend: str = "auto") -> tuple[Tensor, Tensor]:
        """(out, lse) by the public function."""
        device = tensors["q"].device
        cu_seqlens_k = None if self.lengths_k is None else cu_seqlens_of(list(self.lengths_k), device)
        return varlen_attention(
            tensors["q"], tensors["k"], tensors["v"], cu_seqlens_of(list(self.lengths), device), cu_seqlens_k,
            plan=self.plan(device), return_lse=True, backend=backend, **self.options(tensors),
        )  # fmt: skip

    def results(
        self, tensors: dict[str, Tensor], backend: str = "auto", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The output, the log-sum-exp and the gradients of all inputs."""
        leaves = {k: (v if dtype is None else v.to(dtype)).detach().requires_grad_() for k, v in tensors.items()}
        dout = leaves.pop("dout").detach()
        out, lse = self.attend(leaves, backend)
        gradients = torch.autograd.grad(out, list(leaves.values()), dout, materialize_grads=out.numel() == 0)
        return {"out": out.detach(), "lse": lse, **{f"d{k}": v for k, v in zip(leaves, gradients, strict=True)}}


# On a GPU most tests share the kernels of MAIN: each other case compiles a dozen.
MAIN = Case(AWKWARD, heads=2, width=64, dtype=BF16)
CROSS = replace(MAIN, lengths=(20, 300, 31, 0, 5, 100, 0), lengths_k=(300, 20, 0, 7, 140, 60, 0))


def judged(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results as their errors are judged, each alone: the log-sum-exp where it is finite, and nothing for the gradient
    of k's bias, which is zero."""
    finite = {"lse": results["lse"][results["lse"].isfinite()]}
    return {name: tensor for name, tensor in (results | finite).items() if name != "dk_bias"}


def assert_matches_reference(case: Case, device: str, draws: int = 1) -> None:
    """Every result's error is within its bound, the mean over some draws of the inputs."""
    runs = []
    for seed in range(draws):
        tensors = case.inputs(device, seed)
        exact, at_dtype = case.results(tensors, "reference", FP64), case.results(tensors, "reference")
        with poisoned_memory():
            actual = case.results(tensors)
        assert {name: tensor.dtype for name, tensor in actual.items()} == {n: x.dtype for n, x in at_dtype.items()}
        assert torch.equal(actual["lse"].isneginf(), exact["lse"].isneginf())
        if "dk_bias" in actual:
            assert not actual["dk_bias"].any(), "a bias of k changes no output"
        runs.append([judged(results) for results in (actual, exact, at_dtype)])
    for name in runs[0][0]:
        assert_error_within(*([run[i][name] for run in runs] for i in range(3)), name)


def images_of(case: Case, results: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What belongs to one image each: its rows of the output and of the gradients."""
    sizes = dict.fromkeys(("dk", "dv"), case.lengths_k or case.lengths)
    parts = {name: results[name].split(sizes.get(name, case.lengths)) for name in ("out", "dq", "dk", "dv")}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(case.lengths))]


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor], name: object = "") -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert torch.equal(tensor, expected[key]), f"{key} {name}"


def assert_other_images_do_not_leak(case: Case, device: str) -> None:
    """Every second image full of NaN, then the others full of inf: not a bit of the rest changes."""
    tensors = case.inputs(device)
    clean = images_of(case, case.results(tensors))
    for poison, first in ((float("nan"), 0), (float("inf"), 1)):
        poisoned = {name: tensor.clone() for name, tensor in tensors.items()}
        for name, lengths in (
            ("q", case.lengths),
            ("k", case.lengths_k),
            ("v", case.lengths_k),
            ("dout", case.lengths),
        ):
            for rows in poisoned[name].split(lengths or case.lengths)[first::2]:
                rows.fill_(poison)
        with poisoned_memory():
            dirty = images_of(case, case.results(poisoned))
        for i in range(1 - first, len(dirty), 2):
            assert_same_bits(dirty[i], clean[i], f"of image {i} beside {poison}")
        assert any(not image["out"].isfinite().all() for image in dirty[first::2])


def assert_a_tile_chooses_its_own_maximum(case: Case, device: str) -> None:
    """Queries of one tile grow so that under the fixed maximum all its P would be 0: it takes the running one, and not
    a bit of the other tiles changes, of its own image and of others, which take the fixed one as before."""
    small = case.inputs(device)
    start = case.lengths[0] + TILE
    end = start + TILE
    assert end < case.lengths[0] + case.lengths[1]
    large = small | {"q": small["q"].clone()}
    large["q"][start:end] *= 64
    with launch_table(lambda *args: replace(choose_config(*args), fixed_max=False)):
        online, _ = case.attend(small)
    before, after = case.attend(small), case.attend(large)
    assert all(tensor.isfinite().all() for tensor in after)
    for tensors in zip(before, after, strict=True):
        rows = [x if x.dim() == 3 else x.T for x in tensors]
        assert torch.equal(*(torch.cat([x[:start], x[end:]]) for x in rows)), "other tiles"
    assert not (before[0] == online)[case.lengths[0] :].flatten(1).all(1).any(), "the fixed maximum was not taken"


def assert_alone_as_in_company(case: Case, device: str, packs: int) -> None:
    """An image has the same bits alone and in packs of any company, place and order, planned on either side."""
    random = torch.Generator().manual_seed(0)
    tensors = case.inputs(device)
    parameters = {name: tensor for name, tensor in tensors.items() if "_" in name}
    rows = {name: tensors[name].split(case.lengths) for name in ("q", "k", "v", "dout")}

    def pack(order: list[int], planned: bool) -> tuple[Case, dict[str, Tensor]]:
        packed = {name: torch.cat([parts[i] for i in order]) for name, parts in rows.items()}
        own = replace(case, lengths=tuple(case.lengths[i] for i in order), planned=planned)
        return own, own.results(packed | parameters)

    alone = [images_of(*pack([i], True))[0] for i in range(len(case.lengths))]
    for _ in range(packs):
        size = int(torch.randint(2, len(alone) + 1, (), generator=random))
        order = torch.randint(len(alone), (size,), generator=random).tolist()
        for planned in (True, False):
            own, results = pack(order, planned)
            expected = {name: torch.cat([alone[i][name] for i in order]) for name in alone[0]}
            assert_same_bits({name: results[name] for name in expected}, expected, f"of {own.lengths}")


def assert_packed_is_unpacked(case: Case, device: str) -> None:
    """varlen_attention_qkvpacked: the same bits, and the gradient one contiguous (T, 3, H, D)."""
    tensors = case.inputs(device)
    expected = case.results(tensors)
    qkv_T3HD = torch.stack([tensors[name] for name in "qkv"], 1).requires_grad_()
    parameters = {k: v.detach().requires_grad_() for k, v in tensors.items() if "_" in k}
    out_THD = varlen_attention_qkvpacked(
        qkv_T3HD, cu_seqlens_of(list(case.lengths), device), plan=case.plan(device), **case.options(parameters)
    )
    grad_T3HD, *gradients = torch.autograd.grad(out_THD, [qkv_T3HD, *parameters.values()], tensors["dout"])
    assert grad_T3HD.is_contiguous()
    actual = {"out": out_THD, **dict(zip(("dq", "dk", "dv"), grad_T3HD.unbind(1), strict=True))}
    actual |= {f"d{name}": gradient for name, gradient in zip(parameters, gradients, strict=True)}
    assert_same_bits(actual, {name: expected[name] for name in actual})


def assert_strides_do_not_matter(case: Case, device: str) -> None:
    """Head-major tensors, a dout without strides, parameters that are views: the same bits as contiguous ones."""

    def strided(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if name in ("q", "k", "v"):
                yield name, tensor.transpose(0, 1).contiguous().transpose(0, 1)
            elif name != "dout":
                yield name, torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]
            else:
                yield name, tensor.new_ones(()).expand(tensor.shape)

    views = dict(strided(case.inputs(device)))
    assert_same_bits(case.results(views), case.results({k: v.contiguous() for k, v in views.items()}))


def assert_opcheck(device: str) -> None:
    """In float32, which leaves no part of an output unwritten but the plan's unused items."""
    case = Case((3, 0, 20), 1, 16, FP32)
    tensors = case.inputs(device)
    plan, cu_seqlens, tokens = plan_pack(case.lengths, device), cu_seqlens_of(list(case.lengths), device), 23
    ops = torch.ops.navit_kernels
    q, k, v = (tensors[name].contiguous().requires_grad_() for name in "qkv")
    packed = torch.stack([q, k, v], 1).detach().requires_grad_()
    parameters = [tensors[name].requires_grad_() for name in ("q_weight", "q_bias", "k_weight", "k_bias")]
    numbers = (NORM_CODES[case.q_kind], 1e-6, NORM_CODES[case.k_kind], 1e-6, case.width**-0.5, False)
    with poisoned_memory():
        torch.library.opcheck(ops.plan.default, (cu_seqlens, None, tokens, tokens))
        for qkv, host in (((q, k, v), plan.host_offsets), ((packed, None, None), None)):
            shared = (*qkv, plan.items, plan.offsets, host, *parameters, *numbers)
            torch.library.opcheck(ops.varlen_attention.default, (*shared, True))
            with torch.no_grad():
                saved = ops.varlen_attention(*shared, True)
            detached = [x.detach() if isinstance(x, Tensor) else x for x in (tensors["dout"], *saved, *shared)]
            torch.library.opcheck(ops.varlen_attention_backward.default, (*detached, True))


def assert_compiles_once(device: str, compiler: str, planned: bool, packed: bool) -> None:
    case = Case(heads=1, width=64, dtype=BF16) if device == "cuda" else Case(heads=1, width=16)
    counter = CompileCounterWithBackend(compiler)

    @partial(torch.compile, backend=counter, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, qkv: Tensor, cu_seqlens: Tensor, **options: object) -> Tensor:
        if packed:
            return varlen_attention_qkvpacked(qkv * 1, cu_seqlens, **options)
        return varlen_attention(q, k, v, cu_seqlens, **options) * 1

    for lengths in ([3, 4], [5, 0, 1], [1, 1], [1, 1, 1, 9], [300, 16], [40, 7, 0, 0, 0, 1])[
        : None if device == "cuda" else 4
    ]:
        own = replace(case, lengths=tuple(lengths), planned=planned)
        tensors = {name: tensor.requires_grad_(name != "dout") for name, tensor in own.inputs(device).items()}
        q, k, v = (tensors[name].detach().contiguous().requires_grad_() for name in "qkv")
        qkv = torch.stack([q, k, v], 1).detach().requires_grad_()
        plan, cu_seqlens = own.plan(device), cu_seqlens_of(lengths, device)
        for tensor in (q, k, v, qkv, cu_seqlens, *((plan.cu_seqlens, plan.items) if plan else ())):
            torch._dynamo.mark_dynamic(tensor, 0)
        out = attend(q, k, v, qkv, cu_seqlens, plan=plan, **own.options(tensors))
        gradients = torch.autograd.grad(out, [qkv] if packed else [q, k, v], tensors["dout"])
        expected = own.results(own.inputs(device))
        if packed:
            gradients = gradients[0].unbind(1)
        actual = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
        assert_same_bits(actual, {name: expected[name] for name in actual})
    assert counter.frame_count == 1


def assert_saved_tensors_may_move(case: Case, device: str) -> None:
    """Hooks that keep saved tensors elsewhere give them back at another address and without the strides of a view."""
    tensors = case.inputs(device)
    assert not tensors["q"].is_contiguous()
    expected = case.results(tensors)
    moved = partial(torch.clone, memory_format=torch.contiguous_format)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, moved):
        assert_same_bits(case.results(tensors), expected)


def assert_checkpointing_changes_nothing(case: Case, device: str) -> None:
    tensors = {k: v.detach().requires_grad_(k != "dout") for k, v in case.inputs(device).items()}
    leaves = [tensor for name, tensor in tensors.items() if name != "dout"]
    attend: Callable = lambda *_: case.attend(tensors)[0]  # noqa: E731
    outs = [attend(), torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False)]
    plain, again = (torch.autograd.grad(out, leaves, tensors["dout"]) for out in outs)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
