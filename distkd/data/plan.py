"""Which sample goes into which batch: functions of numbers, the same at any world size, any step found at once.

Samples in any order, by index. Where shards have to be read one after another, see `distkd.data.stream_plan`.
"""

# Shapes: G samples of a step over all ranks and passes, N samples of the training list, P places, C classes, R rounds

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from distkd.base import UNLABELLED, World
from distkd.errors import ConfigError, DataError
from distkd.ops.draws import below, counted, fold_in, integer_key, weighted

__all__ = ["Balance", "Plan", "along", "check_sizes", "eval_positions", "micro_batch", "oversampling", "shuffled"]

Balance = Literal["none", "oversample", "weighted"]
Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 14
"""Places shuffled together: so many that the cost per sample vanishes, so few that any number of samples fits."""

_NARROW = 1 << 27
"""Up to here both sides of the network are below 2^14, and uint32 holds the product of a side and 18 random bits."""


@lru_cache(maxsize=1024)
def _sides(n: int) -> tuple[int, int]:
    """Left and right so that left x right covers 0..n-1 with as few spare places as can be, mostly fewer than five."""
    top = math.isqrt(n - 1) + 1
    lowest = max(1, math.ceil(top / 1.4), top - 4096)
    left = min(range(top, lowest - 1, -1), key=lambda side: -n % side)
    return left, -(-n // left)


def shuffled(position: Array, n: int, key: int | Array) -> Array:
    """Values of a random permutation of 0..n-1 at some positions, int64, without making the permutation.

    A Feistel network on a grid that is 0..n-1 and a few places more; a value beyond n goes through again until it is
    inside. Not `distkd.ops.permutation`, which is after the first values only, for many keys, on a device.

    Args:
        position: integers of 0..n-1, any number of them.
        n: below 2^60.
        key: one permutation, or one for each position.
    """
    value = np.asarray(position, dtype=np.int64)
    if not len(value):
        return value
    left, right = _sides(n)
    keys_RP = _round_keys(np.atleast_1d(np.asarray(key, dtype=np.int64)), n)
    value = _network(value, left, right, keys_RP)
    while left * right > n and len(beyond := np.flatnonzero(value >= n)):
        keys = keys_RP if keys_RP.shape[1] == 1 else keys_RP[:, beyond]
        value[beyond] = _network(value[beyond], left, right, keys)
    return value


def _round_keys(key_P: Array, n: int) -> Array:
    """A factor and a summand for each round. Small grids mix badly, hence more rounds."""
    rounds = 6 if n >= 1 << 14 else 8 if n >= 1 << 10 else 12
    key, which = np.unique(key_P, return_inverse=True)
    hashes = counted(torch.as_tensor(key), 2 * rounds).numpy().view(np.uint64).T
    keys = hashes.astype(np.uint32) if n <= _NARROW else hashes
    keys[::2] |= keys.dtype.type(1)
    return keys[:, which] if len(key_P) > 1 else keys


def _network(value: Array, left: int, right: int, keys_RP: Array) -> Array:
    """Where places of the grid go. Each round shifts one side by a keyed hash of the other."""
    narrow = keys_RP.dtype == np.uint32
    fold, share, multiplier = (15, 18, 0x2C1B3C6D) if narrow else (32, 32, 0x2545F4914F6CDD1D)
    # arrays of one, since a scalar's type and its overflow have rules of their own
    numbers = (fold, multiplier, (32 if narrow else 64) - share, share)
    fold_1, multiplier_1, top_1, share_1 = (np.array([number], dtype=keys_RP.dtype) for number in numbers)
    size = [np.array([side], dtype=keys_RP.dtype) for side in (left, right)]
    high, low = np.divmod(value, right)
    sides = [high.astype(keys_RP.dtype), low.astype(keys_RP.dtype)]
    hashed, scratch = np.empty_like(sides[0]), np.empty_like(sides[0])
    for k, (factor, summand) in enumerate(zip(keys_RP[::2], keys_RP[1::2], strict=True)):
        side, by, radix = sides[k % 2], sides[1 - k % 2], size[k % 2]
        np.multiply(by, factor, out=hashed)
        np.add(hashed, summand, out=hashed)
        np.right_shift(hashed, fold_1, out=scratch)
        np.bitwise_xor(hashed, scratch, out=hashed)
        np.multiply(hashed, multiplier_1, out=hashed)
        np.right_shift(hashed, top_1, out=hashed)
        np.multiply(hashed, radix, out=hashed)
        np.right_shift(hashed, share_1, out=hashed)
        np.add(side, hashed, out=side)
        # below the radix the difference wraps around to a large number, so the least of both is the remainder
        np.subtract(side, radix, out=hashed)
        np.minimum(side, hashed, out=side)
    return sides[0].astype(np.int64) * right + sides[1].astype(np.int64)


@lru_cache(maxsize=8)
def _block(n: int, seed: int, epoch: int, number: int) -> Array:
    values = shuffled(np.arange(number * _BLOCK, min((number + 1) * _BLOCK, n)), n, integer_key(seed, epoch, n))
    values.flags.writeable = False
    return values


def oversampling(count_C: Array) -> Array:
    """How often each class's samples go into the list: round(largest / count), half to even, as the source rounds."""
    return np.rint(count_C.max() / count_C).astype(np.int64)


class _Shuffle:
    """Each sample once in a list that every epoch shuffles anew."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def part(self, epoch: int, first: int, last: int) -> Array:
        blocks = range(first // _BLOCK, (last - 1) // _BLOCK + 1)
        values = np.concatenate([_block(self.length, self.seed, epoch, number) for number in blocks])
        return values[first - blocks[0] * _BLOCK :][: last - first]


class _Oversample(_Shuffle):
    """The same over a longer list: `factor` times as many draws of each class that is short, made by their keys.

    Source: card `inter-resolution-at-plus`, section 2. There the list is drawn by a generator before the training;
    here an entry is a function of the seed and its number, so the list is never made.
    """

    def __init__(self, label_N: Array, seed: int):
        label_C, count_C = np.unique(label_N, return_counts=True)
        known_C = label_C != UNLABELLED
        # what has no label belongs to no class that could be short: once each, and no measure for the others
        self.factor_C = np.ones(len(label_C), dtype=np.int64)
        self.factor_C[known_C] = oversampling(count_C[known_C])
        self.count_C, self.end_C = count_C, np.cumsum(count_C * self.factor_C)
        self.sample_N = np.argsort(label_N, kind="stable")
        super().__init__(int(self.end_C[-1]), seed)
        self.key = integer_key(seed, _DRAWN_ONCE)

    def part(self, epoch: int, first: int, last: int) -> Array:
        return self.sample_of(super().part(epoch, first, last))

    def sample_of(self, entry_P: Array) -> Array:
        class_P = np.searchsorted(self.end_C, entry_P, side="right")
        count_P, factor_P = self.count_C[class_P], self.factor_C[class_P]
        kept_P = entry_P - self.end_C[class_P] + count_P * factor_P
        keys_P = fold_in(torch.tensor(self.key), torch.as_tensor(entry_P))
        drawn_P = below(keys_P, 1, torch.as_tensor(count_P))[:, 0].numpy()
        before_C = np.cumsum(self.count_C) - self.count_C
        return self.sample_N[before_C[class_P] + np.where(factor_P == 1, kept_P, drawn_P)]


class _Weighted:
    """Independent draws with replacement, as many as there are samples."""

    def __init__(self, weight_N: Array, seed: int):
        self.length, self.seed = len(weight_N), seed
        self.cumulative_N = torch.as_tensor(np.cumsum(weight_N))

    def part(self, epoch: int, first: int, last: int) -> Array:
        key = torch.tensor(integer_key(self.seed, epoch, self.length))
        return weighted(fold_in(key, torch.arange(first, last)), 1, self.cumulative_N)[:, 0].numpy()


_DRAWN_ONCE = 1 << 40
"""Beyond every epoch, so that no epoch's shuffle shares its key."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The batches of a whole run, as positions in the training list.

    An epoch is n_samples // global_batch steps, whatever the balance; the rest of its list is left out:

    - none: a shuffle of all samples, each at most once an epoch;
    - oversample: classes repeated to about the size of the largest (`oversampling`). A class with factor 1 gives each
      sample once to the list, another gives factor x count draws with replacement, the same in all epochs; samples
      without a label come once. The first n_samples // global_batch batches of the shuffled list are an epoch;
    - weighted: draws with replacement, each sample as likely as its weight.

    The cost of a step does not grow with n_samples (weighted: with its logarithm); there is no state.

    Raises:
        ConfigError: no batch or epoch, or what a balance needs is not given.
        DataError: fewer samples than a global batch, labels or weights of another number, no usable weight.
    """

    n_samples: int
    global_batch: int
    seed: int
    epochs: int
    balance: Balance = "none"
    label_N: Array | None = field(default=None, repr=False)
    """Classes from 0 on, -1 without; for `oversample`, and for `weighted` without weights."""
    weight_N: Array | None = field(default=None, repr=False)
    """At least 0, of any sum. None with `weighted`: all classes equally likely, and samples without a label as likely
    as without balance."""
    _list: _Shuffle | _Weighted = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_sizes(self.n_samples, self.global_batch, self.epochs)
        object.__setattr__(self, "_list", self._list_of())

    def _list_of(self) -> _Shuffle | _Weighted:
        if self.balance == "none":
            return _Shuffle(self.n_samples, self.seed)
        if self.balance == "weighted" and self.weight_N is not None:
            return _Weighted(_checked_weights(self.weight_N, self.n_samples), self.seed)
        if self.balance not in ("oversample", "weighted"):
            raise ConfigError(f"unknown data.balance {self.balance!r}; available: none, oversample, weighted")
        if self.label_N is None:
            raise ConfigError(f"data.balance={self.balance} was given no labels of the training samples; pass label_N")
        label_N = _checked_labels(self.label_N, self.n_samples)
        if self.balance == "oversample":
            return _Oversample(label_N, self.seed)
        return _Weighted(_class_weights(label_N), self.seed)

    @property
    def steps_per_epoch(self) -> int:
        return self.n_samples // self.global_batch

    @property
    def n_entries(self) -> int:
        """Length of the list that an epoch is the beginning of."""
        return self._list.length

    @property
    def n_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def global_positions(self, step: int) -> Array:
        """(G,) int64: the positions of one step over all ranks and passes."""
        return self._part(step, 0, self.global_batch)

    def local_positions(self, step: int, number_of_pass: int, passes: int, world: World) -> Array:
        """(G / passes / ranks,) int64: what one rank reads in one pass, the global batch at its `local_slots`."""
        slot = self.local_slots(number_of_pass, passes, world)
        return self._part(step, int(slot[0]), int(slot[-1]) + 1)

    def local_slots(self, number_of_pass: int, passes: int, world: World) -> Array:
        """(G / passes / ranks,) int64: which slots of every global batch a rank reads in a pass.

        A pass takes a contiguous block of the global batch and a rank a contiguous block of the pass, so the passes
        and ranks one after another are the global batch, in its order.

        Raises:
            ConfigError: the global batch does not divide into passes and ranks.
        """
        micro = micro_batch(self.global_batch, passes, world)
        first = (number_of_pass * world.size + world.rank) * micro
        return np.arange(first, first + micro)

    def after(self, step: int, slot: int, attempt: int) -> int:
        """The position that replaces the one at a slot of a global batch, if that and `attempt - 1` others fail.

        The same slot of the next step, and so on, so that replacements meet no other sample of their own batch as long
        as the epoch has steps left for that. The epoch's list, with the tail that fills no batch, is a ring; the
        attempts 0 to its length - 1 visit each of its entries once, the slot's own first.
        """
        epoch, inside = divmod(step, self.steps_per_epoch)
        place = along(inside * self.global_batch + slot, attempt, self.global_batch, self._list.length)
        return int(self._list.part(epoch, place, place + 1)[0])

    def _part(self, step: int, first: int, last: int) -> Array:
        epoch, inside = divmod(step, self.steps_per_epoch)
        start = inside * self.global_batch
        return self._list.part(epoch, start + first, start + last)


def along(place: int, attempt: int, stride: int, length: int) -> int:
    """The place on a ring after `attempt` strides, with one place more each time the strides come back to the start."""
    lap = length // math.gcd(length, stride)
    return (place + attempt * stride + attempt // lap) % length


def micro_batch(global_batch: int, passes: int, world: World) -> int:
    """Samples of one rank and pass."""
    parts = passes * world.size
    if global_batch % parts:
        raise ConfigError(
            f"batch.global_batch={global_batch} does not divide into {passes} passes x {world.size} ranks "
            f"= {parts}; use a multiple of it"
        )
    return global_batch // parts


def check_sizes(n_samples: int, global_batch: int, epochs: int) -> None:
    """Refuse a run without a step."""
    if global_batch < 1 or epochs < 1:
        raise ConfigError(f"batch.global_batch={global_batch} and epochs={epochs}, expected at least 1 of each")
    if n_samples < global_batch:
        raise DataError(
            f"the fold has {n_samples} training samples, fewer than batch.global_batch={global_batch}; "
            f"set batch.global_batch to {max(1, n_samples)} at most"
        )


def _checked_labels(label_N: Array, n: int) -> Array:
    _check_length("labels", label_N, n)
    label_N = np.asarray(label_N, dtype=np.int64)
    if label_N.min() < UNLABELLED:
        at = int(label_N.argmin())
        raise DataError(
            f"training sample {at} has label {label_N[at]}, expected a class from 0 on, or {UNLABELLED} for none; "
            f"mend the labels of the manifest"
        )
    if label_N.max() == UNLABELLED:
        raise DataError(
            f"none of {n} training samples has a label, expected some to balance classes by; set data.balance to none"
        )
    return label_N


def _checked_weights(weight_N: Array, n: int) -> Array:
    _check_length("weights", weight_N, n)
    weight_N = np.asarray(weight_N, dtype=np.float64)
    bad = np.flatnonzero(~(np.isfinite(weight_N) & (weight_N >= 0)))
    if len(bad):
        raise DataError(
            f"training sample {bad[0]} has weight {weight_N[bad[0]]}, expected a finite number of at least 0 "
            f"({len(bad)} such samples); mend or leave out their weights"
        )
    with np.errstate(over="ignore"):
        total = weight_N.sum()
    if not 0 < total < math.inf:
        raise DataError(
            f"the weights of {n} training samples have the sum {total}, expected a finite one above 0; "
            f"give at least one sample a positive weight, or set data.balance to none"
        )
    return weight_N


def _check_length(what: str, value_N: Array, n: int) -> None:
    if np.shape(value_N) != (n,):
        raise DataError(
            f"the plan was given {what} of shape {np.shape(value_N)}, expected ({n},), one for each training sample; "
            f"pass those of the training split of the fold"
        )


def _class_weights(label_N: Array) -> Array:
    """Inverse frequency of a sample's class; samples without a label keep the share that they have."""
    known_N = label_N != UNLABELLED
    count_C = np.bincount(label_N[known_N])
    weight_N = np.ones(len(label_N))
    weight_N[known_N] = known_N.sum() / np.count_nonzero(count_C) / count_C[label_N[known_N]]
    return weight_N


def eval_positions(n: int, world: World) -> Array:
    """Positions this rank evaluates: each of 0..n-1 on exactly one rank; ranks may differ by one."""
    return np.arange(world.rank, n, world.size, dtype=np.int64)
