"""What a step measures, kept on the device until a logging step asks: means over steps and ranks, and host time.

`Meter.reduce` is the one place where the host waits, for one packed all-reduce.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from distkd.base import World
from distkd.comm.world import all_reduce_sum

__all__ = ["PHASES", "Meter", "Reduced", "Stopwatch"]

PHASES = ("data", "forward", "backward", "collective", "optimizer", "checkpoint")

# the packed vector is padded to a multiple of this, so that ranks with other names still meet in one collective
# of one shape, where the digest tells
_SLOTS = 64
_DIGEST_BITS = 20


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
        self._steps: list[Mapping[str, Tensor]] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Counts one value of each name; names may differ from step to step, not from rank to rank.

        The mapping is kept as it is until `reduce`: a step pays for one append and not for small kernels.

        Args:
            values: scalars, best without a graph, which would live until then; neither they nor the mapping may change
                afterwards.
        """
        self._steps.append(values)

    def reduce(self, world: World, *, flag: int = 0, own: Sequence[float] = ()) -> Reduced:
        """Means over the steps since the last call and over all ranks, equal on every rank; starts afresh.

        Collective: one all-reduce, also when nothing was added. One host sync.

        Args:
            world: the ranks that take part; all call this at the same step.
            flag: summed over ranks along the way, for example 1 on a rank that was asked to stop.
            own: this rank's numbers, as many on every rank, which every rank gets to see.
        """
        counts = Counter(name for step in self._steps for name in step)
        names = sorted(counts)
        digest = zlib.crc32("\n".join(names).encode()) & ((1 << _DIGEST_BITS) - 1)
        seen = [0.0] * (world.size * len(own))
        seen[world.rank * len(own) : (world.rank + 1) * len(own)] = own
        head = [float(flag), float(digest), float(digest**2), *seen, *(float(counts[name]) for name in names)]
        padding = [0.0] * (-(len(head) + len(names)) % _SLOTS)
        packed = torch.tensor(head + padding, dtype=torch.float64).to(self.device, non_blocking=True)
        if names:
            packed = torch.cat([packed, self._sums(names)])
        values: list[float] = all_reduce_sum(packed, world).tolist()  # the host waits here
        # equal on all ranks exactly when the digests have no variance; whole numbers below 2**53, so exact
        one, squares = int(values[1]), int(values[2])
        assert world.size * squares == one**2, f"rank {world.rank} measures {names}, another rank measures other names"
        first = 3 + len(seen)
        totals = values[len(values) - len(names) :]
        together = values[first : first + len(names)]
        means = {name: total / count for name, total, count in zip(names, totals, together, strict=True)}
        self._steps.clear()
        by_rank = [values[3 + rank * len(own) : 3 + (rank + 1) * len(own)] for rank in range(world.size)]
        return Reduced(means, int(values[0]), by_rank)

    def pending(self) -> list[dict[str, float]]:
        """What was added since the last `reduce`, step by step, exactly; a host sync."""
        return [{name: float(value) for name, value in step.items()} for step in self._steps]

    def restore(self, pending: Sequence[Mapping[str, float]]) -> None:
        """Add what another meter had pending."""
        for step in pending:
            self.add({name: torch.tensor(value, dtype=torch.float64) for name, value in step.items()})

    def _sums(self, names: Sequence[str]) -> Tensor:
        """Sum over the steps of each name, float64; a handful of kernels however many names there are."""
        if all(len(step) == len(names) for step in self._steps):
            flat = [step[name] for step in self._steps for name in names]
            return _stacked(flat, self.device).view(len(self._steps), len(names)).sum(dim=0)
        sums = [_stacked([step[name] for step in self._steps if name in step], self.device).sum() for name in names]
        return torch.stack(sums)


@torch.no_grad()
def _stacked(scalars: Sequence[Tensor], device: torch.device) -> Tensor:
    """As float64, whatever they are: converted at once and not one by one."""
    here = [scalar if scalar.device == device else scalar.to(device) for scalar in scalars]
    return torch.stack(here).double()


class Stopwatch:
    """Host seconds by phase since the last reading; no device sync, so a phase shows launches, not kernels.

    A phase inside another takes its time from it: the sum never exceeds the wall clock.

    Args:
        clock: seconds, rising.
        waited: seconds in collectives so far, on the same clock; they are taken from the phase that they happen in
            and counted as `collective`, so that what is left is this rank's own work.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, waited: Callable[[], float] = lambda: 0.0):
        self._clock = clock
        self._waited = waited
        self._waited_since = waited()
        self._phases = {name: _Phase(self, name) for name in PHASES}
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around what is charged to a phase of `PHASES`."""
        assert name in PHASES, f"phase {name!r} is not one of {PHASES}"
        return self._phases[name]

    def read(self) -> dict[str, float]:
        """Seconds of each phase that ran, in the order of `PHASES`; starts afresh."""
        self._charge()
        seconds = {name: self._seconds[name] for name in PHASES if name in self._seconds}
        self._seconds = {}
        return seconds

    def enter(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        now, waited = self._clock(), self._waited()
        if self._open:
            waiting = waited - self._waited_since
            current = self._open[-1]
            self._seconds[current] = self._seconds.get(current, 0.0) + now - self._since - waiting
            if waiting:
                self._seconds["collective"] = self._seconds.get("collective", 0.0) + waiting
        self._since, self._waited_since = now, waited


class _Phase(AbstractContextManager[None]):
    """One for each phase, entered again and again: several times a step."""

    __slots__ = ("name", "watch")

    def __init__(self, watch: Stopwatch, name: str):
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.watch.enter(self.name)

    def __exit__(self, *_: object) -> None:
        self.watch.leave()
