from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distkd.base import World
from distkd.comm import world as comm
from distkd.comm.packed import all_gather_packed
from distkd.memory.bank import MemoryBank, Normaliser, last_of_equals, write_gathered


@given(index=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_the_last_of_equal_indices_is_found(index: list[int]):
    expected = [max(j for j, other in enumerate(index) if other == i) for i in index]
    assert last_of_equals(torch.tensor(index)).tolist() == expected


def test_a_row_written_twice_keeps_the_last_embedding_and_blends_once():
    bank = MemoryBank(5, 3, seed=0).double()
    before = bank.rows_ND.clone()
    rows = torch.nn.functional.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1)
    bank.write(torch.tensor([2, 4, 2, 2]), rows, momentum=0.5)
    expected = torch.nn.functional.normalize(0.5 * before[2] + 0.5 * rows[3], dim=0)
    torch.testing.assert_close(bank.rows_ND[2], expected)
    assert torch.equal(bank.rows_ND[[0, 1, 3]], before[[0, 1, 3]])


def _write_steps(world: World, passes: int) -> torch.Tensor:
    """Ten steps of a global batch of 8, divided over ranks and passes, with rows that are written twice."""
    bank = MemoryBank(20, 6, seed=1).double()
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        index = torch.randint(0, 20, (8,), generator=generator)
        rows = torch.nn.functional.normalize(torch.randn(8, 6, generator=generator, dtype=torch.float64), dim=1)
        micro = 8 // (passes * world.size)
        first = [(number * world.size + world.rank) * micro for number in range(passes)]
        mine = torch.cat([torch.arange(start, start + micro) for start in first])
        write_gathered({"b": bank}, {"index": index[mine], "b": rows[mine]}, momentum=0.5, passes=passes, world=world)
    return bank.rows_ND


@pytest.mark.parametrize(("size", "passes"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_bank_is_identical_on_every_rank_and_equals_one_process(ranks, size: int, passes: int):
    expected = _write_steps(World(), 1)
    for bank in ranks(size).run(_write_steps, passes=passes):
        assert torch.equal(bank, expected)


def _gather(world: World) -> tuple[dict[str, torch.Tensor], int]:
    before = sum(comm.counts.values())
    tensors = {
        "index": torch.tensor([world.rank, 100 + world.rank]),
        "half": torch.full((2, 3), float(world.rank), dtype=torch.bfloat16),
        "rows": torch.full((2, 2, 2), -0.0 if world.rank == 0 else float("nan")),
    }
    return all_gather_packed(tensors, world), sum(comm.counts.values()) - before


def test_tensors_of_any_type_travel_bit_for_bit_in_one_collective(ranks):
    for found, collectives in ranks(2).run(_gather):
        assert collectives == 1
        assert found["index"].tolist() == [0, 100, 1, 101]
        assert found["half"].dtype == torch.bfloat16
        assert found["rows"].shape == (4, 2, 2)
        assert found["rows"][:2].signbit().all()
        assert found["rows"][2:].isnan().all()


def _normalisers(world: World) -> tuple[float, float]:
    scores = torch.arange(12, dtype=torch.float64).view(4, 3)
    per_rank = 4 // world.size
    mine = scores[world.rank * per_rank : (world.rank + 1) * per_rank]
    normaliser = Normaliser().double()
    first = normaliser(mine, 50, world)
    return first.item(), normaliser(mine * 7, 50, world).item()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_normaliser_is_measured_over_all_ranks_once_and_frozen(ranks, size: int):
    expected = (torch.arange(12, dtype=torch.float64).exp().mean() * 50).log().item()
    for first, later in ranks(size).run(_normalisers):
        assert first == pytest.approx(expected, rel=1e-12)
        assert later == first


def test_a_restored_normaliser_is_not_measured_again():
    normaliser = Normaliser()
    first = normaliser(torch.ones(2, 3), 10, World())
    fresh = Normaliser()
    fresh.load_state_dict(normaliser.state_dict())
    assert torch.equal(fresh(torch.zeros(2, 3), 10, World()), first)
