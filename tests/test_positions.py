"""add_positions: norm of the patch embedding + height row + width row; tables and fractional coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from ahead_of_time import assert_fits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from navit_kernels.positions import (
    add_positions,
    fourier_frequencies,
    fourier_table,
    fractional_coords,
    resize_table,
    sinusoidal_table,
)
from navit_kernels.testing import assert_error_within, cu_seqlens_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, COLUMNS = 7, 21  # of the tables
COMBINES = ("sum", "concat", "product")
LEAVES = ("x_TE", "row_table_LE", "column_table_LE", "weight_E", "bias_E")


@dataclass(frozen=True)
class Case:
    width: int = 48
    x: torch.dtype = FP32
    table: torch.dtype = FP32
    out: torch.dtype | None = None
    combine: str = "sum"
    fractional: bool = False
    norm: bool = False
    bias: bool = False

    def inputs(self, tokens: int, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
        random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        lengths = torch.tensor([ROWS, COLUMNS])
        places_T2 = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(seed + 1))
        coords_T2 = places_T2 * (lengths - 1) if self.fractional else (places_T2 * lengths).int()
        widths = (self.width // 3, self.width - self.width // 3) if self.combine == "concat" else (self.width,) * 2
        tensors = {
            "x_TE": (random(tokens, self.width) + 0.5).to(self.x),
            "coords_T2": coords_T2,
            "row_table_LE": random(ROWS, widths[0]).to(self.table),
            "column_table_LE": random(COLUMNS, widths[1]).to(self.table),
            "weight_E": random(self.width) if self.norm else None,
            "bias_E": random(self.width) if self.bias else None,
        }
        return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def call(
    case: Case, inputs: dict[str, Tensor | None], backend: str, op: Callable = add_positions, **more: object
) -> Tensor:
    weight_E, bias_E = inputs["weight_E"], inputs["bias_E"]
    x_TE, coords_T2, row_table_LE, column_table_LE = list(inputs.values())[:4]
    norm = None if weight_E is None else (weight_E, bias_E, 1e-6)
    options = {"combine": case.combine, "norm": norm, "dtype": case.out, "backend": backend, **more}
    return op(x_TE, coords_T2, row_table_LE, column_table_LE, **options)


def results(
    case: Case, inputs: dict[str, Tensor | None], backend: str, exact: bool = False, op: Callable = add_positions
) -> dict[str, Tensor]:
    """The output and the gradients of all inputs under a fixed random cotangent; in float64 if exact."""
    leaves = {
        name: (inputs[name].double() if exact else inputs[name]).detach().requires_grad_()
        for name in LEAVES
        if inputs[name] is not None
    }
    coords_T2 = inputs["coords_T2"].double() if exact and case.fractional else inputs["coords_T2"]
    whole = {**inputs, **leaves, "coords_T2": coords_T2}
    y_TE = call(case, whole, backend, op, **({"dtype": torch.float64} if exact else {}))
    cotangent = torch.randn(y_TE.shape, generator=torch.Generator().manual_seed(2)).to(case.out or case.x).to(y_TE)
    gradients = torch.autograd.grad(y_TE, list(leaves.values()), cotangent)
    return {"y": y_TE.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_matches_reference(case: Case, tokens: int, device: str) -> None:
    inputs = case.inputs(tokens, device)
    exact = results(case, inputs, "reference", exact=True)
    at_dtype = results(case, inputs, "reference")
    for name, actual in results(case, inputs, "triton").items():
        assert actual.dtype == at_dtype[name].dtype, name
        assert_error_within(actual, exact[name], at_dtype[name], name)


def cases(width: int, exact_dtype: torch.dtype) -> Iterator[Case]:
    """exact_dtype: the 16-bit type of the tensor-core path; Triton's interpreter cannot multiply bfloat16 matrices."""
    for combine, fractional in itertools.product(COMBINES, (False, True)):
        yield Case(width, FP32, FP32, None, combine, fractional, norm=True, bias=True)
        yield Case(width, exact_dtype, FP32, None, combine, fractional)
        yield Case(width, exact_dtype, exact_dtype, None, combine, fractional, norm=True)
    yield Case(width, FP32, FP32, FP16, norm=True, bias=True)
    yield Case(width, BF16, BF16, FP32, norm=True)


def name_of(case: Case) -> str:
    parts = [case.width, *(str(dtype)[6:] for dtype in (case.x, case.table, case.out) if dtype), case.combine]
    return "-".join([*map(str, parts), *(flag for flag in ("fractional", "norm", "bias") if getattr(case, flag))])


# The reference and the tables


@pytest.mark.parametrize("combine", COMBINES)
def test_reference_looks_up_a_row_and_a_column(combine: str) -> None:
    case = Case(combine=combine)
    inputs = case.inputs(9)
    y_TE = call(case, inputs, "auto")
    for token, (row, column) in enumerate(inputs["coords_T2"].tolist()):
        row_E, column_E = inputs["row_table_LE"][row], inputs["column_table_LE"][column]
        position_E = {
            "sum": lambda: row_E + column_E,  # noqa: B023
            "concat": lambda: torch.cat([row_E, column_E]),  # noqa: B023
            "product": lambda: row_E * column_E,  # noqa: B023
        }[combine]()
        torch.testing.assert_close(y_TE[token], inputs["x_TE"][token] + position_E)


def test_reference_normalizes_the_embedding_and_not_the_position() -> None:
    case = Case(norm=True, bias=True)
    inputs = case.inputs(9)
    plain = call(Case(), {**inputs, "x_TE": torch.zeros(9, 48), "weight_E": None, "bias_E": None}, "auto")
    normed = F.layer_norm(inputs["x_TE"], (48,), inputs["weight_E"], inputs["bias_E"], 1e-6)
    torch.testing.assert_close(call(case, inputs, "auto"), normed + plain)


def test_float_coordinates_interpolate_between_rows() -> None:
    table_LE = torch.tensor([[0.0], [10.0], [30.0]])
    coords_T2 = torch.tensor([[0.0, 0.0], [0.25, 0.0], [1.5, 1.0], [2.0, 0.0]])
    y_TE = add_positions(torch.zeros(4, 1), coords_T2, table_LE, torch.tensor([[0.0], [1.0]]))
    assert y_TE.flatten().tolist() == [0, 2.5, 21, 30]


def test_fractional_coordinates_are_tables_resized_to_each_grid() -> None:
    grids = [(3, 5), (1, 1), (9, 2), (40, 4)]
    coords_T2 = torch.cat([torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in grids]).int()
    lengths = [rows * columns for rows, columns in grids]
    row_table_LE, column_table_LE = torch.randn(2, 11, 6)
    x_TE = torch.zeros(len(coords_T2), 6)
    places_T2 = fractional_coords(coords_T2, torch.tensor(grids, dtype=torch.int32), cu_seqlens_of(lengths), 11)
    stretched = add_positions(x_TE, places_T2, row_table_LE, column_table_LE)
    start = 0
    for (rows, columns), length in zip(grids, lengths, strict=True):
        tables = resize_table(row_table_LE, rows), resize_table(column_table_LE, columns)
        own = slice(start, start + length)
        torch.testing.assert_close(stretched[own], add_positions(x_TE[own], coords_T2[own], *tables), atol=1e-5, rtol=0)
        start += length


def test_fractional_coordinates_of_a_grid_as_long_as_the_table_are_its_rows() -> None:
    coords_T2 = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    grids, cu_seqlens = torch.tensor([[6, 6]]), cu_seqlens_of([36])
    assert torch.equal(fractional_coords(coords_T2, grids, cu_seqlens, 6), coords_T2.float())


def test_resizing_a_table_to_its_own_length_changes_nothing() -> None:
    table_LE = torch.randn(13, 4)
    assert torch.equal(resize_table(table_LE, 13), table_LE)
    assert resize_table(table_LE, 29).shape == (29, 4)


def test_sinusoidal_and_fourier_tables_tell_positions_apart() -> None:
    for table_LE in (sinusoidal_table(64, 32), fourier_table(64, fourier_frequencies(64, 32))):
        assert table_LE.shape == (64, 32)
        assert table_LE.abs().max() <= 1
        distances = torch.cdist(table_LE, table_LE) + 10 * torch.eye(64)
        assert distances.min() > 0.05
    assert sinusoidal_table(2, 4)[1].tolist() == pytest.approx([0.8414710, 0.00999983, 0.5403023, 0.9999500])


def test_fourier_frequencies_can_be_learned() -> None:
    frequencies = fourier_frequencies(16, 8).requires_grad_()
    (fourier_table(16, frequencies) * torch.randn(16, 8)).sum().backward()
    assert frequencies.grad.abs().min() > 0


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("fractional", [False, True])
def test_reference_gradients(combine: str, fractional: bool) -> None:
    case = Case(6, torch.float64, torch.float64, None, combine, fractional, norm=True, bias=True)
    inputs = case.inputs(5)
    names = [name for name in LEAVES if inputs[name] is not None]
    leaves = [inputs[name].double().requires_grad_() for name in names]
    op = lambda *values: call(case, {**inputs, **dict(zip(names, values, strict=True))}, "auto")  # noqa: E731
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TE": torch.zeros(9, 47)}, r"row_table must be \(L, E\) = \(any, 47\), got \(7, 48\)"),
        ({"coords_T2": torch.zeros(8, 2).int()}, r"coords must be \(T, 2\) = \(9, 2\), got \(8, 2\)"),
        ({"coords_T2": torch.full((9, 2), 7).int()}, r"coords must be from 0 to \[6, 20\], got \[7, 7\] to \[7, 7\]"),
        ({"coords_T2": torch.full((9, 2), -0.5)}, r"coords must be from 0 to \[6, 20\], got \[-0.5, -0.5\]"),
        ({"coords_T2": torch.zeros(9, 2).short()}, "coords must be int32 or .* got torch.int16"),
        ({"row_table_LE": torch.zeros(0, 48)}, r"row_table must be of at least one row, got \(0, 48\)"),
        ({"weight_E": torch.zeros(1)}, r"norm weight must be \(E,\) = \(48\), got \(1,\)"),
    ],
)
def test_errors_say_name_expected_and_got(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Case(), {**Case().inputs(9), **change}, "auto")


def test_concat_needs_widths_that_add_up() -> None:
    with pytest.raises(ValueError, match=r"widths that add up to 48, got \(48, 48\)"):
        call(Case(combine="concat"), Case().inputs(9), "auto")


# The kernel, in the interpreter and on a GPU


def assert_other_tokens_do_not_leak(case: Case, device: str) -> None:
    inputs = case.inputs(70, device)
    own = slice(13, 37)
    poisoned = {**inputs, "x_TE": inputs["x_TE"].clone()}
    poisoned["x_TE"][: own.start] = poisoned["x_TE"][own.stop :] = float("nan")
    clean, dirty = results(case, inputs, "triton"), results(case, poisoned, "triton")
    for name in ("y", "x_TE"):
        assert torch.equal(clean[name][own], dirty[name][own]), name
    assert dirty["y"][: own.start].isnan().all()
    for name in ("row_table_LE", "column_table_LE"):
        assert torch.equal(clean[name], dirty[name]), name


def assert_order_does_not_matter(case: Case, device: str) -> None:
    inputs = case.inputs(70, device)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = {**inputs, "x_TE": inputs["x_TE"][order], "coords_T2": inputs["coords_T2"][order]}
    assert torch.equal(call(case, shuffled, "triton"), call(case, inputs, "triton")[order])


def assert_opcheck(case: Case, device: str) -> None:
    inputs = case.inputs(20, device)
    for name in LEAVES:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    x_TE, coords_T2, row_table_LE, column_table_LE, weight_E, bias_E = inputs.values()
    arguments = (
        x_TE,
        coords_T2,
        row_table_LE,
        column_table_LE,
        case.combine,
        weight_E,
        bias_E,
        1e-6,
        case.out or case.x,
    )
    torch.library.opcheck(torch.ops.navit_kernels.add_positions.default, arguments)


def assert_compiles_once(case: Case, device: str, compiler: str) -> None:
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(add_positions, backend=counter, fullgraph=True)

    def op(x_TE: Tensor, coords_T2: Tensor, *others: object, **options: object) -> Tensor:
        torch._dynamo.mark_dynamic(x_TE, 0)
        torch._dynamo.mark_dynamic(coords_T2, 0)
        return compiled(x_TE, coords_T2, *others, **options)

    for tokens in (7, 64, 2, 131):
        inputs = case.inputs(tokens, device)
        actual = results(case, inputs, "triton", op=op)
        for name, expected in results(case, inputs, "triton").items():
            assert torch.equal(actual[name], expected), name
    assert counter.frame_count == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("case", [case for case in cases(48, FP16) if BF16 not in (case.x, case.table)], ids=name_of)
def test_kernel_matches_reference(case: Case) -> None:
    assert_matches_reference(case, 75, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 65])
@pytest.mark.parametrize("width", [3, 130])
def test_kernel_at_awkward_sizes(tokens: int, width: int) -> None:
    assert_matches_reference(Case(width, norm=True, bias=True), tokens, "cpu")
    assert_matches_reference(Case(width, FP16, combine="concat"), tokens, "cpu")


@pytest.mark.interpreter
def test_tables_of_more_rows_than_a_program_holds_and_many_chunks_of_tokens() -> None:
    case = Case(130, FP16)
    inputs = case.inputs(700)
    inputs["row_table_LE"], inputs["column_table_LE"] = torch.randn(130, 130), torch.randn(1, 130)
    inputs["coords_T2"] = torch.stack([torch.randint(130, (700,)), torch.zeros(700).long()], 1)
    exact, at_dtype = results(case, inputs, "reference", exact=True), results(case, inputs, "reference")
    for name, actual in results(case, inputs, "triton").items():
        assert_error_within(actual, exact[name], at_dtype[name], name)


@pytest.mark.interpreter
def test_frozen_tables_get_no_gradient_and_no_kernel() -> None:
    case = Case(norm=True)
    inputs = case.inputs(9)
    inputs["x_TE"].requires_grad_()
    inputs["weight_E"].requires_grad_()
    found = [
        torch.autograd.grad(call(case, inputs, backend).square().sum(), (inputs["x_TE"], inputs["weight_E"]))
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*found)


@pytest.mark.interpreter
def test_strided_inputs() -> None:
    case = Case(norm=True)
    inputs = case.inputs(20)
    strided = {name: None if t is None or t.dim() == 1 else t.t().contiguous().t() for name, t in inputs.items()}
    strided["weight_E"] = inputs["weight_E"]
    for name, expected in results(case, inputs, "triton").items():
        assert torch.equal(results(case, strided, "triton")[name], expected), name


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", [False, True])
def test_other_tokens_do_not_leak(norm: bool) -> None:
    assert_other_tokens_do_not_leak(Case(norm=norm), "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("fractional", [False, True])
def test_token_order_does_not_matter(fractional: bool) -> None:
    assert_order_does_not_matter(Case(norm=True, fractional=fractional), "cpu")


OPCHECKED = [
    Case(),
    Case(table=FP16, norm=True, bias=True, out=FP16),
    Case(combine="concat", norm=True),
    Case(combine="product", fractional=True),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", OPCHECKED, ids=name_of)
def test_opcheck(case: Case) -> None:
    assert_opcheck(case, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", [Case(norm=True, bias=True), Case(combine="concat", fractional=True)], ids=name_of)
def test_compile_once_for_all_batches(case: Case) -> None:
    assert_compiles_once(case, "cpu", "aot_eager")


# Ahead of time


def launch_on_meta(case: Case) -> None:
    from navit_kernels.positions import kernel

    x_TE, coords_T2, row_table_LE, column_table_LE, weight_E, bias_E = case.inputs(300, "meta").values()
    tables = row_table_LE.new_empty(64, row_table_LE.shape[1]), column_table_LE.new_empty(64, column_table_LE.shape[1])
    y_TE = kernel.add_positions(x_TE, coords_T2, *tables, case.combine, weight_E, bias_E, 1e-6, case.out or case.x)
    kernel.table_backward(y_TE, coords_T2, *tables, case.combine)
    if weight_E is not None:
        kernel.norm_backward(y_TE, x_TE, weight_E, case.bias, 1e-6)


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("sm_90", Case(768, BF16, norm=True)),
        ("sm_90", Case(1152, BF16, BF16, combine="concat", fractional=True, norm=True, bias=True)),
        ("sm_80", Case(1024, BF16, BF16, norm=True)),
        ("sm_89", Case(4096, norm=True, bias=True)),
        ("sm_89", Case(768, BF16, combine="product", norm=True)),
        ("sm_100", Case(1280, BF16, norm=True, bias=True)),
        ("gfx942", Case(768, FP16, norm=True)),
        ("gfx942", Case(1152, combine="product", fractional=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_kernels_fit_without_spills(arch: str, case: Case) -> None:
    assert_fits(arch, lambda: launch_on_meta(case))


@pytest.mark.compile_only
def test_table_gradients_of_16_bit_tokens_run_on_the_matrix_unit() -> None:
    tables = assert_fits("sm_90", lambda: launch_on_meta(Case(768, BF16)))[1]
    assert tables.name == "table_backward_kernel"
    assert "wgmma.mma_async" in tables.asm["ptx"]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("width", [24, 768, 1152, 4096])
@pytest.mark.parametrize("tokens", [1, 2049])
def test_gpu_matches_reference(width: int, tokens: int) -> None:
    for case in [*cases(width, BF16), *cases(width, FP16)]:
        assert_matches_reference(case, tokens, "cuda")


@pytest.mark.gpu
def test_gpu_isolation_opcheck_and_one_compilation() -> None:
    for norm in (False, True):
        assert_other_tokens_do_not_leak(Case(768, BF16, norm=norm), "cuda")
        assert_order_does_not_matter(Case(768, BF16, norm=norm, fractional=norm), "cuda")
    for case in (*OPCHECKED, Case(768, BF16, norm=True, bias=True)):
        assert_opcheck(case, "cuda")
    assert_compiles_once(Case(768, BF16, norm=True, bias=True), "cuda", "inductor")


@pytest.mark.gpu
def test_gpu_results_repeat_bitwise_and_never_wait_for_the_gpu() -> None:
    case = Case(768, BF16, norm=True, bias=True)
    inputs = case.inputs(20000, "cuda")
    first = results(case, inputs, "auto")
    for name, again in results(case, inputs, "auto").items():
        assert torch.equal(again, first[name]), name
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_TE = call(case, inputs, "auto")
        torch.autograd.grad(y_TE, leaves, torch.ones_like(y_TE))
        lengths = torch.tensor([0, 20000], dtype=torch.int32, device="cpu").to("cuda", non_blocking=True)
        grids = inputs["coords_T2"][:1] + 50
        fractional_coords(inputs["coords_T2"], grids, lengths, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_clamps_coordinates_outside_the_tables() -> None:
    case = Case(768, BF16)
    inputs = case.inputs(9, "cuda")
    far = {**inputs, "coords_T2": torch.tensor([[-5, 10**6]] * 9, dtype=torch.int32, device="cuda")}
    near = {**inputs, "coords_T2": torch.tensor([[0, COLUMNS - 1]] * 9, dtype=torch.int32, device="cuda")}
    assert torch.equal(call(case, far, "auto"), call(case, near, "auto"))


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_values() -> None:
    case = Case(768, BF16, norm=True)
    inputs = case.inputs(100, "cuda")
    call(case, inputs, "auto")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(case, inputs, "auto")
    changed = case.inputs(100, "cuda", seed=3)
    for name, tensor in inputs.items():
        if tensor is not None:
            tensor.copy_(changed[name])
    graph.replay()
    assert torch.equal(captured, call(case, changed, "auto"))


@pytest.mark.gpu
def test_gpu_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB")
    case = Case(1024, BF16, BF16, norm=True)
    tail = case.inputs(5, "cuda")
    x_TE = torch.zeros(2**21 + 5, 1024, dtype=BF16, device="cuda")
    coords_T2 = torch.zeros(2**21 + 5, 2, dtype=torch.int32, device="cuda")
    x_TE[-5:], coords_T2[-5:] = tail["x_TE"], tail["coords_T2"]
    leaves = {name: tail[name].requires_grad_() for name in ("row_table_LE", "column_table_LE", "weight_E")}
    y_TE = call(case, {**tail, "x_TE": x_TE, "coords_T2": coords_T2}, "auto")
    assert torch.equal(y_TE[-5:], call(case, tail, "auto"))
    dy_TE = torch.zeros_like(y_TE)
    dy_TE[-5:] = 1
    found = torch.autograd.grad(y_TE, list(leaves.values()), dy_TE)
    expected = torch.autograd.grad(call(case, tail, "auto"), list(leaves.values()), dy_TE[-5:])
    for actual, exact in zip(found, expected, strict=True):
        assert_error_within(actual, exact.double(), exact)
