"""Counter-based random numbers: a draw is a function of its key, never of a generator, a rank or an order.

int64 arithmetic that wraps, so the same key gives the same draw on every device and at every world size.
"""

# Shapes: ... any shape of keys

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fold_in", "integer_key", "mix", "text_key", "uniform", "words"]

_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


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


def mix(key: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 keys of any shape: every input bit reaches every output bit."""
    # `>>` keeps the sign on int64, hence the masks of a logical shift
    key = (key ^ ((key >> 30) & ((1 << 34) - 1))) * _signed(_M1)
    key = (key ^ ((key >> 27) & ((1 << 37) - 1))) * _signed(_M2)
    return key ^ ((key >> 31) & ((1 << 33) - 1))


def fold_in(key: Tensor, number: Tensor | int) -> Tensor:
    """A new independent key from `key` and a number; broadcasts, int64."""
    # a multiple of the golden ratio, not the bare number: keys and numbers that both count up must not meet
    step = _signed(_GOLDEN * (number + 1)) if isinstance(number, int) else (number + 1) * _signed(_GOLDEN)
    return mix(key + step)


def words(key: Tensor, n: int) -> Tensor:
    """`n` random int32 words for each key, all values equally likely; two words cost one hash.

    Where order or a threshold is all that matters this is several times faster than `uniform`.

    Returns:
        Shape (..., n).
    """
    pair = torch.arange((n + 1) // 2, device=key.device, dtype=torch.int64)
    return fold_in(key.unsqueeze(-1), pair).view(torch.int32)[..., :n]


def uniform(key: Tensor, n: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """`n` uniform draws in [0, 1) for each key.

    Args:
        key: int64, shape (...).
        n: draws per key.
        dtype: floating-point type of the result; 24 bits are drawn whatever it is, so all types agree.

    Returns:
        Shape (..., n). No gradient, no collective.
    """
    counter = torch.arange(n, device=key.device, dtype=torch.int64)
    bits = (fold_in(key.unsqueeze(-1), counter) >> 40) & ((1 << 24) - 1)
    return bits.to(dtype) * (1.0 / (1 << 24))
