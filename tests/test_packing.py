"""Packing: every image once, budgets kept, packs full, and token drop decided once."""

import doctest
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import navit.packing
from navit import in_given_order, pack, plan_packs
from navit.packing import beta_rate, drop_tokens, kept_tokens, resolution_rate, scheduled_rate
from navit_kernels.testing import image_lengths

LENGTHS = st.lists(st.integers(1, 40), max_size=60)
BUDGETS = st.tuples(st.integers(40, 90), st.none() | st.integers(1, 5))
STRATEGIES = st.sampled_from(["best_fit", "next_fit"])
GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=12)


def numbered_images(grids: list[tuple[int, int]], patch_size: int = 2) -> list[torch.Tensor]:
    """Images of which every pixel holds its image's number."""
    return [torch.full((3, rows * patch_size, cols * patch_size), float(i)) for i, (rows, cols) in enumerate(grids)]


@given(LENGTHS, BUDGETS, STRATEGIES, st.sampled_from([1, 3, 1024]))
def test_every_image_is_in_one_pack_and_budgets_are_kept(lengths, budgets, strategy, window):
    token_budget, image_budget = budgets
    packs = plan_packs(lengths, token_budget, image_budget, strategy, window)
    assert sorted(index for group in packs for index in group) == list(range(len(lengths)))
    for group in packs:
        assert group == sorted(group)
        assert 0 < sum(lengths[index] for index in group) <= token_budget
        assert image_budget is None or len(group) <= image_budget
    assert packs == plan_packs(lengths, token_budget, image_budget, strategy, window)


@given(LENGTHS)
def test_next_fit_keeps_the_order(lengths):
    packs = plan_packs(lengths, 50, strategy="next_fit")
    assert [index for group in packs for index in group] == list(range(len(lengths)))
    for group, following in itertools.pairwise(packs):
        assert sum(lengths[index] for index in group) + lengths[following[0]] > 50


def fill(lengths: list[int], packs: list[list[int]], token_budget: int) -> float:
    """Mean fill of all packs but the last."""
    return sum(lengths[index] for group in packs[:-1] for index in group) / (token_budget * (len(packs) - 1))


@pytest.mark.parametrize(
    ("mix", "token_budget"), [("pt", 4096), ("pt", 16384), ("ft", 4096), ("ft", 65536), ("hr", 8192), ("hr", 32768)]
)
def test_best_fit_fills_packs(mix, token_budget):
    lengths = image_lengths(mix, 4_200_000)
    assert fill(lengths, plan_packs(lengths, token_budget), token_budget) >= 0.985


def test_best_fit_fills_packs_under_an_image_budget():
    lengths = image_lengths("pt", 1_000_000)
    mean = sum(lengths) / len(lengths)
    assert fill(lengths, plan_packs(lengths, 4096, math.ceil(1.5 * 4096 / mean)), 4096) >= 0.985


@pytest.mark.parametrize("strategy", ["best_fit", "next_fit"])
def test_an_image_over_the_budget_is_named(strategy):
    with pytest.raises(ValueError, match=r"images\[2\] must have 1 to token_budget = 9 tokens, got 10"):
        plan_packs([9, 1, 10], 9, strategy=strategy)
    images = numbered_images([(1, 1), (2, 4)])
    with pytest.raises(ValueError, match=r"images\[1\] .* 8 tokens, got 9"):
        pack(images, 8, patch_size=2, prefix_tokens=1, strategy=strategy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "first_fit"}, "strategy must be 'best_fit' or 'next_fit', got 'first_fit'"),
        ({"token_budget": 0}, "token_budget must be at least 1, got 0"),
        ({"image_budget": 0}, "image_budget must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(**{"lengths": [1], "token_budget": 4, **changes})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 5), r"images\[1\] must have sides that are multiples of 2 pixels, got 4 × 5"),
        (torch.zeros(3, 0, 4), r"images\[1\] must have sides that are multiples of 2 pixels, got 0 × 4"),
        (torch.zeros(4, 4), r"images\[1\] must be a tensor \(C, H, W\), got \(4, 4\)"),
        (np.zeros((3, 4, 4)), r"images\[1\] must be a tensor \(C, H, W\), got ndarray"),
        (torch.zeros(1, 4, 4), r"images\[1\] must have 3 channels of torch.float32 .*, got 1 of torch.float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"images\[1\] must have 3 channels of torch.float32 .*, got 3 of"),
    ],
)
def test_a_wrong_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        pack([torch.zeros(3, 4, 4), image], 100, patch_size=2)


def test_an_image_larger_than_the_model_takes_is_named():
    with pytest.raises(ValueError, match=r"images\[1\] must have at most 4 patches of 2 pixels per side, got 4 × 10"):
        pack(numbered_images([(4, 4), (2, 5)]), None, patch_size=2, max_side=4)


@given(GRIDS, st.none() | st.floats(0, 0.99), STRATEGIES, st.integers(0, 2), st.integers(0, 3))
def test_packs_describe_their_images(grids, token_drop, strategy, prefix_tokens, seed):
    images = numbered_images(grids)
    options = {"patch_size": 2, "token_drop": token_drop, "prefix_tokens": prefix_tokens, "seed": seed}
    packs = pack(images, 24, strategy=strategy, **options)
    for packed in packs:
        lengths = packed.cu_seqlens.diff().tolist()
        assert packed.tokens == sum(lengths) + prefix_tokens * len(packed) <= 24
        assert packed.fill == packed.tokens / 24
        assert packed.plan.cu_seqlens.diff().tolist() == [length + prefix_tokens for length in lengths]
        assert packed.cu_seqlens.dtype == packed.coords.dtype == packed.grids.dtype == torch.int32
        for index, (rows, columns), coords in zip(
            packed.order.tolist(), packed.grids.tolist(), packed.coords.split(lengths), strict=True
        ):
            assert (rows, columns) == grids[index]
            places = (coords[:, 0] * columns + coords[:, 1]).tolist()
            assert len(places) == kept_tokens(rows, columns, token_drop or 0)
            assert places == sorted(set(places))
            assert coords[:, 1].max() < columns
            assert 0 <= places[0] <= places[-1] < rows * columns
    assert sorted(index for packed in packs for index in packed.order.tolist()) == list(range(len(grids)))
    if packs:
        rows = in_given_order([packed.order.float()[:, None] for packed in packs], packs)
        assert rows.flatten().tolist() == list(range(len(grids)))


def test_token_drop_does_not_depend_on_the_packing():
    images = numbered_images([(4, 5), (3, 3), (2, 5), (4, 4), (1, 1)])

    def kept(token_budget, seed=0, **options):
        packs = pack(images, token_budget, patch_size=2, token_drop=0.5, seed=seed, **options)
        lengths = [length for packed in packs for length in packed.cu_seqlens.diff().tolist()]
        coords = torch.cat([packed.coords for packed in packs]).split(lengths)
        order = torch.cat([packed.order for packed in packs]).tolist()
        return {index: part.tolist() for index, part in zip(order, coords, strict=True)}

    assert kept(None) == kept(12) == kept(16, strategy="next_fit")
    assert kept(None) != kept(None, seed=1)
    assert len(kept(None)[4]) == 1


def test_pixels_travel_in_one_buffer_in_the_order_of_the_pack():
    images = numbered_images([(1, 2), (2, 2), (1, 1)])
    (packed,) = pack(images, None, patch_size=2)
    assert packed.pixels.pixels.tolist() == torch.cat([image.flatten() for image in images]).tolist()
    assert packed.order.tolist() == [0, 1, 2]
    assert packed.fill == 1.0


def test_a_pack_can_be_sent_to_another_process_or_device():
    (packed,) = pack(numbered_images([(1, 2), (2, 2)]), 9, patch_size=2)
    copy = pickle.loads(pickle.dumps(packed)).to("cpu")
    assert copy.coords.tolist() == packed.coords.tolist()
    assert copy.pixels.pixels.tolist() == packed.pixels.pixels.tolist()
    assert copy.fill == packed.fill


@pytest.mark.gpu
def test_a_data_loader_pins_packs_and_they_reach_the_gpu():
    packs = pack(numbered_images([(1, 2), (2, 2), (4, 4)]), 16, patch_size=2)
    loader = torch.utils.data.DataLoader(packs, batch_size=None, pin_memory=True)
    for packed, original in zip(loader, packs, strict=True):
        assert packed.coords.is_pinned()
        assert packed.pixels.pixels.is_pinned()
        moved = packed.to("cuda", non_blocking=True)
        assert moved.pixels.pixels.is_cuda
        assert moved.plan.cu_seqlens.is_cuda
        assert moved.coords.tolist() == original.coords.tolist()


def test_no_images_give_no_packs():
    assert pack([], 16, patch_size=2) == []
    assert plan_packs([], 16) == []


def test_at_least_one_token_stays():
    assert kept_tokens(1, 1, 0.99) == 1
    assert kept_tokens(10, 10, 0.29) == 71
    with pytest.raises(ValueError, match=r"token drop rate must be in \[0, 1\), got 1.0 for an image of 2 × 3"):
        drop_tokens(2, 3, 1.0, np.random.default_rng(0))


def test_every_patch_is_dropped_equally_often():
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([drop_tokens(2, 5, 0.3, rng) for _ in range(2000)]), minlength=10)
    assert abs(counts / 2000 - 0.7).max() < 0.05


def test_beta_rates_have_the_papers_moments():
    rate = beta_rate(0.6, 0.8, np.random.default_rng(0))
    rates = np.array([rate(4, 4) for _ in range(20000)])
    assert rates.min() >= 0
    assert rates.max() <= 0.8
    assert rates.mean() == pytest.approx(0.8 * 0.6, abs=0.01)
    assert rates.var() == pytest.approx(0.8**2 * 0.3 * 0.6 * 0.4, rel=0.05)


def test_resolution_rates_grow_with_the_image():
    rate = resolution_rate(16, 256, 0.2, 0.8, np.random.default_rng(0))
    for (rows, columns), mean in {(2, 2): 0.2, (4, 4): 0.2, (8, 17): 0.5, (16, 16): 0.8, (40, 40): 0.8}.items():
        rates = np.array([rate(rows, columns) for _ in range(500)])
        assert rates.mean() == pytest.approx(mean, abs=0.005)
        assert abs(rates - mean).max() <= 0.04


def test_a_negative_temperature_lowers_the_rate_over_training():
    rates = [scheduled_rate(seen, 0.2, 0.8, 1e6, -1e5) for seen in (0, 1e6, 2e6)]
    assert rates == pytest.approx([0.8, 0.5, 0.2], abs=1e-4)
    assert scheduled_rate(1e9, 0.2, 0.8, 1e6, 1.0) == 0.8


def test_the_worked_example_is_right():
    assert doctest.testmod(navit.packing).failed == 0
