"""What the steps leave behind until somebody asks: metrics, the guard against NaN, and whether a rank should stop.

Everything stays on the device and on this rank between two readings; a reading is one small collective.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distkd.base import Batch, StepOutput
from distkd.comm.world import all_reduce_max, gather_objects, waited_s
from distkd.engines import Update
from distkd.metrics.meters import Meter, Stopwatch
from distkd.train.finite import FiniteGuard
from distkd.train.job import Job
from distkd.train.signals import Pacing, StopFlag

__all__ = ["Reading", "Tally"]

_OWN_WORK = ("data", "forward", "optimizer")
"""Phases in which no rank waits for another; a backward waits for the gradients of all."""


class _Prefixed(dict[str, str]):
    """Names with a prefix, each put together once."""

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def __missing__(self, name: str) -> str:
        return self.setdefault(name, f"{self.prefix}:{name}")


_PARTS, _GAUGES = _Prefixed("parts"), _Prefixed("gauges")


@dataclass(frozen=True, slots=True)
class Reading:
    """What all ranks know at a logging step."""

    means: dict[str, float]
    """Mean over steps and ranks; no `loss` where every step was left out."""
    timings: dict[str, float]
    """Seconds by phase on this rank since the last reading, and the slowest rank."""
    stop: bool
    """Whether any rank was asked to stop."""
    replaced: int
    """Samples that could not be read and were replaced by others, over all ranks of this attempt."""


class Tally:
    """Takes in every step, answers at the steps that all ranks agree on."""

    def __init__(self, job: Job, log_every: int):
        self.job = job
        self.watch = Stopwatch(waited=waited_s)
        self.guard = FiniteGuard(job)
        self._meter = Meter(job.device)
        self._pacing = Pacing(log_every)
        self._steps = 0
        self._since = time.perf_counter()

    def add(self, passes: Sequence[Batch], out: StepOutput, update: Update) -> str | None:
        """Hand over a step's scalars. Returns the words for a step that was left out, on all ranks alike."""
        self._steps += 1
        if not update.applied:
            return self.guard.skipped(out.step, passes, out.loss)
        loss = out.loss.detach()
        values = {"loss": loss, "grad_norm": update.norm}
        values |= {_PARTS[name]: value for name, value in out.parts.items()}
        values |= {_GAUGES[name]: value for name, value in out.gauges.items()}
        self._meter.add(values)
        self.guard.watch(out.step, loss, update.norm)
        return None

    def read(self, stop_flag: StopFlag) -> Reading:
        """Means since the last reading. One all-reduce and one host sync; a gather where samples cannot be read.

        Raises:
            NonFiniteError: on all ranks, where a step was not finite.
            DataError: on all ranks, where too many samples cannot be read.
        """
        timings = self.watch.read()
        busy_s = sum(timings.get(phase, 0.0) for phase in _OWN_WORK)
        now = time.perf_counter()
        asked = int(stop_flag.is_set())
        unreadable = self.job.dataset.unreadable
        untold = unreadable.untold()
        own = (busy_s, now - self._since, float(unreadable.replaced), float(len(untold)))
        reduced = self._meter.reduce(self.job.world, flag=asked, own=own)
        self.guard.check(reduced.means.get("loss", 0.0))
        self._pacing.learn(max(wall_s for _, wall_s, *_ in reduced.by_rank) / max(1, self._steps))
        self._steps, self._since = 0, now
        straggler = _straggler([busy_s for busy_s, *_ in reduced.by_rank])
        replaced = int(sum(replaced for _, _, replaced, _ in reduced.by_rank))
        if any(n_untold for *_, n_untold in reduced.by_rank):  # known to all ranks, so all go this way
            unreadable.tell(gather_objects(untold, self.job.world))
        return Reading(reduced.means, timings | straggler, reduced.flags > 0, replaced)

    def carry(self) -> list[list[dict[str, float]]]:
        """What every rank has measured since the last reading, for a checkpoint between two of them. One gather.

        Raises:
            NonFiniteError: on all ranks, where a step was not finite: no checkpoint is worth writing.
        """
        pending = gather_objects(self._meter.pending(), self.job.world)
        losses = [step["loss"] for steps in pending for step in steps]
        self.guard.check(sum(losses))
        return pending

    def restore(self, carried: Sequence[Sequence[Mapping[str, float]]]) -> None:
        """Go on from `carry`: this rank's own steps, or at another number of ranks the mean of all on every rank."""
        world = self.job.world
        if len(carried) == world.size:
            self._meter.restore(carried[world.rank])
        elif carried:
            together = zip(*carried, strict=True)
            self._meter.restore(
                [{name: statistics.fmean(step[name] for step in steps) for name in steps[0]} for steps in together]
            )

    def should_stop(self, step: int, stop_flag: StopFlag) -> bool:
        """Whether any rank was asked to stop, between two readings. A collective where steps are long, else no."""
        if not self._pacing.is_due(step):
            return False
        asked = torch.tensor(float(stop_flag.is_set()), device=self.job.device)
        return all_reduce_max(asked, self.job.world).item() > 0


def _straggler(busy_s: list[float]) -> dict[str, float]:
    """The rank with most work of its own, and how many times the median's that is; nothing for one rank."""
    median = statistics.median(busy_s)
    if len(busy_s) == 1 or not median:
        return {}
    slowest = max(range(len(busy_s)), key=busy_s.__getitem__)
    return {"straggler_rank": slowest, "straggler_index": busy_s[slowest] / median}
