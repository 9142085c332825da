"""Ages and drift of banks, against a dictionary of who was written when."""

from __future__ import annotations

from collections import deque
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distkd.base import World
from distkd.comm import world as comm
from distkd.comm.packed import start_gather
from distkd.memory.bank import MemoryBank
from distkd.memory.contrast import ContrastPair, write_rows
from distkd.memory.freshness import freshness, settle
from distkd.memory.queue import Queue

N, D, BATCH = 23, 4, 8


def over_ranks(states: list[nn.Module], global_batch: int = BATCH) -> dict[str, float]:
    """What a logging step says: the mean of every number over the ranks, then `settle`."""
    found = [freshness(state, global_batch=global_batch) for state in states]
    assert all(each.keys() == found[0].keys() for each in found)
    return settle({name: fmean(each[name].item() for each in found) for name in found[0]})


def by_hand(writes: list[list[int]], n_rows: int) -> tuple[float | None, float]:
    """Mean age of the written rows, and the share of the others."""
    last = {row: step for step, rows in enumerate(writes) for row in rows}
    ages = [len(writes) - 1 - step for step in last.values()]
    return (fmean(ages) if ages else None), 1 - len(last) / n_rows


rows_of_steps = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), max_size=6)


@given(writes=rows_of_steps, parts=st.integers(1, 4), n_rows=st.integers(1, 13))
def test_ages_are_those_of_a_dictionary_of_last_writes_wherever_rows_lie(
    writes: list[list[int]], parts: int, n_rows: int
):
    """Ranks without rows, and with rows of which none was written, are among these."""
    writes = [[row % n_rows for row in rows] for rows in writes]
    banks = [MemoryBank(n_rows, D, seed=1, part=part, parts=parts) for part in range(parts)]
    for rows in writes:
        for bank in banks:
            bank.write(torch.tensor(rows), F.normalize(torch.ones(len(rows), D), dim=1), momentum=0.5)
    found = over_ranks([nn.ModuleDict({"a": bank}) for bank in banks])
    age, unwritten = by_hand(writes, n_rows)
    assert found.pop("bank/a/unwritten_ratio") == pytest.approx(unwritten, abs=1e-15)
    drift = fmean(abs(norm.item() - 1) for bank in banks for norm in bank.rows_ND.norm(dim=1))
    assert found.pop("bank/a/norm_drift") == pytest.approx(drift, rel=1e-6)
    assert found == ({} if age is None else {"bank/a/staleness_steps": pytest.approx(age, rel=1e-15)})


def test_a_bank_that_is_written_all_over_at_every_step_is_fresh():
    bank = MemoryBank(6, D, seed=0)
    before = over_ranks([nn.ModuleDict({"a": bank})])
    assert before["bank/a/unwritten_ratio"] == 1
    assert before["bank/a/norm_drift"] > 0.1
    for _ in range(3):
        bank.write(torch.arange(6), F.normalize(torch.ones(6, D), dim=1), momentum=0.5)
    found = over_ranks([nn.ModuleDict({"a": bank})])
    assert found.pop("bank/a/norm_drift") < 1e-6
    assert found == {"bank/a/unwritten_ratio": 0, "bank/a/staleness_steps": 0}


def _steps(world: World, passes: int, sharded: bool) -> dict[str, float]:
    """Five steps of a global batch of 8 in some passes, and what the ranks' means say."""
    parts = world.size if sharded else 1
    bank = MemoryBank(N, D, seed=1, part=world.rank % parts, parts=parts)
    micro = BATCH // (passes * world.size)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        index = torch.randint(0, N, (BATCH,), generator=generator)
        embedding = F.normalize(torch.randn(BATCH, D, generator=generator), dim=1)
        starts = [(number * world.size + world.rank) * micro for number in range(passes)]
        arriving = [
            start_gather({"index": index[start : start + micro], "a": embedding[start : start + micro]}, world)
            for start in starts
        ]
        write_rows({"a": bank}, arriving, momentum=0.5)
    found = freshness(nn.ModuleDict({"a": bank}), global_batch=BATCH)
    totals = comm.all_reduce_sum(torch.stack(list(found.values())), world).tolist()
    return settle({name: total / world.size for name, total in zip(found, totals, strict=True)})


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("size", "passes"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_ages_are_the_same_at_any_number_of_ranks_and_passes(ranks, size: int, passes: int, sharded: bool):
    generator = torch.Generator().manual_seed(5)
    writes: list[list[int]] = []
    for _ in range(5):
        writes.append(torch.randint(0, N, (BATCH,), generator=generator).tolist())
        torch.randn(BATCH, D, generator=generator)
    age, unwritten = by_hand(writes, N)
    for found in ranks(size).run(_steps, passes=passes, sharded=sharded):
        assert found["bank/a/staleness_steps"] == pytest.approx(age, rel=1e-14)
        assert found["bank/a/unwritten_ratio"] == pytest.approx(unwritten, rel=1e-14)
        assert found["bank/a/norm_drift"] == pytest.approx(_steps(World(), 1, False)["bank/a/norm_drift"], rel=1e-6)


def test_rows_of_a_state_without_ages_count_as_written_at_the_restart():
    bank, fresh = MemoryBank(4, D, seed=0), MemoryBank(4, D, seed=0)
    for _ in range(7):
        bank.write(torch.tensor([1]), F.normalize(torch.ones(1, D), dim=1), momentum=0.5)
    fresh.load_state_dict({"rows_ND": bank.rows_ND})
    fresh.write(torch.tensor([1]), F.normalize(torch.ones(1, D), dim=1), momentum=0.5)
    found = over_ranks([nn.ModuleDict({"a": fresh})])
    assert found["bank/a/unwritten_ratio"] == 0
    assert found["bank/a/staleness_steps"] == 3 / 4


def test_a_restored_bank_goes_on_with_its_ages():
    bank, fresh = MemoryBank(4, D, seed=0), MemoryBank(4, D, seed=0)
    for row in (0, 1, 1):
        bank.write(torch.tensor([row]), F.normalize(torch.ones(1, D), dim=1), momentum=0.5)
    fresh.load_state_dict(bank.state_dict())
    assert over_ranks([nn.ModuleDict({"a": fresh})]) == over_ranks([nn.ModuleDict({"a": bank})])
    assert fresh.written_N.tolist() == [1, 3, 0, 0]


@given(length=st.integers(1, 20), batch=st.integers(1, 7), steps=st.integers(0, 8), passes=st.integers(1, 3))
def test_ages_in_a_queue_are_those_of_its_keys(length: int, batch: int, steps: int, passes: int):
    queue, expected = Queue(length, 2), deque[int](maxlen=length)
    for step in range(steps):
        for keys in torch.randn(batch, 2).tensor_split(passes):
            queue.push(keys)
        expected.extend([step] * batch)
    found = over_ranks([nn.ModuleDict({"queue": queue})] * 2, global_batch=batch)
    assert found.pop("bank/queue/unwritten_ratio") == pytest.approx(1 - len(expected) / length, abs=1e-15)
    ages = [steps - 1 - step for step in expected]
    assert found == ({"bank/queue/staleness_steps": pytest.approx(fmean(ages), rel=1e-14)} if ages else {})


def banks_of(found: dict[str, Tensor]) -> set[str]:
    return {name.split("/")[1] for name in found}


def test_banks_are_named_by_their_place_in_the_state():
    sides = nn.ModuleDict({side: ContrastPair(3, 2, seed=1) for side in ("teacher", "mean_teacher")})
    state = nn.ModuleDict({"contrast": sides, "queue": Queue(3, 2), "head": nn.Linear(2, 2)})
    pairs = {"teacher.student", "teacher.teacher", "mean_teacher.student", "mean_teacher.teacher"}
    assert banks_of(freshness(state, global_batch=2)) == pairs | {"queue"}
    twice = nn.ModuleDict({"a": ContrastPair(3, 2, seed=1), "b": ContrastPair(3, 2, seed=1)})
    assert banks_of(freshness(twice, global_batch=2)) == {"a.student", "a.teacher", "b.student", "b.teacher"}
    assert freshness(nn.ModuleDict({"head": nn.Linear(2, 2)}), global_batch=2) == {}


def test_other_means_pass_through_under_any_prefix():
    means = {"loss": 2.0, "gauges:bank/a/age_steps": 3.0, "gauges:bank/a/written_ratio": 0.5, "parts:x/age_steps": 1.0}
    settled = {"loss": 2.0, "gauges:bank/a/staleness_steps": 6.0, "parts:x/age_steps": 1.0}
    assert settle(means) == settled


def test_neither_a_write_nor_its_age_waits_for_the_device():
    """On the meta device there are no values that a host could wait for."""
    for parts in (1, 2):
        state = nn.ModuleDict({"a": MemoryBank(5, D, seed=0, parts=parts), "queue": Queue(5, D)}).to("meta")
        bank = state["a"]
        assert isinstance(bank, MemoryBank)
        index = torch.tensor([1, 2], device="meta")
        bank.write(index, torch.ones(2, D, device="meta"), momentum=0.5, last_G=index)
        found = freshness(state, global_batch=2)
        assert {(value.shape, value.device.type, value.dtype) for value in found.values()} == {
            ((), "meta", torch.float64)
        }


def test_norms_of_a_bank_that_is_cast_are_those_that_a_resumed_run_finds():
    bank = MemoryBank(64, 16, seed=3).double()
    again = MemoryBank(64, 16, seed=3).double()
    again.load_state_dict(bank.state_dict())
    assert torch.equal(bank.norm_N, again.norm_N)
    assert torch.equal(bank.norm_N, bank.rows_ND.norm(dim=1))
