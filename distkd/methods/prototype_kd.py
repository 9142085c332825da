"""Distillation through prototypes: student and teacher are each drawn to the codes of the sample's class.

The two embeddings never meet directly. Codes are running means of the teacher's embeddings over the global batch,
written after the step; nothing is remembered of single samples, so it also works at a batch of one. Source: card
`beyond`, section 3.1 (MoMKD, arXiv 2602.21395), where the codes are learned by gradient instead.
"""

# Shapes: B samples of this rank, D embedding width

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from distkd.base import Batch, Forward, StepOutput, World
from distkd.comm.packed import start_gather
from distkd.errors import ConfigError
from distkd.memory.prototypes import Prototypes
from distkd.methods._plain import teacher_gauges
from distkd.methods._projected import ProjectedMethod
from distkd.methods._protocol import MethodConfig, Setup
from distkd.ops.kd import kl_at_temperature, labelled_cross_entropy
from distkd.ops.prototypes import prototype_margin

__all__ = ["Config", "PrototypeKD", "build"]


class Config(MethodConfig):
    """Margins to class prototypes; weights are the published ones relative to the cross entropy's."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["prototype_kd"] = "prototype_kd"
    beta: NonNegativeFloat = 0.4
    """Weight of the student's margin to the prototypes."""
    teacher_beta: NonNegativeFloat = 0.1
    """Weight of the teacher's margin, from which its projection learns; the teacher itself is frozen."""
    alpha: NonNegativeFloat = 0.0
    """Weight of the divergence of logits, which the method can be used with."""
    temperature: PositiveFloat = 4.0
    """Divisor of both sides' logits, unitless; the divergence is multiplied by its square."""
    embedding_dim: PositiveInt = 64
    """Width of the projected embeddings and of the prototypes."""
    per_class: PositiveInt = 1
    """Codes of a class; a sample moves the one it is nearest to (the source has 16)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """What is left of a code's sum of embeddings at a step that adds to it."""
    sharpness: PositiveFloat = 5.0
    """How close the score of a class is to its nearest code, unitless."""
    margin: float = 0.3
    """By how much a sample's own class has to score above another one, on the scale of cosines."""
    scale: PositiveFloat = 20.0
    """Steepness of the loss beside the margin, unitless."""


class PrototypeKD(ProjectedMethod):
    """Cross entropy and two margins, all of the labelled samples."""

    def __init__(self, config: Config, setup: Setup):
        _check_labels(setup)
        super().__init__(config, setup)
        self.prototypes = Prototypes(
            setup.n_classes, config.embedding_dim, per_class=config.per_class, momentum=config.momentum
        )
        self.state["prototypes"] = self.prototypes

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput:
        c = self.config
        student = model(batch)
        with torch.no_grad():
            teacher = self.frozen["teacher"](batch)
        teacher_BD = self.model.other(teacher.feature_BD)
        arriving = start_gather({"embedding": teacher_BD, "label": batch.label_B}, world)
        code_CMD, known_CM = self.prototypes.codes()

        def margin(embedding_BD: Tensor) -> Tensor:
            return prototype_margin(
                embedding_BD,
                batch.label_B,
                code_CMD,
                known_CM,
                sharpness=c.sharpness,
                margin=c.margin,
                scale=c.scale,
                labelled_share=self.labelled_share,
            )

        parts = {
            "task": labelled_cross_entropy(student.logits_BC, batch.label_B, self.labelled_share),
            "kl_teacher": kl_at_temperature(student.logits_BC, teacher.logits_BC, c.temperature),
            "margin_student": margin(self.model.own(student.feature_BD)),
            "margin_teacher": margin(teacher_BD),
        }
        loss = (
            parts["task"]
            + c.alpha * parts["kl_teacher"]
            + c.beta * parts["margin_student"]
            + c.teacher_beta * parts["margin_teacher"]
        )
        detached = {name: part.detach() for name, part in parts.items()}
        gauges = teacher_gauges(teacher, batch, self.labelled_share)
        gauges["prototypes/known"] = known_CM.to(teacher_BD.dtype).mean()
        return StepOutput(loss, detached, gauges, (arriving,), step=batch.step)

    def after_step(self, out: StepOutput, world: World) -> None:
        passes = [arriving.wait() for arriving in out.rows]
        self.prototypes.update(
            torch.cat([rows["embedding"] for rows in passes]), torch.cat([rows["label"] for rows in passes])
        )


def _check_labels(setup: Setup) -> None:
    """Prototypes need two classes, and every label a place."""
    found = sorted(set(setup.train_label_N.tolist()))
    if found[-1] >= setup.n_classes:
        raise ConfigError(
            f"training labels reach {found[-1]}, but the {setup.n_classes} classes of the task are 0 to "
            f"{setup.n_classes - 1}; make the shards again"
        )
    if sum(label >= 0 for label in found) < 2:
        raise ConfigError(
            f"method 'prototype_kd' compares classes, but the training labels have {sum(x >= 0 for x in found)} of the "
            f"task's {setup.n_classes}; use a split with at least two, or method 'rrd', which needs no labels"
        )


def build(config: Config, setup: Setup) -> PrototypeKD:
    return PrototypeKD(config, setup)
