"""What a step measures, kept on the device until a logging step asks: means over steps and ranks, and host time.

`Meter.reduce` is the one place where the host waits, for one packed all-reduce.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor

from distkd.base import World
from distkd.comm.world import all_reduce_sum

__all__ = ["PHASES", "Meter", "Stopwatch"]

PHASES = ("data", "forward", "backward", "collective", "optimizer", "checkpoint")

# the packed vector is padded to a multiple of this, so that ranks with other names still meet in one collective
# of one shape, where the digest tells
_SLOTS = 64
_DIGEST_BITS = 20


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

    @overload
    def reduce(self, world: World) -> dict[str, float]: ...
    @overload
    def reduce(self, world: World, flag: int) -> tuple[dict[str, float], int]: ...
    def reduce(self, world: World, flag: int | None = None) -> dict[str, float] | tuple[dict[str, float], int]:
        """Means over the steps since the last call and over all ranks, equal on every rank; starts afresh.

        Collective: one all-reduce, also when nothing was added. One host sync.

        Args:
            world: the ranks that take part; all call this at the same step.
            flag: summed over ranks along the way, for example 1 on a rank that was asked to stop.

        Returns:
            Name to mean, sorted by name; with `flag` a pair of that and the sum of flags.
        """
        names = sorted(self._values)
        digest = zlib.crc32("\n".join(names).encode()) & ((1 << _DIGEST_BITS) - 1)
        head = [float(flag or 0), float(digest), float(digest**2), *(float(len(self._values[name])) for name in names)]
        padding = [0.0] * (-(len(head) + len(names)) % _SLOTS)
        packed = torch.tensor(head + padding, dtype=torch.float64).to(self.device, non_blocking=True)
        if names:
            sums = [torch.stack(self._values[name]).to(self.device, torch.float64).sum() for name in names]
            packed = torch.cat([packed, torch.stack(sums)])
        values: list[float] = all_reduce_sum(packed, world).tolist()  # the host waits here
        # equal on all ranks exactly when the digests have no variance; whole numbers below 2**53, so exact
        one, squares = int(values[1]), int(values[2])
        assert world.size * squares == one**2, f"rank {world.rank} measures {names}, another rank measures other names"
        totals = values[len(values) - len(names) :]
        counts = values[3 : 3 + len(names)]
        means = {name: total / count for name, total, count in zip(names, totals, counts, strict=True)}
        self._values.clear()
        return means if flag is None else (means, int(values[0]))


class Stopwatch:
    """Host seconds by phase since the last reading; no device sync, so a phase shows launches, not kernels.

    A phase inside another takes its time from it: the sum never exceeds the wall clock.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
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
        now = self._clock()
        if self._open:
            current = self._open[-1]
            self._seconds[current] = self._seconds.get(current, 0.0) + now - self._since
        self._since = now
