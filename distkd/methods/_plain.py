"""What a method does when there is nothing special to do; a method is free to be written without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distkd.base import Batch, Outputs, StepOutput, World
from distkd.methods._protocol import ParamGroup
from distkd.models.build import Classifier
from distkd.ops.kd import labelled_cross_entropy

__all__ = ["PlainMethod", "teacher_gauges"]


class PlainMethod:
    """One group, no state to move, predictions from the student."""

    def __init__(self, student: Classifier, trainable: nn.Module | None = None):
        self.student = student
        self.trainable = student if trainable is None else trainable
        self.frozen = nn.ModuleDict()
        self.state = nn.ModuleDict()
        self.outside: Sequence[nn.Parameter] = ()
        self.follows_weights = False

    def groups(self) -> list[ParamGroup]:
        return [{"params": [p for p in self.trainable.parameters() if p.requires_grad]}]

    def after_step(self, out: StepOutput, world: World) -> None:
        """Nothing follows the optimizer."""

    def after_eval(self, report: Mapping[str, float], world: World) -> None:
        """Nothing follows an evaluation."""

    def predict(self, batch: Batch) -> Tensor:
        """Logits (B, C) of the student."""
        return self.student(batch).logits_BC


@torch.no_grad()
def teacher_gauges(teacher: Outputs, batch: Batch, labelled_share: float) -> dict[str, Tensor]:
    """`teacher/task`: what the student's `task` would be if it answered as the frozen teacher does on this batch.

    Of this rank's samples, as the part is; the teacher is taken as the step has it, in training mode too.
    """
    return {"teacher/task": labelled_cross_entropy(teacher.logits_BC, batch.label_B, labelled_share)}
