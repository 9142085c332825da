"""Counter-based random numbers: a draw is a function of its key, never of a generator, a rank or an order.

int64 arithmetic that wraps, so the same key gives the same draw on every device and at every world size. Draws without
replacement are in `distkd.ops.permutation`.
"""

# Shapes: ... any shape of keys, B keys, n draws of each, N rows with weights

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

__all__ = [
    "below",
    "counted",
    "fold_in",
    "integer_key",
    "mix",
    "not_compiled",
    "text_key",
    "uniform",
    "weighted",
    "words",
]

P = ParamSpec("P")
R = TypeVar("R")

_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1
_BELOW = 1 << 48
_WEIGHTED = 2 << 48
"""Where a kind of draw begins to count, so that one key gives each kind other numbers."""


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function out of `torch.compile`: a compiled caller calls it as it is, between two graphs.

    The compiler's C++ multiplies signed integers that wrap around, which is undefined there
    (`docs/decisions/0007-precision-and-kernels.md`).
    """

    @wraps(function)
    def eager(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            # not as a decorator: that imports the whole compiler, and each worker that loads data would wait for it
            reason = "integers that wrap around are undefined in compiled C++"
            disabled = torch.compiler.disable(function, reason=reason)  # pyright: ignore[reportUnknownMemberType]
            return cast(Callable[P, R], disabled)(*args, **kwargs)
        return function(*args, **kwargs)

    return eager


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch can hold."""
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


def integer_key(*numbers: int) -> int:
    """One int64 key of several integers; order matters. The host's twin of `fold_in`."""
    key = 0
    for number in numbers:
        x = (key + _GOLDEN * (number + 1)) & _WORD
        x = ((x ^ (x >> 30)) * _M1) & _WORD
        x = ((x ^ (x >> 27)) * _M2) & _WORD
        key = x ^ (x >> 31)
    return _signed(key)


def text_key(text: str) -> int:
    """A stable int64 of a name (FNV-1a); Python's own hash changes from process to process."""
    key = 0xCBF29CE484222325
    for byte in text.encode():
        key = ((key ^ byte) * 0x100000001B3) & _WORD
    return _signed(key)


@not_compiled
def mix(key: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 keys of any shape: every input bit reaches every output bit."""
    return _mix(key.clone())


def _mix(key: Tensor) -> Tensor:
    """`mix` in place: fresh memory for each intermediate would cost more than the arithmetic."""
    high = torch.empty_like(key)
    for shift, multiplier in ((30, _M1), (27, _M2), (31, 1)):
        # a shift keeps the sign of an int64, hence the mask of a logical one
        torch.bitwise_right_shift(key, shift, out=high).bitwise_and_((1 << (64 - shift)) - 1)
        key.bitwise_xor_(high)
        if multiplier != 1:
            key.mul_(_signed(multiplier))
    return key


@not_compiled
def fold_in(key: Tensor, number: Tensor | int) -> Tensor:
    """A new independent key from `key` and a number; broadcasts, int64."""
    # a multiple of the golden ratio, not the bare number: keys and numbers that both count up must not meet
    step = _signed(_GOLDEN * (number + 1)) if isinstance(number, int) else (number + 1) * _signed(_GOLDEN)
    return _mix(key + step)


@not_compiled
def counted(key: Tensor, n: int, *, first: int = 0) -> Tensor:
    """`fold_in` of the numbers from `first` on, `n` of them for each key: int64, all bits random, shape (..., n)."""
    step = torch.arange(first + 1, first + 1 + n, device=key.device, dtype=torch.int64).mul_(_signed(_GOLDEN))
    return _mix(key.unsqueeze(-1) + step)


@not_compiled
def words(key: Tensor, n: int) -> Tensor:
    """`n` random int32 words for each key, all values equally likely; two words cost one hash.

    Where order or a threshold is all that matters this is several times faster than `uniform`.

    Returns:
        Shape (..., n).
    """
    return counted(key, (n + 1) // 2).view(torch.int32)[..., :n]


@not_compiled
def uniform(key: Tensor, n: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """`n` uniform draws in [0, 1) for each key.

    Args:
        key: int64, shape (...).
        n: draws per key.
        dtype: floating-point type of the result; 24 bits are drawn whatever it is, so all types agree.

    Returns:
        Shape (..., n). No gradient, no collective.
    """
    bits = (counted(key, n) >> 40) & ((1 << 24) - 1)
    return bits.to(dtype) * (1.0 / (1 << 24))


@not_compiled
def below(key_B: Tensor, n: int, pool: int | Tensor) -> Tensor:
    """`n` numbers of [0, pool) for each key, with replacement.

    56 random bits are multiplied by the pool, so a number's probability is off by at most pool / 2^56 of itself:
    1.4e-11 for a million numbers, 1.4e-7 for ten billion.

    Args:
        key_B: int64, the only source of randomness.
        n: draws per key.
        pool: how many numbers there are, 1 <= pool < 2^35; one for all keys, or int64 (B,).

    Returns:
        int64 (B, n). No gradient, no collective.
    """
    high_Bn = counted(key_B, n, first=_BELOW)
    low_Bn = high_Bn & _LOW_28
    # the product of 56 bits and 35 in two halves, carried from the low one
    pool_B1 = pool if isinstance(pool, int) else pool.unsqueeze(-1)
    low_Bn.mul_(pool_B1).bitwise_right_shift_(28)
    high_Bn.bitwise_right_shift_(36).bitwise_and_(_LOW_28).mul_(pool_B1)
    return high_Bn.add_(low_Bn).bitwise_right_shift_(28)


_LOW_28 = (1 << 28) - 1


@not_compiled
def weighted(key_B: Tensor, n: int, cumulative_N: Tensor) -> Tensor:
    """`n` rows for each key, with replacement, each as likely as its weight.

    A search in the running sum of the weights instead of the source's alias table: nothing to build, and log2(N) steps.

    Args:
        key_B: int64, the only source of randomness.
        n: draws per key.
        cumulative_N: float64 `weight_N.cumsum(0)`; weights >= 0 of any positive sum, and a row of weight 0 never comes.

    Returns:
        int64 (B, n), 0 <= row < N. No gradient, no collective.

    Source: card `crd`, section 2 (the alias method draws the same distribution).
    """
    # 52 bits: the product stays below the sum, whatever the rounding
    bits_Bn = (counted(key_B, n, first=_WEIGHTED) >> 12) & ((1 << 52) - 1)
    level_Bn = bits_Bn.double().mul_(cumulative_N[-1].double() / (1 << 52))
    return torch.searchsorted(cumulative_N.double(), level_Bn, right=True)
