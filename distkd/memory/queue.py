"""The latest teacher keys, the same on every rank: a ring of rows, written once after the step.

A frozen teacher's keys are never stale, so a queue of them needs no momentum and no address. The buffers belong to a
method's `state`; nothing in them depends on the number of ranks, so they load at any other.
"""

# Shapes: Q rows, D embedding, G keys of all ranks and passes

from __future__ import annotations

import torch
from torch import Tensor

from distkd.errors import ConfigError, ShapeError
from distkd.memory.memory import Memory

__all__ = ["Queue"]


class Queue(Memory):
    """The last Q keys, first in, first out.

    It starts empty and counts only what was pushed. Random rows instead (MoCo, RRD) are no samples of the data: with
    some hundred training samples the student would learn its relation to noise for epochs.
    """

    rows_QD: Tensor
    """Keys; the first `filled()` of them count, in no order that matters."""
    pushed: Tensor
    """int64 scalar, keys since the start: tells slot and filling, and stays on the device."""

    def __init__(self, length: int, dim: int):
        super().__init__()
        if length < 1 or dim < 1:
            raise ConfigError(f"a queue of {length} rows of width {dim}; both must be at least 1")
        self.register_buffer("rows_QD", torch.zeros(length, dim))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def filled(self) -> Tensor:
        """int64 scalar, how many rows count; no host sync."""
        return self.pushed.clamp_max(len(self.rows_QD))

    @torch.no_grad()
    def push(self, key_GD: Tensor) -> None:
        """Write keys in place of the oldest; of more than Q keys the last Q stay. No collective, no host sync.

        Args:
            key_GD: unit embeddings of all ranks in the order of the global batch, the same on every rank; any G.

        Raises:
            ShapeError: D differs.
        """
        length, dim = self.rows_QD.shape
        if key_GD.dim() != 2 or key_GD.shape[1] != dim:
            raise ShapeError(
                f"keys of shape {tuple(key_GD.shape)} do not fit a queue of width {dim}, expected (G, {dim})"
            )
        kept_GD = key_GD[-length:]
        number_G = torch.arange(len(key_GD) - len(kept_GD), len(key_GD), device=self.pushed.device)
        # at most Q numbers in a row, hence no slot twice and no order of writing
        self.rows_QD.index_copy_(0, (self.pushed + number_G) % length, kept_GD.to(self.rows_QD.dtype))
        self.pushed += len(key_GD)
