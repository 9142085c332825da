"""What is known of one run at one moment, as its files say it, and the numbers that follow from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low
from typing import Any

from distkd.metrics.jsonl import number
from distkd.metrics.table import OWN_WORK, PHASES
from distkd.slurm.status import Row

__all__ = ["SLOW_RANK", "Checkpoint", "Facts", "Interval", "Rank", "Ranks"]

_RECENT_S = 10.0
"""What is going on now is the mean of so long, or of one line where lines are further apart."""

SLOW_RANK = 1.3
"""Straggler index from which on a rank is worth a word, as in the alert."""


@dataclass(frozen=True, slots=True)
class Interval:
    """From one line of metrics to the next."""

    line: dict[str, Any]
    """The line at its end."""
    steps: int
    seconds: float | None
    """Without the validation in between; None where lines have no time."""
    samples: float | None

    @property
    def samples_per_s(self) -> float | None:
        return self.samples / self.seconds if self.samples is not None and self.seconds else None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The last one that is whole."""

    step: int
    time: float
    seconds: float | None
    """How long it, or the one before, took to write."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank's last steps were made of; seconds per step."""

    rank: int
    straggler_index: float | None
    phases: dict[str, float]
    queue: int | None = None
    gpu_memory_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Ranks:
    """`ranks.json`, slowest rank first."""

    step: int | None
    time: float | None
    ranks: Sequence[Rank]
    own_work: Sequence[str] = OWN_WORK
    """Phases in which a rank waits for no other."""

    def excess(self, rank: Rank) -> str | None:
        """The phase of its own work in which a rank loses most against the median; None where it loses in none."""
        lost = {phase: rank.phases.get(phase, 0.0) - self.median_s(phase) for phase in self.own_work}
        worst = max(lost, key=lambda phase: lost[phase], default=None)
        return worst if worst is not None and lost[worst] > 0 else None

    def median_s(self, phase: str) -> float:
        """Median over ranks, of two the lower one, of the seconds per step in a phase."""
        return median_low(rank.phases.get(phase, 0.0) for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class Facts:
    """One run. Times are seconds of the epoch; None: not known."""

    row: Row
    """What `distkd status` says of it."""
    now: float
    config: dict[str, Any]
    world_size: int | None = None
    device: str | None = None
    attempt: int | None = None
    nodes: str = ""
    started: float | None = None
    """When the present attempt began."""
    first_step: int = 0
    """Steps that lay behind the run then."""
    lines: Sequence[dict[str, Any]] = ()
    """Newest lines of metrics, oldest first, validations left out; those of attempts before as well."""
    vals: Sequence[dict[str, Any]] = ()
    """Newest validations."""
    intervals: Sequence[Interval] = ()
    """Of the present attempt."""
    best: tuple[int, float] | None = None
    """Step and value of the best validation."""
    checkpoint: Checkpoint | None = None
    events: Sequence[dict[str, Any]] = ()
    """Of the main rank in the present attempt."""
    ranks: Ranks | None = None
    trouble: str = ""
    """Why files of the run could not be read just now."""

    @property
    def _recent(self) -> Sequence[Interval]:
        return _recent(self.intervals)

    @property
    def line(self) -> dict[str, Any]:
        """The newest; empty before the first."""
        return self.lines[-1] if self.lines else {}

    def mapping(self, name: str) -> dict[str, float | None]:
        """`parts` or `gauges` of the newest line; None for what is not finite."""
        found = self.line.get(name)
        return {key: number(value) for key, value in found.items()} if isinstance(found, dict) else {}

    def setting(self, section: str, name: str) -> Any:
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @property
    def samples_per_s(self) -> float | None:
        """Now."""
        samples = [interval.samples for interval in self._recent if interval.samples is not None]
        seconds = sum(interval.seconds or 0.0 for interval in self._recent)
        return sum(samples) / seconds if samples and seconds else None

    @property
    def samples_per_s_overall(self) -> float | None:
        """Of the present attempt, with its start, evaluations and checkpoints."""
        samples, step, time = (number(self.line.get(name)) for name in ("samples", "step", "time"))
        if not samples or not step or time is None or self.started is None or time <= self.started:
            return None
        return samples * (1 - self.first_step / step) / (time - self.started)

    @property
    def phases_s(self) -> dict[str, float]:
        """Seconds per step now, on the main rank, in the order of a step."""
        steps = sum(interval.steps for interval in self._recent)
        if not steps:
            return {}
        timings = [interval.line.get("timings") or {} for interval in self._recent]
        present = [phase for phase in PHASES if any(phase in timing for timing in timings)]
        return {phase: sum(number(timing.get(phase)) or 0.0 for timing in timings) / steps for phase in present}

    @property
    def step_s(self) -> float | None:
        """Seconds from step to step now."""
        timed = [interval for interval in self._recent if interval.seconds]
        seconds, steps = sum(interval.seconds or 0.0 for interval in timed), sum(interval.steps for interval in timed)
        return seconds / steps if steps else None

    @property
    def gap_s(self) -> float | None:
        """The longest time between two of the last lines."""
        times = [time for line in self.lines[-50:] if (time := number(line.get("time"))) is not None]
        times = [time for time in times if self.started is None or time >= self.started]
        return max((after - before for before, after in pairwise(times)), default=None)


def _recent(intervals: Sequence[Interval]) -> list[Interval]:
    """The last ones, which together take some seconds."""
    found: list[Interval] = []
    seconds = 0.0
    for interval in reversed(intervals):
        if found and (interval.seconds is None or seconds + interval.seconds > _RECENT_S):
            break  # one without a time has the start of the attempt: its steps are no measure of those after it
        found.append(interval)
        seconds += interval.seconds or 0.0
        if interval.seconds is None:
            break
    return found
