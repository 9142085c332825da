"""What the steps leave behind until somebody asks: metrics, the guard against NaN, and whether a rank should stop.

Everything stays on the device and on this rank between two readings; a reading is one small collective.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distkd.base import Batch, StepOutput
from distkd.comm.world import any_rank, gather_objects
from distkd.data.loader import Backlog
from distkd.engines import Update
from distkd.memory.freshness import freshness, settle
from distkd.metrics.meters import CudaTimeline, HostTimeline, Laps, Meter, Stopwatch
from distkd.metrics.table import PHASES
from distkd.train.finite import FiniteGuard
from distkd.train.job import Job
from distkd.train.signals import Pacing, StopFlag

__all__ = ["RankShare", "Reading", "Tally", "gpu_memory"]


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank did since the last reading; every rank gets to see that of all."""

    rank: int
    busy_s: float
    """Of a step, in phases where no rank waits for another: the engine's `own_work`."""
    wall_s: float
    """Of all steps since then."""
    steps: int
    index: float | None
    """Time of a step at this rank's pace over that at the median's; None for a single rank, or while not known.

    (base + busy_s - m) / base with m the median of `busy_s` over ranks, of two the lower one. base is what a step takes
    without the wait for the slowest rank: the median over ranks of a step's phases without checkpoints, less
    max(busy_s) - m, and at least m.
    """
    phases: dict[str, float]
    """Seconds of a step."""
    queue: int | None
    """Steps whose data lies ready; None where nothing is prepared ahead."""
    gpu_memory_bytes: int | None
    """Allocated; None without a GPU."""

    def row(self) -> dict[str, Any]:
        """As `ranks.json` has it."""
        return {
            "rank": self.rank,
            "busy_s": round(self.busy_s, 6),
            "wall_s": round(self.wall_s, 6),
            "straggler_index": None if self.index is None else round(self.index, 4),
            "phases": {name: round(passed, 6) for name, passed in self.phases.items()},
            "queue": self.queue,
            "gpu_memory_bytes": self.gpu_memory_bytes,
        }


@dataclass(frozen=True, slots=True)
class Reading:
    """What all ranks know at a logging step."""

    loss: float | None
    """Mean over steps and ranks, as what follows; None where every step was left out."""
    grad_norm: float | None
    parts: dict[str, float]
    """Of the loss."""
    gauges: dict[str, float]
    """What the method says besides, and the state of its memories."""
    timings: dict[str, float]
    """Seconds by phase on this rank since the last reading, and the slowest rank."""
    stop: bool
    """Whether any rank was asked to stop."""
    replaced: int
    """Samples that could not be read and were replaced by others, over all ranks of this attempt."""
    ranks: list[RankShare]
    """By rank."""


class Tally:
    """Takes in every step, answers at the steps that all ranks agree on.

    Args:
        job: what is trained.
        log_every: steps between two readings.
        on_lap: as `Stopwatch` has it.
        backlog: how many steps lie ready.
    """

    def __init__(
        self,
        job: Job,
        log_every: int,
        on_lap: Callable[[dict[str, float]], None] | None = None,
        backlog: Backlog | None = None,
    ):
        self.job = job
        self.watch = Stopwatch(CudaTimeline() if job.device.type == "cuda" else HostTimeline(), on_lap)
        self.guard = FiniteGuard(job)
        self._meter = Meter(job.device)
        self._pacing = Pacing(log_every)
        self._backlog = Backlog() if backlog is None else backlog
        self._steps = 0
        self._since = time.perf_counter()

    def add(self, passes: Sequence[Batch], out: StepOutput, update: Update) -> str | None:
        """Hand over a step's scalars. Returns the words for a step that was left out, on all ranks alike."""
        self._steps += 1
        if not update.applied:
            return self.guard.skipped(out.step, passes, out.loss)
        loss = out.loss.detach()
        self._meter.add({"loss": loss, "grad_norm": update.norm}, parts=out.parts, gauges=out.gauges)
        self.guard.watch(out.step, loss, update.norm)
        return None

    def read(self, stop_flag: StopFlag, *, memories: bool = True) -> Reading:
        """Means since the last reading. One all-reduce and one host sync; a gather where samples cannot be read.

        Args:
            stop_flag: of this rank.
            memories: whether to look at all rows of memory banks, too; the same on every rank.

        Raises:
            NonFiniteError: on all ranks, where a step was not finite.
            DataError: on all ranks, where too many samples cannot be read.
        """
        laps = self.watch.read()
        now = time.perf_counter()
        wall_s = now - self._since
        asked = int(stop_flag.is_set())
        unreadable = self.job.dataset.unreadable
        untold = unreadable.untold()
        if memories:
            self._meter.add(gauges=freshness(self.job.method.state, global_batch=self.job.plan.global_batch))
        own = (wall_s, float(unreadable.replaced), float(len(untold)), *self._own(laps))
        reduced = self._meter.reduce(self.job.world, flag=asked, own=own)
        self.guard.check(reduced.means.get("loss", 0.0), reduced.means.get("grad_norm", 0.0))
        self._pacing.learn(max(wall_s for wall_s, *_ in reduced.by_rank) / max(1, self._steps))
        shares = _shares(reduced.by_rank, self._steps, self.job.engine.own_work)
        self._steps, self._since = 0, now
        replaced = int(sum(replaced for _, replaced, *_ in reduced.by_rank))
        if any(n_untold for _, _, n_untold, *_ in reduced.by_rank):  # known to all ranks, so all go this way
            unreadable.tell(gather_objects(untold, self.job.world))
        means = settle(reduced.means)
        groups = _groups(means)
        return Reading(
            loss=means.get("loss"),
            grad_norm=means.get("grad_norm"),
            parts=groups["parts"],
            gauges=groups["gauges"],
            timings=laps.seconds | _straggler(shares),
            stop=reduced.flags > 0,
            replaced=replaced,
            ranks=shares,
        )

    def _own(self, laps: Laps) -> list[float]:
        """What `_shares` reads: the queue, the memory, the number of steps and seconds of one by phase."""
        queue, memory = self._backlog(), gpu_memory(self.job.device).get("allocated")
        per_step = (laps.seconds.get(phase, 0.0) / max(1, laps.n) for phase in PHASES)
        return [-1.0 if queue is None else queue, -1.0 if memory is None else memory, laps.n, *per_step]

    def carry(self) -> list[list[dict[str, float]]]:
        """What every rank has measured since the last reading, for a checkpoint between two of them. One gather.

        Raises:
            NonFiniteError: on all ranks, where a step was not finite: no checkpoint is worth writing.
        """
        pending = gather_objects(self._meter.pending(), self.job.world)
        steps = [step for of_rank in pending for step in of_rank]
        self.guard.check(sum(step["loss"] for step in steps), sum(step["grad_norm"] for step in steps))
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
        return any_rank(stop_flag.is_set(), self.job.world, device=self.job.device)


def _groups(means: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The means of each group of `Meter.add`, under their own names."""
    groups: dict[str, dict[str, float]] = {"parts": {}, "gauges": {}}
    for name, mean in means.items():
        group, _, own = name.partition(":")
        if own:
            groups[group][own] = mean
    return groups


def _shares(by_rank: Sequence[Sequence[float]], steps: int, own_work: Sequence[str]) -> list[RankShare]:
    """What each rank has said of itself, and how its own work compares; on the device's timeline some know no step."""
    phases: list[dict[str, float]] = [dict(zip(PHASES, row[-len(PHASES) :], strict=True)) for row in by_rank]
    busy = [sum(of_rank[phase] for phase in own_work) for of_rank in phases]
    # of two ranks the faster one, so that the slower one shows with all that it is slower
    median = statistics.median_low(busy)
    step_s = statistics.median_low(sum(of_rank.values()) - of_rank["checkpoint"] for of_rank in phases)
    base = max(median, step_s - (max(busy) - median))
    comparable = len(busy) > 1 and base > 0 and all(n_laps for *_, n_laps in (row[3:6] for row in by_rank))
    return [
        RankShare(
            rank=rank,
            busy_s=busy[rank],
            wall_s=wall_s,
            steps=steps,
            index=(base + busy[rank] - median) / base if comparable else None,
            phases={name: passed for name, passed in phases[rank].items() if passed},
            queue=None if queue < 0 else int(queue),
            gpu_memory_bytes=None if memory < 0 else int(memory),
        )
        for rank, (wall_s, _, _, queue, memory, *_) in enumerate(by_rank)
    ]


def _straggler(shares: Sequence[RankShare]) -> dict[str, float]:
    """The rank with most work of its own, and its index; nothing for one rank."""
    known = [(share.index, -share.rank) for share in shares if share.index is not None]
    if not known:
        return {}
    index, rank = max(known)
    return {"straggler_rank": -rank, "straggler_index": index}


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes of the CUDA allocator by kind, as the host counts them; empty on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak": torch.cuda.max_memory_allocated(device),
    }
