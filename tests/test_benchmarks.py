"""The benchmarks report nothing that is wrong, mixed or incomplete. All but one of these tests run without a GPU."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import attention_cases  # noqa: E402
import bench_model  # noqa: E402
import bench_self_attention  # noqa: E402
import harness  # noqa: E402
import model_baselines  # noqa: E402
import peers  # noqa: E402
import report_self_attention  # noqa: E402
import timing  # noqa: E402
from attention_cases import Case  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
SMOKE = ["--smoke", "--contenders", "sdpa_loop,navit_kernels", "--cases", "U16"]
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_uuid": "a", "torch": "2.11.0", "copy_tb_s": 3.0, "matmul_tflop_s": 750}
H100 = timing.Ceilings(bytes_per_s=3.0e12, flops_per_s=750e12)


def attention_row(**changes: object) -> harness.Row:
    row = {"case": "pt", "heads": 16, "head_dim": 64, "dtype": "bf16", "qk_norm": "layer_norm", "direction": "fwd"}
    return {**row, "contender": "fa3", "us": 600.0, "floor_us": 180.0, "timer": "graph", **changes}


def results_of(*rows: harness.Row, **changes: object) -> harness.Row:
    return {"machine": dict(MACHINE), "commit": "abc", "rows": list(rows), **changes}


# The gate


def test_smoke_run_writes_tidy_rows_and_prints_their_path_last(tmp_path, capsys):
    before = set(RESULTS)
    bench_self_attention.main([*SMOKE, "--out", str(tmp_path / "results.json")])
    path = capsys.readouterr().out.splitlines()[-1]
    assert path == str(tmp_path / "results.json")
    results = json.loads(Path(path).read_text())
    assert {"machine", "commit", "rows"} <= set(results)
    for row in results["rows"]:
        assert set(row) == set(attention_row())
        assert row["us"] > 0
        assert row["floor_us"] > 0
    held = {(row["contender"], row["qk_norm"], row["direction"]) for row in results["rows"]}
    names, norms = ("sdpa_loop", "navit_kernels"), ("layer_norm", "none")
    assert held == {(name, norm, way) for name in names for norm in norms for way in ("fwd", "bwd")}
    assert set((ROOT / "benchmarks" / "results").glob("*/*.json")) == before


@pytest.mark.parametrize("error", [0.05, math.nan])
def test_nothing_is_reported_when_our_result_is_wrong(monkeypatch, tmp_path, error):
    right = attention_cases.varlen_attention
    monkeypatch.setattr(
        attention_cases, "varlen_attention", lambda *args, **kwargs: right(*args, **kwargs) * (1 + error)
    )
    with pytest.raises(SystemExit, match="navit_kernels") as exit:
        bench_self_attention.main([*SMOKE, "--out", str(tmp_path / "results.json")])
    assert exit.value.code != 0
    assert not list(tmp_path.iterdir())


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attention_cases.F, "layer_norm", lambda x, shape, weight, eps: x * weight)
    bench_self_attention.main([*SMOKE, "--out", str(tmp_path / "results.json")])
    assert "without sdpa_loop" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["contender"] for row in rows} == {"navit_kernels"}


def test_required_peers_that_are_missing_stop_the_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("they may be there")
    with pytest.raises(SystemExit, match="fa3, fa4, torch_varlen"):
        bench_self_attention.main(["--smoke", "--require-peers", "--out", str(tmp_path / "results.json")])


def test_a_real_run_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_self_attention.main([])
    assert "no CUDA GPU" in capsys.readouterr().err


# Floors and faults


def test_floors_follow_bytes_for_short_images_and_flops_for_long_ones(monkeypatch):
    monkeypatch.setattr(attention_cases, "ceilings", lambda: H100)
    short, long = Case("U64", 16, 64, (64,) * 1024), Case("U4096", 16, 64, (4096,) * 16)
    tensor_us = 65536 * 16 * 64 * 2 / 3.0e12 * 1e6
    assert short.floor_us("fwd") == pytest.approx(4 * tensor_us)
    assert short.floor_us("bwd") == pytest.approx(7 * tensor_us)
    product_us = 2 * 16 * 64 * 16 * 4096**2 / 750e12 * 1e6
    assert long.floor_us("fwd") == pytest.approx(2 * product_us)
    assert long.floor_us("bwd") == pytest.approx(5 * product_us)


def test_a_norm_backward_with_launch_gaps_in_it_is_a_fault(monkeypatch):
    monkeypatch.setattr(bench_self_attention, "ceilings", lambda: H100)
    bench_self_attention.assert_norm_backward_is_sane(290, 65536, 16, 64)
    with pytest.raises(bench_self_attention.MeasuringFault, match="347"):
        bench_self_attention.assert_norm_backward_is_sane(347, 65536, 16, 64)


def test_sample_holds_the_longest_and_the_shortest_image():
    lengths = [70, 5, 900, 64, 1, 300]
    sample = attention_cases.sample_images(lengths, tokens=1000)
    assert {2, 4} <= set(sample)
    assert sum(lengths[image] for image in sample) <= 1000
    assert len(attention_cases.sample_images([4096, 4096])) == 1


# Results


def test_merging_replaces_the_row_about_the_same_thing_and_keeps_the_others():
    old = results_of(attention_row(us=600.0), attention_row(contender="fa4", us=700.0))
    new = results_of(
        attention_row(us=590.0, floor_us=181.0, timer="events"), peak_mib=[{"case": "pt", "peak_mib": 1.0}]
    )
    new["machine"]["copy_tb_s"] = 2.99  # measured anew in every run
    joined = harness.merge(old, new)
    assert [(row["contender"], row["us"]) for row in joined["rows"]] == [("fa3", 590.0), ("fa4", 700.0)]
    assert joined["peak_mib"] == [{"case": "pt", "peak_mib": 1.0}]


@pytest.mark.parametrize("part", ["commit", "torch", "gpu_uuid"])
def test_results_of_different_runs_are_not_mixed(part):
    other = results_of(attention_row(contender="fa4"))
    if part == "commit":
        other["commit"] = "def"
    else:
        other["machine"][part] = "other"
    with pytest.raises(ValueError, match=part):
        harness.merge(results_of(attention_row()), other)


def test_a_refused_merge_loses_neither_result(tmp_path):
    path = tmp_path / "self_attention.json"
    options = harness.parse_options(harness.parser(""), ["--smoke", "--merge", "--out", str(path)])
    path.write_text(json.dumps(results_of(attention_row())))
    before = path.read_text()
    with pytest.raises(SystemExit, match="not one run"):
        harness.write_results("self_attention", [attention_row(contender="fa4")], options)
    assert path.read_text() == before
    (beside,) = set(tmp_path.iterdir()) - {path}
    assert json.loads(beside.read_text())["rows"][0]["contender"] == "fa4"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        (None, "cpu"),
    ],
)
def test_results_folder_is_named_after_the_gpu(name, slug):
    assert harness.gpu_slug(name) == slug


def test_ratios_compare_with_the_best_required_peer():
    us = {"navit_kernels": 100.0, "fa3": 300.0, "fa4": 250.0, "torch_varlen": 400.0, "flex_attention": 1.0}
    rows = [attention_row(contender=name, us=t, direction=way) for name, t in us.items() for way in ("fwd", "bwd")]
    (line,) = report_self_attention.ratios(rows)
    assert line["fwd+bwd"] == "2.50× fa4"
    assert (line["at least"], line["aim at"]) == report_self_attention.TARGETS["pt", 16, 64]


def test_missing_names_each_required_peer_and_direction_that_lacks():
    names = ("navit_kernels", "fa3", "fa4", "torch_varlen")
    rows = [attention_row(contender=name, direction=way) for name in names for way in ("fwd", "bwd")]
    assert report_self_attention.missing({"rows": rows}) == []
    lacking = {"rows": rows[:-1]}
    assert report_self_attention.missing(lacking) == ["pt 16 64 bf16 layer_norm: no torch_varlen bwd"]
    reason = {key: rows[-1][key] for key in ("case", "heads", "head_dim", "dtype", "contender")} | {"why": "wrong"}
    assert report_self_attention.missing({**lacking, "left_out": [reason]}) == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_state_their_machine_and_commit(path):
    results = json.loads(path.read_text())
    assert harness.gpu_slug(results["machine"]["gpu"]) == path.parent.name
    assert results["commit"] not in ("", "unknown")
    assert results["rows"]
    assert all(row["contender"] for row in results["rows"])


def test_committed_h100_attention_results_hold_every_required_peer():
    path = ROOT / "benchmarks" / "results" / "h100" / "self_attention.json"
    if not path.exists():
        pytest.skip("none committed yet")
    assert report_self_attention.missing(json.loads(path.read_text())) == []


# Whole models


def test_smoke_run_of_models_writes_every_field(tmp_path):
    path = tmp_path / "model.json"
    bench_model.main(["--smoke", "--contenders", "navit,straw_sdpa_loop", "--out", str(path)])
    rows = json.loads(path.read_text())["rows"]
    held = {(row["contender"], row["direction"]) for row in rows}
    assert held == {(name, way) for name in ("navit", "straw_sdpa_loop") for way in bench_model.DIRECTIONS}
    fields = {"case", "ms", "images_per_s", "tokens_per_s", "mfu", "peak_gib", "time_by_kind"}
    assert all(fields <= set(row) for row in rows)


def test_no_model_is_timed_when_the_baseline_computes_something_else(monkeypatch, tmp_path):
    monkeypatch.setattr(model_baselines, "_unit", lambda x, weight=None: x if weight is None else x * weight)
    with pytest.raises(SystemExit, match="straw_sdpa_loop"):
        bench_model.main(["--smoke", "--contenders", "straw_sdpa_loop", "--out", str(tmp_path / "model.json")])
    assert not list(tmp_path.iterdir())


def test_model_work_is_counted_as_published():
    config = bench_model.NaViTConfig.preset("B/16")
    work = bench_model.Workload("B/16 pt", config, [100, 50], None, [], None)
    linear = 12 * 12 * 768**2 + 3 * 256 * 768 + 2 * 768**2
    assert work.flops("train") == 6 * linear * 150 + 12 * 12 * 768 * (100**2 + 50**2)
    assert work.flops("forward") == pytest.approx(work.flops("train") / 3)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("backward_resident", "attention"),
        ("hopper_keys", "attention"),
        ("hopper_queries", "attention"),
        ("backward_norms", "attention"),
        ("pool_backward_kernel", "attention"),
        ("down_backward_kernel", "gemm"),
        ("table_backward_kernel", "norm+elementwise"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTT", "gemm"),
        ("triton_poi_fused__flash_attention_forward_gelu_mm_3", "norm+elementwise"),
        ("triton_tem_fused_mm_7", "gemm"),
        ("indexing_backward_kernel_small_stride", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(kernel, kind):
    assert bench_model.kind_of(kernel) == kind


def test_time_by_kind_fills_the_step():
    kernels = [timing.Kernel("up_kernel", 2000.0, 0.0), timing.Kernel("hopper_keys", 500.0, 2100.0)]
    kinds = bench_model.time_by_kind(kernels, 3.0)
    assert kinds == {"gemm": 2.0, "attention": 0.5, "norm+elementwise": 0.0, "other": 0.0, "idle": 0.5}


def test_fa3_op_keeps_one_graph_and_its_gradients(monkeypatch):
    lengths = [5, 1, 9]
    pack = peers.Pack(lengths, attention_cases.cu_seqlens_of(lengths))
    plain = peers.load("sdpa_loop").prepare(pack)

    def forward(q, k, v, cu_seqlens, longest):
        assert (cu_seqlens.tolist(), longest) == ([0, 5, 6, 15], 9)
        return plain(q, k, v), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)

    def backward(dout, q, k, v, out, lse, cu_seqlens, longest):
        image_T = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        other = image_T[:, None] != image_T
        q, k, v, dout = (x.transpose(0, 1) for x in (q, k, v, dout))
        weights = (q @ k.mT * 8**-0.5).masked_fill(other, -math.inf).softmax(-1)
        dweights = dout @ v.mT
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * 8**-0.5
        return torch.stack([part.transpose(0, 1) for part in (dscores @ k, dscores.mT @ q, weights.mT @ dout)], 1)

    monkeypatch.setattr(peers, "fa3_forward", forward)
    monkeypatch.setattr(peers, "fa3_backward", backward)
    compiled = torch.compile(model_baselines._fa3_for_compile(pack), backend="aot_eager", fullgraph=True)
    q, k, v = (torch.randn(15, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gradients = [torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v)) for run in (compiled, plain)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_timers_agree_on_a_large_kernel():
    harness.parse_options(harness.parser(""), [])
    try:
        source, target = torch.randn(2**27, device="cuda"), torch.empty(2**27, device="cuda")
        graph, events, kernels = (
            timing.measure([lambda: torch.neg(source, out=target)] * 2, timer, 20).us
            for timer in ("graph", "events", "kernels")
        )
        assert events == pytest.approx(graph, rel=0.15)
        assert kernels == pytest.approx(graph, rel=0.15)
    finally:
        torch.cuda.set_stream(torch.cuda.default_stream())
