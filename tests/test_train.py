"""Training: rates, decays, losses, the stream of batches, and that a model learns."""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from drawings import write_drawings

from navit import NaViT, NaViTConfig
from navit.data import DataError, ImageSet, read_images
from navit.evaluate import outputs, score, view_batches
from navit.images import Resize
from navit.train import BatchStream, Settings, TrainConfig, Trainer, classification_loss, make_optimizer, rate_factor

CONFIG = NaViTConfig(width=32, depth=1, heads=2, mlp_width=64, patch_size=16, num_classes=3, bias=True)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return read_images(write_drawings(tmp_path_factory.mktemp("drawings")))


def settings_for(images: ImageSet, **changes: object) -> Settings:
    train = TrainConfig(steps=20, learning_rate=1e-2, warmup=2, schedule="constant", decay_head=0.1)
    settings = Settings("", images.classes, train, token_budget=32, resize=Resize("uniform", 24, 48, max_tokens=16))
    return replace(settings, **changes)


def same_pack(one: tuple, other: tuple) -> bool:
    """Whether two batches are bitwise the same: pixels, kept patches, places and labels."""
    (a, a_labels), (b, b_labels) = one, other
    pairs = [(a.pixels.pixels, b.pixels.pixels), (a.coords, b.coords), (a.order, b.order), (a_labels, b_labels)]
    return all(torch.equal(x, y) for x, y in pairs)


def test_warm_up_is_linear_and_ends_at_the_full_rate() -> None:
    config = TrainConfig(steps=100, warmup=4)
    assert [rate_factor(step, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_reciprocal_square_root_falls_as_written() -> None:
    config = TrainConfig(steps=100_000, warmup=10, timescale=1000)
    assert rate_factor(10 + 3000, config) == pytest.approx(0.5)


def test_cosine_falls_to_zero_at_the_last_step() -> None:
    config = TrainConfig(steps=110, warmup=10, schedule="cosine")
    assert rate_factor(60, config) == pytest.approx(0.5)
    assert rate_factor(110, config) == pytest.approx(0.0)


def test_cool_down_ends_any_schedule_linearly() -> None:
    config = TrainConfig(steps=100, warmup=0, schedule="constant", cooldown=10)
    assert [rate_factor(step, config) for step in (50, 90, 95, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.1])


def test_head_and_body_have_their_own_weight_decay_and_nothing_else_has_any() -> None:
    model = NaViT(CONFIG)
    groups = make_optimizer(model, TrainConfig(steps=1, decay_head=3.0, decay_body=0.03)).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decay) == sum(1 for _ in model.parameters())
    named = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert named.pop("head.weight") == 3.0
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(value == (0.03 if name in matrices else 0.0) for name, value in named.items())


def test_equal_decays_still_cover_every_parameter_once() -> None:
    model = NaViT(CONFIG)
    groups = make_optimizer(model, TrainConfig(steps=1, decay_head=0.0, decay_body=0.0)).param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))


def test_sigmoid_loss_is_summed_over_classes_and_averaged_over_images() -> None:
    logits, labels = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([0, 1])
    chances = logits.sigmoid()
    expected = -(chances[0, 0].log() + (1 - chances[0, 1]).log() + (1 - chances[1, 0]).log() + chances[1, 1].log()) / 2
    assert classification_loss(logits, labels, TrainConfig(1, loss="sigmoid")).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("after", [1, 5, 13])
def test_a_resumed_stream_gives_the_same_batches(drawings: ImageSet, after: int) -> None:
    settings = settings_for(drawings, token_drop=(0.7, 0.1))
    whole = list(islice(BatchStream(drawings, settings, CONFIG), 20))
    first = BatchStream(drawings, settings, CONFIG)
    list(islice(first, after))
    second = BatchStream(drawings, settings, CONFIG)
    second.position = dict(first.position)
    rest = list(islice(second, 20 - after))
    assert all(same_pack(one, other) for one, other in zip(whole[after:], rest, strict=True))


def test_epochs_differ_and_each_shows_every_image_once(drawings: ImageSet) -> None:
    stream, epochs = BatchStream(drawings, settings_for(drawings), CONFIG), []
    batches = iter(stream)
    packed, _ = next(batches)
    for epoch in range(2):
        places = []
        while stream.position["epoch"] == epoch:
            places += packed.order.tolist()
            packed, _ = next(batches)
        epochs.append(places)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(drawings)))
    assert epochs[0] != epochs[1]


def test_token_drop_goes_from_its_first_rate_to_its_second(drawings: ImageSet) -> None:
    stream = BatchStream(drawings, settings_for(drawings, token_drop=(0.8, 0.2)), CONFIG)
    rates = []
    for step in (0, 5, 10, 15, 20):
        stream.position["step"] = step
        rates.append(stream.drop_rate(4, 4))
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.8, abs=0.01)
    assert rates[2] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.2, abs=0.01)


def test_a_stream_of_unusable_files_ends_with_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.png").write_bytes(b"not a picture")
    images = read_images(tmp_path)
    with pytest.raises(DataError, match="none of the 2 training images"):
        next(iter(BatchStream(images, settings_for(images), CONFIG)))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_model_learns_colours(drawings: ImageSet, loss: str) -> None:
    torch.manual_seed(0)
    settings = settings_for(drawings)
    settings = replace(settings, train=replace(settings.train, loss=loss, steps=30))
    model = NaViT(CONFIG)
    trainer = Trainer(model, settings.train)
    reports = [
        metrics for arrived in islice(trainer.run(BatchStream(drawings, settings, CONFIG)), 30) for metrics in arrived
    ]
    assert [metrics["step"] for metrics in reports] == list(range(1, 31))
    assert reports[-1]["loss"] < 0.5 * reports[0]["loss"]
    last = score(model, drawings, settings)
    assert last.accuracy == 1.0
    assert last.labels_S.tolist() == list(drawings.labels)


def test_training_stops_when_the_loss_is_not_finite(drawings: ImageSet) -> None:
    model = NaViT(CONFIG)
    with torch.no_grad():
        model.head.weight.fill_(math.inf)
    trainer = Trainer(model, settings_for(drawings).train)
    with pytest.raises(FloatingPointError, match="step 1"):
        next(trainer.run(BatchStream(drawings, settings_for(drawings), CONFIG)))


def test_outputs_come_in_the_order_of_the_set(drawings: ImageSet) -> None:
    model, settings = NaViT(CONFIG).double(), settings_for(drawings)
    found = outputs(model, view_batches(drawings, settings, model))
    assert found.places_S.tolist() == list(range(len(drawings)))
    for place in (0, 7, 23):
        alone = outputs(
            model, view_batches(drawings.select([k == place for k in range(len(drawings))]), settings, model)
        )
        torch.testing.assert_close(alone.rows_SN[0], found.rows_SN[place])
