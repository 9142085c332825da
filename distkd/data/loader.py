"""Batches in the order of the plan, prepared by a thread while the last step computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from distkd.base import Batch, World
from distkd.data.dataset import Dataset, Spare
from distkd.data.manifest import Split
from distkd.data.plan import Plan, eval_positions
from distkd.data.remote.stream import StreamReader, StreamSource, eval_stream, numbers_at
from distkd.data.stream_plan import StreamPlan

__all__ = ["Backlog", "batches_of_step", "eval_batches", "train_batches"]

T = TypeVar("T")

_AHEAD = 2
"""Items that wait ready; each is all passes of a step."""


class Backlog:
    """How many steps lie ready, for whoever watches; None where nothing is prepared ahead."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Any] | None = None

    def __call__(self) -> int | None:
        return None if self.queue is None else self.queue.qsize()


def train_batches(
    dataset: Dataset,
    plan: Plan | StreamPlan,
    world: World,
    passes: int,
    start_step: int = 0,
    backlog: Backlog | None = None,
) -> Generator[tuple[int, list[Batch]], None, None]:
    """(step, batches of its passes) of this rank, from `start_step` to the end of the run.

    Closing the iterator ends its thread; what fails in the thread is raised here.
    """

    def make() -> Iterator[tuple[int, list[Batch]]]:
        order = _Order(dataset, plan, world, passes)
        for step, parts in order.steps(start_step):
            yield step, order.batches(step, parts)

    return _ahead(make, threaded=dataset.config.threads > 0, backlog=backlog)


def batches_of_step(dataset: Dataset, plan: Plan | StreamPlan, world: World, passes: int, step: int) -> list[Batch]:
    """The batches of this rank in one step, by itself."""
    order = _Order(dataset, plan, world, passes)
    return order.batches(step, order.parts(step))


class _Order:
    """A plan's places as numbers of samples, and these as batches of this rank."""

    def __init__(self, dataset: Dataset, plan: Plan | StreamPlan, world: World, passes: int):
        self._dataset, self._plan, self._world, self._passes = dataset, plan, world, passes
        self._train = dataset.split_samples("train")
        self._of_shard = dataset.samples_of_shards("train") if isinstance(plan, StreamPlan) else []

    def steps(self, start_step: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(step, (B,) samples of each pass)."""
        plan, shard_set = self._plan, self._dataset.shard_set
        if isinstance(plan, StreamPlan) and isinstance(shard_set, StreamReader):
            yield from StreamSource(shard_set.store, plan, self._of_shard, self._world, self._passes, start_step)
            return
        for step in range(start_step, plan.n_steps):
            yield step, self.parts(step)

    def parts(self, step: int) -> list[np.ndarray]:
        """(B,) samples of each pass of a step."""
        plan, passes = self._plan, range(self._passes)
        if isinstance(plan, StreamPlan):
            places = [plan.local_places(step, number, self._passes, self._world) for number in passes]
            return [numbers_at(self._of_shard, shard_B, inside_B) for shard_B, inside_B in places]
        return [self._train[plan.local_positions(step, number, self._passes, self._world)] for number in passes]

    def batches(self, step: int, parts: Sequence[np.ndarray]) -> list[Batch]:
        """The passes of a step; samples that cannot be read are replaced by the plan's next ones."""
        plan = self._plan
        epoch, progress = plan.epoch_of(step), step / plan.n_steps
        made: list[Batch] = []
        for number, samples in enumerate(parts):
            spare = self._spare(step, plan.local_slots(number, self._passes, self._world))
            made.append(
                self._dataset.batch(samples, epoch=epoch, train=True, step=step, progress=progress, spare=spare)
            )
        return made

    def _spare(self, step: int, slot_B: np.ndarray) -> Spare:
        def of(place: int, attempt: int) -> int:
            after = self._plan.after(step, int(slot_B[place]), attempt)
            return int(self._train[after] if isinstance(after, int) else self._of_shard[after[0]][after[1]])

        return of


def eval_batches(dataset: Dataset, split: Split, world: World, micro_batch: int) -> Iterator[Batch]:
    """This rank's share of a split, each sample once over all ranks; ranks may have different numbers of batches.

    Samples that cannot be read are left out, where `data.on_error: skip` allows it.
    """

    def parts() -> Iterator[np.ndarray]:
        if isinstance(dataset.shard_set, StreamReader):
            yield from eval_stream(dataset.shard_set.store, dataset.samples_of_shards(split), world, micro_batch)
            return
        numbers = dataset.split_samples(split)
        mine = numbers[eval_positions(len(numbers), world)]
        for first in range(0, len(mine), micro_batch):
            yield mine[first : first + micro_batch]

    def make() -> Iterator[Batch]:
        for samples in parts():
            batch = dataset.batch(samples, epoch=0, train=False)
            if len(batch):
                yield batch

    return _ahead(make, threaded=dataset.config.threads > 0)


class _End:
    """What a thread says last, with the error that ended it, if one did."""

    def __init__(self, error: BaseException | None):
        self.error = error


def _ahead(
    make: Callable[[], Iterable[T]], *, threaded: bool, backlog: Backlog | None = None
) -> Generator[T, None, None]:
    if not threaded:
        yield from make()
        return
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=_AHEAD)
    if backlog is not None:
        backlog.queue = ready
    closed = threading.Event()

    def put(item: T | _End) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in make():
                if not put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - it is raised where the batches are used
            put(_End(error))
        else:
            put(_End(None))

    thread = threading.Thread(target=work, name="distkd-batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        closed.set()
        thread.join()
