"""A pool of ranks that lives as long as the test run: functions go in, results come back in rank order.

A worker imports torch once and then serves many jobs; each job of several ranks meets over a new file store, so that
no job sees what another one left in a process group. A job whose ranks do not all answer ends the pool.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

__all__ = ["SIZES", "Pool", "PoolError", "Ranks"]

SIZES = (1, 2, 4)
COLLECTIVE_TIMEOUT_S = 90.0
JOB_TIMEOUT_S = 240.0
START_TIMEOUT_S = 400.0
GRACE_S = 60.0
"""How long the other ranks of a job may go on after one has raised."""


class PoolError(Exception):
    """A rank died, hung, or raised something that cannot travel; the text has its traceback or its stacks."""


@dataclass(frozen=True, slots=True)
class _Job:
    function: Callable[..., Any]
    kwargs: dict[str, Any]
    size: int
    store: str
    filters: list[Any]
    """Warning filters of the test that asks, so that its marks hold on the ranks too."""


@dataclass(frozen=True, slots=True)
class _Failure:
    rank: int
    error: BaseException | None
    """The exception itself where it survives pickling."""
    text: str
    at: float
    """When it was raised, on the clock that all processes share."""


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    log: Path
    """Where the worker leaves the stacks of its threads when it is aborted."""


@dataclass(slots=True)
class Pool:
    """Up to four worker processes, started when a job needs them and replaced after a failure."""

    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory[str])
    workers: list[_Worker] = field(default_factory=list[_Worker])
    jobs: int = 0

    def run(self, size: int, function: Callable[..., Any], kwargs: dict[str, Any], timeout_s: float) -> list[Any]:
        """Call `function(world, **kwargs)` on ranks 0..size-1 and return the results in rank order.

        Raises:
            PoolError: a rank died or did not answer within `timeout_s`; the pool is ended.
            Exception: what the first failing rank raised, with its traceback as the cause.
        """
        try:
            self._start(size)
            answers = self._exchange(size, function, kwargs, timeout_s)
        except BaseException:  # also the signal of pytest-timeout: the ranks are in the middle of something
            self.close()
            raise
        failures = [answer for answer in answers if isinstance(answer, _Failure)]
        if failures:
            # every rank has answered and left its group, so the workers stay usable; of two that raised, the one
            # whose neighbour had gone may be heard first
            first = min(failures, key=lambda failure: failure.at)
            cause = PoolError(f"rank {first.rank} of {size} raised\n{first.text}")
            raise cause if first.error is None else first.error from cause
        return _sorted_by_rank(answers)

    def close(self) -> None:
        """End all workers at once; the next job starts new ones."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers.clear()

    def _start(self, size: int) -> None:
        if any(not worker.process.is_alive() for worker in self.workers):
            self.close()  # a worker that was killed between two jobs
        fresh = [self._spawn(number) for number in range(len(self.workers), size)]
        for worker in fresh:
            if not worker.pipe.poll(START_TIMEOUT_S):
                raise PoolError(f"a worker did not start within {START_TIMEOUT_S:g} s")
            worker.pipe.recv_bytes()

    def _spawn(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = Path(self.folder.name) / f"stacks-{number}.txt"
        process = context.Process(target=_serve, args=(theirs, number, str(log)), name=f"rank-{number}", daemon=True)
        process.start()
        theirs.close()
        self.workers.append(_Worker(process, ours, log))
        return self.workers[-1]

    def _exchange(
        self, size: int, function: Callable[..., Any], kwargs: dict[str, Any], timeout_s: float
    ) -> list[tuple[int, Any] | _Failure]:
        self.jobs += 1
        store = str(Path(self.folder.name) / f"store-{self.jobs}")
        message = pickle.dumps(_Job(function, kwargs, size, store, list(warnings.filters)))
        waiting = {worker.pipe: rank for rank, worker in enumerate(self.workers[:size])}
        for pipe in waiting:
            pipe.send_bytes(message)  # not send(): torch would pass tensors as shared memory of a mortal process
        answers: list[tuple[int, Any] | _Failure] = []
        end = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise PoolError(self._describe_hang(sorted(waiting.values()), answers, timeout_s))
            for pipe in cast("list[Connection]", ready):
                answers.append(self._receive(pipe, waiting.pop(pipe), answers))
            if any(isinstance(answer, _Failure) for answer in answers):
                end = min(end, time.monotonic() + GRACE_S)
        return answers

    def _receive(self, pipe: Connection, rank: int, answers: list[Any]) -> tuple[int, Any] | _Failure:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError) as error:
            worker = self.workers[rank]
            worker.process.join(GRACE_S)
            stacks = worker.log.read_text() if worker.log.exists() else ""
            raise PoolError(
                f"rank {rank} died with exit code {worker.process.exitcode}\n{stacks}{_texts(answers)}"
            ) from error

    def _describe_hang(self, ranks: list[int], answers: list[Any], timeout_s: float) -> str:
        lines = [f"ranks {ranks} did not answer within {timeout_s:g} s{_texts(answers)}"]
        for rank in ranks:
            worker = self.workers[rank]
            os.kill(cast(int, worker.process.pid), signal.SIGABRT)  # faulthandler writes the stacks, then it is gone
            worker.process.join(GRACE_S)
            stacks = worker.log.read_text() if worker.log.exists() else ""
            lines.append(f"rank {rank} was at\n{stacks}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Ranks:
    """`size` ranks of the pool, as a test asks for them."""

    pool: Pool
    size: int
    timeout_s: float = JOB_TIMEOUT_S

    def run(self, function: Callable[..., Any], /, **kwargs: Any) -> list[Any]:
        """Call the module-level `function(world, **kwargs)` on every rank; the results, in rank order."""
        return self.pool.run(self.size, function, kwargs, self.timeout_s)


def _sorted_by_rank(answers: list[Any]) -> list[Any]:
    return [result for _, result in sorted(answers, key=lambda answer: answer[0])]


def _texts(answers: list[Any]) -> str:
    return "".join(f"\nrank {a.rank} raised\n{a.text}" for a in answers if isinstance(a, _Failure))


def _serve(pipe: Connection, rank: int, log: str) -> None:
    """A worker's life: import torch, then answer jobs until the parent is gone."""
    import torch

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    with open(log, "w") as stacks:
        faulthandler.enable(stacks)
        pipe.send_bytes(b"ready")
        while True:
            try:
                message = pipe.recv_bytes()
            except EOFError:
                return
            pipe.send_bytes(_answer(message, rank))


def _answer(message: bytes, rank: int) -> bytes:
    raised_at: list[float] = []
    try:
        job = cast(_Job, pickle.loads(message))
        return pickle.dumps((rank, _call(job, rank, raised_at)))
    except (Exception, SystemExit) as error:
        text = traceback.format_exc()
        at = raised_at[0] if raised_at else time.monotonic()
        try:
            packed = pickle.dumps(_Failure(rank, error, text, at))
            pickle.loads(packed)  # an exception with its own __init__ may pickle and not come back
        except Exception:
            packed = pickle.dumps(_Failure(rank, None, text, at))
        return packed


def _call(job: _Job, rank: int, raised_at: list[float]) -> Any:
    import numpy as np
    import torch

    from distkd.base import World
    from distkd.comm import world as comm

    warnings.filters[:] = job.filters  # pyright: ignore[reportIndexIssue]
    warnings.simplefilter("default", append=True)  # the public way to make the new list count
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # for code that should not use it
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    world = World(rank, job.size, rank)
    comm.init(world, device=torch.device("cpu"), timeout_s=COLLECTIVE_TIMEOUT_S, store=Path(job.store))
    comm.barrier(world)  # a rank that has no collective could leave while others are still connecting
    comm.counts.clear()
    try:
        return job.function(world, **job.kwargs)
    except BaseException:
        raised_at.append(time.monotonic())  # before the group goes: the others notice that and raise too
        raise
    finally:
        comm.shutdown()
