"""Dropout whose mask is a function of (sample, layer, role), so that neither rank nor order matters.

`build` gives the layers their salts; a `Classifier` opens the block of keys around its forward.
"""

# Shapes: B samples of this rank

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from distkd.errors import ShapeError
from distkd.ops.draws import fold_in, text_key, words

__all__ = ["KeyedAlphaDropout", "KeyedDropout", "dropout_keys", "salt_by_path"]

_keys: ContextVar[Tensor | None] = ContextVar("dropout_keys", default=None)


@contextmanager
def dropout_keys(key_B: Tensor, role: str) -> Iterator[None]:
    """The keys of the samples that go through a network in this block.

    Args:
        key_B: int64, a hash of (seed, epoch, sample).
        role: which network, so that a student and its mean teacher drop differently.
    """
    token = _keys.set(fold_in(key_B, text_key(role)))
    try:
        yield
    finally:
        _keys.reset(token)


class KeyedDropout(nn.Module):
    """Zero a share of the values and scale up the rest; the first dimension of the input is the samples."""

    salt = 0

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def kept(self, x: Tensor) -> Tensor:
        """Which values stay, bool, in the shape of `x`."""
        key_B = _keys.get()
        if key_B is None:
            raise RuntimeError("dropout in train mode outside of `dropout_keys`: call the whole model, not its parts")
        if key_B.shape[0] != x.shape[0]:
            raise ShapeError(
                f"dropout got {x.shape[0]} samples of shape {tuple(x.shape[1:])} and keys of {key_B.shape[0]}"
            )
        draw = words(fold_in(key_B, self.salt), math.prod(x.shape[1:]))
        threshold = min(round(self.p * 2**32), 2**32 - 1) - 2**31
        return (draw >= threshold).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * self.kept(x).to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class KeyedAlphaDropout(KeyedDropout):
    """Dropout that keeps mean and variance of self-normalising activations; the formula of `nn.AlphaDropout`."""

    saturation = -1.0507009873554805 * 1.6732632423543772  # what SELU tends to on the left

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        scale = 1 / math.sqrt((1 - self.p) * (1 + self.p * self.saturation**2))
        shift = -scale * self.saturation * self.p
        return torch.where(self.kept(x), x, self.saturation) * scale + shift


def salt_by_path(model: nn.Module) -> None:
    """Give each dropout layer its own draws, by its path in the model."""
    for path, layer in model.named_modules():
        if isinstance(layer, KeyedDropout):
            layer.salt = text_key(path)
