"""flash_navit in the vision towers of transformers: what eager computes, in packs, or a refusal that says why."""

import copy
import importlib
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from navit.integrations import transformers as integration
from navit_kernels.testing import assert_error_within, relative_errors

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[transformers]'")
from transformers.models.pixtral import PixtralVisionConfig, PixtralVisionModel  # noqa: E402
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5  # noqa: E402
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3  # noqa: E402
from transformers.models.siglip2 import (  # noqa: E402
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

NAME = integration.NAME
ROOT = Path(__file__).parent.parent
SMALL = {"depth": 3, "hidden_size": 48, "num_heads": 3, "intermediate_size": 80, "out_hidden_size": 16}
SMALL_SIGLIP = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
GRIDS = ((1, 10, 12), (2, 2, 6), (1, 8, 8))  # frames, rows, columns; windows are 8 x 8
NARROW = {"intermediate_size": 64, "out_hidden_size": 8, "spatial_merge_size": 1}
Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    integration.register()


class Tower(NamedTuple):
    """A vision model's class, configuration, inputs, and the tensors of its output that are compared."""

    kind: type
    config: Any
    inputs: Inputs
    outputs: Callable[[Any], list[Tensor]]
    pixels: str = "hidden_states"


def patches(config: Any) -> Inputs:
    grids = torch.tensor(GRIDS if config.hidden_size < 100 else GRIDS[1:])
    generator = torch.Generator().manual_seed(0)
    values = 3 * config.temporal_patch_size * config.patch_size**2
    return {"hidden_states": torch.randn(int(grids.prod(1).sum()), values, generator=generator), "grid_thw": grids}


def padded(shapes: list[tuple[int, int]], slots: int, values: int = 768) -> Inputs:
    """What Siglip2's image processor gives, with noise where there is padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([rows * columns for rows, columns in shapes])
    return {
        "pixel_values": torch.randn(len(shapes), slots, values, generator=generator),
        "pixel_attention_mask": (torch.arange(slots) < lengths[:, None]).int(),
        "spatial_shapes": torch.tensor(shapes),
    }


def qwen2_5_tower(**options: Any) -> Tower:
    config = qwen2_5.Qwen2_5_VLVisionConfig(fullatt_block_indexes=[1], **options)
    kind = qwen2_5.Qwen2_5_VisionTransformerPretrainedModel
    return Tower(kind, config, patches(config), lambda out: [out.last_hidden_state, out.pooler_output])


def qwen3_tower(**options: Any) -> Tower:
    config = qwen3.Qwen3VLVisionConfig(**options)
    return Tower(
        qwen3.Qwen3VLVisionModel, config, patches(config), lambda out: [out.pooler_output, *out.deepstack_features]
    )


def pixtral_tower(**options: Any) -> Tower:
    config = PixtralVisionConfig(image_size=96, patch_size=16, **options)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 96, 96, generator=generator)
    inputs = {"pixel_values": images, "image_sizes": torch.tensor([(96, 64), (16, 96), (48, 48)])}
    return Tower(PixtralVisionModel, config, inputs, lambda out: [out.last_hidden_state], "pixel_values")


def siglip2_tower(**options: Any) -> Tower:
    inputs = padded([(5, 3), (1, 8), (4, 4), (1, 1)], 18)
    valid = inputs["pixel_attention_mask"].bool()

    def outputs(out: Any) -> list[Tensor]:
        return [out.last_hidden_state[valid.to(out.last_hidden_state.device)], out.pooler_output]

    return Tower(Siglip2VisionModel, Siglip2VisionConfig(**options), inputs, outputs, "pixel_values")


TOWERS: dict[str, Callable[[], Tower]] = {
    "qwen2.5 small": lambda: qwen2_5_tower(**SMALL),
    "qwen3 small": lambda: qwen3_tower(**SMALL, deepstack_visual_indexes=[0]),
    "pixtral small": lambda: pixtral_tower(**SMALL_SIGLIP),
    "siglip2 small": lambda: siglip2_tower(**SMALL_SIGLIP),
    # widths and heads of published models, one or two layers, narrow MLPs
    "qwen2.5, head width 80": lambda: qwen2_5_tower(**NARROW, depth=2, hidden_size=1280, num_heads=16),
    "qwen3, head width 72": lambda: qwen3_tower(**NARROW, depth=1, deepstack_visual_indexes=[]),
    "pixtral, head width 64": lambda: pixtral_tower(num_hidden_layers=1, intermediate_size=64),
    "siglip2 base, head width 64": lambda: siglip2_tower(num_hidden_layers=2, intermediate_size=64),
    "siglip2 so400m, head width 72": lambda: siglip2_tower(
        hidden_size=1152, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16
    ),
}


def build(tower: Tower, implementation: str = "eager") -> nn.Module:
    """A model whose biases and norms are random too."""
    torch.manual_seed(0)
    model = tower.kind._from_config(copy.deepcopy(tower.config), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def results(
    tower: Tower, model: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all parameters and of the pixels, for the same gradient of the outputs."""
    model = model.to(device, dtype)
    model.zero_grad(set_to_none=True)
    inputs = {name: part.to(device) for name, part in tower.inputs.items()}
    inputs[tower.pixels] = inputs[tower.pixels].to(dtype).requires_grad_()
    outputs = tower.outputs(model(**inputs))
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(out.shape, generator=generator).to(out) for out in outputs])
    found = {f"output {index}": out.detach() for index, out in enumerate(outputs)}
    found |= {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    return found | {tower.pixels: inputs[tower.pixels].grad}


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error by name. Attention does not see its keys' bias: its gradient is zero, and rounding in either."""
    assert actual.keys() == expected.keys()
    largest = max(part.norm() for part in expected.values())
    unseen = {name for name in expected if name.endswith("k_proj.bias")}
    assert all(actual[name].norm() < 1e-5 * largest for name in unseen)
    return {name: max(relative_errors(actual[name], expected[name])) for name in expected if name not in unseen}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_compute_what_eager_computes_and_its_gradients(name: str) -> None:
    tower = TOWERS[name]()
    model = build(tower)
    expected = results(tower, model)
    model.set_attn_implementation(NAME)
    errors = differences(results(tower, model), expected)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.gpu
@pytest.mark.parametrize("name", TOWERS)
def test_towers_on_a_gpu_are_as_exact_as_eager(name: str) -> None:
    tower = TOWERS[name]()
    model = build(tower)
    exact = results(tower, model, torch.float32, "cuda")
    expected = results(tower, model, torch.bfloat16, "cuda")
    model.set_attn_implementation(NAME)
    found = results(tower, model, torch.bfloat16, "cuda")
    for part in expected:
        if not part.endswith("k_proj.bias"):
            assert_error_within(found[part], exact[part], expected[part], part)


@pytest.mark.parametrize("name", ["qwen2.5 small", "siglip2 small"])
def test_the_implementation_can_be_chosen_when_a_model_is_made(name: str) -> None:
    tower = TOWERS[name]()
    expected, found = (results(tower, build(tower, implementation)) for implementation in ("eager", NAME))
    assert max(differences(found, expected).values()) < 1e-5


@pytest.mark.parametrize("name", ["qwen2.5 small", "siglip2 small"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    tower = TOWERS[name]()
    model = build(tower, NAME).train()
    expected = results(tower, model)
    model.gradient_checkpointing_enable()
    found = results(tower, model)
    assert all(torch.equal(found[part], expected[part]) for part in expected)


def test_inference_mode_computes_the_same() -> None:
    tower = TOWERS["qwen2.5 small"]()
    model = build(tower, NAME)
    expected = results(tower, model)
    with torch.inference_mode():
        found = tower.outputs(model(**tower.inputs))
    assert all(torch.equal(part, expected[f"output {index}"]) for index, part in enumerate(found))


# Siglip2: unpadded once


def test_siglip2_layers_see_the_valid_tokens_only() -> None:
    tower = TOWERS["siglip2 small"]()
    model, shapes = build(tower, NAME), []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, given, out: shapes.append(tuple(given[0].shape)))
    model(**tower.inputs)
    assert shapes == [(1, 15 + 8 + 16 + 1, 48)] * 2


def test_siglip2_padding_does_not_reach_the_images() -> None:
    tower = TOWERS["siglip2 small"]()
    model, inputs = build(tower, NAME), dict(tower.inputs)
    expected = tower.outputs(model(**inputs))
    padding = inputs["pixel_attention_mask"] == 0
    inputs["pixel_values"] = inputs["pixel_values"].masked_fill(padding[:, :, None], torch.nan)
    for found, wanted in zip(tower.outputs(model(**inputs)), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("mask", ["none", "all valid"])
def test_siglip2_without_padding(mask: str) -> None:
    tower = TOWERS["siglip2 small"]()
    inputs = padded([(3, 4), (2, 6)], 12)
    if mask == "none":
        inputs["pixel_attention_mask"] = None
    expected, found = (build(tower, kind)(**inputs).pooler_output for kind in ("eager", NAME))
    assert max(relative_errors(found, expected)) < 1e-5


def test_siglip2_hidden_states_keep_their_padded_shape() -> None:
    tower = TOWERS["siglip2 small"]()
    states = [build(tower, kind)(**tower.inputs, output_hidden_states=True).hidden_states for kind in ("eager", NAME)]
    assert len(states[1]) == len(states[0]) == 3
    for found, expected in zip(states[1], states[0], strict=True):
        assert max(relative_errors(found, expected)) < 1e-5


def siglip2_model(implementation: Any) -> Siglip2Model:
    torch.manual_seed(0)
    text = Siglip2TextConfig(**SMALL_SIGLIP, vocab_size=50, max_position_embeddings=8)
    config = Siglip2Config(text_config=text.to_dict(), vision_config=Siglip2VisionConfig(**SMALL_SIGLIP).to_dict())
    return Siglip2Model._from_config(config, attn_implementation=implementation)


@pytest.mark.parametrize("implementation", [{"vision_config": NAME, "text_config": "eager"}, NAME])
def test_siglip2_text_tower_computes_what_eager_computes_padding_included(implementation: Any) -> None:
    model = siglip2_model(implementation)
    assert model.text_model.config._attn_implementation == (NAME if implementation == NAME else "eager")
    words = {
        "input_ids": torch.randint(50, (3, 8)),
        "attention_mask": (torch.arange(8) < torch.tensor([[8], [3], [5]])),
    }
    inputs = padded([(3, 4), (2, 2), (1, 5)], 14) | words
    found, expected = (each(**inputs) for each in (model, siglip2_model("eager")))
    assert max(relative_errors(found.logits_per_image, expected.logits_per_image)) < 1e-5
    states = [out.text_model_output.last_hidden_state for out in (found, expected)]
    assert max(relative_errors(*states)) < 1e-5


# Whole vision-language models


def qwen2_5_model(implementation: Any) -> nn.Module:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = qwen2_5.Qwen2_5_VLConfig(
        vision_config={**SMALL, "fullatt_block_indexes": [1]},
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 60, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2,
        },
        image_token_id=50, video_token_id=51, vision_start_token_id=52, vision_end_token_id=53,
    )  # fmt: skip
    return qwen2_5.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=implementation)


def picture_and_words() -> dict[str, Tensor]:
    words = torch.tensor([[4, 52, *[50] * 6, 53, 7, 8]])
    grid = torch.tensor([[1, 4, 6]])
    pixels = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": words, "attention_mask": torch.ones_like(words), "mm_token_type_ids": (words == 50).int()}
    return {**given, "pixel_values": pixels, "image_grid_thw": grid}


def test_a_vision_language_model_with_flash_navit_in_its_vision_tower_alone() -> None:
    model = qwen2_5_model({"vision_config": NAME, "text_config": "eager"})
    assert model.model.visual.config._attn_implementation == NAME
    assert model.model.language_model.config._attn_implementation == "eager"
    found, expected = (each(**picture_and_words()).logits for each in (model, qwen2_5_model("eager")))
    assert max(relative_errors(found, expected)) < 1e-5


def test_a_causal_text_tower_is_refused_with_what_to_write_instead() -> None:
    with pytest.raises(NotImplementedError, match=r"causal_mask_function.*\"vision_config\": \"flash_navit\""):
        qwen2_5_model(NAME)(**picture_and_words())


# Beside


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "transformers_qwen_vision.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(re.findall(r"(\S+) from before", printed)[0]) < 1e-5
    assert "refused: flash_navit" in printed


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench, cases = (importlib.import_module(f) for f in ("bench_integrations", "integration_cases_transformers"))
    path = tmp_path / "results.json"
    bench.main(["--smoke", "--images", "pt", "--cases", ",".join(cases.CASES), "--out", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert {(row["case"], row["contender"]) for row in rows} == {
        *((f"siglip2 {size}", side) for size in ("so400m", "base") for side in ("before", "flash_navit", "packed")),
        *((f"qwen2.5-vl {part}", side) for part in ("tower", "attention") for side in ("before", "flash_navit")),
    }
