"""What memories have in common."""

from __future__ import annotations

from torch import nn

__all__ = ["Memory"]


class Memory(nn.Module):
    """State that changes only after the update of a step: one whose update is left out has not touched it."""
