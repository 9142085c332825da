"""Roots of means over all ranks: value and averaged gradient are those of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distkd.base import World
from distkd.comm import roots as module
from distkd.comm import world as comm
from distkd.comm.roots import global_roots
from tests.golden_numbers import golden, tensor

CARD = golden("inter-resolution-at-plus")
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 0.0}


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 5, generator=generator), torch.randn(3, 5, generator=generator)
    return x.double(), weight.double()


def _roots(world: World, names: tuple[str, ...] = ("near", "far")) -> tuple[dict[str, Tensor], Tensor, list[int], int]:
    """Roots, gradient at a shared weight averaged over ranks, numbers in each all-reduce, counted collectives."""
    x, weight = _inputs()
    weight.requires_grad_()
    mine = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    near = x[mine] @ weight.T - 1
    squares = {"near": (near.square().sum(), near.numel()), "far": ((near**2 - 7).square().sum(), near.numel())}
    sizes: list[int] = []
    original = module.all_reduce_sum

    def watched(tensor: Tensor, world: World) -> Tensor:
        sizes.append(tensor.numel())
        return original(tensor, world)

    module.all_reduce_sum = watched
    try:
        before = sum(comm.counts.values())
        found = global_roots({name: squares[name] for name in names}, world)
        counted = sum(comm.counts.values()) - before
    finally:
        module.all_reduce_sum = original
    total = near.sum() * 0
    for factor, root in enumerate(found.values(), start=1):
        total = total + factor * root
    total.backward()
    assert weight.grad is not None
    gradient = comm.all_reduce_sum(weight.grad, world) / world.size
    return {name: root.detach() for name, root in found.items()}, gradient, sizes, counted


@pytest.mark.parametrize("size", [1, 2, 4])
def test_value_and_gradient_are_those_of_the_whole_batch(ranks, size: int):
    x, weight = _inputs()
    weight.requires_grad_()
    near = x @ weight.T - 1
    expected = {"near": near.square().mean().sqrt(), "far": (near**2 - 7).square().mean().sqrt()}
    (expected["near"] + 2 * expected["far"]).backward()
    for found, gradient, _, _ in ranks(size).run(_roots):
        for name, root in expected.items():
            torch.testing.assert_close(found[name], root.detach(), **EXACT)
        torch.testing.assert_close(gradient, weight.grad, **EXACT)


def test_all_roots_share_one_reduction_and_none_needs_none(ranks):
    for _, _, sizes, counted in ranks(2).run(_roots):
        assert (sizes, counted) == ([2], 1)
    for found, gradient, sizes, counted in ranks(2).run(_roots, names=()):
        assert (found, sizes, counted) == ({}, [], 0)
        assert not gradient.any()
    _, _, _, counted = _roots(World())
    assert counted == 0


def _of_the_card(world: World) -> tuple[Tensor, Tensor]:
    student, teacher = (tensor(CARD["inputs"][f"A_{side}"]) for side in ("student", "teacher"))
    each = len(student) // world.size
    mine = slice(world.rank * each, (world.rank + 1) * each)
    square = (student[mine] - teacher[mine]).square()
    return global_roots({"": (square.sum(), square.numel())}, world)[""], square.mean().sqrt()


@pytest.mark.parametrize("size", [1, 2])
def test_feature_matching_of_two_ranks_is_golden(ranks, size: int):
    golden_roots = CARD["data_parallel"]
    found = ranks(size).run(_of_the_card)
    for root, _ in found:
        assert root.item() == pytest.approx(golden_roots["fm_exact_global"], abs=1e-12)
    if size == 2:
        own = [root.item() for _, root in found]
        assert own == pytest.approx(golden_roots["fm_if_each_rank_takes_its_own_root"], abs=1e-12)
        assert sum(own) / 2 == pytest.approx(golden_roots["fm_mean_of_rank_roots"], abs=1e-12)
        assert sum(own) / 2 < golden_roots["fm_exact_global"] - 4e-3


def _of_zeros(world: World, *, everywhere: bool) -> tuple[Tensor, Tensor]:
    zeros = everywhere or world.rank == 0
    x = torch.zeros(4, dtype=torch.float64) if zeros else torch.ones(4, dtype=torch.float64)
    x.requires_grad_()
    root = global_roots({"": (x.square().sum(), 4)}, world)[""]
    root.backward()
    assert x.grad is not None
    return root.detach(), x.grad


@pytest.mark.parametrize("size", [1, 2])
def test_a_root_of_zero_has_no_gradient(ranks, size: int):
    for root, gradient in ranks(size).run(_of_zeros, everywhere=True):
        assert root == 0
        assert not gradient.any()


def test_a_rank_without_a_difference_shares_the_root_of_the_others(ranks):
    (root, nothing), (same, gradient) = ranks(2).run(_of_zeros, everywhere=False)
    assert root == same == pytest.approx(0.5**0.5)
    assert not nothing.any()
    torch.testing.assert_close(gradient / 2, torch.full((4,), 1 / (8 * 0.5**0.5), dtype=torch.float64))


def test_a_root_can_be_part_of_a_scaled_sum():
    x = torch.arange(3.0, dtype=torch.float64, requires_grad=True)
    roots = [global_roots({"": (x.square().sum(), 3)}, World())[""], x.square().mean().sqrt()]
    gradients = [torch.autograd.grad(1024 * root + root**2, x)[0] for root in roots]
    torch.testing.assert_close(*gradients)
