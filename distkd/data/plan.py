"""Which sample goes into which batch: functions of numbers, the same at any world size, any step found at once."""

# Shapes: G samples of a step over all ranks and passes, N samples of the training list

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from distkd.base import World
from distkd.errors import ConfigError, DataError
from distkd.ops.draws import fold_in, integer_key

__all__ = ["Plan", "eval_positions", "shuffled"]

_ROUNDS = 6
_BLOCK = 1 << 14
"""Positions shuffled together: so many that the cost per sample vanishes, so few that any number of samples fits."""


def shuffled(position: np.ndarray, n: int, key: int) -> np.ndarray:
    """Values of a random permutation of 0..n-1 at some positions, int64, without making the permutation.

    A Feistel network on the next power of four above n; a value beyond n goes through again until it falls below.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << bits) - 1
    value = torch.tensor(np.asarray(position, dtype=np.int64))
    waiting = torch.arange(len(value))
    while len(waiting):
        x = value[waiting]
        left, right = x >> bits, x & low
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (fold_in(fold_in(torch.tensor(key), round_number), right) & low)
        value[waiting] = (left << bits) | right
        waiting = waiting[value[waiting] >= n]
    return value.numpy()


@lru_cache(maxsize=8)
def _block(n: int, seed: int, epoch: int, number: int) -> np.ndarray:
    values = shuffled(np.arange(number * _BLOCK, min((number + 1) * _BLOCK, n)), n, integer_key(seed, epoch, n))
    values.flags.writeable = False
    return values


@dataclass(frozen=True, slots=True)
class Plan:
    """The batches of a whole run, as positions in the training list.

    Each epoch shuffles anew and drops the samples that do not fill a global batch.
    """

    n_samples: int
    global_batch: int
    seed: int
    epochs: int

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.epochs < 1:
            raise ConfigError(
                f"batch.global_batch={self.global_batch} and epochs={self.epochs}, expected at least 1 of each"
            )
        if self.n_samples < self.global_batch:
            raise DataError(
                f"the fold has {self.n_samples} training samples, fewer than batch.global_batch={self.global_batch}; "
                f"set batch.global_batch to {max(1, self.n_samples)} at most"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n_samples // self.global_batch

    @property
    def n_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def global_positions(self, step: int) -> np.ndarray:
        """(G,) int64: the positions of one step over all ranks and passes."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        first, last = inside * self.global_batch, (inside + 1) * self.global_batch
        blocks = range(first // _BLOCK, (last - 1) // _BLOCK + 1)
        values = np.concatenate([_block(self.n_samples, self.seed, epoch, number) for number in blocks])
        start = first - blocks[0] * _BLOCK
        return values[start : start + self.global_batch]

    def local_positions(self, step: int, number_of_pass: int, passes: int, world: World) -> np.ndarray:
        """(G / passes / ranks,) int64: what one rank reads in one pass.

        A pass takes a contiguous block of the global batch and a rank a contiguous block of the pass, so the passes
        and ranks one after another are the global batch, in its order.

        Raises:
            ConfigError: the global batch does not divide into passes and ranks.
        """
        parts = passes * world.size
        if self.global_batch % parts:
            raise ConfigError(
                f"batch.global_batch={self.global_batch} does not divide into {passes} passes x {world.size} ranks "
                f"= {parts}; use a multiple of it"
            )
        micro = self.global_batch // parts
        first = (number_of_pass * world.size + world.rank) * micro
        return self.global_positions(step)[first : first + micro]


def eval_positions(n: int, world: World) -> np.ndarray:
    """Positions this rank evaluates: each of 0..n-1 on exactly one rank; ranks may differ by one."""
    return np.arange(world.rank, n, world.size, dtype=np.int64)
