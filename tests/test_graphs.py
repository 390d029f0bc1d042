"""Packs padded to budgets, and CUDA graphs that take them: shapes stay, and images do not notice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from navit import NaViT, NaViTConfig, PackedImages, pack
from navit.graphs import Captured, pad_pack
from navit.train import NO_IMAGE, TrainConfig, Trainer, classification_loss

SMALL = NaViTConfig(width=32, depth=2, heads=2, mlp_width=48, patch_size=4, num_classes=5, table_length=12)
TOKENS, IMAGES = 48, 9


def make_packs(config: NaViTConfig, count: int = 25, token_drop: float = 0.0, seed: int = 0) -> list[PackedImages]:
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    sides = 4 * rng.integers(1, 6, (count, 2))
    images = [torch.randint(256, (3, *side), generator=random, dtype=torch.uint8) for side in sides.tolist()]
    return pack(images, TOKENS, image_budget=IMAGES, token_drop=token_drop, seed=seed, **config.pack_options)


def make_model(**changes: object) -> NaViT:
    torch.manual_seed(0)
    return NaViT(replace(SMALL, **changes))


def shapes(packed: PackedImages) -> list[object]:
    """Of all that a graph reads: the order of images is the host's."""
    leaves = tree_leaves(replace(packed, order=None))
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


# Padding


@pytest.mark.parametrize("token_drop", [0.0, 0.6])
def test_shapes_are_those_of_the_budgets(token_drop):
    packs = make_packs(SMALL, token_drop=token_drop)
    assert len({len(packed) for packed in packs}) > 1
    padded = [pad_pack(packed, IMAGES, token_drop) for packed in packs]
    assert all(shapes(one) == shapes(padded[0]) for one in padded)
    assert padded[0].segments == IMAGES + 1
    assert padded[0].coords.shape == (TOKENS, 2)
    for before, after in zip(packs, padded, strict=True):
        assert (len(after), after.tokens, after.fill) == (len(before), before.tokens, before.fill)
        assert after.cu_seqlens[-1] == TOKENS
        padding = after.cu_seqlens.diff()[len(after) :]
        assert padding.max() - padding.min() <= 1


SWITCHES = [
    {},
    {"registers": 2, "coordinates": "fractional"},
    {"pool": "cls"},
    {"pool": "mean", "positions": "fourier", "combine": "concat"},
    {"pool": "max", "layer_scale": 0.1},
]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_images_do_not_notice_the_padding(changes):
    model = make_model(**changes).double().eval()
    for packed in make_packs(model.config):
        rows, dense = model(packed, dense=True)
        padded_rows, padded_dense = model(pad_pack(packed, IMAGES), dense=True)
        torch.testing.assert_close(padded_rows, rows, rtol=1e-10, atol=1e-12)
        for one, other in zip(padded_dense, dense, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradients_do_not_notice_the_padding():
    packed = make_packs(SMALL)[0]
    gradients = []
    for one in (packed, pad_pack(packed, IMAGES)):
        model = make_model().double()
        model(one).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_padding_does_not_count_in_the_loss(loss):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    config = TrainConfig(steps=1, loss=loss)
    plain = classification_loss(logits, labels, config)
    more = torch.cat([logits, torch.randn(2, 3)]), torch.cat([labels, torch.full((2,), NO_IMAGE)])
    torch.testing.assert_close(classification_loss(*more, config), plain)


def test_training_on_padded_packs_is_the_same_training():
    packs = [(packed, packed.order % 5) for packed in make_packs(SMALL)]
    config = TrainConfig(steps=len(packs), warmup=1)
    histories = []
    for image_budget in (None, IMAGES):
        trainer = Trainer(make_model().double(), config, image_budget=image_budget)
        histories.append([{**one, "seconds": 0.0} for arrived in trainer.run(packs) for one in arrived])
    for plain, padded in zip(*histories, strict=True):
        assert padded == pytest.approx(plain, rel=1e-8)


@pytest.mark.parametrize(
    ("packed", "budget", "message"),
    [
        (make_packs(SMALL)[0], 2, "images of a pack must be at most 2, the budget, got"),
        (make_packs(SMALL, token_drop=0.6)[0], IMAGES, "pixel values of a pack must be at most 2304, the budget, got"),
        (replace(make_packs(SMALL)[0], token_budget=None), IMAGES, "packed must be of pixels, under a token budget"),
    ],
)
def test_a_pack_over_a_budget_is_named(packed, budget, message):
    with pytest.raises(ValueError, match=message):
        pad_pack(packed, budget)


# Graphs


@pytest.mark.gpu
@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_a_captured_model_gives_every_pack_what_the_eager_one_gives(changes):
    model = make_model(**changes).cuda().eval()
    packs = [pad_pack(packed, IMAGES).to("cuda") for packed in make_packs(model.config)]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        captured = Captured(model, packs[0])
        for packed in packs:
            assert torch.equal(captured(packed)[: len(packed)], model(packed))


@pytest.mark.gpu
def test_padding_changes_no_bit_of_a_row():
    model = make_model(width=128, heads=2, mlp_width=256).cuda().eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for packed in make_packs(model.config):
            assert torch.equal(model(pad_pack(packed, IMAGES).to("cuda")), model(packed.to("cuda")))


@pytest.mark.gpu
def test_a_captured_training_step_gives_the_eager_gradients():
    packs = [(packed, packed.order % 5) for packed in make_packs(SMALL)]
    model = make_model().cuda()
    trainer = Trainer(model, TrainConfig(steps=1), image_budget=IMAGES)
    for packed, labels_S in packs:
        trainer._passes(packed, labels_S, torch.device("cuda"))
        captured = [parameter.grad.clone() for parameter in model.parameters()]
        again = make_model().cuda()
        padded = pad_pack(packed, IMAGES).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            logits = again(padded).float()
        classification_loss(logits, labels_S.cuda(), trainer.config).backward()
        for mine, parameter in zip(captured, again.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_a_model_learns_by_captured_steps_and_drops_anew_in_each():
    packs = [(packed, packed.order % 2) for packed in make_packs(SMALL, count=12)] * 60
    model = make_model(num_classes=2, drop_path=0.3).cuda()
    trainer = Trainer(model, TrainConfig(steps=len(packs), warmup=1, learning_rate=3e-3), image_budget=IMAGES)
    losses = [one["loss"] for arrived in trainer.run(packs) for one in arrived]
    assert len(set(losses[:10])) > 8
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.gpu
def test_other_shapes_than_those_recorded_are_refused():
    doubled = Captured(lambda x: 2 * x, torch.ones(3, device="cuda"))
    assert doubled(torch.full((3,), 4.0, device="cuda")).tolist() == [8.0, 8.0, 8.0]
    with pytest.raises(ValueError, match="inputs must be of the shapes and dtypes recorded"):
        doubled(torch.ones(4, device="cuda"))


@pytest.mark.gpu
def test_values_on_the_cpu_are_part_of_what_was_recorded():
    def scaled(x, factor):
        return x * factor.item()

    doubled, two = Captured(scaled, torch.ones(3, device="cuda"), torch.tensor(2.0)), torch.tensor(2.0)
    assert doubled(torch.full((3,), 4.0, device="cuda"), two).tolist() == [8.0, 8.0, 8.0]
    with pytest.raises(ValueError, match=r"inputs must be with the values recorded of a CPU tensor"):
        doubled(torch.ones(3, device="cuda"), torch.tensor(3.0))
