"""Soft labels of a frozen teacher (Hinton et al. 2015): the shortest distillation, the file to copy for another."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from distkd.base import Batch, Forward, StepOutput, World
from distkd.methods._plain import PlainMethod, teacher_gauges
from distkd.methods._protocol import MethodConfig, Setup
from distkd.ops.kd import kl_at_temperature, labelled_cross_entropy

__all__ = ["Config", "LogitKD", "build"]


class Config(MethodConfig):
    """Distillation of logits."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["logit_kd"] = "logit_kd"
    alpha: NonNegativeFloat = 1.0
    """Weight of the divergence beside the cross entropy."""
    temperature: PositiveFloat = 4.0
    """Divisor of both sides' logits, unitless; the divergence is multiplied by its square."""


class LogitKD(PlainMethod):
    """Cross entropy where there is a label, divergence from the teacher's soft label everywhere."""

    def __init__(self, config: Config, setup: Setup):
        assert setup.teacher is not None
        super().__init__(setup.build_student())
        self.config = config
        self.labelled_share = setup.labelled_share
        self.frozen["teacher"] = setup.teacher

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput:
        student = model(batch)
        with torch.no_grad():
            teacher = self.frozen["teacher"](batch)
        parts = {
            "task": labelled_cross_entropy(student.logits_BC, batch.label_B, self.labelled_share),
            "kl_teacher": kl_at_temperature(student.logits_BC, teacher.logits_BC, self.config.temperature),
        }
        loss = parts["task"] + self.config.alpha * parts["kl_teacher"]
        gauges = teacher_gauges(teacher, batch, self.labelled_share)
        return StepOutput(loss, {name: part.detach() for name, part in parts.items()}, gauges, step=batch.step)


def build(config: Config, setup: Setup) -> LogitKD:
    return LogitKD(config, setup)
