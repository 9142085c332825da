"""Taking back what a forward has changed, for a step whose update is left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distkd.memory.bank import Normaliser
from distkd.memory.memory import Memory

__all__ = ["Undo"]


class Undo:
    """Batch statistics, normalisers and the like, as they were before a step.

    Memories are left out: they are written after the update, which does not happen either.
    """

    def __init__(self, *roots: nn.Module):
        owners = [module for root in roots for module in root.modules() if not isinstance(module, Memory)]
        self.normalisers = [module for module in owners if isinstance(module, Normaliser)]
        found = {id(buffer): buffer for module in owners for buffer in module.buffers(recurse=False)}
        self.live: list[Tensor] = list(found.values())
        self.kept = [buffer.clone() for buffer in self.live]

    def keep(self) -> None:
        """Remember; no host sync."""
        _copy(self.kept, self.live)

    def back(self) -> None:
        """As it was at the last `keep`. One host sync for each normaliser."""
        _copy(self.live, self.kept)
        for normaliser in self.normalisers:
            normaliser.look()


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)  # pyright: ignore[reportPrivateImportUsage]
