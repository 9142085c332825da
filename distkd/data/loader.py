"""Batches in the order of the plan, prepared by a thread while the last step computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from distkd.base import Batch, World
from distkd.data.dataset import Dataset
from distkd.data.manifest import Split
from distkd.data.plan import Plan, eval_positions

__all__ = ["eval_batches", "train_batches"]

T = TypeVar("T")

_AHEAD = 2
"""Items that wait ready; each is all passes of a step."""


def train_batches(
    dataset: Dataset, plan: Plan, world: World, passes: int, start_step: int = 0
) -> Generator[tuple[int, list[Batch]], None, None]:
    """(step, batches of its passes) of this rank, from `start_step` to the end of the run.

    Closing the iterator ends its thread; what fails in the thread is raised here.
    """

    def make() -> Iterator[tuple[int, list[Batch]]]:
        train_samples = dataset.split_samples("train")
        for step in range(start_step, plan.n_steps):
            parts = [train_samples[plan.local_positions(step, number, passes, world)] for number in range(passes)]
            epoch, progress = plan.epoch_of(step), step / plan.n_steps
            yield step, [dataset.batch(part, epoch=epoch, train=True, step=step, progress=progress) for part in parts]

    return _ahead(make, threaded=dataset.config.threads > 0)


def eval_batches(dataset: Dataset, split: Split, world: World, micro_batch: int) -> Iterator[Batch]:
    """This rank's share of a split, each sample once over all ranks; ranks may have different numbers of batches."""

    def make() -> Iterator[Batch]:
        numbers = dataset.split_samples(split)
        mine = numbers[eval_positions(len(numbers), world)]
        for first in range(0, len(mine), micro_batch):
            yield dataset.batch(mine[first : first + micro_batch], epoch=0, train=False)

    return _ahead(make, threaded=dataset.config.threads > 0)


class _End:
    """What a thread says last, with the error that ended it, if one did."""

    def __init__(self, error: BaseException | None):
        self.error = error


def _ahead(make: Callable[[], Iterable[T]], *, threaded: bool) -> Generator[T, None, None]:
    if not threaded:
        yield from make()
        return
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=_AHEAD)
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
