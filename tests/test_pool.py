"""The pool of ranks that the distributed tests run on."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distkd.base import World
from tests import pool as pool_module
from tests.pool import JOB_TIMEOUT_S, Pool, PoolError


class _Fussy(Exception):
    """An exception that pickles and does not come back."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def _sum_of_ranks(world: World, start: float) -> torch.Tensor:
    total = torch.tensor([start + world.rank])
    if world.size > 1:
        dist.all_reduce(total)
    return total


def _layout(world: World) -> tuple[int, int, int, int]:
    return world.rank, world.size, os.getpid(), torch.get_num_threads()


def _raise(world: World, on: int, message: str) -> None:
    if world.rank == on:
        raise ValueError(message)


def _raise_before_a_collective(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank one gives up")
    dist.all_reduce(torch.zeros(1))


def _raise_fussy(world: World) -> None:
    raise _Fussy(1, 2)


def _hang_in_a_named_place(world: World, folder: Path) -> None:
    (folder / str(world.rank)).touch()
    threading.Event().wait()


def _die(world: World, on: int) -> None:
    if world.rank == on:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _warn(world: World) -> None:
    warnings.warn("something is old", DeprecationWarning, stacklevel=1)


def _dtype_after_double(world: World) -> tuple[torch.dtype, float]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    return dtype, torch.rand(()).item()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_back_in_rank_order(ranks, size):
    layouts = ranks(size).run(_layout)
    assert [(rank, of) for rank, of, _, _ in layouts] == [(rank, size) for rank in range(size)]
    assert len({pid for _, _, pid, _ in layouts} | {os.getpid()}) == size + 1
    assert {threads for _, _, _, threads in layouts} == {1}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_collective_gives_equal_results_on_every_rank(ranks, size):
    expected = torch.tensor([10.0 * size + sum(range(size))])
    for found in ranks(size).run(_sum_of_ranks, start=10.0):
        assert torch.equal(found, expected)


def test_workers_live_from_job_to_job(ranks):
    first = [pid for _, _, pid, _ in ranks(2).run(_layout)]
    assert [pid for _, _, pid, _ in ranks(4).run(_layout)][:2] == first


def test_a_job_starts_from_the_same_seed_and_dtype_whatever_ran_before(ranks):
    assert ranks(1).run(_dtype_after_double)[0][0] is torch.float32
    assert ranks(1).run(_dtype_after_double)[0][0] is torch.float32


def test_an_exception_comes_back_with_its_type_and_the_traceback_of_its_rank(ranks):
    with pytest.raises(ValueError, match="seven is too many") as caught:
        ranks(2).run(_raise, on=1, message="seven is too many")
    assert "rank 1 of 2" in str(caught.value.__cause__)
    assert "_raise" in str(caught.value.__cause__)
    assert len(ranks(2).run(_layout)) == 2


def test_the_first_rank_that_raised_is_the_one_reported(ranks):
    with pytest.raises(ValueError, match="rank one gives up"):
        ranks(2).run(_raise_before_a_collective)


def test_an_exception_that_cannot_travel_comes_back_as_text(ranks):
    with pytest.raises(PoolError, match=r"_Fussy: 1 and 2"):
        ranks(1).run(_raise_fussy)


def test_a_warning_on_a_rank_is_an_error(ranks):
    with pytest.raises(DeprecationWarning, match="something is old"):
        ranks(1).run(_warn)


@pytest.mark.filterwarnings("ignore:something is old")
def test_a_filter_of_the_test_holds_on_the_ranks(ranks):
    assert ranks(1).run(_warn) == [None]


def test_a_hanging_job_is_ended_with_its_stacks_and_the_next_one_works(ranks, tmp_path: Path, monkeypatch):
    wait = pool_module.wait

    def wait_once_they_hang(pipes: Any, timeout: float) -> Any:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)  # polling other processes, not waiting for luck
        return wait(pipes, timeout)

    monkeypatch.setattr(pool_module, "wait", wait_once_they_hang)
    with pytest.raises(PoolError, match=r"ranks \[0, 1\] did not answer within 0\.5 s") as caught:
        ranks(2, timeout_s=0.5).run(_hang_in_a_named_place, folder=tmp_path)
    monkeypatch.undo()
    assert "_hang_in_a_named_place" in str(caught.value)
    assert len(ranks(2).run(_layout)) == 2


def test_a_killed_rank_is_named_and_replaced(ranks):
    with pytest.raises(PoolError, match="rank 1 died with exit code -9"):
        ranks(2).run(_die, on=1)
    assert len(ranks(2).run(_layout)) == 2


def test_a_worker_killed_between_two_jobs_is_replaced(ranks):
    before = [pid for _, _, pid, _ in ranks(2).run(_layout)]
    os.kill(before[1], signal.SIGKILL)
    os.waitid(os.P_PID, before[1], os.WEXITED | os.WNOWAIT)
    after = [pid for _, _, pid, _ in ranks(2).run(_layout)]
    assert before[1] not in after


def test_a_closed_pool_starts_again():
    pool = Pool()
    try:
        assert pool.run(1, _sum_of_ranks, {"start": 1.0}, JOB_TIMEOUT_S) == [torch.tensor([1.0])]
        pool.close()
        assert not pool.workers
        assert pool.run(1, _sum_of_ranks, {"start": 2.0}, JOB_TIMEOUT_S) == [torch.tensor([2.0])]
    finally:
        pool.close()
        pool.folder.cleanup()
