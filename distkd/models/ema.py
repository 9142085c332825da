"""The mean teacher: a running average of the student's weights that sees another view of the sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distkd.base import Batch, Outputs
from distkd.models.build import Classifier

__all__ = ["MeanTeacher", "ema_alpha"]


def ema_alpha(step: int, decay: float) -> float:
    """Share of the old average after a step, 0-based: 0 at first, so that the first update copies the student."""
    return min(1 - 1 / (step + 1), decay)


class MeanTeacher(nn.Module):
    """Averages parameters, not buffers: its batch statistics are its own.

    It stays in train mode, as in the source, and never records a graph.
    """

    def __init__(self, model: Classifier, *, decay: float):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.role = "mean_teacher"
        self.decay = decay

    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        return self.model.train()(batch)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """average <- alpha average + (1 - alpha) student, after the optimizer step `step` (0-based). No collective."""
        own: list[Tensor] = list(self.model.parameters())
        new: list[Tensor] = list(student.parameters())
        # at a weight of 1 this is an exact copy
        torch._foreach_lerp_(own, new, 1 - ema_alpha(step, self.decay))  # pyright: ignore[reportPrivateImportUsage]
