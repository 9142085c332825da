"""Process group and collectives: results in rank order, counts, and errors that name rank and collective."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from distkd.base import World
from distkd.comm import world as comm
from distkd.errors import ConfigError, DivergedError, LostRankError

SIZES = [1, 2, 4]


def _collectives(world: World) -> dict[str, Any]:
    before = comm.counts.copy()
    rank = torch.tensor([world.rank, 2 * world.rank], dtype=torch.float64)
    summed, largest = rank.clone(), rank.clone()
    returned = comm.all_reduce_sum(summed, world)
    comm.all_reduce_max(largest, world)
    strided = torch.stack([rank, rank + 10], dim=1).T  # not contiguous
    comm.barrier(world)
    found = {
        "in_place": returned is summed,
        "sum": summed,
        "max": largest,
        "rows": comm.all_gather_rows(strided, world),
        "objects": comm.gather_objects({"rank": world.rank}, world),
        "broadcast": comm.broadcast_object(f"of {world.rank}", world),
    }
    return found | {"counts": dict(comm.counts - before)}


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_what_all_ranks_gave_in_rank_order(ranks, size):
    total = size * (size - 1) / 2
    for found in ranks(size).run(_collectives):
        assert found["in_place"]
        assert found["sum"].tolist() == [total, 2 * total]
        assert found["max"].tolist() == [size - 1, 2 * (size - 1)]
        assert found["rows"].tolist() == [row for r in range(size) for row in ([r, 2 * r], [r + 10, 2 * r + 10])]
        assert found["objects"] == [{"rank": r} for r in range(size)]
        assert found["broadcast"] == "of 0"


@pytest.mark.parametrize("size", SIZES)
def test_collectives_are_counted_by_name_and_not_in_a_world_of_one(ranks, size):
    names = ["all_reduce_sum", "all_reduce_max", "all_gather_rows", "gather_objects", "broadcast_object", "barrier"]
    for found in ranks(size).run(_collectives):
        assert found["counts"] == (dict.fromkeys(names, 1) if size > 1 else {})


def _gathers_without_graph(world: World) -> bool:
    return comm.all_gather_rows(torch.zeros(2, 3, requires_grad=True), world).requires_grad


@pytest.mark.parametrize("size", [1, 2])
def test_gathered_rows_have_no_gradient(ranks, size):
    assert ranks(size).run(_gathers_without_graph) == [False] * size


def _meet_and_lose(rank: int, store: Path, reply: Any) -> None:
    world = World(rank, 2, rank)
    comm.init(world, device=torch.device("cpu"), timeout_s=200, store=store)
    reply.send(comm.all_reduce_sum(torch.ones(1), world).item())
    if rank == 1:
        return  # gone without a word
    try:
        comm.all_reduce_sum(torch.ones(1), world)
    except LostRankError as error:
        reply.send(str(error))
    comm.shutdown()


def test_a_rank_that_dies_is_reported_by_the_others(tmp_path):
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_meet_and_lose, args=(rank, tmp_path / "store", pipes[rank][1])) for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert [ours.recv() for ours, _ in pipes] == [2.0, 2.0]
    text = pipes[0][0].recv()
    for process in processes:
        process.join(200)
    assert text.startswith("rank 0 of 2: collective 'all_reduce_sum' number 2 failed: ")
    assert text.endswith("another rank died or stopped answering, start the run again to resume")


def test_a_world_of_one_needs_no_group():
    comm.init(World(), device=torch.device("cpu"), timeout_s=1)
    assert not torch.distributed.is_initialized()
    comm.shutdown()


def test_ranks_without_an_address_are_told_to_use_a_launcher(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"rank 1 of 2 cannot meet the others: .*MASTER_ADDR.*torchrun or srun"):
        comm.init(World(1, 2, 1), device=torch.device("cpu"), timeout_s=1)


def _out_of_order(world: World, store: Path) -> str:
    """Two ranks in different collectives, in debug mode."""
    comm.shutdown()
    comm.init(world, device=torch.device("cpu"), timeout_s=90.0, debug=True, store=store)
    comm.barrier(world)
    try:
        if world.is_main:
            comm.all_reduce_sum(torch.ones(3), world)
        else:
            comm.all_gather_rows(torch.ones(3, 2), world)
    except DivergedError as error:
        return str(error) if error.local else "only one rank would speak"
    return ""


def test_debug_mode_names_the_collectives_that_do_not_match(ranks, tmp_path: Path):
    first, second = ranks(2).run(_out_of_order, store=tmp_path / "store")
    assert first.startswith("rank 0 of 2: collective 'all_reduce_sum' number 1 is not what the other ranks are in: ")
    assert second.startswith("rank 1 of 2: collective 'all_gather_rows' number 1 is not what the other ranks are in: ")
    for said in (first, second):
        assert said.endswith("; look for code that differs by rank")


def test_every_collective_of_the_observing_thread_is_observed_and_its_bytes_counted(ranks):
    for around, elsewhere, moved in ranks(2).run(_observe):
        assert around == ["in", "out"] * 4  # an all-gather that is waited for later is observed twice
        assert elsewhere == []
        assert moved == {"all_reduce_sum": 24, "all_gather_rows": 16, "reduce_scatter_rows": 64}


def _observe(world: World) -> tuple[list[str], list[str], dict[str, int]]:
    comm.moved_bytes.clear()
    seen: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    with comm.observed(around):
        comm.all_reduce_sum(torch.ones(3, dtype=torch.float64), world)
        arrived = comm.start_all_gather_rows(torch.ones(4), world)
        arrived()
        comm.reduce_scatter_rows(torch.ones(8, dtype=torch.float64), world)
        first, seen = seen[:], []
        other = threading.Thread(target=comm.barrier, args=(world,))
        other.start()
        other.join()
    comm.barrier(world)  # nobody observes any more
    return first, seen, dict(comm.moved_bytes)


def _loses_one(world: World, folder: Path) -> str:
    """The last rank leaves; what the other one says."""
    comm.shutdown()
    comm.init(
        world,
        device=torch.device("cpu"),
        timeout_s=90.0,
        record=folder / "events" / "flight-rank-",
        store=folder / "store",
    )
    comm.all_reduce_sum(torch.ones(3), world)
    if not world.is_main:
        return ""
    try:
        comm.all_gather_rows(torch.ones(2, 2), world)
    except LostRankError as error:
        return str(error)
    return "nothing was lost"


def test_a_rank_that_loses_another_one_leaves_its_last_collectives(ranks, tmp_path: Path):
    said, _ = ranks(2).run(_loses_one, folder=tmp_path)
    path = tmp_path / "events" / "flight-rank-0"
    assert "collective 'all_gather_rows' number 1 failed: " in said
    assert said.endswith(f"start the run again to resume; its last collectives are in {path}")
    recorded = json.loads(path.read_text())["entries"]
    assert any("all_reduce" in entry["profiling_name"] for entry in recorded)
