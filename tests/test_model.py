"""The model: rows in the order given, images apart, every switch, every parameter trained, saved and read back."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from navit import NaViT, NaViTConfig, PackedImages, pack
from navit.model import CONFIG, WEIGHTS
from navit_kernels import plan_pack

SMALL = NaViTConfig(width=32, depth=2, heads=2, mlp_width=48, patch_size=4, num_classes=5, table_length=12)
SWITCHES = [
    {"bias": True},
    {"norm": "rms_norm"},
    {"norm": "rms_norm", "bias": True, "embed_norm": True},
    {"qk_norm": "rms_norm", "bias": True},
    {"qk_norm": "l2"},
    {"qk_norm": "none", "bias": True},
    {"mlp": "gelu"},
    {"mlp": "swiglu", "bias": True},
    {"embed_norm": True},
    {"combine": "concat"},
    {"combine": "product"},
    {"coordinates": "fractional"},
    {"positions": "sinusoidal"},
    {"positions": "fourier"},
    {"positions": "fourier", "combine": "concat", "coordinates": "fractional"},
    {"pool": "mean"},
    {"pool": "max"},
    {"pool": "cls"},
    {"pool": "cls", "registers": 2},
    {"registers": 3},
    {"layer_scale": 0.1},
    {"drop_path": 0.3},
    {"num_classes": 0},
    {"channels": 1, "mean": (0.4,), "std": (0.2,)},
    {"depth": 0},
    {"checkpointing": "mlp"},
    {"checkpointing": "block", "drop_path": 0.3, "registers": 1},
]
GRIDS = [(2, 3), (1, 1), (5, 2), (1, 12), (4, 4)]


def make_images(config: NaViTConfig = SMALL, grids: list[tuple[int, int]] = GRIDS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(config.channels, rows * config.patch_size, columns * config.patch_size) for rows, columns in grids]
    return [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]


def make_model(seed: int = 0, **changes) -> NaViT:
    torch.manual_seed(seed)
    return NaViT(replace(SMALL, **changes))


def switch_name(changes: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in changes.items())


@pytest.mark.parametrize("changes", [{}, *SWITCHES], ids=switch_name)
def test_an_image_gets_the_same_row_alone_and_packed_among_others(changes):
    model = make_model(**changes).double().eval()
    images = make_images(model.config)
    packed, dense = model(images, dense=True)
    for index, image in enumerate(images):
        row, (features,) = model([image], dense=True)
        torch.testing.assert_close(packed[index], row[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dense[index], features, rtol=1e-10, atol=1e-12)
        assert features.shape == (*GRIDS[index], 32)
    assert packed.shape == (len(images), model.config.num_classes or 32)


@pytest.mark.parametrize("changes", [{}, *SWITCHES], ids=switch_name)
def test_every_parameter_gets_gradient(changes):
    model = make_model(**changes)
    rows = model(make_images(model.config))
    (rows * torch.randn_like(rows)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    assert not [name for name, _ in model.named_parameters() if "k_norm" in name and "bias" in name]


def test_rows_stand_in_the_order_given_however_images_are_packed():
    model = make_model().double()
    images = make_images()
    rows, dense = model(images, dense=True)
    packs = pack(images, 24, **model.config.pack_options)
    assert len(packs) > 1
    for given in (packs, [images[:2], [], images[2:]], [tuple(images)]):
        again, features = model(given, dense=True)
        torch.testing.assert_close(again, rows, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(model(given), rows, rtol=1e-10, atol=1e-12)
        for one, other in zip(features, dense, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(images[::-1]), rows.flip(0), rtol=1e-10, atol=1e-12)


def test_a_batch_of_equal_images_is_a_list_of_them():
    model = make_model().double()
    images = make_images(grids=[(2, 3)] * 3)
    assert torch.equal(model(torch.stack(images)), model(images))


def test_other_images_do_not_leak():
    model = make_model()
    images = [image / 255 for image in make_images()]
    clean = model(images)
    images[2] = torch.full_like(images[2], torch.nan)
    dirty = model(images)
    assert dirty[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(dirty[others], clean[others])


def test_uint8_images_are_scaled_to_the_unit_interval():
    model = make_model().double()
    images = make_images()
    torch.testing.assert_close(model([image.double() / 255 for image in images]), model(images), rtol=1e-10, atol=1e-12)


def test_patches_cut_before_give_the_same():
    model = make_model().double()
    (packed,) = pack(make_images(), None, **model.config.pack_options)
    patches = model._patches(packed)
    torch.testing.assert_close(model(replace(packed, pixels=None, patches=patches)), model(packed))
    torch.testing.assert_close(model(replace(packed, plan=None)), model(packed))


@pytest.mark.parametrize("patch_size", [3, 4])
def test_rows_of_any_number_of_values_are_projected(patch_size):
    embed = make_model(patch_size=patch_size, bias=True).embed
    patches_TP = torch.randn(7, 3 * patch_size**2)
    outcomes = []
    for project in (embed._project, embed.proj):
        out_TE = project(patches_TP)
        out_TE.square().sum().backward()
        outcomes.append([out_TE.detach(), embed.proj.weight.grad.clone(), embed.proj.bias.grad.clone()])
        embed.zero_grad()
    torch.testing.assert_close(*outcomes)


def test_where_a_patch_stands_matters():
    for changes in ({}, {"combine": "product"}, {"combine": "concat"}, {"positions": "fourier"}):
        model = make_model(**changes).double()
        image = make_images(grids=[(2, 3)])[0]
        turned = image.view(3, 2, 4, 12).flip(1).reshape(3, 8, 12)  # the two rows of patches change places
        assert (model([image]) - model([turned])).abs().max() > 1e-6


def test_dropped_tokens_are_never_read():
    model = make_model().double()
    images = [image.double() / 255 for image in make_images(grids=[(4, 4), (2, 2)])]
    (packed,) = pack(images, None, token_drop=0.5, **model.config.pack_options)
    rows = model(packed)
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[tuple(packed.coords[:8].T.long())] = True
    images[0].masked_fill_(~kept.repeat_interleave(4, 0).repeat_interleave(4, 1), torch.nan)
    (packed,) = pack(images, None, token_drop=0.5, **model.config.pack_options)
    assert torch.equal(model(packed), rows)
    with pytest.raises(ValueError, match=r"images\[0\] must be whole for dense features, 4 × 4 patches, got 8"):
        model(packed, dense=True)


def test_stochastic_depth_drops_whole_branches_of_single_images():
    model = make_model(drop_path=0.5, depth=1)
    model.config = replace(model.config, depth=3)  # rates 0, 1/4, 1/2
    torch.manual_seed(0)
    scales = torch.stack([torch.as_tensor(scale) for scale in model._keep_scales(4000, torch.device("cpu"))])
    for depth, keep in enumerate((1, 0.75, 0.5)):
        assert set(scales[depth].unique().tolist()) <= {0.0, torch.tensor(1 / keep).item()}
        assert abs(scales[depth].mean() - 1) < 0.05
    model = make_model(drop_path=0.9)
    images = make_images()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("checkpointing", ["mlp", "block"])
def test_checkpointing_changes_no_gradient(checkpointing):
    gradients = []
    for kind in ("none", checkpointing):
        model = make_model(checkpointing=kind, drop_path=0.3, registers=1)
        torch.manual_seed(1)
        model(make_images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_no_images_give_no_rows():
    model = make_model()
    rows, dense = model([], dense=True)
    assert rows.shape == (0, 5)
    assert dense == []
    assert model([[], []]).shape == (0, 5)
    assert make_model(num_classes=0)([]).shape == (0, 32)


def test_an_empty_pack_gives_no_rows():
    model = make_model(registers=1)
    (one,) = pack(make_images(grids=[(1, 1)]), None, **model.config.pack_options)
    pixels = replace(
        one.pixels, **{name: getattr(one.pixels, name)[:0] for name in ("pixels", "offsets_S", "sizes_S2")}
    )
    nothing = {name: getattr(one, name)[:0] for name in ("coords", "grids", "order")}
    empty = replace(one, pixels=pixels, cu_seqlens=one.cu_seqlens[:1], plan=plan_pack([]), **nothing)
    rows, dense = model(empty, dense=True)
    rows.sum().backward()
    assert rows.shape == (0, 5)
    assert dense == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(3, 4, 6)], r"images\[0\] must have sides that are multiples of 4 pixels, got 4 × 6"),
        ([torch.zeros(3, 4, 52)], r"images\[0\] must have at most 12 patches of 4 pixels per side, got 4 × 52"),
        ([torch.zeros(1, 4, 4)], r"mean must be 1 float"),
        (["photo.jpg"], r"images must be a PackedImages, a list of .*, got a list of \['str'\]"),
        (pack([torch.zeros(3, 8, 8)], None, patch_size=2)[0], "the pack's patch_size must be the model's, 4, got 2"),
        (
            pack([torch.zeros(3, 8, 8)], None, patch_size=4, prefix_tokens=1),
            "prefix_tokens must be the model's, 0, got",
        ),
    ],
)
def test_wrong_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        make_model()(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "attention"}, "pool must be 'map' or 'mean' or 'max' or 'cls', got 'attention'"),
        ({"heads": 5}, "width must be a multiple of heads = 5, got 32"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"mean": (0.5,)}, "mean and std must be of 3 numbers"),
        ({"width": 34, "positions": "fourier", "combine": "concat"}, "width must be a multiple of 4"),
    ],
)
def test_wrong_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize("name", ["B", "XL/16", "B/", "B/x", ""])
def test_a_wrong_preset_is_named(name):
    with pytest.raises(ValueError, match="preset must be one of Ti, S, B, L, So400m"):
        NaViTConfig.preset(name)


@pytest.mark.parametrize(
    ("preset", "millions"), [("Ti/16", 5.5), ("S/16", 21.7), ("B/16", 85.8), ("L/16", 303.3), ("So400m/14", 412.4)]
)
def test_presets_have_the_known_sizes(preset, millions):
    """Published counts of ViT encoders without a head (So400m: SigLIP's, without its pool)."""
    with torch.device("meta"):
        model = NaViT(NaViTConfig.preset(preset, pool="mean", bias=True))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("mlp", ["gelu_tanh", "gelu", "swiglu"])
def test_layers_that_are_replaced_or_watched_are_called(mlp: str):
    """Adapters replace layers, and profilers watch them."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    config = replace(SMALL, mlp=mlp, bias=True, layer_scale=0.3)
    expected, model = NaViT(config).eval(), NaViT(config).eval()
    images, names, seen = make_images(), ("qkv", "proj", "mlp.fc1", "mlp.fc2"), []
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.uniform_(-0.5, 0.5)
    model.load_state_dict(expected.state_dict())
    for block in (expected.blocks[0], model.blocks[0]):
        for name in names:
            layer = block.get_submodule(name)
            if block is model.blocks[0]:
                layer.__class__ = Doubled
            else:
                layer.weight.data *= 2
                layer.bias.data *= 2
    for name in names:
        model.blocks[1].get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with pytest.warns(UserWarning, match="watched or replaced"):
        torch.testing.assert_close(model(images), expected(images))
    assert seen == [*names]


def test_layers_that_are_wrapped_are_called():
    """By a module with neither weight nor bias."""
    torch.manual_seed(0)
    model = NaViT(SMALL).eval()
    expected = model(make_images())
    for name in ("qkv", "proj", "mlp.fc1", "mlp.fc2"):
        model.blocks[0].set_submodule(name, torch.nn.Sequential(model.blocks[0].get_submodule(name)))
    with pytest.warns(UserWarning, match="watched or replaced"):
        torch.testing.assert_close(model(make_images()), expected)


def test_flops_count_the_matrix_products_and_attention():
    config = replace(SMALL, registers=2, mlp="swiglu")
    model = NaViT(config)
    rows, columns = 3, 5
    seen = 0

    def count(module: torch.nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal seen
        seen += 2 * inputs[0].shape[0] * module.weight.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    model(make_images(grids=[(rows, columns)]))
    attention = 4 * config.depth * config.width * (rows * columns + 2) ** 2
    assert config.flops_per_image(rows, columns, training=False) == seen + attention
    assert config.flops_per_image(rows, columns) == 3 * (seen + attention)


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "fourier", "pool": "cls", "bias": True}, {"positions": "sinusoidal"}], ids=switch_name
)
def test_a_saved_model_reads_back(changes, tmp_path):
    model = make_model(**changes).eval()
    model.save_pretrained(tmp_path / "new" / "folder")
    again = NaViT.from_pretrained(tmp_path / "new" / "folder").eval()
    assert again.config == model.config
    assert torch.equal(again(make_images()), model(make_images()))
    assert NaViT.from_pretrained(tmp_path / "new" / "folder", drop_path=0.5).config.drop_path == 0.5


def test_a_mismatched_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json: not a saved NaViT"):
        NaViT.from_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"head.weight in .* must be \(7, 32\) .*, got \(5, 32\)"):
        NaViT.from_pretrained(tmp_path, num_classes=7)
    state = load_file(tmp_path / WEIGHTS)
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"extra in .* must be absent"):
        NaViT.from_pretrained(tmp_path)
    del state["norm.weight"]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"norm.weight in .* must be \(32,\) .*, got none"):
        NaViT.from_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "widht": 3}))
    with pytest.raises(ValueError, match=r"fields of .* must be fields of NaViTConfig, got \['widht'\]"):
        NaViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"positions": "sinusoidal"}, {"positions": "fourier"}])
def test_resized_positions_take_larger_images(changes):
    model = make_model(**changes)
    image = make_images(grids=[(20, 1)])
    with pytest.raises(ValueError, match="at most 12 patches"):
        model(image)
    model.resize_positions(24)
    assert model(image).isfinite().all()
    assert model.config.table_length == model.embed.config.table_length == 24
    model(image).sum().backward()


def test_autocast_runs_the_products_in_16_bits():
    model = make_model()
    exact = model(make_images())
    with torch.autocast("cpu", torch.bfloat16):
        rows = model(make_images())
    assert rows.dtype == torch.bfloat16
    assert (rows - exact).abs().max() < 0.05 * exact.abs().max()
    assert model.bfloat16()(make_images()).dtype == torch.bfloat16


COMPILED = [
    {},
    {"pool": "cls", "registers": 2, "coordinates": "fractional", "layer_scale": 0.1, "bias": True, "drop_path": 0.3},
    {"checkpointing": "block", "positions": "fourier", "qk_norm": "l2", "pool": "mean"},
]


def compile_once(device: str, backend: str, batches: int, **changes) -> None:
    """Train on packs of many sizes through one compiled graph; on a real device compare with the eager model."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(**{"depth": 1, **changes}).to(device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    rng = np.random.default_rng(0)
    graphs = []
    for step in range(batches):
        grids = [tuple(rng.integers(1, 8, 2).tolist()) for _ in range(3 + step % 5)]
        images = make_images(model.config, grids, seed=step)
        (packed,) = pack(images, None, token_drop=0.2, seed=step, **model.config.pack_options)
        packed = packed.to(device)
        compiled(packed).square().sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == 1
    assert graphs[1] == graphs[-1] <= 2  # the second pack's sizes differ, which makes sizes dynamic
    if device != "meta":
        compiled.eval()
        torch.testing.assert_close(compiled(packed), model(packed), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("batches", "changes"), list(zip((50, 4, 4), COMPILED, strict=True)))
def test_compiles_whole_and_once_for_all_batches(batches, changes):
    compile_once("meta", "aot_eager", batches, **changes)  # traced as on a GPU, computed nowhere


@pytest.mark.gpu
@pytest.mark.parametrize("changes", COMPILED, ids=switch_name)
def test_compiles_whole_and_once_for_all_batches_on_a_gpu(changes):
    compile_once("cuda", "inductor", 50, **changes)


def exported_matches(device: str) -> None:
    """Export the evaluating model, write it, read it, and run it on another pack."""
    model = make_model(registers=1).to(device)

    def packed(grids: list[tuple[int, int]]) -> PackedImages:
        return pack(make_images(grids=grids), None, **model.config.pack_options)[0].to(device)

    file = io.BytesIO()
    torch.export.save(model.export(packed(GRIDS[:3])), file)
    file.seek(0)
    rows = torch.export.load(file).module()(packed(GRIDS))
    assert rows.shape == (5, 5)
    if device != "meta":
        torch.testing.assert_close(rows, model(packed(GRIDS)), rtol=1e-3, atol=1e-4)


def test_exports_with_dynamic_sizes():
    exported_matches("meta")


@pytest.mark.gpu
def test_exports_with_dynamic_sizes_on_a_gpu():
    exported_matches("cuda")


@pytest.mark.gpu
def test_inference_holds_little_beside_an_mlp():
    """At most: what embeds the patches, the stream and its norm before and after attention, and the MLP's inside."""
    model = make_model(width=256, heads=4, mlp_width=1024, depth=3, table_length=64).cuda().eval()
    (packed,) = pack(make_images(grids=[(64, 64)] * 16), None, **model.config.pack_options)
    packed, tokens = packed.to("cuda"), 16 * 64 * 64
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(packed)  # kernels compile, libraries allocate
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(packed)
    held = (1 + 2 + 2 + 1) * 256 + 1024
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * 2 * tokens * held + 2**22  # of cast weights


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"registers": 1, "pool": "cls", "layer_scale": 0.1, "norm": "rms_norm"}])
def test_a_training_step_on_a_gpu_never_waits_for_it(changes):
    model = make_model(**changes, drop_path=0.2).cuda()
    (packed,) = pack(make_images(), None, **model.config.pack_options)
    packed = packed.pin_memory().to("cuda", non_blocking=True)
    with torch.autocast("cuda", torch.bfloat16):
        model(packed).sum().backward()  # warm-up: kernels compile
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(packed).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
