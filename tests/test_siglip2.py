"""SigLIP 2 NaFlex, packed: the numbers of transformers' model, from its modules or from a checkpoint's files."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from navit import cli, pack
from navit.integrations.siglip2 import Preprocessing, Siglip2, from_checkpoint, from_transformers
from navit_kernels.testing import assert_error_within, relative_errors

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[transformers]'")
from transformers.models.siglip2 import (  # noqa: E402
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import (  # noqa: E402
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
WIDE = {"hidden_size": 1152, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16}
SIZES = [(48, 64), (32, 48), (16, 320), (16, 16), (96, 80)]  # pixels: taller, wider, finer and coarser than the table
SLOTS = 32


def random_model(**options: Any) -> Siglip2VisionModel:
    """Their model, with no parameter left at a value such as one or zero."""
    torch.manual_seed(0)
    model = Siglip2VisionModel._from_config(Siglip2VisionConfig(**options), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def random_images(sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def padded(images: list[Tensor], slots: int = SLOTS) -> dict[str, Tensor]:
    """What their image processor makes of images that need no resizing, with NaN in the padding."""
    inputs = {
        "pixel_values": torch.full((len(images), slots, 768), torch.nan),
        "pixel_attention_mask": torch.zeros(len(images), slots, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[side // 16 for side in image.shape[1:]] for image in images]),
    }
    for row, image in enumerate(images):
        values = (image / 255 - 0.5) / 0.5
        patches = values.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 3, 4, 0).flatten(0, 1).flatten(1)
        inputs["pixel_values"][row, : len(patches)] = patches
        inputs["pixel_attention_mask"][row, : len(patches)] = 1
    return inputs


def theirs(model: Any, images: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Their pooled rows, and the features of each image's valid tokens."""
    inputs = padded(images)
    inputs["pixel_values"] = inputs["pixel_values"].nan_to_num(0.0)
    device, dtype = model.device, model.dtype
    out = model(**{name: part.to(device, dtype if part.is_floating_point() else None) for name, part in inputs.items()})
    shapes = inputs["spatial_shapes"].tolist()
    features = [row[: a * b].unflatten(0, (a, b)) for row, (a, b) in zip(out.last_hidden_state, shapes, strict=True)]
    return out.pooler_output, features


def assert_equal(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    assert max(relative_errors(actual, expected)) < 1e-5, name


# The same numbers


@pytest.mark.parametrize(
    "options", [SMALL, WIDE, {**SMALL, "num_patches": 49, "patch_size": 16}, {**SMALL, "hidden_act": "gelu"}]
)
@pytest.mark.parametrize("given", ["images", "pack", "packs", "inputs"])
def test_rows_and_features_are_theirs(options: dict[str, Any], given: str) -> None:
    model, images = random_model(**options), random_images()
    packed = from_transformers(model)
    rows, features = theirs(model, images)
    if given == "images":
        found = packed(images, dense=True)
    elif given == "pack":
        found = packed(pack(images, None, **packed.config.pack_options)[0], dense=True)
    elif given == "packs":
        packs = pack(images, 40, **packed.config.pack_options)
        assert len(packs) > 1
        found = packed(packs, dense=True)
    else:
        found = packed(padded(images), dense=True)
    assert_equal(found[0], rows)
    for actual, expected in zip(found[1], features, strict=True):
        assert_equal(actual, expected)


def test_gradients_are_theirs() -> None:
    model, images = random_model(**SMALL), random_images()
    packed = from_transformers(model)
    for out in (theirs(model, images)[0], packed(images)):
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    layer, block = model.encoder.layers[0], packed.blocks[0]
    in_projection = torch.cat([getattr(layer.self_attn, f"{part}_proj").weight.grad for part in "qkv"])
    patches = model.embeddings.patch_embedding.weight.grad.unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2).flatten(1)
    for name, actual, expected in (
        ("patches", packed.embed.proj.weight, patches),
        ("positions", packed.embed.table_LE, model.embeddings.position_embedding.weight.grad),
        ("qkv", block.qkv.weight, in_projection),
        ("norm", block.norm1.weight, layer.layer_norm1.weight.grad),
        ("head's keys and values", packed.pool.kv.weight, model.head.attention.in_proj_weight.grad[48:]),
    ):
        assert_equal(actual.grad, expected, name)


def test_weights_are_copies_and_keep_dtype_and_mode() -> None:
    model = random_model(**SMALL).to(torch.bfloat16).train()
    packed = from_transformers(model)
    assert packed.training
    assert {parameter.dtype for parameter in packed.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in packed.parameters())
    before = packed(random_images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(packed(random_images()), before)


def test_the_vision_tower_of_a_whole_model() -> None:
    torch.manual_seed(0)
    text = Siglip2TextConfig(**SMALL, vocab_size=50, max_position_embeddings=8).to_dict()
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=Siglip2VisionConfig(**SMALL).to_dict())).eval()
    assert_equal(from_transformers(model)(random_images()), theirs(model.vision_model, random_images())[0])


def test_our_own_format_saves_and_loads(tmp_path: Path) -> None:
    packed = from_transformers(random_model(**SMALL))
    packed.save_pretrained(tmp_path)
    assert torch.equal(Siglip2.from_pretrained(tmp_path)(random_images()), packed(random_images()))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [SMALL, WIDE])
def test_on_a_gpu_rows_are_as_exact_as_theirs(options: dict[str, Any]) -> None:
    model, images = random_model(**options).cuda(), random_images()
    exact = theirs(model, images)[0]
    expected = theirs(model.to(torch.bfloat16), images)[0]
    assert_error_within(from_transformers(model)([image.cuda() for image in images]), exact, expected)


# What is refused


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"vision_use_head": False}, "vision_use_head"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_patches": 200}, "num_patches"),
    ],
)
def test_options_that_are_not_supported_are_refused_by_name(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        from_transformers(Siglip2VisionModel(Siglip2VisionConfig(**{**SMALL, **change})))


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type must be 'siglip2'"):
        from_transformers(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)))
    with pytest.raises(ValueError, match="model must be a Siglip2VisionModel"):
        from_transformers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("what", ["mask", "shapes"])
def test_inputs_that_do_not_agree_are_refused(what: str) -> None:
    packed, inputs = from_transformers(random_model(**SMALL)), padded(random_images())
    if what == "mask":
        inputs["pixel_attention_mask"][1, 0] = 0
    else:
        inputs["spatial_shapes"][4] = torch.tensor([6, 6])
    with pytest.raises(ValueError, match=r"pixel_attention_mask.*images \[1\]" if what == "mask" else "spatial_shapes"):
        packed(inputs)


def test_the_position_table_has_one_size() -> None:
    with pytest.raises(NotImplementedError, match="stretched"):
        from_transformers(random_model(**SMALL)).resize_positions(20)


# Checkpoints


@pytest.fixture(params=["vision", "whole", "whole, in shards"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Siglip2VisionModel]:
    """A folder as save_pretrained writes it, and the vision tower in it."""
    model = vision = random_model(**SMALL)
    if request.param != "vision":
        text = Siglip2TextConfig(**SMALL, vocab_size=50, max_position_embeddings=8).to_dict()
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision.config.to_dict())).eval()
        model.vision_model.load_state_dict(vision.state_dict())
    model.save_pretrained(tmp_path, max_shard_size="60KB" if "shards" in request.param else "1GB")
    Siglip2ImageProcessorPil(max_num_patches=24, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shards" in request.param)
    return tmp_path, vision


def write_images(folder: Path) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for number, (height, width) in enumerate([(90, 61), (33, 200), (300, 240), (20, 20)]):
        paths.append(folder / f"{number}.png")
        small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        small.resize((width, height)).save(paths[-1])
    return paths


def test_navit_embed_gives_their_vectors(
    checkpoint: tuple[Path, Siglip2VisionModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = checkpoint
    paths = write_images(tmp_path / "images")
    with torch.no_grad():
        inputs = Siglip2ImageProcessorPil.from_pretrained(folder)(
            [Image.open(path) for path in paths], return_tensors="pt"
        )
        expected = model(**inputs).pooler_output
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    command = [
        "navit",
        "embed",
        "--weights",
        folder,
        tmp_path / "images",
        "--to",
        tmp_path / "out.npz",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    found = np.load(tmp_path / "out.npz")
    assert found["paths"].tolist() == [str(path) for path in paths]
    assert_equal(torch.from_numpy(found["vectors"]), expected)


def test_images_are_prepared_as_theirs_are(tmp_path: Path) -> None:
    processor = Siglip2ImageProcessorPil(max_num_patches=24)
    processor.save_pretrained(tmp_path)
    rules = Preprocessing.read(tmp_path)
    for path in write_images(tmp_path / "images"):
        inputs = processor(Image.open(path), return_tensors="pt")
        expected = padded([rules.load(path)], 24)
        assert torch.equal(inputs["spatial_shapes"], expected["spatial_shapes"])
        assert_equal(expected["pixel_values"].nan_to_num(0.0), inputs["pixel_values"])


def test_grids_are_theirs() -> None:
    rng = np.random.default_rng(0)
    for height, width in [
        (1, 1),
        (1, 4000),
        (16, 16),
        (1000, 1),
        *np.exp(rng.uniform(0, 8, (60, 2))).astype(int).tolist(),
    ]:
        for patches in (1, 24, 256, 1024):
            sides = get_image_size_for_max_num_patches(height, width, 16, patches)
            found = Preprocessing(16, patches, (0.5,) * 3, (0.5,) * 3, 2).grid(height, width)
            assert found == (sides[0] // 16, sides[1] // 16), (height, width, patches)


def test_an_old_config_that_leaves_defaults_out(tmp_path: Path) -> None:
    """Published folders name only what differs from transformers' defaults."""
    model = random_model(num_hidden_layers=1, intermediate_size=64)
    model.save_pretrained(tmp_path)
    Siglip2ImageProcessorPil().save_pretrained(tmp_path)
    vision = {"model_type": "siglip2_vision_model", "num_hidden_layers": 1, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2", "vision_config": vision}))
    assert_equal(from_checkpoint(tmp_path)(random_images()), theirs(model, random_images())[0])


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("config.json", None, FileNotFoundError, "holds no config.json"),
        ("model.safetensors", None, FileNotFoundError, "holds no model.safetensors"),
        ("preprocessor_config.json", None, FileNotFoundError, "holds no preprocessor_config.json"),
        ("config.json", {"model_type": "siglip"}, ValueError, "model_type must be 'siglip2'"),
        ("config.json", {"num_hidden_layers": 3}, ValueError, r"encoder\.layers\.2"),
        ("config.json", {"intermediate_size": 81}, ValueError, "do not fit their configuration.*fc1"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor"},
            ValueError,
            "image_processor_type",
        ),
        ("preprocessor_config.json", {"do_normalize": False}, ValueError, "do_normalize"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, ValueError, "rescale_factor"),
        ("preprocessor_config.json", {"patch_size": 14}, ValueError, "patch_size"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(
    name: str, change: dict[str, Any] | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    random_model(**SMALL).save_pretrained(tmp_path)
    Siglip2ImageProcessorPil().save_pretrained(tmp_path)
    if change is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(json.dumps({**json.loads((tmp_path / name).read_text()), **change}))
    with pytest.raises(error, match=f"(?s){message}"):
        from_checkpoint(tmp_path)


def test_embed_without_a_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images")
    for arguments, message in (
        (["--weights", tmp_path, tmp_path / "images"], "no model can be loaded"),
        ([tmp_path / "images"], "give a run folder and images"),
    ):
        monkeypatch.setattr(sys, "argv", ["navit", "embed", "--device", "cpu", *map(str, arguments)])
        with pytest.raises(SystemExit):
            cli.main()
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parent.parent / "examples" / "transformers_siglip2.py"
    runpy.run_path(str(example), run_name="__main__")
    differences = re.findall(r"(\S+) from before", capsys.readouterr().out)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-5
