"""The plan of a run that reads shards one after another: functions of numbers, too, but near in time is near on disk.

A run has a number of lanes that does not change with its ranks. A lane is a long stretch of the shards' shuffled
sequence, read window by window; a global batch takes as many samples from each lane.
"""

# Shapes: S shards, D different shards, G samples of a step over all ranks and passes, P places, N samples of all shards

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import torch

from distkd.base import World
from distkd.data.plan import along, check_sizes, micro_batch, shuffled
from distkd.errors import ConfigError, DataError
from distkd.ops.draws import fold_in, integer_key

__all__ = ["ShuffleQuality", "StreamPlan", "eval_places", "shuffle_quality"]

Array = np.ndarray[Any, np.dtype[Any]]

_SHARDS, _START, _WINDOWS = range(3)
"""What a key of an epoch is for."""


class _Sequence(NamedTuple):
    """One epoch: which shard comes when, and which sample of the sequence is the first."""

    shard_S: Array
    start_S: Array
    start: int


class _Window(NamedTuple):
    """Which shards some lanes read in one window, to be asked for at any of its places."""

    of: tuple[int, range, int]
    """Epoch, lanes and window."""
    shard_D: Array
    """The different shards."""
    use_P: Array
    """Ascending: D's number times all places, plus the place of a use; a place counts the lanes, too."""
    n_places: int

    def coming(self, place: int) -> list[int]:
        """Shards that are used at that place or later, by their next use."""
        first_D = np.arange(len(self.shard_D)) * self.n_places
        # the next use of the last shards may not exist, or be one of the shard behind
        at_D = np.searchsorted(self.use_P, first_D + place)
        next_D = np.append(self.use_P, len(self.shard_D) * self.n_places)[at_D] - first_D
        order = np.argsort(next_D)
        return self.shard_D[order[: np.count_nonzero(next_D < self.n_places)]].tolist()


class StreamPlan:
    """The batches of a whole run over sequential shards, as (shard, sample in the shard).

    Each epoch shuffles the shards and joins their samples to a ring, which it enters anywhere. From there each of
    `lanes` lanes takes steps_per_epoch x (global_batch / lanes) samples in turn. A lane shuffles its samples in
    windows of `buffer` at most, of equal size but for the last one. A step takes global_batch / lanes samples of each
    lane, and a rank has lanes / world size neighbouring lanes.

    What holds, for any counts of samples in shards, also none:

    - A step's global batch is a function of the arguments: equal at any world size that divides the lanes, in the same
      order. So is a pass of it, at a given number of passes.
    - All ranks have equal numbers of steps, and each sample is read at most once an epoch. Fewer than a global batch
      are left out, neighbours on the ring, others in each epoch.
    - At any time a lane reads within one window, so from the shards that `buffer` neighbouring samples lie in. A shard
      belongs to one lane, unless it is where a lane begins or ends: lanes + 1 shards an epoch at most are cut,
      counting the one where the ring is entered. A shard with more samples than a lane is read by several.
    - A step is found by itself, at the cost of any other; to go on within an epoch means to read a window of each lane.

    There is no array of samples: one epoch's arrays have a number for each shard, a step's one for each of its samples.

    Args:
        shard_samples: samples of the split in each shard; which of the shard's samples they are is the caller's matter.
        global_batch: samples of a step, a multiple of `lanes`.
        lanes: stretches read at the same time. More of them keep samples of a shard apart at least as well as a buffer
            longer by the same factor.
        buffer: samples that a lane shuffles together, at most.

    Raises:
        ConfigError: no batch, epoch, lane or buffer; lanes that do not divide the global batch.
        DataError: a negative count, or fewer samples than a global batch.
    """

    def __init__(
        self,
        shard_samples: Sequence[int] | Array,
        global_batch: int,
        seed: int,
        epochs: int,
        lanes: int,
        buffer: int,
    ):
        self.count_S = _counts(shard_samples)
        self.n_samples = int(self.count_S.sum())
        check_sizes(self.n_samples, global_batch, epochs)
        if lanes < 1 or buffer < 1:
            raise ConfigError(f"data.stream.lanes={lanes} and data.stream.buffer={buffer}, expected at least 1 of each")
        if global_batch % lanes:
            raise ConfigError(
                f"batch.global_batch={global_batch} is not a multiple of data.stream.lanes={lanes}; set these to a "
                f"divisor, the next ones are {_neighbours(global_batch, lanes)}"
            )
        self.global_batch, self.seed, self.epochs, self.lanes, self.buffer = global_batch, seed, epochs, lanes, buffer
        self.steps_per_epoch = self.n_samples // global_batch
        self.n_steps = epochs * self.steps_per_epoch
        self._of_lane = global_batch // lanes
        self._length = self.steps_per_epoch * self._of_lane
        self._windows = -(-self._length // buffer)
        self._window = -(-self._length // self._windows)
        self._sequences: dict[int, _Sequence] = {}
        self._window_now: _Window | None = None

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def global_places(self, step: int) -> tuple[Array, Array]:
        """Shard and sample in the shard, int64 (G,) each, of one step over all ranks and passes: lane after lane."""
        return self._at_slots(step, np.arange(self.global_batch))

    def local_places(self, step: int, number_of_pass: int, passes: int, world: World) -> tuple[Array, Array]:
        """Shard and sample in the shard, int64 (G / passes / ranks,) each: what one rank reads in one pass.

        It is the global batch at the rank's `local_slots`.
        """
        return self._at_slots(step, self.local_slots(number_of_pass, passes, world))

    def local_slots(self, number_of_pass: int, passes: int, world: World) -> Array:
        """(G / passes / ranks,) int64: which slots of every global batch a rank reads in a pass.

        Every slot is in one pass of one rank. A pass takes an equal part of each lane, or, where that has too few
        samples, of every k-th lane; so it has the same samples, in the order of ranks, at any world size.

        Raises:
            ConfigError: the lanes do not divide into ranks, or the global batch into passes and ranks.
        """
        lanes_of_rank = self._lanes_of(world)
        micro_batch(self.global_batch, passes, world)
        parts = gcd(passes, self._of_lane)
        every = passes // parts
        size = self._of_lane // parts
        lane = [lane for lane in lanes_of_rank if lane % every == number_of_pass % every]
        inside = number_of_pass // every * size + np.arange(size)
        return (np.array(lane)[:, None] * self._of_lane + inside).ravel()

    def after(self, step: int, slot: int, attempt: int) -> tuple[int, int]:
        """What replaces the sample at a slot of a global batch, if that and `attempt - 1` others fail.

        The same slot of the next step, and so on, so that it is of the same lane, mostly of the same window, and meets
        no other sample of its own batch. A lane is a ring; its attempts 0 to length - 1 visit each sample once.
        """
        epoch, inside = divmod(step, self.steps_per_epoch)
        lane, place = divmod(slot, self._of_lane)
        place = along(inside * self._of_lane + place, attempt, self._of_lane, self._length)
        shard, sample = self._at(epoch, np.array([lane]), np.array([place]))
        return int(shard[0]), int(sample[0])

    def shards_ahead(self, step: int, world: World, n: int) -> list[int]:
        """The next `n` different shards that this rank reads, from a step on, in the order of first use.

        Fewer if the rank needs fewer until the end of the epoch after this one. Shards of one window are used at the
        same time, except that those of the current windows come first, in their order.
        """
        ahead: dict[int, None] = {}
        for shard in self._shards_from(step, self._lanes_of(world)):
            ahead[shard] = None
            if len(ahead) >= n:
                break
        return list(islice(ahead, n))

    def _shards_from(self, step: int, lanes: range) -> Iterator[int]:
        if step >= self.n_steps:
            return
        epoch, inside = divmod(step, self.steps_per_epoch)
        window, place = divmod(inside * self._of_lane, self._window)
        yield from self._window_of(epoch, lanes, window).coming(place * len(lanes))
        for later, begin in ((epoch, window + 1), (epoch + 1, 0)):
            for window in range(begin, self._windows if later < self.epochs else 0):
                for lane in lanes:
                    yield from self._shards_of(later, lane, window)

    def _window_of(self, epoch: int, lanes: range, window: int) -> _Window:
        """The last one asked for is kept: what comes next is looked at many times while a window is read."""
        found = self._window_now
        if found is None or found.of != (epoch, lanes, window):
            place = np.arange(window * self._window, min((window + 1) * self._window, self._length))
            shard_P = self._at(epoch, np.tile(lanes, len(place)), np.repeat(place, len(lanes)))[0]
            shard_D, number_P = np.unique(shard_P, return_inverse=True)
            use_P = np.sort(number_P * len(shard_P) + np.arange(len(shard_P)))
            found = self._window_now = _Window((epoch, lanes, window), shard_D, use_P, len(shard_P))
        return found

    def _shards_of(self, epoch: int, lane: int, window: int) -> Iterator[int]:
        """All shards of a window, as they lie."""
        order = self._sequence(epoch)
        first = order.start + lane * self._length + window * self._window
        last = min(first + self._window, order.start + (lane + 1) * self._length)
        for begin, end in ((first, min(last, self.n_samples)), (max(first - self.n_samples, 0), last - self.n_samples)):
            if begin < end:
                left, right = np.searchsorted(order.start_S, [begin, end - 1], side="right") - 1
                held = order.shard_S[left : right + 1]
                yield from held[self.count_S[held] > 0].tolist()

    def _at_slots(self, step: int, slot_P: Array) -> tuple[Array, Array]:
        epoch, inside = divmod(step, self.steps_per_epoch)
        lane_P, place_P = np.divmod(slot_P, self._of_lane)
        return self._at(epoch, lane_P, place_P + inside * self._of_lane)

    def _at(self, epoch: int, lane_P: Array, place_P: Array) -> tuple[Array, Array]:
        """What is read at some places of lanes."""
        order = self._sequence(epoch)
        window_P, inside_P = np.divmod(place_P, self._window)
        key = torch.tensor(integer_key(self.seed, epoch, self.n_samples, _WINDOWS))
        key_P = fold_in(key, torch.as_tensor(lane_P * self._windows + window_P)).numpy()
        moved_P = np.empty_like(inside_P)
        last = self._length - (self._windows - 1) * self._window
        for chosen_P, size in ((window_P < self._windows - 1, self._window), (window_P == self._windows - 1, last)):
            moved_P[chosen_P] = shuffled(inside_P[chosen_P], size, key_P[chosen_P])
        number_P = order.start + lane_P * self._length + window_P * self._window + moved_P
        number_P = number_P % self.n_samples
        at_P = np.searchsorted(order.start_S, number_P, side="right") - 1
        return order.shard_S[at_P], number_P - order.start_S[at_P]

    def _sequence(self, epoch: int) -> _Sequence:
        found = self._sequences.get(epoch)
        if found is not None:
            return found
        n = len(self.count_S)
        shard_S = shuffled(np.arange(n), n, integer_key(self.seed, epoch, n, _SHARDS))
        count_S = self.count_S[shard_S]
        start = integer_key(self.seed, epoch, self.n_samples, _START) % self.n_samples
        made = _Sequence(shard_S, np.cumsum(count_S) - count_S, start)
        # the last two asked for; another thread may have made the same one
        self._sequences = dict([*self._sequences.items(), (epoch, made)][-2:])
        return made

    def _lanes_of(self, world: World) -> range:
        if self.lanes % world.size:
            raise ConfigError(
                f"data.stream.lanes={self.lanes} do not divide into {world.size} ranks; use a number of ranks that "
                f"does ({', '.join(map(str, _divisors(self.lanes)))}), or set the lanes to a multiple of the ranks"
            )
        of_rank = self.lanes // world.size
        return range(world.rank * of_rank, (world.rank + 1) * of_rank)


def eval_places(shard_samples: Sequence[int] | Array, world: World) -> tuple[Array, Array]:
    """Shard and sample in the shard of what this rank evaluates, in the order of the shards.

    Each sample is on one rank, which has a contiguous part; ranks may differ by one sample.
    """
    count_S = _counts(shard_samples)
    end_S = np.cumsum(count_S)
    total = int(count_S.sum())
    number_P = np.arange(world.rank * total // world.size, (world.rank + 1) * total // world.size)
    shard_P = np.searchsorted(end_S, number_P, side="right")
    return shard_P, number_P - (end_S - count_S)[shard_P]


def _counts(shard_samples: Sequence[int] | Array) -> Array:
    count_S = np.array(shard_samples, dtype=np.int64)
    if count_S.size and count_S.min() < 0:
        at = int(count_S.argmin())
        raise DataError(
            f"shard {at} has {count_S[at]} samples, expected at least 0; run `distkd shards verify` on the set"
        )
    return count_S


def _divisors(n: int) -> list[int]:
    return [number for number in range(1, n + 1) if n % number == 0]


def _neighbours(n: int, wanted: int) -> str:
    divisors = _divisors(n)
    around = [max((d for d in divisors if d < wanted), default=1), min((d for d in divisors if d > wanted), default=n)]
    return " and ".join(map(str, dict.fromkeys(around)))


@dataclass(frozen=True, slots=True)
class ShuffleQuality:
    """How an order of reading compares with a shuffle of all samples, for which each number but `shards` is 1."""

    displacement: float
    """Mean distance of a sample's places in two epochs, as a multiple of a full shuffle's."""
    same_shard: float
    """Chance that two samples of a batch come from one shard, as a multiple; also that of two samples of a shard to
    meet in a batch."""
    neighbours: float
    """Chance that two samples stored next to each other in a shard meet in a batch, as a multiple."""
    shards: float
    """Mean number of different shards in a batch."""


def shuffle_quality(
    epochs: tuple[Array, Array], shard_samples: Sequence[int] | Array, global_batch: int
) -> ShuffleQuality:
    """Measure two epochs of any reader.

    Args:
        epochs: the samples in the order of reading, numbered as they are stored, shard after shard, each at most once;
            batch follows batch.
        shard_samples: samples of each shard, two or more in some.
        global_batch: 2 <= samples of a batch < samples of all shards.
    """
    count_S = _counts(shard_samples)
    n = int(count_S.sum())
    shard_N = np.repeat(np.arange(len(count_S)), count_S)
    place_2N = np.full((2, n), -1)
    for place_N, order in zip(place_2N, epochs, strict=True):
        place_N[order] = np.arange(len(order))
    both_N = (place_2N >= 0).all(axis=0)
    moved = np.abs(place_2N[0] - place_2N[1])[both_N].mean() / (n / 3)
    steps = len(epochs[0]) // global_batch
    shard_TG = np.sort(shard_N[epochs[0][: steps * global_batch]].reshape(steps, global_batch), axis=1)
    _, per_batch = np.unique(shard_TG + np.arange(steps)[:, None] * len(count_S), return_counts=True)
    pairs = steps * global_batch * (global_batch - 1)
    expected = (count_S * (count_S - 1)).sum() / (n * (n - 1))
    step_N = np.where(place_2N[0] >= 0, place_2N[0] // global_batch, -1 - np.arange(n))
    together = (step_N[1:] == step_N[:-1])[shard_N[1:] == shard_N[:-1]].mean()
    return ShuffleQuality(
        displacement=float(moved),
        same_shard=float((per_batch * (per_batch - 1)).sum() / pairs / expected),
        neighbours=float(together / ((global_batch - 1) / (n - 1))),
        shards=len(per_batch) / steps,
    )
