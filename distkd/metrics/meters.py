"""What a step measures, kept on the device until a logging step asks: means over steps and ranks, and host time.

`Meter.reduce` is the one place where the host waits, for one packed all-reduce.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        self._values: dict[str, list[Tensor]] = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Counts one value of each name; names may differ from step to step, not from rank to rank.

        The scalars are kept as they are until `reduce`: a step pays for a list's append and not for small kernels.
        """
        for name, value in parts.items():
            self._values.setdefault(name, []).append(value.detach())

    def reduce(self, world: World, *, flag: int = 0, own: Sequence[float] = ()) -> Reduced:
        """Means over the steps since the last call and over all ranks, equal on every rank; starts afresh.

        Collective: one all-reduce, also when nothing was added. One host sync.

        Args:
            world: the ranks that take part; all call this at the same step.
            flag: summed over ranks along the way, for example 1 on a rank that was asked to stop.
            own: this rank's numbers, as many on every rank, which every rank gets to see.
        """
        names = sorted(self._values)
        digest = zlib.crc32("\n".join(names).encode()) & ((1 << _DIGEST_BITS) - 1)
        seen = [0.0] * (world.size * len(own))
        seen[world.rank * len(own) : (world.rank + 1) * len(own)] = own
        head = [
            float(flag),
            float(digest),
            float(digest**2),
            *seen,
            *(float(len(self._values[name])) for name in names),
        ]
        padding = [0.0] * (-(len(head) + len(names)) % _SLOTS)
        packed = torch.tensor(head + padding, dtype=torch.float64).to(self.device, non_blocking=True)
        if names:
            sums = [torch.stack(self._values[name]).to(self.device, torch.float64).sum() for name in names]
            packed = torch.cat([packed, torch.stack(sums)])
        values: list[float] = all_reduce_sum(packed, world).tolist()  # the host waits here
        # equal on all ranks exactly when the digests have no variance; whole numbers below 2**53, so exact
        one, squares = int(values[1]), int(values[2])
        assert world.size * squares == one**2, f"rank {world.rank} measures {names}, another rank measures other names"
        first = 3 + len(seen)
        totals = values[len(values) - len(names) :]
        counts = values[first : first + len(names)]
        means = {name: total / count for name, total, count in zip(names, totals, counts, strict=True)}
        self._values.clear()
        by_rank = [values[3 + rank * len(own) : 3 + (rank + 1) * len(own)] for rank in range(world.size)]
        return Reduced(means, int(values[0]), by_rank)


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
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        assert name in PHASES, f"phase {name!r} is not one of {PHASES}"
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Seconds of each phase that ran, in the order of `PHASES`; starts afresh."""
        self._charge()
        seconds = {name: self._seconds[name] for name in PHASES if name in self._seconds}
        self._seconds = {}
        return seconds

    def _charge(self) -> None:
        now, waited = self._clock(), self._waited()
        if self._open:
            waiting = waited - self._waited_since
            current = self._open[-1]
            self._seconds[current] = self._seconds.get(current, 0.0) + now - self._since - waiting
            if waiting:
                self._seconds["collective"] = self._seconds.get("collective", 0.0) + waiting
        self._since, self._waited_since = now, waited
