"""varlen_attention on a GPU. For compute-sanitizer: -k sanitize. In parallel: -n 8 --dist loadgroup.

T tokens, S segments (images), H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from attention_checks import (
    BF16,
    CROSS,
    EVERY_CLASS,
    FP16,
    FP32,
    FP64,
    MAIN,
    Case,
    assert_a_tile_chooses_its_own_maximum,
    assert_alone_as_in_company,
    assert_checkpointing_changes_nothing,
    assert_compiles_once,
    assert_opcheck,
    assert_other_images_do_not_leak,
    assert_packed_is_unpacked,
    assert_same_bits,
    assert_saved_tensors_may_move,
    assert_strides_do_not_matter,
    judged,
    poisoned_memory,
)
from torch import Tensor

from navit_kernels import HeadNorm, PackPlan, plan_pack, varlen_attention, varlen_attention_qkvpacked
from navit_kernels.testing import assert_error_within, cu_seqlens_of, image_lengths

pytestmark = pytest.mark.gpu

alone_on_the_gpu = pytest.mark.xdist_group("memory")  # of what fills a GPU, one test at a time


@pytest.mark.parametrize("planned", [True, False])
def test_gpu_ten_thousand_images(planned: bool) -> None:
    """Half of them empty, the others of 5 tokens: the reference takes those as heads of one image."""
    case = replace(MAIN, lengths=(0, 5) * 5000, planned=planned)
    tensors = case.inputs("cuda")

    def fold(named: dict[str, Tensor]) -> dict[str, Tensor]:
        tall = {name: tensor for name, tensor in named.items() if tensor.shape[0] == 25_000}
        rows = {name: tensor.unflatten(0, (-1, 5)).transpose(0, 1).flatten(1, 2) for name, tensor in tall.items()}
        return {name: rows.get(name, tensor) for name, tensor in named.items()}

    one = replace(case, lengths=(5,), heads=5000 * case.heads)
    exact, at_dtype = (one.results(fold(tensors), "reference", dtype) for dtype in (FP64, None))
    actual = case.results(tensors)
    for name, tensor in judged(actual | fold(actual)).items():
        if name != "lse":
            assert_error_within(tensor, judged(exact)[name], judged(at_dtype)[name], name)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (0, 1, 0)], ids=str)
def test_gpu_empty_and_tiny_packs(lengths: tuple[int, ...]) -> None:
    for planned in (True, False):
        case = replace(MAIN, lengths=lengths, planned=planned)
        tensors = case.inputs("cuda")
        results = case.results(tensors)
        assert torch.equal(results["out"], tensors["v"])
        assert torch.equal(results["dv"], tensors["dout"])
        assert not any(results[name].any() for name in ("dq", "dk", "dq_weight", "dq_bias", "dk_weight", "dk_bias"))
        assert_packed_is_unpacked(case, "cuda")


def test_gpu_a_plan_of_another_pack_is_refused() -> None:
    q_THD = torch.randn(12, 2, 64, device="cuda", dtype=BF16)
    plan = plan_pack([5, 6], "cuda")
    with pytest.raises(ValueError, match="plan must be of 12 tokens of q and 12 of k, got of 11 and 11"):
        varlen_attention(q_THD, q_THD, q_THD, cu_seqlens_of([5, 7]).cuda(), plan=plan)


# Bits


@pytest.mark.parametrize("case", [MAIN, replace(MAIN, planned=False), replace(MAIN, dtype=FP32)], ids=str)
def test_gpu_results_repeat_bitwise(case: Case) -> None:
    tensors = case.inputs("cuda")
    first = case.results(tensors)
    for _ in range(5):
        other = torch.randn(2048, 2048, device="cuda")
        for _ in range(3):
            other = torch.softmax(other @ other, -1)
        assert_same_bits(case.results(tensors), first)


def full_cases() -> Iterator[Case]:
    """Without norms, some tiles take the running maximum and some do not."""
    for mix in ("U64", "U128", "pt", "ft", "hr"):
        lengths = tuple(image_lengths(mix, 65536))
        for heads, width in ((16, 64), (16, 72), (8, 128)):
            case = replace(MAIN, lengths=lengths, heads=heads, width=width)
            yield case
            if mix == "ft":
                yield replace(case, q_kind=None, k_kind=None, spread=20.0)


@alone_on_the_gpu
@pytest.mark.parametrize("case", list(full_cases()), ids=str)
def test_gpu_packs_that_fill_the_gpu_repeat_bitwise_and_are_like_the_portable_kernels(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Programs side by side on every multiprocessor, one after another; the packs of other tests fill none."""
    from navit_kernels.self_attention import launch

    tensors = case.inputs("cuda", drawn_on="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(launch, "gluon_is_supported", lambda: False)
        portable = case.results(tensors)
    with poisoned_memory():
        first = case.results(tensors)
    for name, tensor in first.items():
        difference = (tensor.float() - portable[name].float()).norm() / portable[name].float().norm().clamp(min=1e-6)
        assert difference < 0.02, f"{name}: relative difference {difference:.2e}"  # NaN is not less
    for _ in range(20):
        with poisoned_memory():
            assert_same_bits(case.results(tensors), first)


@pytest.mark.parametrize(
    ("case", "packs"),
    [
        (MAIN, 200),
        (replace(MAIN, width=72, dtype=FP16), 30),
        (replace(MAIN, width=128), 30),
        (replace(MAIN, q_kind=None, k_kind=None, spread=30.0), 30),
    ],
    ids=str,
)
def test_gpu_an_image_has_the_same_bits_alone_and_in_any_pack(case: Case, packs: int) -> None:
    lengths = (1, 2, 7, 16, 20, 31, 32, 33, 50, 64, 65, 90, 127, 128, 129, 180, 255, 256, 257, 300, 400, 600)
    assert_alone_as_in_company(replace(case, lengths=lengths), "cuda", packs)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("width", [64, 72, 80, 96, 128])
def test_gpu_hopper_runs_its_own_kernels(width: int, dtype: torch.dtype) -> None:
    """Where the launch table names them, and nothing else in their place."""
    from compile_table import config_of

    from navit_kernels.plan import CLASSES

    case = replace(MAIN, lengths=EVERY_CLASS, width=width, dtype=dtype)
    tensors = case.inputs("cuda")
    case.results(tensors)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.results(tensors)
        torch.cuda.synchronize()
    ran = {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    configs = [config_of(width, index) for index in range(CLASSES)]
    forward, backward = {c.forward.kernel for c in configs}, {c.backward.kernel for c in configs}
    named = {f"hopper_forward_{kernel}" for kernel in ("tile", "stream") if f"hopper_{kernel}" in forward}
    named |= {f"hopper_backward_{kernel}" for kernel in ("tile", "resident") if f"hopper_{kernel}" in backward}
    named |= {"hopper_keys", "hopper_queries"} if "hopper_stream" in backward else set()
    assert {name for name in ran if name.startswith("hopper_")} == named
    assert {"hopper_forward_stream", "hopper_keys", "hopper_queries"} <= named


@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("k_kind", ["layer_norm", None])
def test_gpu_a_tile_chooses_its_own_maximum(width: int, planned: bool, k_kind: str | None) -> None:
    case = replace(MAIN, lengths=(300, 700, 257), heads=16, width=width, q_kind=None, k_kind=k_kind, planned=planned)
    assert_a_tile_chooses_its_own_maximum(case, "cuda")


@pytest.mark.parametrize(
    "case",
    [
        MAIN,
        replace(MAIN, planned=False),
        replace(MAIN, width=72, dtype=FP16),
        replace(MAIN, width=128),
        replace(MAIN, dtype=FP32),
        replace(MAIN, q_kind=None, k_kind=None),
        CROSS,
    ],
    ids=str,
)
def test_gpu_other_images_do_not_leak(case: Case) -> None:
    lengths = EVERY_CLASS if case.lengths_k is None else case.lengths
    assert_other_images_do_not_leak(replace(case, lengths=lengths), "cuda")


@pytest.mark.parametrize("planned", [True, False])
def test_gpu_packed_is_unpacked(planned: bool) -> None:
    assert_packed_is_unpacked(replace(MAIN, planned=planned), "cuda")


def test_gpu_strides_do_not_matter() -> None:
    assert_strides_do_not_matter(replace(MAIN, weight="per head"), "cuda")


def test_gpu_saved_tensors_may_move() -> None:
    assert_saved_tensors_may_move(MAIN, "cuda")


def test_gpu_a_call_like_a_good_one_is_still_checked() -> None:
    tensors = MAIN.inputs("cuda")
    q, k, v = (tensors[name] for name in "qkv")
    cu_seqlens, plan, weight_D = cu_seqlens_of(list(MAIN.lengths), "cuda"), MAIN.plan("cuda"), torch.ones(64)
    good = varlen_attention(q, k, v, cu_seqlens, plan=plan)
    for changes, message in (
        ({"k_THD": k[1:]}, "v must be"),
        ({"v_THD": v.half()}, "v must be of q's dtype"),
        ({"k_THD": k.transpose(1, 2).contiguous().transpose(1, 2)}, "k must be contiguous over D"),
        ({"cu_seqlens": cu_seqlens.long()}, "cu_seqlens must be int32"),
        ({"cu_seqlens": cu_seqlens.cpu()}, "cu_seqlens must be on q's device"),
        ({"cu_seqlens": cu_seqlens[1:]}, r"plan.cu_seqlens must be \(S \+ 1,\)"),
        ({"plan": plan_pack(MAIN.lengths)}, "plan.items must be on q's device"),
        ({"plan": plan_pack([1] * len(MAIN.lengths), "cuda")}, "plan must be of .* tokens of q"),
        ({"cu_seqlens_k": cu_seqlens}, "plan must be made with lengths_k"),
        ({"q_norm": HeadNorm(weight=weight_D)}, "q_norm.weight must be on q's device"),
        ({"backend": "flash"}, "backend must be"),
    ):
        arguments = {"q_THD": q, "k_THD": k, "v_THD": v, "cu_seqlens": cu_seqlens, "plan": plan}
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                varlen_attention(**(arguments | changes))
            assert torch.equal(varlen_attention(**arguments), good)


def test_gpu_checkpointing_changes_nothing() -> None:
    assert_checkpointing_changes_nothing(MAIN, "cuda")


def test_gpu_autocast() -> None:
    case = replace(MAIN, dtype=FP32)
    tensors = case.inputs("cuda")
    halved = {name: tensor.to(BF16) if tensor.dim() == 3 else tensor for name, tensor in tensors.items()}
    with torch.autocast("cuda", BF16):
        results = case.results(tensors | {"dout": halved["dout"]})
    assert {name for name, tensor in results.items() if tensor.dtype == BF16} == {"out"}
    expected = replace(MAIN).results(halved)
    assert_same_bits(
        {name: tensor.float() for name, tensor in results.items()}, {k: v.float() for k, v in expected.items()}
    )


# Sizes and addresses


def needs_memory(gibibytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory")


TAIL = (20, 60, 120, 250, 700)


@alone_on_the_gpu
@pytest.mark.parametrize("planned", [True, False])
def test_gpu_qkv_of_more_than_two_to_the_31_elements(planned: bool) -> None:
    needs_memory(24)
    lengths, tail = (256,) * 22_000 + TAIL, sum(TAIL)
    qkv_T3HD = torch.randn(sum(lengths), 3, 2, 64, device="cuda", dtype=BF16).requires_grad_()
    assert qkv_T3HD[:-tail].numel() > 2**31
    dout_THD = torch.randn(sum(lengths), 2, 64, device="cuda", dtype=BF16)
    options = MAIN.options(MAIN.inputs("cuda"))

    def attend(qkv: Tensor, dout: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        plan = plan_pack(lengths, "cuda") if planned else None
        out = varlen_attention_qkvpacked(qkv, cu_seqlens_of(list(lengths), "cuda"), plan=plan, **options)
        return out.detach(), torch.autograd.grad(out, qkv, dout)[0]

    whole = attend(qkv_T3HD, dout_THD, lengths)
    for own, cut in ((TAIL, slice(-tail, None)), (lengths[:2], slice(512))):
        alone = attend(qkv_T3HD.detach()[cut].requires_grad_(), dout_THD[cut], own)
        assert all(torch.equal(big[cut], small) for big, small in zip(whole, alone, strict=True))


@alone_on_the_gpu
def test_gpu_head_major_tensors_of_more_than_two_to_the_31_elements() -> None:
    """The last head alone lies beyond 2³¹ elements."""
    needs_memory(40)
    lengths, tail = (256,) * 9000 + TAIL, sum(TAIL)
    x_HTD = torch.randn(16, sum(lengths), 64, device="cuda", dtype=BF16)
    assert x_HTD[:15].numel() > 2**31
    options = MAIN.options(MAIN.inputs("cuda"))

    def attend(x_HTD: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        q, k, v = (x_HTD.transpose(0, 1).detach().requires_grad_() for _ in range(3))
        out = varlen_attention(q, k, v, cu_seqlens_of(list(lengths), "cuda"), **options)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), x_HTD.transpose(0, 1))

    whole = [tensor[-tail:].clone() for tensor in attend(x_HTD, lengths)]
    alone = attend(x_HTD[:, -tail:].contiguous(), TAIL)
    assert all(torch.equal(big, small) for big, small in zip(whole, alone, strict=True))


def test_gpu_wrong_cu_seqlens_do_no_harm() -> None:
    tensors = replace(MAIN, lengths=(300,)).inputs("cuda")
    q, k, v = (tensors[name].requires_grad_() for name in "qkv")
    good = varlen_attention(q, k, v, cu_seqlens_of([300], "cuda"))
    for values in (
        [5, -(2**31), 2**31 - 1, 7],
        [300, 200, 100, 0],
        [0, 300, 0, 300, 0, 300],
        [0, 10**6],
        [-(10**6), 300],
    ):
        cu_seqlens = torch.tensor(values, dtype=torch.int32, device="cuda")
        out = varlen_attention(q, k, v, cu_seqlens)
        torch.autograd.grad(out, (q, k, v), tensors["dout"])
        torch.cuda.synchronize()
    assert torch.equal(varlen_attention(q, k, v, cu_seqlens_of([300], "cuda")), good)


def test_gpu_a_plan_of_another_pack_is_refused_or_does_no_harm() -> None:
    """Refused where the plan's numbers are on the host; where they are on the device alone, nothing is overwritten."""
    case = replace(MAIN, lengths=(40, 260))
    tensors = {name: tensor.detach().requires_grad_(name != "dout") for name, tensor in case.inputs("cuda").items()}
    q, k, v = (tensors[name] for name in "qkv")
    cu_seqlens = cu_seqlens_of([40, 260], "cuda")
    other = plan_pack([100_000, 7], "cuda")
    with pytest.raises(ValueError, match="plan must be of 300 tokens of q and 300 of k"):
        varlen_attention(q, k, v, cu_seqlens, plan=other)
    good = case.results({name: tensor.detach() for name, tensor in tensors.items()})
    out = varlen_attention(q, k, v, cu_seqlens, plan=other.without_host_offsets(), **case.options(tensors))
    torch.autograd.grad(out, (q, k, v), tensors["dout"])
    torch.cuda.synchronize()
    assert_same_bits(case.results({name: tensor.detach() for name, tensor in tensors.items()}), good)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_tensors_on_another_device_than_the_current() -> None:
    assert torch.cuda.current_device() == 0
    first, second = (MAIN.results(MAIN.inputs(device)) for device in ("cuda:0", "cuda:1"))
    assert_same_bits({name: tensor.to("cuda:0") for name, tensor in second.items()}, first)


# Compilation, graphs, waiting


def test_gpu_opcheck() -> None:
    assert_opcheck("cuda")


@pytest.mark.parametrize(("planned", "packed"), [(True, True), (False, False)])
def test_gpu_compile_once_for_all_batches(planned: bool, packed: bool) -> None:
    assert_compiles_once("cuda", "inductor", planned, packed)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "case",
    [MAIN, replace(MAIN, planned=False), replace(MAIN, width=128), CROSS, replace(CROSS, planned=False)],
    ids=str,
)
def test_gpu_never_waits(case: Case) -> None:
    tensors = {name: tensor.detach().requires_grad_(name != "dout") for name, tensor in case.inputs("cuda").items()}
    q, k, v, dout, *parameters = (tensors[name] for name in ("q", "k", "v", "dout", *(n for n in tensors if "_" in n)))
    cu_seqlens = cu_seqlens_of(list(case.lengths), "cuda")
    cu_seqlens_k = None if case.lengths_k is None else cu_seqlens_of(list(case.lengths_k), "cuda")
    with waiting_is_an_error():
        out, _ = varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens_k, plan=case.plan("cuda"), return_lse=True, **case.options(tensors)
        )
        torch.autograd.grad(out, (q, k, v, *parameters), dout)


@pytest.mark.parametrize(("width", "planned"), [(64, True), (64, False), (72, True), (128, True)])
def test_gpu_graph_replays_with_new_lengths(width: int, planned: bool) -> None:
    """Captured on short images; replayed on packs of every class with as many tokens and images."""
    case = replace(MAIN, lengths=(90, 100, 110, 100, 100, 100), width=width, planned=planned)
    packs = [(20, 300, 60, 0, 120, 100), (600, 0, 0, 0, 0, 0), (1, 32, 33, 64, 256, 214), (257, 343, 0, 0, 0, 0)]
    tensors = {name: tensor.detach().requires_grad_(name != "dout") for name, tensor in case.inputs("cuda").items()}
    leaves = [tensor for name, tensor in tensors.items() if name != "dout"]
    cu_seqlens, plan = cu_seqlens_of(list(case.lengths), "cuda"), case.plan("cuda")

    def train(plan: PackPlan | None) -> dict[str, Tensor]:
        q, k, v = (tensors[name] for name in "qkv")
        out = varlen_attention(q, k, v, cu_seqlens, plan=plan, **case.options(tensors))
        return dict(
            zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, tensors["dout"])), strict=False)
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            train(plan and plan.without_host_offsets())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(plan)
    for lengths in (*packs, case.lengths):
        own = replace(case, lengths=lengths)
        assert sum(lengths) == sum(case.lengths)
        cu_seqlens.copy_(cu_seqlens_of(list(lengths)))
        if plan is not None:
            new = plan_pack(lengths)
            for field in fields(plan):
                target = getattr(plan, field.name)
                if target is not None and target.is_cuda:
                    target.copy_(getattr(new, field.name))
        graph.replay()
        expected = own.results({name: tensor.detach() for name, tensor in tensors.items()})
        assert_same_bits(captured, {name: expected[name] for name in captured}, lengths)


# Small enough for compute-sanitizer. racecheck reports the bytes by which Triton hands work to the partitions of
# gl.warp_specialize (LDS.U8 behind BAR.SYNC 1, and the STS that it waits for), at that call's lines; all else is ours.


@pytest.mark.parametrize(
    "case",
    [
        replace(MAIN, lengths=EVERY_CLASS),
        replace(MAIN, lengths=EVERY_CLASS, planned=False),
        replace(MAIN, lengths=EVERY_CLASS, width=72),
        replace(MAIN, lengths=EVERY_CLASS, width=128, planned=False),
        replace(MAIN, lengths=EVERY_CLASS, q_kind=None, k_kind=None, spread=30.0),
        replace(MAIN, lengths=(17, 0, 270), dtype=FP32),
        CROSS,
    ],
    ids=str,
)
def test_gpu_sanitize_every_kernel_once(case: Case) -> None:
    with poisoned_memory():
        results = case.results(case.inputs("cuda"))
    assert all(tensor.isfinite().all() for name, tensor in results.items() if name != "lse")
