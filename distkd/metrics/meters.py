"""What a step measures, kept on the device until a logging step asks: means over steps and ranks, and time by phase.

`Meter.reduce` is the one place where the host waits, for one packed all-reduce.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from distkd.base import World
from distkd.comm.world import all_reduce_sum
from distkd.metrics.table import PHASES

__all__ = ["CudaTimeline", "HostTimeline", "Laps", "Meter", "Reduced", "Stopwatch", "Timeline"]

# the packed vector is padded to a multiple of this, so that ranks with other names still meet in one collective
# of one shape, where the digest tells
_SLOTS = 64
_DIGEST_BITS = 20


_Names = tuple[tuple[str, ...], ...]
"""What the values of a step are called: of each mapping the prefix of its names, and then these."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """What all ranks know after `Meter.reduce`."""

    means: dict[str, float]
    """Name to mean over steps and ranks, sorted by name."""
    flags: int
    by_rank: list[list[float]]
    """`own` of every rank, in rank order."""


class Meter:
    """Keeps named scalar tensors on their device, without a host sync, until `reduce` gives their means.

    Args:
        device: where the tensors live and the collective runs.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._reads_are_free = self.device.type == "cpu"
        """No value is waited for there, and to read one that was just made costs less than to keep it for a kernel."""
        self._steps: list[tuple[_Names, list[Tensor] | list[float]]] = []
        self._orders: dict[_Names, tuple[tuple[str, ...], list[int]]] = {}
        """Names in order, and their places, by what steps have added; a run has one or two of them."""

    def add(self, values: Mapping[str, Tensor] | None = None, /, **groups: Mapping[str, Tensor]) -> None:
        """Counts one value of each name; names may differ from step to step, not from rank to rank.

        On a device values are kept as they are until `reduce`: a step pays for one append and not for small kernels.

        Args:
            values: scalars, best without a graph, which would live until then; they may not change afterwards.
            groups: more of them, whose names become `group:name`.
        """
        named = [("", values or {}), *((f"{name}:", group) for name, group in groups.items())]
        found = [value for _, group in named for value in group.values()]
        names = tuple([(prefix, *group) for prefix, group in named])
        self._steps.append((names, [value.item() for value in found] if self._reads_are_free else found))

    def reduce(self, world: World, *, flag: int = 0, own: Sequence[float] = ()) -> Reduced:
        """Means over the steps since the last call and over all ranks, equal on every rank; starts afresh.

        Collective: one all-reduce, also when nothing was added. One host sync.

        Args:
            world: the ranks that take part; all call this at the same step.
            flag: summed over ranks along the way, for example 1 on a rank that was asked to stop.
            own: this rank's numbers, as many on every rank, which every rank gets to see.
        """
        alike = self._alike()
        names = [name for group, _ in alike for name in group]
        counts = [float(len(rows)) for group, rows in alike for _ in group]
        digest = zlib.crc32("\n".join(names).encode()) & ((1 << _DIGEST_BITS) - 1)
        seen = [0.0] * (world.size * len(own))
        seen[world.rank * len(own) : (world.rank + 1) * len(own)] = own
        head = [float(flag), float(digest), float(digest**2), *seen, *counts]
        padding = [0.0] * (-(len(head) + len(names)) % _SLOTS)
        packed = self._packed(head + padding, [rows for _, rows in alike])
        values: list[float] = all_reduce_sum(packed, world).tolist()  # the host waits here
        # equal on all ranks exactly when the digests have no variance; whole numbers below 2**53, so exact
        one, squares = int(values[1]), int(values[2])
        assert world.size * squares == one**2, f"rank {world.rank} measures {names}, another rank measures other names"
        first = 3 + len(seen)
        means = _means(names, values[len(values) - len(names) :], values[first : first + len(names)])
        self._steps.clear()
        by_rank = [values[3 + rank * len(own) : 3 + (rank + 1) * len(own)] for rank in range(world.size)]
        return Reduced(means, int(values[0]), by_rank)

    def pending(self) -> list[dict[str, float]]:
        """What was added since the last `reduce`, step by step, exactly; a host sync."""
        return [dict(zip(_added(names), map(float, values), strict=True)) for names, values in self._steps]

    def restore(self, pending: Sequence[Mapping[str, float]]) -> None:
        """Add what another meter had pending."""
        for step in pending:
            self.add({name: torch.tensor(value, dtype=torch.float64) for name, value in step.items()})

    @torch.no_grad()
    def _packed(self, head: Sequence[float], blocks: Sequence[Sequence[Sequence[Any]]]) -> Tensor:
        """Numbers of the host, and behind them the sums of each block's columns; float64 (n,)."""
        if self._reads_are_free:
            sums = [sum(column) for rows in blocks for column in zip(*rows, strict=True)]
            return torch.tensor([*head, *sums], dtype=torch.float64)
        packed = torch.tensor(head, dtype=torch.float64).to(self.device, non_blocking=True)
        return torch.cat([packed, *(_sums(rows, self.device) for rows in blocks)])

    def _alike(self) -> list[tuple[list[str], list[list[Any]]]]:
        """Names that occur together, and a row of values for each step that has them.

        In one order on all ranks, whatever the order in which names were added. On a device those of one floating type.
        """
        rows_of: dict[tuple[str, ...], list[list[Any]]] = {}
        for key, values in self._steps:
            if key not in self._orders:
                added = _added(key)
                order = sorted(range(len(added)), key=added.__getitem__)
                self._orders[key] = tuple(added[i] for i in order), order
            names, order = self._orders[key]
            rows_of.setdefault(names, []).append([values[i] for i in order])
        found: list[tuple[list[str], list[list[Any]]]] = []
        for names, rows in sorted(rows_of.items(), key=lambda item: item[0]):
            if self._reads_are_free:
                found.append((list(names), rows))
                continue
            by_type: dict[torch.dtype, list[int]] = {}
            for place, value in enumerate(rows[0]):
                by_type.setdefault(value.dtype, []).append(place)
            for dtype in sorted(by_type, key=str):
                places = by_type[dtype]
                found.append(([names[i] for i in places], [[row[i] for i in places] for row in rows]))
        return found


def _added(names: _Names) -> list[str]:
    """Whole names, in the order of the values."""
    return [f"{prefix}{name}" for prefix, *group in names for name in group]


def _means(names: Sequence[str], totals: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """Mean by name, in order; a name may come with several totals."""
    known: dict[str, tuple[float, float]] = {}
    for name, total, count in zip(names, totals, counts, strict=True):
        if name in known:
            total, count = total + known[name][0], count + known[name][1]
        known[name] = total, count
    return {name: total / count for name, (total, count) in sorted(known.items())}


def _sums(rows: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Sums of the columns, float64; a handful of kernels however many there are."""
    flat = [value if value.device.type == device.type else value.to(device) for row in rows for value in row]
    return torch.stack(flat).double().view(len(rows), -1).sum(dim=0)


class Timeline(Protocol):
    """Moments, and the seconds between two of them."""

    def mark(self) -> Any:
        """This moment; nobody waits for it to come."""
        ...

    def spans(self, marks: Sequence[Any]) -> list[float] | None:
        """Seconds from each mark to the next; None while the last one lies ahead."""
        ...


class HostTimeline:
    """What a clock of the host says."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.mark = clock

    def spans(self, marks: Sequence[float]) -> list[float]:
        return [end - start for start, end in pairwise(marks)]


class CudaTimeline:
    """When the current stream of a device reaches a place, which the host may have passed long before.

    Marks are events of CUDA. They are recorded and asked, never waited for.
    """

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spans(self, marks: Sequence[torch.cuda.Event]) -> list[float] | None:
        if not marks[-1].query():
            return None
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]


_Turns = tuple[list[Any], list[str | None]]
"""Marks of a step, and the phase that begins at each."""


@dataclass(frozen=True, slots=True)
class Laps:
    """Steps between two readings."""

    n: int
    """How many of them are known; on the device's timeline fewer or more than the host has left behind."""
    seconds: dict[str, float]
    """Of all of them together by phase that ran, in the order of `PHASES`."""


class Stopwatch:
    """Seconds of each step by phase, as they pass on a timeline.

    A phase lasts until another begins or the step ends, which saves a mark; one inside another takes its time from it,
    so the sum of a step never exceeds what it took. What happens between two steps belongs to none. On the device's
    timeline a step is known a little after the host has left it.

    Args:
        timeline: the host's by default.
        on_lap: is given every step's seconds by phase once they are known, in order, on the thread of the steps.
    """

    def __init__(self, timeline: Timeline | None = None, on_lap: Callable[[dict[str, float]], None] | None = None):
        self._timeline = HostTimeline() if timeline is None else timeline
        self._on_lap = on_lap
        self._phases = {name: _Phase(self, name) for name in PHASES}
        self._in_no_phase = nullcontext()
        self._open: list[str] = []
        self._turns: _Turns = [], []
        """Of this step."""
        self._laps: deque[_Turns] = deque()
        """Steps that lie behind the host and perhaps ahead of the device."""
        self._n, self._sums = 0, dict[str, float]()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around what is charged to a phase of `PHASES`."""
        found = self._phases.get(name)
        assert found is not None, f"phase {name!r} is not one of {PHASES}"
        return found

    def waiting(self) -> AbstractContextManager[None]:
        """Around a collective: time of no phase if none is open, as during an evaluation."""
        return self._phases["collective"] if self._open else self._in_no_phase

    def lap(self) -> None:
        """A step has ended; no phase is open."""
        assert not self._open, self._open
        marks, _ = self._turns
        if marks:
            self._turn(None)
            self._laps.append(self._turns)
            self._turns = [], []
        self._settle()

    def read(self) -> Laps:
        """The steps known since the last reading."""
        self._settle()
        laps = Laps(self._n, {name: self._sums[name] for name in PHASES if name in self._sums})
        self._n, self._sums = 0, {}
        return laps

    def enter(self, name: str) -> None:
        self._open.append(name)
        self._turn(name)

    def leave(self) -> None:
        self._open.pop()
        if self._open:
            self._turn(self._open[-1])

    def _turn(self, phase: str | None) -> None:
        marks, phases = self._turns
        marks.append(self._timeline.mark())
        phases.append(phase)

    def _settle(self) -> None:
        """Take in the steps that the timeline has reached."""
        sums = self._sums
        while self._laps:
            marks, phases = self._laps[0]
            spans = self._timeline.spans(marks)
            if spans is None:
                return
            self._laps.popleft()
            self._n += 1
            seconds: dict[str, float] = {}
            for phase, span in zip(phases, spans):  # noqa: B905 - nothing comes after the last mark
                if phase is not None:
                    seconds[phase] = seconds.get(phase, 0.0) + span
            for phase, passed in seconds.items():
                sums[phase] = sums.get(phase, 0.0) + passed
            if self._on_lap is not None:
                self._on_lap(seconds)


class _Phase(AbstractContextManager[None]):
    """One for each phase, entered again and again: several times a step."""

    __slots__ = ("name", "watch")

    def __init__(self, watch: Stopwatch, name: str):
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.watch.enter(self.name)

    def __exit__(self, *_: object) -> None:
        self.watch.leave()
