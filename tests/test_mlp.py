"""feed_forward: up, activation and down; on Hopper the activation and its backward behind the matrix products."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
import torch
from ahead_of_time import SHARED_MEMORY_LIMIT, compile_launches, machine_code
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from navit_kernels.mlp import feed_forward
from navit_kernels.testing import assert_error_within

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")
UNCHOSEN = {
    "up_chunk": 32,
    "down_chunk": 8,
    "down_ahead": 3,
}  # a launch that is not yet measured, of all the kernels can


@dataclass(frozen=True)
class Case:
    activation: str = "gelu_tanh"
    width: int = 24
    mlp_width: int = 40
    dtype: torch.dtype = FP16
    bias: bool = True

    def inputs(self, tokens: int, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
        random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        hidden = self.mlp_width * (2 if self.activation == "swiglu" else 1)
        tensors = {
            "x_TE": random(tokens, self.width),
            "up_UE": random(hidden, self.width) * 1.5 * self.width**-0.5,
            "down_EM": random(self.width, self.mlp_width) * self.mlp_width**-0.5,
            "up_bias_U": random(hidden) if self.bias else None,
            "down_bias_E": random(self.width) if self.bias else None,
        }
        return {name: None if t is None else t.to(self.dtype).to(device) for name, t in tensors.items()}


def results(
    case: Case,
    inputs: dict[str, Tensor | None],
    backend: str,
    dtype: torch.dtype | None = None,
    op: Callable = feed_forward,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """The output and the gradients of all inputs under a fixed random cotangent; in `dtype` where one is given."""
    leaves = {
        name: tensor.to(dtype or tensor.dtype).detach().requires_grad_()
        for name, tensor in inputs.items()
        if tensor is not None
    }
    out = op(**leaves, activation=case.activation, backend=backend, recompute=recompute)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype).to(out)
    return {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))}


def assert_matches_reference(case: Case, tokens: int, device: str) -> None:
    inputs = case.inputs(tokens, device)
    exact = results(case, inputs, "reference", torch.float64)
    at_dtype = results(case, inputs, "reference")
    for name, actual in results(case, inputs, "triton").items():
        assert actual.dtype == at_dtype[name].dtype, name
        assert_error_within(actual, exact[name], at_dtype[name], name)


def name_of(case: Case) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in dataclasses.astuple(case))


# The reference


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_two_linear_layers_around_the_activation(activation: str) -> None:
    inputs = Case(activation, dtype=FP32).inputs(5)
    x_TE, up_UE, down_EM, up_bias_U, down_bias_E = inputs.values()
    hidden = x_TE @ up_UE.T + up_bias_U
    if activation == "swiglu":
        act = hidden[:, :40] * hidden[:, :40].sigmoid() * hidden[:, 40:]
    else:
        act = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    torch.testing.assert_close(feed_forward(**inputs, activation=activation), act @ down_EM.T + down_bias_E)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradients(activation: str) -> None:
    inputs = Case(activation, 3, 4, torch.float64).inputs(2)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs.values())
    assert torch.autograd.gradcheck(partial(feed_forward, activation=activation), leaves)


def test_autocast_brings_all_to_its_dtype() -> None:
    inputs = Case(dtype=FP32).inputs(3)
    with torch.autocast("cpu", BF16):
        assert feed_forward(**inputs).dtype == BF16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_UE": torch.ones(40, 23)}, r"up must be \(M, E\) = \(40, 24\), got \(40, 23\)"),
        ({"activation": "swiglu"}, r"up must be \(2M, E\) = \(80, 24\), got \(40, 24\)"),
        ({"down_EM": torch.ones(23, 40)}, r"down must be \(E, M\) = \(24, any\), got \(23, 40\)"),
        ({"up_bias_U": torch.ones(39)}, r"up_bias must be \(U,\) = \(40\), got \(39,\)"),
        ({"down_bias_E": torch.ones(40)}, r"down_bias must be \(E,\) = \(24\), got \(40,\)"),
        ({"up_UE": torch.ones(40, 24)}, "up must be of x's dtype torch.float16, got torch.float32"),
        ({"activation": "relu"}, "activation must be 'gelu_tanh' or 'gelu' or 'swiglu', got 'relu'"),
    ],
)
def test_errors_say_name_expected_and_got(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feed_forward(**{**Case().inputs(3), **change})


# The op: torch's products on a CPU, the kernels on a GPU


def assert_other_tokens_do_not_leak(case: Case, tokens: int, device: str) -> None:
    """Neighbours full of NaN, in the same tile and in others, change no bit of a token's output or gradient."""
    inputs = case.inputs(tokens, device)
    own = slice(tokens // 3, tokens // 3 + 5)
    poisoned = {**inputs, "x_TE": inputs["x_TE"].clone()}
    poisoned["x_TE"][: own.start] = poisoned["x_TE"][own.stop :] = float("nan")
    clean, dirty = results(case, inputs, "triton"), results(case, poisoned, "triton")
    for name in ("out", "x_TE"):
        assert torch.equal(clean[name][own], dirty[name][own]), name
        assert dirty[name][: own.start].isnan().all()


def assert_opcheck(case: Case, device: str) -> None:
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(9, device).values()]
    for keep_hidden in (True, False):
        arguments = (*inputs, case.activation, keep_hidden)
        torch.library.opcheck(torch.ops.navit_kernels.feed_forward.default, arguments)


def assert_compiles_once(device: str, compiler: str) -> None:
    case = Case(dtype=FP16 if device == "cpu" else BF16)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(feed_forward, backend=counter, fullgraph=True)

    def op(**inputs: object) -> Tensor:
        torch._dynamo.mark_dynamic(inputs["x_TE"], 0)
        return compiled(**inputs)

    for tokens in (7, 130, 16, 2, 33):
        inputs = case.inputs(tokens, device)
        actual = results(case, inputs, "triton", op=op)
        for name, expected in results(case, inputs, "triton").items():
            assert_error_within(actual[name], expected.double(), expected, name)
    assert counter.frame_count == 1


def cases() -> Iterator[Case]:
    for activation, bias in itertools.product(ACTIVATIONS, (False, True)):
        yield Case(activation, bias=bias)
        yield Case(activation, dtype=FP32, bias=bias)  # torch's products
    yield Case(width=23, mlp_width=39)  # no rows of 16 bytes: torch's products
    yield Case(width=72, mlp_width=136)


@pytest.mark.parametrize("case", list(cases()), ids=name_of)
def test_op_matches_reference(case: Case) -> None:
    assert_matches_reference(case, 37, "cpu")


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129])
def test_op_at_awkward_sizes(tokens: int) -> None:
    assert_matches_reference(Case(width=136, mlp_width=136), tokens, "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keeping_only_x_gives_the_same(activation: str) -> None:
    """Bit for bit but for the sums inside a product, which torch may order in another way."""
    case = Case(activation)
    inputs = case.inputs(37)
    again = results(case, inputs, "triton", recompute=True)
    for name, expected in results(case, inputs, "triton").items():
        assert_error_within(again[name], expected.double(), results(case, inputs, "reference")[name], name)


def test_what_is_kept_for_the_backward() -> None:
    case = Case("swiglu", bias=False)
    inputs = {name: None if t is None else t.requires_grad_() for name, t in case.inputs(37).items()}
    for recompute, expected in ((False, 37 * 80), (True, 0)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            feed_forward(**inputs, activation="swiglu", recompute=recompute, backend="triton")
        of_inputs = {t.data_ptr() for t in inputs.values() if t is not None}
        assert sum(t.numel() for t in kept if t.data_ptr() not in of_inputs) == expected


def test_other_tokens_do_not_leak() -> None:
    assert_other_tokens_do_not_leak(Case(), 150, "cpu")


def test_strided_inputs() -> None:
    case = Case()
    inputs = case.inputs(9)
    strided = {**inputs, "x_TE": inputs["x_TE"].repeat(1, 2)[:, :24], "down_EM": inputs["down_EM"].t().clone().t()}
    for name, expected in results(case, inputs, "triton").items():
        assert_error_within(results(case, strided, "triton")[name], expected.double(), expected, name)


def test_frozen_weights_get_no_gradient() -> None:
    inputs = Case().inputs(9)
    inputs["x_TE"].requires_grad_()
    expected = results(Case(), inputs, "triton")["x_TE"]
    out = feed_forward(**inputs, backend="triton")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    assert torch.equal(torch.autograd.grad(out, inputs["x_TE"], dout)[0], expected)


@pytest.mark.parametrize("case", [Case(), Case("swiglu", bias=False), Case(dtype=FP32)], ids=name_of)
def test_opcheck(case: Case) -> None:
    assert_opcheck(case, "cpu")


def test_compile_once_for_all_batches() -> None:
    assert_compiles_once("cpu", "aot_eager")


# float32 weights under autocast


def assert_float32_weights_get_float32_gradients(case: Case, tokens: int, device: str) -> None:
    """As near the truth as the reference's; on a GPU not rounded to 16 bits between, eager or compiled."""
    inputs = case.inputs(tokens, device)
    leaves = {name: None if t is None else t.float().requires_grad_() for name, t in inputs.items()}
    names, tensors = zip(*((name, leaf) for name, leaf in leaves.items() if leaf is not None), strict=True)
    exact = results(case, inputs, "reference", torch.float64)

    def gradients(op: Callable, backend: str) -> dict[str, Tensor]:
        with torch.autocast(device, case.dtype):
            out = op(**leaves, activation=case.activation, backend=backend)
        assert out.dtype == case.dtype
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype).to(out)
        return dict(zip(names, torch.autograd.grad(out, tensors, dout), strict=True))

    compiled = torch.compile(feed_forward, backend="aot_eager", fullgraph=True)
    at_dtype = gradients(feed_forward, "reference")
    for op in (feed_forward, compiled):
        for name, actual in gradients(op, "triton").items():
            assert actual.dtype == torch.float32, name
            assert_error_within(actual, exact[name], at_dtype[name].to(case.dtype), name)
            if name in ("up_UE", "down_EM"):
                rounded = torch.equal(actual, actual.to(case.dtype).float())
                assert rounded == (device == "cpu"), name


@pytest.mark.parametrize("case", [Case(dtype=BF16), Case("swiglu", dtype=BF16, bias=False)], ids=name_of)
def test_float32_weights_get_float32_gradients(case: Case) -> None:
    assert_float32_weights_get_float32_gradients(case, 37, "cpu")


def test_opcheck_of_float32_weights() -> None:
    inputs = Case(dtype=BF16).inputs(9)
    x_TE, up_UE, down_EM, *biases = (t.requires_grad_() for t in inputs.values())
    weights = [t.detach().float().requires_grad_() for t in (up_UE, down_EM)]
    for keep_hidden in (True, False):
        arguments = (x_TE, *weights, *biases, "gelu", keep_hidden)
        torch.library.opcheck(torch.ops.navit_kernels.feed_forward.default, arguments)


# Ahead of time


def launch_on_meta(case: Case, config: dict[str, int]) -> None:
    from navit_kernels.mlp import kernel

    inputs = case.inputs(1000, "meta")
    x_TE, up_UE, down_EM, up_bias_U, _ = inputs.values()
    with mock.patch.object(kernel, "choose_config", return_value=config):
        out_TE, hidden_TU = kernel.feed_forward(*inputs.values(), case.activation, True)
        kernel.feed_forward(*inputs.values(), case.activation, False)
        kernel.feed_forward_backward(out_TE, x_TE, hidden_TU, up_UE, down_EM, up_bias_U, case.activation, case.dtype)


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("case", "spills"),
    [
        # bytes, the most on Tritons 3.6.0 and 3.9.0; once a tile, mostly by the activation's warpgroup
        (Case("gelu_tanh", 768, 3072, BF16, bias=False), 32),
        (Case("gelu_tanh", 1152, 4304, BF16), 112),
        (Case("gelu", 1024, 4096, BF16), 64),
        (Case("gelu_tanh", 1024, 4096, FP16, bias=False), 72),
        (Case("swiglu", 768, 2048, BF16, bias=False), 64),
        (Case("swiglu", 1024, 2736, FP16), 64),
    ],
    ids=str,
)
def test_programs_fit_and_products_are_asynchronous(case: Case, spills: int) -> None:
    """All of a tile's columns in one wgmma, of which the compiler, which can serialize them, waits for none alone."""
    from navit_kernels.mlp.kernel import choose_config

    config = choose_config(90, case.activation, case.width, case.bias)
    assert config is not None
    compiled = compile_launches("sm_90", lambda: launch_on_meta(case, config))
    assert [one.name for one in compiled] == ["up_kernel", "up_kernel", "down_backward_kernel"]
    for one in compiled:
        assert one.spills <= spills, f"{one.name} spills {one.spills} bytes"
        assert one.registers * 384 <= 1 << 16
        assert one.shared <= SHARED_MEMORY_LIMIT["sm_90"]
        assert one.asm["ptx"].count("wgmma.mma_async.sync.aligned.m64n256k16") == 2 * 4
        code = machine_code(one)
        assert code.count("HGMMA.64x256x16") == 2 * 4
        assert code.count("WARPGROUP.DEPBAR") <= one.asm["ptx"].count("wgmma.wait_group")


@pytest.mark.compile_only
@pytest.mark.parametrize("case", [Case("gelu", 24, 40), Case("swiglu", 72, 136, bias=False)], ids=name_of)
def test_launches_that_no_table_chooses_compile(case: Case) -> None:
    for one in compile_launches("sm_90", lambda: launch_on_meta(case, UNCHOSEN)):
        assert one.shared <= SHARED_MEMORY_LIMIT["sm_90"]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(cases()), ids=name_of)
def test_gpu_matches_reference(case: Case) -> None:
    for tokens, dtype in itertools.product((1, 127, 128, 129), {case.dtype, BF16}):
        assert_matches_reference(dataclasses.replace(case, dtype=dtype), tokens, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "width", "mlp_width"), [(1000, 1152, 4304), (20000, 768, 3072)])
def test_gpu_matches_reference_where_programs_take_many_tiles(
    activation: str, tokens: int, width: int, mlp_width: int
) -> None:
    assert_matches_reference(Case(activation, width, mlp_width, BF16), tokens, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif("torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9", reason="needs Hopper")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gpu_launches_that_no_table_chooses_match_reference(activation: str, dtype: torch.dtype) -> None:
    from navit_kernels.mlp import kernel

    with mock.patch.object(kernel, "choose_config", return_value=UNCHOSEN):
        for width, mlp_width, tokens in ((24, 40, 1), (72, 136, 129), (768, 3072, 20000)):
            assert_matches_reference(Case(activation, width, mlp_width, dtype), tokens, "cuda")
        assert_other_tokens_do_not_leak(Case(activation, 768, 3072, dtype), 700, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gpu_float32_weights_get_float32_gradients(activation: str) -> None:
    for bias in (False, True):
        assert_float32_weights_get_float32_gradients(Case(activation, 768, 3072, BF16, bias), 1000, "cuda")


@pytest.mark.gpu
def test_gpu_isolation_opcheck_and_one_compilation() -> None:
    for activation in ACTIVATIONS:
        assert_other_tokens_do_not_leak(Case(activation, 768, 3072, BF16), 700, "cuda")
        assert_opcheck(Case(activation, dtype=BF16), "cuda")
    assert_compiles_once("cuda", "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gpu_results_repeat_bitwise_and_never_wait_for_the_gpu(activation: str, recompute: bool) -> None:
    case = Case(activation, 768, 2048, BF16)
    inputs = case.inputs(3000, "cuda")
    first = results(case, inputs, "auto", recompute=recompute)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out_TE = feed_forward(**inputs, activation=activation, recompute=recompute)
        torch.autograd.grad(out_TE, leaves, torch.ones_like(out_TE))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, again in results(case, inputs, "auto", recompute=recompute).items():
        assert torch.equal(again, first[name]), name
