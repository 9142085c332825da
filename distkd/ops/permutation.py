"""Different numbers of a pool: the first images of a permutation that a key chooses, at a cost that no pool raises.

A Feistel network permutes pairs (left, right) of a grid of left x right places, which is the pool and a few places more
(mostly fewer than five). Their images are known without a search, because the network can be run backwards.
"""

# Shapes: B keys, n draws of each, C sizes of pools, S spare places of the grid beyond the pool

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distkd.errors import ConfigError
from distkd.ops.draws import counted, not_compiled

__all__ = ["Pools", "distinct", "distinct_of"]

_DISTINCT = 3 << 48
"""Where these draws begin to count, so that one key gives them other numbers than the draws of `distkd.ops.draws`."""

_SORTED = 256
"""Pools up to here are permuted by sorting random words: exact, and grids this small mix badly."""

_NARROW = 1 << 25
"""Pools up to here have radices of at most 2^13: int32 arithmetic, which a CPU does several times faster than int64."""

_CHUNK = 1 << 19
"""Numbers that a CPU makes at once: enough to hide what it costs to start an operation, within its last cache."""

_NEVER = (1 << 63) - 1
_LAST = (1 << 31) - 1


class _Word(NamedTuple):
    """The integers of a network, and their bits: a product of `share` bits and a radix must fit."""

    dtype: torch.dtype
    bits: int
    share: int
    fold: int
    multiplier: int


_INT32 = _Word(torch.int32, 32, 18, 15, 0x2C1B3C6D)
_INT64 = _Word(torch.int64, 64, 32, 32, 0x2545F4914F6CDD1D)


@lru_cache(maxsize=1024)
def _radices(size: int) -> tuple[int, int]:
    """Left and right, at most twice as large, so that left x right covers `size` with as few spare places as can be."""
    top = math.isqrt(size - 1) + 1
    lowest = max(1, math.ceil(top / 1.4), top - 4096)
    left = min(range(top, lowest - 1, -1), key=lambda left: -size % left)
    return left, -(-size // left)


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """Sizes of pools that the host knows, in a table that keys choose from on the device.

    How a number is drawn depends on the facts below, so one key may draw differently from equal sizes in two tables.
    """

    cut_C3: Tensor
    """int64 (size, left, right) of each pool; a module keeps it as a buffer and hands it over with `on`."""
    smallest: int
    largest: int
    sorted_up_to: int
    """The largest size that is permuted by sorting, 0 if none is."""
    rounds: int
    spare: int
    """Most places of a grid beyond its pool."""

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Pools:
        """A table on the CPU of the given sizes, each 1 <= size < 2^60."""
        cuts = [(size, *_radices(size)) for size in sizes]
        large = [cut for cut in cuts if cut[0] > _SORTED]
        return cls(
            cut_C3=torch.tensor(cuts, dtype=torch.int64),
            smallest=min(sizes),
            largest=max(sizes),
            sorted_up_to=max((size for size in sizes if size <= _SORTED), default=0),
            rounds=_rounds(min(cut[0] for cut in large)) if large else 0,
            spare=max((left * right - size for size, left, right in large), default=0),
        )

    def on(self, cut_C3: Tensor) -> Pools:
        """The same sizes with the table where the keys are."""
        return replace(self, cut_C3=cut_C3)


def _rounds(size: int) -> int:
    """Rounds after which a pair of images is within 1.2e-4 (total variation) of a pair of different uniform numbers.

    The difference of two places is a Markov chain, and its worst start is no better off after an even number of rounds
    than after the odd one below it. At a million numbers five rounds leave 2e-6.
    """
    return 5 if size >= 1 << 14 else 7 if size >= 1 << 10 else 9


@lru_cache(maxsize=1024)
def _one_pool(size: int) -> Pools:
    return Pools.of([size])


@not_compiled
def distinct(key_B: Tensor, n: int, pool: int) -> Tensor:
    """`n` different numbers of [0, pool) for each key; the first m of n are what m alone would be.

    Args:
        key_B: int64, the only source of randomness.
        n: draws per key, 1 <= n <= pool.
        pool: how many numbers there are, below 2^60.

    Returns:
        int64 (B, n). No gradient, no collective, no host sync. Time and memory O(B n), whatever the pool.

    Raises:
        ConfigError: n is not in 1 to pool.

    Source: Naor and Reingold, J. Cryptology 12 (1999): of the hashes only the inner ones need be strong; Black and
    Rogaway, CT-RSA 2002: a network on any number of places. `docs/decisions/0008-draws.md` has the measurements.
    """
    pools = _one_pool(pool)
    _check(n, pools)
    # filled, not copied: a copy from the host would wait for the device
    cut_B3 = torch.cat([torch.full((1, 1), number, device=key_B.device) for number in (pool, *_radices(pool))], dim=1)
    return _draw(key_B, n, cut_B3, pools)


@not_compiled
def distinct_of(key_B: Tensor, n: int, pools: Pools, which_B: Tensor) -> Tensor:
    """As `distinct`, from a pool of its own for each key.

    Args:
        key_B: int64, the only source of randomness.
        n: draws per key, 1 <= n <= the smallest pool of the table.
        pools: sizes that the host knows, on the keys' device.
        which_B: int64 row of the table.

    Returns:
        int64 (B, n), each row in [0, its pool). No gradient, no collective, no host sync.

    Raises:
        ConfigError: n is not in 1 to the smallest pool.
    """
    _check(n, pools)
    return _draw(key_B, n, pools.cut_C3[which_B], pools)


def _check(n: int, pools: Pools) -> None:
    if not 1 <= n <= pools.smallest:
        raise ConfigError(
            f"cannot draw {n} different numbers of a pool of {pools.smallest}; "
            f"draw 1 to {pools.smallest} of them, or with replacement (`below`)"
        )


def _draw(key_B: Tensor, n: int, cut_B3: Tensor, pools: Pools) -> Tensor:
    at_once = max(1, _CHUNK // n)
    if key_B.device.type != "cpu" or len(key_B) <= at_once:
        return _draw_chunk(key_B, n, cut_B3, pools)
    drawn: list[Tensor] = []
    for first in range(0, len(key_B), at_once):
        part = slice(first, first + at_once)
        drawn.append(_draw_chunk(key_B[part], n, cut_B3 if len(cut_B3) == 1 else cut_B3[part], pools))
    return torch.cat(drawn)


def _draw_chunk(key_B: Tensor, n: int, cut_B3: Tensor, pools: Pools) -> Tensor:
    if pools.largest <= _SORTED:
        return _by_sorting(key_B, n, cut_B3[:, :1], pools.sorted_up_to)
    large_Bn = _Network(key_B, cut_B3, pools).first(n)
    if not pools.sorted_up_to:
        return large_Bn
    small_Bn = _by_sorting(key_B, n, cut_B3[:, :1], pools.sorted_up_to)
    return torch.where(cut_B3[:, :1] <= _SORTED, small_Bn, large_Bn)


def _by_sorting(key_B: Tensor, n: int, size_B1: Tensor, width: int) -> Tensor:
    """The places of random words in order; a tie, one in 2^32 pairs, goes to the smaller number."""
    number = torch.arange(width, device=key_B.device)
    # stable, so that a word that happens to be the largest still comes before the places beyond the pool
    word = counted(key_B, (width + 1) // 2, first=_DISTINCT).view(torch.int32)[:, :width]
    word = word.masked_fill(number >= size_B1, _LAST)
    return word.argsort(dim=1, stable=True)[:, :n]


class _Network:
    """A Feistel network for each key, on int32 or int64 places."""

    def __init__(self, key_B: Tensor, cut_B3: Tensor, pools: Pools):
        self.word = word = _INT32 if pools.largest <= _NARROW else _INT64
        self.spare = pools.spare
        self.size_B1, left_B1, right_B1 = cut_B3.unsqueeze(-1).unbind(1)
        self.radix = (left_B1.to(word.dtype), right_B1.to(word.dtype))
        hashes = counted(key_B, pools.rounds * word.bits // 32, first=_DISTINCT)
        keys = hashes.view(word.dtype).unsqueeze(-1).unbind(1)
        self.rounds = list(zip(keys[::2], keys[1::2], strict=True))
        # tensors, since an operation with a number of Python's costs a CPU three times as long to start
        low = (1 << word.share) - 1
        constants = (word.fold, word.multiplier, word.bits - word.share, low, word.share, word.bits - 1)
        self.constants = [torch.full((), number, dtype=word.dtype, device=key_B.device) for number in constants]

    def first(self, n: int) -> Tensor:
        """Images of 0 to n - 1, int64 (B, n); those beyond the pool are walked on until they are inside."""
        left_Bn, right_Bn = (side.expand(len(self.rounds[0][0]), n) for side in self._cut_first(n))
        if not self.spare:
            return self._run(left_Bn.clone(), right_Bn.clone())
        spare_BS = self.size_B1 + torch.arange(self.spare, device=self.size_B1.device)
        left_BS = (spare_BS // self.radix[1]).to(left_Bn).expand(len(left_Bn), -1)
        right_BS = (spare_BS % self.radix[1]).to(left_Bn).expand(len(left_Bn), -1)
        image = self._run(torch.cat([left_Bn, left_BS], dim=1), torch.cat([right_Bn, right_BS], dim=1))
        source_BS = self._run(left_BS.clone(), right_BS.clone(), back=True)
        return self._walked(image[:, :n], image[:, n:], source_BS, spare_BS)

    def _cut_first(self, n: int) -> tuple[Tensor, Tensor]:
        """Left and right of 0 to n - 1, (B, n) or (1, n), without an integer division."""
        # the quotient of a half-integer is far enough from a whole number for its rounding not to matter
        exact = torch.float32 if n <= 1 << 22 else torch.float64
        number_n = torch.arange(n, device=self.size_B1.device)
        left_Bn = ((number_n.to(exact) + 0.5) / self.radix[1]).to(self.word.dtype)
        return left_Bn, number_n.to(self.word.dtype) - left_Bn * self.radix[1]

    def _run(self, left: Tensor, right: Tensor, *, back: bool = False) -> Tensor:
        """Where places go, or `back` from where they come, as int64 numbers; left and right are used up."""
        sides, scratch = (left, right), (torch.empty_like(left), torch.empty_like(left))
        order = range(len(self.rounds))
        for k in reversed(order) if back else order:
            side, radix = sides[k % 2], self.radix[k % 2]
            step = self._step(k, sides[1 - k % 2], *scratch)
            if back:
                side.add_(step).sub_(radix)
            else:
                side.sub_(step)
            # the radix is added where the side is negative; a comparison would take four times as long
            side.addcmul_(torch.bitwise_right_shift(side, self.constants[-1], out=step), radix, value=-1)
        return sides[0].mul_(self.radix[1]).add_(sides[1]).long()

    def _step(self, k: int, by: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        """By how much round k moves the one side, in [0, its radix): a keyed hash of the other side."""
        fold, multiplier, top, low, share, _ = self.constants
        factor_B1, summand_B1 = self.rounds[k]
        torch.mul(by, factor_B1, out=out).add_(summand_B1)
        if 0 < k < len(self.rounds) - 1:
            torch.bitwise_right_shift(out, fold, out=scratch)
            out.bitwise_xor_(scratch).mul_(multiplier)
        else:
            out.bitwise_right_shift_(top)
        return out.bitwise_and_(low).mul_(self.radix[k % 2]).bitwise_right_shift_(share)

    def _walked(self, image_Bn: Tensor, image_BS: Tensor, source_BS: Tensor, spare_BS: Tensor) -> Tensor:
        """Images beyond the pool replaced by their own image, and so on, from the few spare places' side.

        Args:
            image_Bn: changed in place.
            image_BS: where the spare places go.
            source_BS: what goes to the spare places.
            spare_BS: the spare places' numbers, of which those beyond the grid are none.
        """
        n = image_Bn.shape[1]
        for _ in range((self.spare - 1).bit_length()):
            beyond_BS = image_BS - self.size_B1
            further_BS = image_BS.gather(1, beyond_BS.clamp(0, self.spare - 1))
            image_BS = torch.where(beyond_BS < 0, image_BS, further_BS)
        left_B1, right_B1 = self.radix
        reached_BS = (source_BS < n) & (spare_BS < left_B1.long() * right_B1)
        # a spare place is larger than its replacement, so the least of both is right, also where nothing is replaced
        value_BS = torch.where(reached_BS, image_BS, _NEVER)
        return image_Bn.scatter_reduce_(1, source_BS.clamp(0, n - 1), value_BS, "amin")
