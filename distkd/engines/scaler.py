"""Loss scaling for float16: small gradients are lifted over what float16 can hold, and put back before the update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distkd.engines.protocol import Entry
from distkd.errors import NonFiniteError

__all__ = ["LossScale"]

_SCALE, _GOOD_STEPS = "engine/loss_scale", "engine/good_steps"


@dataclass(slots=True)
class LossScale:
    """A power of two that follows what the gradients bear: halved after an overflow, doubled after many good steps.

    Not `torch.amp.GradScaler`: that reads all gradients once more for what the norm already says, tells nobody whether
    it left an update out, and keeps its count of good steps private. A power of two changes no digit of a float32.

    It is a number on the host. Ranks that see the same reduced gradient keep it equal without a collective.
    """

    value: float = 2.0**16
    good_steps: int = 0
    """Updates since the last change."""
    growth_every: int = 2000
    """Good steps until it is doubled."""

    def good(self) -> None:
        """An update was applied."""
        self.good_steps += 1
        if self.good_steps >= self.growth_every:
            self.value, self.good_steps = self.value * 2, 0

    def overflow(self) -> None:
        """An update was left out.

        Raises:
            NonFiniteError: there is nothing left to halve; on every rank, as the numbers are equal.
        """
        self.value, self.good_steps = self.value / 2, 0
        if self.value < 1:
            raise NonFiniteError(
                "gradients in float16 overflow even with a loss scale of 1, after one update after the other was left "
                "out: the loss is not finite or far too large; use engine.precision=bf16 or fp32, or lower optim.lr, "
                "and pass --allow-change"
            )

    def entries(self) -> list[Entry]:
        """What a checkpoint keeps; read when the entry is."""
        return [
            Entry(_SCALE, 4, lambda: torch.tensor(self.value, dtype=torch.float32)),
            Entry(_GOOD_STEPS, 8, lambda: torch.tensor(self.good_steps, dtype=torch.int64)),
        ]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `entries`; from a checkpoint of a run without scaling, as at the start."""
        if _SCALE in tensors:
            self.value = float(tensors[_SCALE])
        if _GOOD_STEPS in tensors:
            self.good_steps = int(tensors[_GOOD_STEPS])
