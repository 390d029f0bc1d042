"""plan_pack, and the same plan made on the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from navit_kernels import plan_pack
from navit_kernels.plan import CLASS_LIMITS, CLASSES, ITEM_FIELDS, TILE, max_items
from navit_kernels.testing import cu_seqlens_of

LENGTH = st.one_of(
    st.integers(0, 40),
    st.sampled_from([limit + step for limit in (*CLASS_LIMITS, TILE * 3) for step in (-1, 0, 1)]),
    st.integers(0, 2000),
)
LENGTHS = st.lists(LENGTH, max_size=12)
SIDES = LENGTHS.flatmap(
    lambda lengths: st.tuples(
        st.just(lengths), st.none() | st.lists(LENGTH, min_size=len(lengths), max_size=len(lengths))
    )
)


def expected_items(lengths: list[int], lengths_k: list[int] | None) -> list[set[tuple[int, ...]]]:
    """The items of each class, by a loop over segments."""
    classes: list[set[tuple[int, ...]]] = [set() for _ in range(CLASSES)]
    q_start = k_start = 0
    for segment, (q_length, k_length) in enumerate(zip(lengths, lengths_k or lengths, strict=True)):
        longest = max(q_length, k_length)
        own = sum(longest > limit for limit in CLASS_LIMITS)
        tiles = -(-longest // TILE) if own == CLASSES - 1 else int(longest > 0)
        classes[own] |= {(q_start, q_length, k_start, k_length, tile, segment) for tile in range(tiles)}
        q_start, k_start = q_start + q_length, k_start + k_length
    return classes


def items_by_class(items: torch.Tensor, offsets: torch.Tensor) -> list[list[tuple[int, ...]]]:
    ends = offsets.tolist()
    assert ends[0] == 0
    assert ends[-1] <= items.shape[0]
    return [[tuple(item) for item in items[a:b, :6].tolist()] for a, b in itertools.pairwise(ends)]


@given(SIDES)
def test_every_row_of_every_segment_is_in_one_item(sides: tuple[list[int], list[int] | None]) -> None:
    lengths, lengths_k = sides
    plan = plan_pack(lengths, lengths_k=lengths_k)
    by_class = items_by_class(plan.items, plan.offsets)
    assert [set(items) for items in by_class] == expected_items(lengths, lengths_k)
    assert sum(map(len, by_class)) == sum(len(set(items)) for items in by_class)
    for items in by_class:
        longest = [max(item[1], item[3]) for item in items]
        assert longest == sorted(longest, reverse=True)
    assert not plan.items[int(plan.offsets[-1]) :].any()


@given(SIDES)
def test_tensors_of_a_plan_depend_on_counts_alone(sides: tuple[list[int], list[int] | None]) -> None:
    lengths, lengths_k = sides
    plan = plan_pack(lengths, lengths_k=lengths_k)
    tokens = sum(max(pair) for pair in zip(lengths, lengths_k or lengths, strict=True))
    assert plan.items.shape == (max_items(tokens, len(lengths)), ITEM_FIELDS)
    assert plan.offsets.shape == (CLASSES + 1,)
    assert torch.equal(plan.cu_seqlens, cu_seqlens_of(lengths))
    assert (plan.cu_seqlens_k is None) == (lengths_k is None)
    if lengths_k is not None:
        assert torch.equal(plan.cu_seqlens_k, cu_seqlens_of(lengths_k))
    tensors = (plan.cu_seqlens, plan.items, plan.offsets, plan.host_offsets)
    assert {tensor.dtype for tensor in tensors} == {torch.int32}
    keys = lengths if lengths_k is None else lengths_k
    longest = [max(side, default=0) for side in (lengths, keys)]
    assert plan.host_offsets.tolist() == [*plan.offsets.tolist(), *longest, sum(lengths), sum(keys)]


def test_worked_example() -> None:
    plan = plan_pack([300, 20])
    assert plan.offsets.tolist() == [0, 1, 1, 1, 1, 4]
    assert plan.items[:4].tolist() == [[300, 20, 300, 20, 0, 1, 0, 0]] + [
        [0, 300, 0, 300, t, 0, 0, 0] for t in range(3)
    ]


def test_moving_a_plan_leaves_the_host_its_offsets() -> None:
    plan = plan_pack([3, 4], lengths_k=[1, 2]).to("meta")
    assert {x.device.type for x in (plan.cu_seqlens, plan.cu_seqlens_k, plan.items, plan.offsets)} == {"meta"}
    assert plan.host_offsets.tolist() == [0, 2, 2, 2, 2, 2, 4, 2, 7, 3]
    assert plan.without_host_offsets().host_offsets is None


def test_errors_say_name_expected_and_got() -> None:
    with pytest.raises(ValueError, match="lengths must be at least 0, got -1"):
        plan_pack([3, -1])
    with pytest.raises(ValueError, match="lengths_k must be one length per segment, 2 in all, got 3"):
        plan_pack([3, 1], lengths_k=[1, 2, 3])


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(SIDES)
def test_the_device_makes_the_same_plan(sides: tuple[list[int], list[int] | None]) -> None:
    from navit_kernels.self_attention.launch import plan_on_device

    lengths, lengths_k = sides
    plan = plan_pack(lengths, lengths_k=lengths_k)
    cu_seqlens_k = plan.cu_seqlens if plan.cu_seqlens_k is None else plan.cu_seqlens_k
    items, offsets = plan_on_device(plan.cu_seqlens, cu_seqlens_k, sum(lengths), sum(lengths_k or lengths))
    by_class = items_by_class(items, offsets)
    assert [set(found) for found in by_class] == expected_items(lengths, lengths_k)
    assert torch.equal(offsets, plan.offsets)


@pytest.mark.interpreter
def test_the_device_plans_more_segments_than_a_block_holds() -> None:
    from navit_kernels.self_attention.launch import plan_on_device

    lengths = [(7 * i) % 40 for i in range(1200)] + [300]
    plan = plan_pack(lengths)
    items, offsets = plan_on_device(plan.cu_seqlens, plan.cu_seqlens, sum(lengths), sum(lengths))
    assert [set(found) for found in items_by_class(items, offsets)] == expected_items(lengths, None)


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 400), min_size=1, max_size=8), st.integers(0, 300))
@example([5, -(2**31)], 10)
def test_wrong_cu_seqlens_give_no_wrong_address(values: list[int], tokens: int) -> None:
    from navit_kernels.self_attention.launch import plan_on_device

    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    items, offsets = plan_on_device(cu_seqlens, cu_seqlens, tokens, tokens)
    for item in itertools.chain.from_iterable(items_by_class(items, offsets)):
        for start, length in (item[:2], item[2:4]):
            assert 0 <= start <= start + length <= tokens
