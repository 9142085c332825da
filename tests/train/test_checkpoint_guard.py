"""Ranks that drifted apart are noticed before a checkpoint is written."""

from __future__ import annotations

import pytest
from torch import nn

from distkd.base import World
from distkd.errors import DivergedError
from distkd.memory.bank import MemoryBank
from distkd.train.checkpoint import check_equal


def _check(world: World, *, drifted: int | None) -> str:
    bank, heads = MemoryBank(20, 4, seed=1), nn.Linear(3, 3)
    nn.init.ones_(heads.weight)
    nn.init.zeros_(heads.bias)
    if world.rank == drifted:
        bank.rows_ND[7, 2] += 1e-7
    try:
        check_equal([heads, bank], 12, world)
    except DivergedError as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equal_ranks_pass(ranks, size: int):
    assert ranks(size).run(_check, drifted=None) == ["equal"] * size


def test_one_row_of_one_rank_is_enough_and_all_ranks_stop_together(ranks):
    said = ranks(4).run(_check, drifted=2)
    assert len(set(said)) == 1
    assert said[0].startswith("ranks [2] hold other weights or banks than rank 0 after step 12")
