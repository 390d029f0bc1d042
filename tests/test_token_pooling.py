"""pool_tokens and attention_pool: one vector, or a few, per image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from ahead_of_time import assert_fits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from navit_kernels import HeadNorm
from navit_kernels.self_attention.reference import head_norm
from navit_kernels.testing import assert_error_within, cu_seqlens_of
from navit_kernels.token_pooling import attention_pool, pool_tokens
from navit_kernels.token_pooling.op import fold_query

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MODES = ("mean", "max", "first")
LENGTHS = [0, 1, 15, 0, 65, 300, 17]  # 300 tokens: two chunks
KINDS = ("layer_norm", "rms_norm", "l2", None)


@dataclass(frozen=True)
class Case:
    queries: int = 1
    heads: int = 2
    width: int = 24
    dtype: torch.dtype = FP32
    kind: str | None = "layer_norm"
    per_head: bool = True
    bias: bool = False
    mean: float = 0.0  # of the keys, in standard deviations
    spread: float = 1.0  # of the scores, roughly
    heavy_tails: bool = False

    def inputs(self, lengths: list[int], device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        shape = (sum(lengths), 2, self.heads, self.width)
        kv_T2HD = random(shape) + self.mean * torch.tensor([1.0, 0.0])[:, None, None]
        if self.heavy_tails:
            kv_T2HD = kv_T2HD * random(shape).abs().add(0.05).reciprocal()
        parameter = (self.heads, self.width) if self.per_head else (self.width,)
        tensors = {
            "query": random(self.queries, self.heads, self.width),
            "kv": kv_T2HD.to(self.dtype),
            "q_weight": random(self.width) * self.spread,
            "k_weight": random(parameter),
        }
        if self.bias:
            tensors |= {"q_bias": random(parameter), "k_bias": random(self.width)}
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def pool(
        self, inputs: dict[str, Tensor], cu_seqlens: Tensor, backend: str, op: Callable = attention_pool
    ) -> Tensor:
        q_norm = k_norm = None
        if self.kind is not None:
            q_norm = HeadNorm(self.kind, inputs["q_weight"], inputs.get("q_bias"))
            k_norm = HeadNorm(self.kind, inputs["k_weight"], inputs.get("k_bias"))
        k_THD, v_THD = inputs["kv"].unbind(1)
        return op(inputs["query"], k_THD, v_THD, cu_seqlens, q_norm=q_norm, k_norm=k_norm, backend=backend)

    def results(
        self,
        inputs: dict[str, Tensor],
        lengths: list[int],
        backend: str,
        dtype: torch.dtype | None = None,
        op: Callable = attention_pool,
    ) -> dict[str, Tensor]:
        """The output and the gradients of all inputs that matter, under fixed random cotangents."""
        used = {k: v for k, v in inputs.items() if self.kind is not None or k in ("query", "kv")}
        leaves = {k: (v if dtype is None else v.to(dtype)).detach().requires_grad_() for k, v in used.items()}
        out = self.pool(leaves, cu_seqlens_of(lengths, inputs["kv"].device), backend, op)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(self.dtype).to(out)
        return {
            "out": out,
            **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True)),
        }


def assert_attention_matches(case: Case, lengths: list[int], device: str) -> None:
    """Over several draws at once in float32, where the rounding errors of two times few numbers differ by chance."""

    def results(backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        draws = [case.inputs(lengths, device, seed) for seed in range(2 if case.dtype == FP32 else 1)]
        each = [case.results(inputs, lengths, backend, dtype) for inputs in draws]
        return {name: torch.stack([result[name] for result in each]) for name in each[0]}

    exact, at_dtype = results("reference", FP64), results("reference")
    for name, actual in results("triton").items():
        assert actual.dtype == at_dtype[name].dtype, name
        if name == "k_bias":
            assert not actual.any()  # exactly zero
        else:
            assert_error_within(actual, exact[name], at_dtype[name], name)


def assert_pooling_matches(mode: str, width: int, dtype: torch.dtype, lengths: list[int], device: str) -> None:
    x_TE = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x_TE[::3] = x_TE[:1]  # ties

    def results(x_TE: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        x_TE = x_TE.detach().requires_grad_()
        out_SE = pool_tokens(x_TE, cu_seqlens_of(lengths, device), mode, backend=backend)
        cotangent = torch.randn(out_SE.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out_SE)
        return out_SE, torch.autograd.grad(out_SE, x_TE, cotangent)[0]

    groups = (results(x_TE, "triton"), results(x_TE.to(FP64), "reference"), results(x_TE, "reference"))
    for name, actual, exact, at_dtype in zip(("out", "dx"), *groups, strict=True):
        assert actual.dtype == dtype
        assert_error_within(actual, exact, at_dtype, name)


# The reference


def test_reference_pools_each_image_alone() -> None:
    x_TE, lengths = torch.randn(8, 5, dtype=FP64), [3, 0, 5]
    zeros = torch.zeros(5, dtype=FP64)
    for mode, expected in {
        "mean": [x_TE[:3].mean(0), zeros, x_TE[3:].mean(0)],
        "max": [x_TE[:3].amax(0), zeros, x_TE[3:].amax(0)],
        "first": [x_TE[0], zeros, x_TE[3]],
    }.items():
        torch.testing.assert_close(pool_tokens(x_TE, cu_seqlens_of(lengths), mode), torch.stack(expected))


def test_reference_attention_is_softmax_attention_of_normed_queries_and_keys() -> None:
    query_QHD, k_THD, v_THD = torch.randn(2, 3, 4, dtype=FP64), *torch.randn(2, 6, 3, 4, dtype=FP64)
    weight_D, bias_D = torch.randn(2, 4, dtype=FP64)
    norm = HeadNorm("layer_norm", weight_D, bias_D)
    pooled_SQHD = attention_pool(query_QHD, k_THD, v_THD, cu_seqlens_of([4, 2]), q_norm=norm, k_norm=norm)
    q, k = (F.layer_norm(x, (4,), weight_D, bias_D, 1e-6).transpose(0, 1) for x in (query_QHD, k_THD))
    for image, own in enumerate((slice(0, 4), slice(4, 6))):
        expected = F.scaled_dot_product_attention(q, k[:, own], v_THD.transpose(0, 1)[:, own]).transpose(0, 1)
        torch.testing.assert_close(pooled_SQHD[image], expected)


def test_a_query_without_a_query_axis_gives_one_vector_per_head() -> None:
    query_HD, k_THD = torch.randn(3, 4), torch.randn(6, 3, 4)
    pooled_SHD = attention_pool(query_HD, k_THD, k_THD, cu_seqlens_of([4, 2]))
    assert torch.equal(pooled_SHD, attention_pool(query_HD[None], k_THD, k_THD, cu_seqlens_of([4, 2]))[:, 0])


def test_an_image_without_tokens_gives_zeros() -> None:
    k_THD = torch.randn(2, 3, 4)
    assert not attention_pool(torch.randn(5, 3, 4), k_THD, k_THD, cu_seqlens_of([0, 2]))[0].any()


@pytest.mark.parametrize("mode", MODES)
def test_reference_pooling_gradients(mode: str) -> None:
    x_TE = torch.randn(5, 3, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool_tokens(x, cu_seqlens_of([2, 0, 3]), mode), x_TE)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_query_gives_the_same_scores(kind: str | None) -> None:
    case = Case(queries=3, kind=kind, bias=True, dtype=FP32)
    inputs = case.inputs([7])
    k_THD = inputs["kv"][:, 0]
    k_norm = HeadNorm(kind, inputs["k_weight"], inputs["k_bias"]) if kind else None
    u_QHD = fold_query(inputs["query"], HeadNorm("layer_norm", inputs["q_weight"], inputs["q_bias"]), k_norm, 0.3)
    raw_THD = head_norm(k_THD, HeadNorm(kind) if kind else None)
    folded = torch.einsum("qhd,thd->qht", u_QHD, raw_THD).softmax(-1)
    identity = torch.eye(7)[:, None, :].expand(7, 2, 7)
    padded_v = F.pad(identity, (0, case.width - 7))
    pooled = attention_pool(
        inputs["query"], k_THD, padded_v, cu_seqlens_of([7]), k_norm=k_norm, softmax_scale=0.3,
        q_norm=HeadNorm("layer_norm", inputs["q_weight"], inputs["q_bias"]),
    )  # fmt: skip
    torch.testing.assert_close(folded, pooled[0, :, :, :7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_QHD": torch.ones(1, 2, 5)}, r"query must be \(Q, H, D\) = \(any, 2, 4\), got \(1, 2, 5\)"),
        ({"v_THD": torch.ones(5, 2, 4)}, r"v must be \(T, H, D\) = \(6, 2, 4\), got \(5, 2, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, r"cu_seqlens\[-1\] must be the number of tokens, 6"),
        ({"k_norm": HeadNorm(weight=torch.ones(5))}, r"k_norm.weight must be \(D,\) = \(4,\) or \(H, D\)"),
        ({"backend": "fast"}, "backend must be 'auto' or 'reference' or 'triton', got 'fast'"),
    ],
)
def test_errors_say_name_expected_and_got(change: dict[str, object], message: str) -> None:
    k_THD = torch.ones(6, 2, 4)
    inputs = {"query_QHD": torch.ones(1, 2, 4), "k_THD": k_THD, "v_THD": k_THD, "cu_seqlens": cu_seqlens_of([6])}
    with pytest.raises(ValueError, match=message):
        attention_pool(**{**inputs, **change})


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="mode must be 'mean' or 'max' or 'first', got 'median'"):
        pool_tokens(torch.ones(2, 2), cu_seqlens_of([2]), "median")


# The kernels, in the interpreter and on a GPU


def attention_cases() -> Iterator[tuple[Case, list[int]]]:
    """Every norm, with widths, lengths, queries and dtypes in rotation."""
    lengths = ([0, 1, 15, 16], [17, 63, 0], [64, 65], [129], [257, 2], LENGTHS)
    options = zip(
        itertools.cycle(lengths),
        itertools.cycle((1, 1, 3, 1, 6)),
        itertools.cycle((FP32, BF16, FP32, FP16)),
        strict=False,
    )
    for (width, kind), (rotated, queries, dtype) in zip(itertools.product((24, 64, 72, 128), KINDS), options):  # noqa: B905
        yield Case(queries, 2, width, dtype, kind, per_head=width != 64, bias=queries == 1), rotated
    for dtype in (FP32, BF16):
        yield Case(1, 2, 64, dtype, mean=10.0), [65, 100]
        yield Case(1, 2, 64, dtype, spread=40.0), [65, 100]
        yield Case(2, 2, 64, dtype, heavy_tails=True), [65, 100]


def assert_other_images_do_not_leak(device: str) -> None:
    """The image of 300 tokens, between neighbours full of NaN, and then full of inf: not a bit of its own changes."""
    own, image = slice(81, 381), 5
    cu_seqlens = cu_seqlens_of(LENGTHS, device)
    for case, poison in ((Case(heads=1, dtype=BF16), float("nan")), (Case(3, 1), float("inf"))):
        inputs = case.inputs(LENGTHS, device)
        poisoned = {**inputs, "kv": inputs["kv"].clone()}
        poisoned["kv"][: own.start] = poisoned["kv"][own.stop :] = poison
        clean, dirty = (case.results(tensors, LENGTHS, "triton") for tensors in (inputs, poisoned))
        assert torch.equal(clean["out"][image], dirty["out"][image])
        assert torch.equal(clean["kv"][own], dirty["kv"][own])
        assert dirty["out"][1].isnan().any()
        for mode in MODES:
            pools = [pool_tokens(x["kv"].flatten(1), cu_seqlens, mode, backend="triton") for x in (inputs, poisoned)]
            assert torch.equal(pools[0][image], pools[1][image]), mode


def assert_alone_as_in_company(device: str, packs: int) -> None:
    """Over random packs, positions and orders, an image pools to the same bits as alone."""
    random = torch.Generator().manual_seed(0)
    case = Case(2, 1, 24, BF16)
    images = [case.inputs([length], device, seed) for seed, length in enumerate((1, 40, 64, 256, 257, 300))]
    gradients = [case.results({**images[0], "kv": image["kv"]}, [len(image["kv"])], "triton") for image in images]
    for _ in range(packs):
        order = torch.randperm(len(images), generator=random)[
            : 2 + int(torch.randint(4, (), generator=random))
        ].tolist()
        lengths = [len(images[index]["kv"]) for index in order]
        packed = {**images[0], "kv": torch.cat([images[index]["kv"] for index in order])}
        out_SQHD = case.pool(packed, cu_seqlens_of(lengths, device), "triton")
        means = pool_tokens(packed["kv"].flatten(1), cu_seqlens_of(lengths, device), "mean", backend="triton")
        for place, index in enumerate(order):
            assert torch.equal(out_SQHD[place], gradients[index]["out"][0])
            x_TE = images[index]["kv"].flatten(1)
            alone = pool_tokens(x_TE, cu_seqlens_of([len(x_TE)], device), "mean", backend="triton")
            assert torch.equal(means[place], alone[0])


def assert_opcheck(device: str) -> None:
    case, lengths = Case(2, 1), [0, 3, 9]
    inputs, cu_seqlens = case.inputs(lengths, device), cu_seqlens_of(lengths, device)
    k_THD, v_THD = (x.detach().requires_grad_() for x in inputs["kv"].unbind(1))
    u_QHD = inputs["query"].requires_grad_()
    ops = torch.ops.navit_kernels
    torch.library.opcheck(ops.attention_pool.default, (u_QHD, k_THD, v_THD, cu_seqlens, "layer_norm", 1e-6))
    for mode in MODES:
        x_TE = inputs["kv"].flatten(1).detach().requires_grad_()
        torch.library.opcheck(ops.pool_tokens.default, (x_TE, cu_seqlens, mode))


def assert_compiles_once(device: str, compiler: str) -> None:
    case = Case(2, 1, 24, bias=True)
    counter = CompileCounterWithBackend(compiler)

    @partial(torch.compile, backend=counter, fullgraph=True)
    def compiled(query_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, **options: object) -> Tensor:
        pooled = [pool_tokens(v_THD.flatten(1), cu_seqlens, mode, backend="triton") for mode in MODES]
        return attention_pool(query_QHD, k_THD, v_THD, cu_seqlens, **options) + sum(pooled).view(-1, 1, 1, 24)

    def marked(query_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, **options: object) -> Tensor:
        for tensor in (k_THD, v_THD, cu_seqlens):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(query_QHD, k_THD, v_THD, cu_seqlens, **options)

    for lengths in ([3, 4], [5, 0, 1], [1, 1, 1, 9], [16, 16], [40, 7, 1]):
        inputs = case.inputs(lengths, device)
        case.results(inputs, lengths, "triton", op=marked)
    assert counter.frame_count == 1


@pytest.mark.interpreter
@pytest.mark.parametrize(("case", "lengths"), list(attention_cases()), ids=str)
def test_attention_matches_reference(case: Case, lengths: list[int]) -> None:
    assert_attention_matches(case, lengths, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_pooling_matches_reference(mode: str, dtype: torch.dtype) -> None:
    assert_pooling_matches(mode, 50, dtype, LENGTHS, "cpu")
    assert_pooling_matches(mode, 300, dtype, [1, 20], "cpu")


@pytest.mark.interpreter
def test_maximum_orders_infinities_zeros_and_nan_as_torch_does() -> None:
    inf, nan = float("inf"), float("nan")
    x_TE = torch.tensor([[0.0, -inf, 1.0, -nan], [-0.0, -inf, nan, 2.0], [-1.0, -inf, inf, nan]], requires_grad=True)
    out_SE, expected_SE = (pool_tokens(x_TE, cu_seqlens_of([3]), "max", backend=b) for b in ("triton", "reference"))
    assert torch.equal(out_SE.nan_to_num(7.0), expected_SE.nan_to_num(7.0))
    gradients = [torch.autograd.grad(out.sum(), x_TE)[0] for out in (out_SE, expected_SE)]
    assert torch.equal(*gradients)


@pytest.mark.interpreter
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_empty_pack(lengths: list[int]) -> None:
    case = Case(2)
    for result in case.results(case.inputs(lengths), lengths, "triton").values():
        assert not result.any()
    for mode in MODES:
        x_TE = torch.zeros(0, 5, requires_grad=True)
        out_SE = pool_tokens(x_TE, cu_seqlens_of(lengths), mode, backend="triton")
        assert torch.equal(out_SE, torch.zeros(len(lengths), 5))
        assert torch.autograd.grad(out_SE.sum(), x_TE)[0].shape == (0, 5)


@pytest.mark.interpreter
def test_head_major_keys() -> None:
    case = Case()
    inputs = case.inputs(LENGTHS)
    cu_seqlens, (k_THD, v_THD) = cu_seqlens_of(LENGTHS), inputs["kv"].unbind(1)
    expected = attention_pool(inputs["query"], k_THD, v_THD, cu_seqlens, backend="triton")
    head_major = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k_THD, v_THD)]
    assert torch.equal(attention_pool(inputs["query"], *head_major, cu_seqlens, backend="triton"), expected)


@pytest.mark.interpreter
def test_other_images_do_not_leak() -> None:
    assert_other_images_do_not_leak("cpu")


@pytest.mark.interpreter
def test_an_image_alone_gives_the_same_bits() -> None:
    assert_alone_as_in_company("cpu", packs=2)


@pytest.mark.interpreter
def test_opcheck() -> None:
    assert_opcheck("cpu")


@pytest.mark.interpreter
def test_compile_once_for_all_batches() -> None:
    assert_compiles_once("cpu", "aot_eager")


# Ahead of time


def launch_on_meta(case: Case) -> None:
    from navit_kernels.token_pooling import kernel

    inputs = case.inputs([1000, 24], "meta")
    k_THD, v_THD = inputs["kv"].unbind(1)
    cu_seqlens, kind = torch.empty(3, dtype=torch.int32, device="meta"), case.kind or "none"
    out_SQHD, out32_SQHD, softmax_2SQH = kernel.attention_pool(inputs["query"], k_THD, v_THD, cu_seqlens, kind, 1e-6)
    kernel.attention_pool_backward(
        out_SQHD, out32_SQHD, softmax_2SQH, inputs["query"], k_THD, v_THD, cu_seqlens, kind, 1e-6
    )


def launch_pooling_on_meta(dtype: torch.dtype) -> None:
    from navit_kernels.token_pooling import kernel_segments

    x_TE, cu_seqlens = (
        torch.empty(1000, 768, dtype=dtype, device="meta"),
        torch.empty(5, dtype=torch.int32, device="meta"),
    )
    for mode in MODES:
        out_SE, index_SE = kernel_segments.pool_tokens(x_TE, cu_seqlens, mode)
        kernel_segments.pool_tokens_backward(out_SE, index_SE, cu_seqlens, 1000, mode)


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("sm_90", Case(1, 12, 64, BF16)),
        ("sm_90", Case(4, 8, 128, BF16)),
        ("sm_80", Case(1, 16, 72, FP16, "rms_norm")),
        ("sm_89", Case(1, 12, 64, FP32)),
        ("sm_100", Case(2, 12, 64, BF16, None)),
        ("gfx942", Case(1, 12, 64, BF16, "l2")),
    ],
    ids=str,
)
def test_attention_kernels_fit_without_spills(arch: str, case: Case) -> None:
    assert_fits(arch, lambda: launch_on_meta(case))


@pytest.mark.compile_only
@pytest.mark.parametrize(("arch", "dtype"), [("sm_90", BF16), ("sm_80", FP32), ("gfx942", BF16)], ids=str)
def test_pooling_kernels_fit_without_spills(arch: str, dtype: torch.dtype) -> None:
    assert_fits(arch, lambda: launch_pooling_on_meta(dtype))


# On a GPU


@pytest.mark.gpu
def test_gpu_matches_reference() -> None:
    for case, lengths in attention_cases():
        assert_attention_matches(replace(case, heads=16), lengths, "cuda")
    for width in (64, 72, 80, 96, 128):
        assert_attention_matches(Case(1, 12, width, BF16, per_head=False), [196, 1, 0, 1024, 16_000], "cuda")
    for mode, width, dtype in itertools.product(MODES, (1, 50, 768, 1152), (FP32, BF16)):
        assert_pooling_matches(mode, width, dtype, [*LENGTHS, 4000], "cuda")


@pytest.mark.gpu
def test_gpu_isolation_opcheck_and_one_compilation() -> None:
    assert_other_images_do_not_leak("cuda")
    assert_alone_as_in_company("cuda", packs=200)
    assert_opcheck("cuda")
    assert_compiles_once("cuda", "inductor")


@pytest.mark.gpu
def test_gpu_results_repeat_bitwise_and_never_wait_for_the_gpu() -> None:
    case, lengths = Case(2, 12, 64, BF16, bias=True), [196] * 50 + [3000, 0, 1]
    inputs = case.inputs(lengths, "cuda")
    first = case.results(inputs, lengths, "auto")
    for name, again in case.results(inputs, lengths, "auto").items():
        assert torch.equal(again, first[name]), name
    cu_seqlens = cu_seqlens_of(lengths, "cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out_SQHD = case.pool(inputs, cu_seqlens, "auto")
        torch.autograd.grad(out_SQHD, leaves, torch.ones_like(out_SQHD))
        for mode in MODES:
            pooled_SE = pool_tokens(leaves[1].flatten(1), cu_seqlens, mode)
            torch.autograd.grad(pooled_SE, leaves[1], torch.ones_like(pooled_SE))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_lengths() -> None:
    case, cu_seqlens = Case(1, 12, 64, BF16), cu_seqlens_of([300, 100, 0], "cuda")
    inputs = case.inputs([400], "cuda")
    case.pool(inputs, cu_seqlens, "auto")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.pool(inputs, cu_seqlens, "auto")
    for lengths in ([1, 2, 397], [0, 399, 1]):
        cu_seqlens.copy_(cu_seqlens_of(lengths))
        graph.replay()
        assert torch.equal(captured, case.pool(inputs, cu_seqlens_of(lengths, "cuda"), "auto"))


@pytest.mark.gpu
def test_gpu_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB")
    kv_T2HD = torch.zeros(2**20 + 300, 2, 16, 64, dtype=BF16, device="cuda")
    kv_T2HD[-300:] = torch.randn(300, 2, 16, 64, device="cuda")
    query_HD = torch.randn(16, 64, device="cuda")
    whole = attention_pool(query_HD, *kv_T2HD.unbind(1), cu_seqlens_of([2**20, 300], "cuda"))
    alone = attention_pool(query_HD, *kv_T2HD[-300:].unbind(1), cu_seqlens_of([300], "cuda"))
    assert torch.equal(whole[1], alone[0])
