"""Casting the weights of a step together: the values and the gradients of casting them one by one."""

import torch
from torch import Tensor

from navit_kernels._autocast import joined

BF16 = torch.bfloat16


def groups_of(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [[(4, 3), (2, 3)], [(5, 2)], [(7,)], [(1, 3), (3, 3), (2, 3)]]
    return [[torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in group] for group in shapes]


def one_by_one(groups: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat([part.to(BF16) for part in group]) for group in groups]


def test_values_and_gradients_are_those_of_casting_one_by_one() -> None:
    groups = groups_of()
    parts = [part for group in groups for part in group]
    results = []
    for wholes in (joined(groups, BF16), one_by_one(groups)):
        total = sum((whole.float() * torch.arange(whole.numel()).view_as(whole)).sum() for whole in wholes)
        assert isinstance(total, Tensor)
        results.append((wholes, torch.autograd.grad(total, parts)))
    for (mine, my_gradients), (theirs, their_gradients) in [results]:
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
        assert all(torch.equal(*pair) for pair in zip(my_gradients, their_gradients, strict=True))
        assert {gradient.dtype for gradient in my_gradients} == {torch.float32}


def test_what_nobody_used_gets_no_gradient() -> None:
    groups = groups_of()
    groups[2][0].requires_grad_(False)
    joined(groups, BF16)[0].sum().backward()
    assert [[part.grad is not None for part in group] for group in groups] == [
        [True, True],
        [False],
        [False],
        [False] * 3,
    ]


def test_nothing_is_copied_that_needs_no_copy() -> None:
    groups = groups_of(BF16)
    wholes = joined(groups, BF16)
    assert wholes[1] is groups[1][0]
    assert torch.equal(wholes[0], one_by_one(groups)[0])


def test_parts_of_several_dtypes_are_cast_too() -> None:
    groups = groups_of()
    groups[0][1] = groups[0][1].detach().to(BF16)
    assert all(torch.equal(*pair) for pair in zip(joined(groups, BF16), one_by_one(groups), strict=True))


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    with torch.no_grad():
        assert not any(whole.requires_grad for whole in joined(groups_of(), BF16))
