from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from distkd.base import World
from distkd.comm import world as comm
from distkd.comm.packed import all_gather_packed, start_gather
from distkd.errors import DivergedError, ShapeError
from distkd.memory.bank import MemoryBank, Normaliser, initial_rows, last_of_equals
from distkd.memory.contrast import write_rows
from distkd.memory.guard import check_banks

UNIT = F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64), dim=1)


@given(index=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_the_last_of_equal_indices_is_found(index: list[int]):
    expected = [max(j for j, other in enumerate(index) if other == i) for i in index]
    assert last_of_equals(torch.tensor(index)).tolist() == expected


def test_a_row_written_twice_keeps_the_last_embedding_and_blends_once():
    bank = MemoryBank(5, 3, seed=0).double()
    before = bank.rows_ND.clone()
    bank.write(torch.tensor([2, 4, 2, 2]), UNIT, momentum=0.5)
    expected = F.normalize(0.5 * before[2] + 0.5 * UNIT[3], dim=0)
    torch.testing.assert_close(bank.rows_ND[2], expected)
    assert torch.equal(bank.rows_ND[[0, 1, 3]], before[[0, 1, 3]])
    torch.testing.assert_close(bank.norm_N, bank.rows_ND.norm(dim=1))


@given(index=st.lists(st.integers(0, 12), min_size=1, max_size=8), parts=st.integers(1, 4))
def test_a_part_writes_what_the_whole_bank_writes_there(index: list[int], parts: int):
    rows = F.normalize(torch.randn(len(index), 3, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = MemoryBank(13, 3, seed=1)
    whole.write(torch.tensor(index), rows, momentum=0.5)
    for part in range(parts):
        bank = MemoryBank(13, 3, seed=1, part=part, parts=parts)
        bank.write(torch.tensor(index), rows, momentum=0.5)
        assert torch.equal(bank.rows_ND, whole.rows_ND[part::parts])
        assert torch.equal(bank.norm_N, whole.norm_N[part::parts])


def test_more_ranks_than_rows_leave_some_ranks_without():
    bank = MemoryBank(2, 3, seed=1, part=3, parts=4)
    bank.write(torch.tensor([0, 1]), UNIT[:2].float(), momentum=0.5)
    assert bank.rows_ND.shape == (0, 3)


def test_zeros_leave_the_direction_of_a_row_and_make_no_nan():
    bank = MemoryBank(3, 3, seed=0)
    before = bank.rows_ND.clone()
    bank.write(torch.tensor([1]), torch.zeros(1, 3), momentum=0.5)
    torch.testing.assert_close(bank.rows_ND[1], F.normalize(before[1], dim=0))
    bank.rows_ND[2] = 0
    bank.write(torch.tensor([2]), torch.zeros(1, 3), momentum=0.5)
    assert bank.rows_ND[2].tolist() == [0, 0, 0]
    bank.write(torch.tensor([2]), UNIT[:1].float(), momentum=0.5)
    torch.testing.assert_close(bank.rows_ND[2], UNIT[0].float())


@pytest.mark.parametrize(
    ("index", "width", "words"),
    [
        ([0, 5], 3, "the write of a memory bank has index 5, rows are 0 to 4"),
        ([-1, 0], 3, "has index -1, rows are 0 to 4: only samples of the training split have a row"),
        ([0, 1], 4, "embeddings have width 4, the bank has 3"),
    ],
)
def test_what_does_not_fit_is_not_written(index: list[int], width: int, words: str):
    bank = MemoryBank(5, 3, seed=0)
    before = bank.rows_ND.clone()
    with pytest.raises(ShapeError, match=words):
        bank.write(torch.tensor(index), torch.ones(2, width), momentum=0.5)
    assert torch.equal(bank.rows_ND, before)


# how rows start and in which precision they lie


def test_rows_start_uniform_with_a_norm_of_one_in_expectation():
    rows = initial_rows(torch.arange(4000), 18, seed=3)
    assert rows.shape == (4000, 18)
    assert rows.square().sum(1).mean().item() == pytest.approx(1.0, abs=0.02)
    assert rows.abs().max().item() <= math.sqrt(3 / 18)
    assert rows.mean().item() == pytest.approx(0, abs=0.01)
    assert torch.corrcoef(rows.T).fill_diagonal_(0).abs().max() < 6 / 4000**0.5
    assert torch.equal(initial_rows(torch.tensor([7, 3999]), 18, seed=3), rows[[7, 3999]])
    assert not torch.equal(initial_rows(torch.arange(4000), 18, seed=4), rows)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_rows_of_half_precision_are_off_by_no_more_than_is_stated(dtype: torch.dtype, bound: float):
    generator = torch.Generator().manual_seed(0)
    exact, half = MemoryBank(50, 128, seed=1).double(), MemoryBank(50, 128, seed=1, dtype=dtype).double()
    assert half.rows_ND.dtype == dtype
    for _ in range(40):
        index = torch.randint(0, 50, (16,), generator=generator)
        rows = F.normalize(torch.randn(16, 128, generator=generator, dtype=torch.float64), dim=1)
        for bank in (exact, half):
            bank.write(index, rows, momentum=0.5)
    anchors = F.normalize(torch.randn(200, 128, generator=generator, dtype=torch.float64), dim=1)
    error = (anchors @ half.rows_ND.double().T - anchors @ exact.rows_ND.T).abs().max().item()
    assert 0 < error < bound


def test_a_bank_follows_its_module_unless_its_precision_was_chosen():
    for dtype, expected in ((None, torch.float64), (torch.float16, torch.float16)):
        bank = MemoryBank(6, 4, seed=0, dtype=dtype)
        before = bank.rows_ND.clone()
        bank.to(torch.float64)
        assert bank.rows_ND.dtype == expected
        assert torch.equal(bank.rows_ND.float(), before.float())
        assert "rows_ND" in bank.state_dict()


def test_a_restored_bank_knows_its_norms():
    bank, fresh = MemoryBank(6, 4, seed=0), MemoryBank(6, 4, seed=1)
    fresh.load_state_dict(bank.state_dict())
    assert torch.equal(fresh.norm_N, bank.norm_N)


# over ranks


def _write_steps(world: World, passes: int) -> torch.Tensor:
    """Ten steps of a global batch of 8, divided over ranks and passes, with rows that are written twice."""
    bank = MemoryBank(20, 6, seed=1).double()
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        index = torch.randint(0, 20, (8,), generator=generator)
        rows = F.normalize(torch.randn(8, 6, generator=generator, dtype=torch.float64), dim=1)
        micro = 8 // (passes * world.size)
        arriving = []
        for number in range(passes):
            first = (number * world.size + world.rank) * micro
            mine = slice(first, first + micro)
            arriving.append(start_gather({"index": index[mine], "b": rows[mine]}, world))
        write_rows({"b": bank}, arriving, momentum=0.5)
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


def _gather_beside_others(world: World) -> list[float]:
    """A gather that is under way while other collectives run, as those of a backward do."""
    arriving = start_gather({"x": torch.full((2, 3), float(world.rank))}, world)
    sums = [comm.all_reduce_sum(torch.ones(1000), world)[0].item() for _ in range(5)]
    return [*sums, *arriving.wait()["x"][:, 0].tolist()]


def test_a_gather_runs_beside_other_collectives(ranks):
    for found in ranks(2).run(_gather_beside_others):
        assert found == [2.0] * 5 + [0.0, 0.0, 1.0, 1.0]


def _normalisers(world: World) -> tuple[float, float]:
    scores = torch.arange(12, dtype=torch.float64).view(4, 3)
    scores[1, 2] = -math.inf  # a column that does not count
    per_rank = 4 // world.size
    normaliser = Normaliser()
    assert not normaliser.known
    normaliser.measure(scores[world.rank * per_rank : (world.rank + 1) * per_rank], 50, world)
    return normaliser.log_z.item(), float(normaliser.known)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_normaliser_is_measured_over_all_ranks(ranks, size: int):
    scores = [float(i) for i in range(12) if i != 5]
    expected = math.log(sum(map(math.exp, scores)) / len(scores) * 50)
    for found, known in ranks(size).run(_normalisers):
        assert found == pytest.approx(expected, rel=1e-12)
        assert known


def test_a_restored_normaliser_is_known():
    normaliser, fresh = Normaliser(), Normaliser()
    normaliser.measure(torch.ones(2, 3), 10, World())
    fresh.load_state_dict(normaliser.state_dict())
    assert fresh.known
    assert torch.equal(fresh.log_z, normaliser.log_z)


# the guard


def _diverge(world: World, *, rows: list[int], heal: bool) -> str:
    banks = {name: MemoryBank(300, 4, seed=number) for number, name in enumerate(("a", "b"))}
    check_banks(banks, 1, world)
    if world.rank == 1:
        banks["b"].rows_ND[rows] += 1e-6
    for bank in banks.values():
        bank.write(torch.tensor([5, 280]), UNIT[:2, [0, 1, 2, 0]].float(), momentum=0.5)
    if heal:
        banks["b"].rows_ND[:] = 0
    try:
        check_banks(banks, 7, world)
    except DivergedError as error:
        return str(error)
    return ""


def test_the_guard_names_bank_rank_and_row_on_every_rank(ranks):
    for message in ranks(2).run(_diverge, rows=[280], heal=False):
        assert message.startswith("rank 1 holds another row 280 of bank 'b' than rank 0 after step 7; ")
    for message in ranks(2).run(_diverge, rows=[5], heal=True):
        assert "different rows into bank 'b', which were overwritten since, after step 7" in message
    assert ranks(2).run(_diverge, rows=[], heal=False) == ["", ""]


def test_sharded_banks_have_no_replicas_to_compare():
    check_banks({"a": MemoryBank(5, 3, seed=0, part=0, parts=2)}, 1, World(size=2))
