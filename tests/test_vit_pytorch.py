"""vit-pytorch's NaViTs, accelerated: the same numbers, the same parameters, and a clear no to what is not supported."""

import importlib
import importlib.metadata
import importlib.util
import json
import random
import runpy
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from navit import PackedImages
from navit.integrations.vit_pytorch import accelerate, load
from navit_kernels.testing import assert_error_within, relative_errors

ROOT = Path(__file__).parent.parent
KINDS = ("na_vit", "na_vit_nested_tensor")
SMALL = dict(image_size=32, patch_size=4, num_classes=5, dim=24, depth=2, heads=2, mlp_dim=40, dim_head=8)


@pytest.fixture(scope="module")
def theirs() -> Iterator[dict[str, Any]]:
    """Their modules by name, loaded from their files: the package as a whole imports torchvision, and fails without it.

    The nested one is let train its embedding, which torch.nested.nested_tensor prevents.
    """
    spec = importlib.util.find_spec("vit_pytorch")
    if spec is None or importlib.util.find_spec("einops") is None:
        pytest.skip("needs vit-pytorch: pip install --no-deps vit-pytorch einops")
    package = types.ModuleType("vit_pytorch")
    package.__path__ = list(spec.submodule_search_locations or [])
    names = [*KINDS, "na_vit_nested_tensor_3d"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vit_pytorch", package)
        modules: dict[str, Any] = {name: importlib.import_module(f"vit_pytorch.{name}") for name in names}
        nested = modules["na_vit_nested_tensor"]
        patch.setattr(
            nested, "nested_tensor", lambda parts, **options: torch.nested.as_nested_tensor([*parts], **options)
        )
        yield modules
        for name in names:
            del sys.modules[f"vit_pytorch.{name}"]


def make(theirs: dict[str, Any], kind: str, seed: int = 0, **changes) -> Any:
    """Their model, with no parameter or buffer left at a value such as one or zero."""
    torch.manual_seed(seed)
    nested = {"token_dropout_prob": 0.0} if kind == "na_vit_nested_tensor" else {}
    model = theirs[kind].NaViT(**{**SMALL, **nested, **changes})
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 0.1 * torch.randn_like(tensor)
    return model


def make_images(sizes: list[tuple[int, int]], channels: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, *size, generator=generator) for size in sizes]


SIZES = [(12, 20), (4, 4), (32, 8), (16, 16)]


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(out, parameters, direction), strict=True))


def assert_equal_to(bound: float, actual: Tensor, expected: Tensor, name: str) -> None:
    error = max(relative_errors(actual, expected))
    assert error <= bound, f"{name}: {error:.1e}"


# The same numbers


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_theirs_for_any_sizes(theirs, kind, seed):
    rng = random.Random(seed)
    patch, channels = rng.choice([1, 2, 3, 4, 7, 16]), rng.choice([1, 3, 4])
    rows, columns = rng.randint(3, 9), rng.randint(3, 9)
    sizes = [(rng.randint(1, rows) * patch, rng.randint(1, columns) * patch) for _ in range(rng.randint(1, 6))]
    images = make_images([(3 * patch, 2 * patch), *sizes], channels, seed)
    changes = dict(
        image_size=(rows * patch, columns * patch), patch_size=patch, channels=channels, dim=rng.choice([8, 20, 33]),
        depth=rng.randint(1, 3), heads=rng.randint(1, 4), dim_head=rng.choice([4, 8, 18]), mlp_dim=rng.choice([16, 50]),
        num_classes=rng.randint(1, 9),
    )  # fmt: skip
    if kind == "na_vit_nested_tensor":
        changes["qk_rmsnorm"] = rng.random() < 0.7
    model = make(theirs, kind, seed, **changes)
    fast = accelerate(model)
    given: Any = images
    options: dict[str, Any] = {}
    if kind == "na_vit" and seed % 3 == 1:
        at = rng.randint(1, len(images))
        given = [images[:at], images[at:]] if at < len(images) else [images]
    elif kind == "na_vit" and seed % 3 == 2:
        options = {"group_images": True, "group_max_seq_len": rows * columns}
    expected, actual = model(given, **options), fast(given, **options)
    assert_equal_to(1e-5, actual, expected, "output")
    ours = gradients(fast, actual)
    for name, gradient in gradients(model, expected).items():
        assert_equal_to(1e-5, ours[name], gradient, name)


@pytest.mark.parametrize("changes", [{}, {"qk_rmsnorm": False}], ids=["normed", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_with_and_without_norms_of_q_and_k(theirs, kind, changes):
    if changes and kind == "na_vit":
        pytest.skip("it always has norms")
    model, images = make(theirs, kind, **changes), make_images(SIZES)
    expected = model(images)
    fast = accelerate(model)
    actual = fast(images)
    assert_equal_to(1e-5, actual, expected, "output")
    ours = gradients(fast, actual)
    for name, gradient in gradients(model, expected).items():
        assert_equal_to(1e-5, ours[name], gradient, name)


@pytest.mark.parametrize("kind", KINDS)
def test_images_get_their_gradient_too(theirs, kind):
    model = make(theirs, kind)
    images = [image.requires_grad_() for image in make_images(SIZES)]
    pairs = [torch.autograd.grad(run(images).square().sum(), images) for run in (accelerate(model), model)]
    for actual, expected in zip(*pairs, strict=True):
        assert_equal_to(1e-5, actual, expected, "image")


@pytest.mark.parametrize("kind", KINDS)
def test_other_images_do_not_leak(theirs, kind):
    fast = accelerate(make(theirs, kind))
    images = make_images(SIZES)
    clean = fast(images)
    images[2] = torch.full_like(images[2], torch.nan)
    others = [0, 1, 3]
    assert torch.equal(fast(images)[others], clean[others])


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_dropout_and_those_of_the_branches_act_in_training_alone(theirs, kind):
    model = make(theirs, kind, dropout=0.3, emb_dropout=0.2)
    fast, images = accelerate(model), make_images(SIZES)
    assert fast.training
    with pytest.raises(NotImplementedError, match=r"attention_dropout must be 0 in training, got 0\.3"):
        fast(images)
    fast.attention_dropout = 0.0
    assert not torch.equal(fast(images), fast(images))
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert {name: m.p for name, m in fast.named_modules() if isinstance(m, nn.Dropout)} == rates
    assert_equal_to(1e-5, fast.eval()(images), model.eval()(images), "output")


# Token dropout


RATES = [0.1, 0.3, 0.5, 0.7, 0.9, 0.95]


@pytest.mark.parametrize("rate", [*RATES, lambda height, width: height / (height + 2 * width)])
@pytest.mark.parametrize("kind", KINDS)
def test_training_drops_as_many_tokens_as_theirs_and_computes_the_same_on_them(theirs, kind, rate, monkeypatch):
    if callable(rate) and kind == "na_vit_nested_tensor":
        pytest.skip("its rate is a number")
    model = make(theirs, kind, token_dropout_prob=rate)
    fast = accelerate(model)
    images = make_images([*SIZES, (20, 16), (8, 20)])  # 20 tokens at 0.9: one or two, by float64 or float32
    packed = fast.pack(images)
    bounds = packed.cu_seqlens.tolist()
    scores = []
    for first, last, (_, columns), image in zip(bounds, bounds[1:], packed.grids.tolist(), images, strict=False):
        score = torch.zeros(image[0].numel() // 16)
        row, column = packed.coords[first:last].unbind(1)
        score[row * columns + column] = 1
        scores.append(score)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda size, **_: scores.pop(0).reshape(size))
        expected = model(images)  # keeps the best scores: ours, if as many as it wants
    assert_equal_to(1e-5, fast(packed), expected, "output")
    fast.eval()
    assert fast.pack(images).tokens == sum(image[0].numel() // 16 for image in images)


def test_token_dropout_follows_torchs_seed(theirs):
    fast = accelerate(make(theirs, "na_vit", token_dropout_prob=0.5))
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(fast.pack(make_images(SIZES)).coords)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_no_rate_means_no_dropout_in_training(theirs):
    fast = accelerate(make(theirs, "na_vit_nested_tensor", token_dropout_prob=None))
    assert fast.pack(make_images(SIZES)).tokens == sum(height * width // 16 for height, width in SIZES)


# The same parameters


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_state_dicts_are_shared(theirs, kind):
    model = make(theirs, kind)
    model.to_patch_embedding[1].weight.requires_grad_(False)
    fast = accelerate(model.eval())
    assert not fast.training
    assert [(n, id(p)) for n, p in fast.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [n for n, p in fast.named_parameters() if not p.requires_grad] == ["to_patch_embedding.1.weight"]
    assert list(fast.state_dict()) == list(model.state_dict())
    model.load_state_dict(fast.state_dict())
    fast.load_state_dict(make(theirs, kind, seed=1).state_dict())
    assert_equal_to(1e-5, fast(make_images(SIZES)), model(make_images(SIZES)), "output")


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_made_before_trains_the_accelerated_model(theirs, kind):
    model, images = make(theirs, kind), make_images(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    fast = accelerate(model)
    before = fast(images)
    before.square().sum().backward()
    assert not [name for name, parameter in fast.named_parameters() if parameter.grad is None]
    optimizer.step()
    assert fast(images).square().sum() < before.square().sum()
    assert_equal_to(1e-5, fast(images), model(images), "output")


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_enough(theirs, kind):
    for changes in ({}, {"depth": 0}, {"channels": 1}):
        model = make(theirs, kind, **changes)
        loaded = load(model.state_dict(), **({"channels": 1} if "channels" in changes else {}))
        images = make_images(SIZES, changes.get("channels", 3))
        expected = model(images)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert_equal_to(1e-5, loaded(images), expected, "output")


def test_a_replaced_head_is_kept(theirs):
    model = make(theirs, "na_vit")
    model.to_latent, model.mlp_head = nn.Tanh(), nn.Linear(24, 3)
    fast, images = accelerate(model), make_images(SIZES)
    assert fast(images).shape == (4, 3)
    assert_equal_to(1e-5, fast(images), model(images), "output")
    assert fast.mlp_head is model.mlp_head


# Packs


@pytest.mark.parametrize("kind", KINDS)
def test_packs_run_as_lists_do(theirs, kind):
    fast = accelerate(make(theirs, kind)).double()
    images = [image.double() for image in make_images(SIZES)]
    expected = fast(images)
    assert torch.equal(fast(fast.pack(images)), expected)
    assert torch.equal(fast([images[:1], images[1:]]), expected)
    torch.testing.assert_close(fast(images[::-1]), expected.flip(0), rtol=1e-10, atol=1e-12)


def test_uint8_images_are_scaled_to_the_unit_interval(theirs):
    fast = accelerate(make(theirs, "na_vit"))
    image = torch.randint(256, (3, 12, 8), dtype=torch.uint8)
    torch.testing.assert_close(fast([image]), fast([image / 255]))


def compile_once(theirs: dict[str, Any], kind: str, device: str, backend: str) -> None:
    """Train on packs of many sizes through one compiled graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = accelerate(make(theirs, kind, depth=1, dim_head=16))
    packs = []
    for step in range(3):
        rng = random.Random(step)
        sizes = [(4 * rng.randint(1, 8), 4 * rng.randint(1, 8)) for _ in range(3 + step)]
        packs.append(fast.pack(make_images(sizes, seed=step)).to(device))
    fast.to(device)
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    graphs = []
    for packed in packs:
        compiled(packed).square().sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == 1
    assert graphs[1] == graphs[-1] <= 2  # the second pack's sizes differ, which makes sizes dynamic
    if device != "meta":
        torch.testing.assert_close(compiled(packs[0]), fast(packs[0]), rtol=1e-3, atol=1e-4)


def test_compiles_whole_and_once_for_all_batches(theirs):
    compile_once(theirs, "na_vit", "meta", "aot_eager")  # traced as on a GPU, computed nowhere


def test_a_list_is_packed_outside_of_the_compiled_graph(theirs):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(accelerate(make(theirs, "na_vit", depth=1, dim_head=16)).to("meta"), backend="eager")
    graphs = []
    for count in (2, 3, 4):
        assert compiled([image.to("meta") for image in make_images(SIZES[:count])]).shape == (count, 5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] <= 2 * graphs[0]


# Refusals


def test_importing_the_integration_imports_no_peer():
    command = "import navit, navit.integrations.vit_pytorch, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, check=True, text=True)
    assert not {name.split(".")[0] for name in modules.stdout.split()} & {"vit_pytorch", "einops", "triton"}


def test_other_models_are_refused(theirs):
    class Changed(theirs["na_vit"].NaViT):
        pass

    for model in (Changed(**SMALL), nn.Linear(2, 2)):
        with pytest.raises(
            TypeError, match=r"model must be a NaViT of vit_pytorch\.na_vit or .*, got .*(Changed|Linear)"
        ):
            accelerate(model)
    video = theirs["na_vit_nested_tensor_3d"].NaViT(**SMALL, max_frames=4, frame_patch_size=2)
    for run, what in ((accelerate, video), (load, video.state_dict())):
        with pytest.raises(NotImplementedError, match=r"na_vit_nested_tensor_3d\.NaViT is not supported"):
            run(what)
    with pytest.raises(ValueError, match=r"state must be of vit_pytorch's na_vit\.NaViT or"):
        load({"weight": torch.ones(2)})
    model = make(theirs, "na_vit")
    with pytest.raises(RuntimeError, match=r"Missing key.*\n*.*attn_pool_queries"):
        load({name: tensor for name, tensor in model.state_dict().items() if name != "attn_pool_queries"})
    model.transformer.extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"transformer\.extra\.weight"):
        accelerate(model)


def test_what_the_kernels_cannot_cut_is_refused(theirs):
    for changes in ({"patch_size": 33, "image_size": 66}, {"channels": 5}):
        with pytest.raises(NotImplementedError, match="at most 4 channels and patches of 32 pixels a side"):
            accelerate(make(theirs, "na_vit", **changes))
    with pytest.raises(ValueError, match="channels must be such that patches of 48 values are square, got 4"):
        load(make(theirs, "na_vit").state_dict(), channels=4)


@pytest.mark.parametrize(
    ("sizes", "channels", "message"),
    [
        ([], 3, r"images must be at least one image, got none"),
        ([(4, 4), (36, 4)], 3, r"images\[1\] must be at most 32 × 32 pixels.*, got 36 × 4"),
        ([(4, 36)], 3, r"images\[0\] must be at most 32 × 32 pixels.*, got 4 × 36"),
        ([(4, 6)], 3, r"images\[0\] must have sides that are multiples of 4 pixels, got 4 × 6"),
        ([(4, 4)], 1, r"images\[0\] must be a tensor \(C, H, W\) of 3 channels, got \(1, 4, 4\)"),
    ],
)
def test_images_that_do_not_fit_are_named(theirs, sizes, channels, message):
    with pytest.raises(ValueError, match=message):
        accelerate(make(theirs, "na_vit"))(make_images(sizes, channels))


def test_a_pack_of_another_model_is_refused(theirs):
    packed = accelerate(make(theirs, "na_vit", patch_size=8)).pack(make_images([(8, 8)]))
    assert isinstance(packed, PackedImages)
    with pytest.raises(ValueError, match=r"images must be made by this model's `pack`, of patches of 4 pixels"):
        accelerate(make(theirs, "na_vit"))(packed)


def test_an_old_package_is_named_with_what_to_install(theirs, monkeypatch):
    model = make(theirs, "na_vit")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.8.7")
    with pytest.raises(ImportError, match=r">= 1\.23, found 1\.8\.7; .* 'navit-kernels\[vit-pytorch\]'"):
        accelerate(model)


# Beside


def test_the_example_runs(theirs, capsys):
    runpy.run_path(str(ROOT / "examples" / "from_vit_pytorch.py"), run_name="__main__")
    assert "difference" in capsys.readouterr().out


def test_the_benchmark_compares_both_models(theirs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("bench_integrations")
    path, cases = tmp_path / "integrations.json", ("vit_pytorch", "vit_pytorch nested")
    bench.main(["--smoke", "--images", "pt", "--cases", ",".join(cases), "--out", str(path)])
    rows = json.loads(path.read_text())["rows"]
    held = {(row["case"], row["direction"], row["contender"]) for row in rows}
    assert held >= {(case, way, side) for case in cases for way in ("forward", "train") for side in ("before", "after")}


# On a GPU


GPU = dict(image_size=512, patch_size=16, dim=256, depth=3, heads=4, mlp_dim=512, dim_head=64, num_classes=100)
GPU_SIZES = [(16 * rows, 16 * columns) for rows, columns in [(9, 7), (1, 1), (16, 16), (3, 30), (32, 20), (1, 17)]]


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_theirs_in_16_bits_on_a_gpu(theirs, kind, autocast):
    model = make(theirs, kind, **GPU)
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.gamma"):  # scores up to 64, as they come, turn any rounding into another result
            parameter.data /= 8
    images = make_images(GPU_SIZES)
    if not autocast:
        model.bfloat16()
        images = [image.bfloat16() for image in images]
    reference = load({name: tensor.double() for name, tensor in model.state_dict().items()})
    exact = reference([image.double() for image in images])
    model.cuda()
    images = [image.cuda() for image in images]
    results = []
    for run in (model, accelerate(model)):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = run(images)
        results.append({"output": out, **gradients(model, out)})
    at_dtype, actual = results
    for name, exactly in {"output": exact, **gradients(reference, exact)}.items():
        assert_error_within(actual[name], exactly, at_dtype[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_and_once_for_all_batches_on_a_gpu(theirs, kind):
    compile_once(theirs, kind, "cuda", "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_on_a_gpu_never_waits_for_it(theirs, kind):
    fast = accelerate(make(theirs, kind, **GPU, token_dropout_prob=0.3)).cuda()
    images = [image.cuda() for image in make_images(GPU_SIZES)]
    with torch.autocast("cuda", torch.bfloat16):
        fast(images).sum().backward()  # warm-up: kernels compile
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fast(images).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
