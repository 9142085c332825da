"""Contrastive representation distillation (CRD, ICLR 2020): the student knows a sample as its teacher does.

Each network's embedding is compared with the other network's memory of the same sample and of many others.
Source: card `crd`, sections 2, 3 and 8.
"""

# Shapes: B samples of this rank, A anchors that it scores, D embedding, N training rows, J = 1 + negatives

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from distkd.base import Batch, Forward, StepOutput, World
from distkd.memory.candidates import Candidates
from distkd.memory.contrast import Choice
from distkd.methods._banks import BankConfig, Banks
from distkd.methods._plain import teacher_gauges
from distkd.methods._projected import ProjectedMethod
from distkd.methods._protocol import MethodConfig, Setup
from distkd.ops.draws import fold_in
from distkd.ops.kd import kl_at_temperature, labelled_cross_entropy

__all__ = ["CRD", "Config", "build"]


class Config(MethodConfig):
    """Instance contrast with two memory banks; defaults as published."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["crd"] = "crd"
    beta: NonNegativeFloat = 0.8
    """Weight of the contrast."""
    alpha: NonNegativeFloat = 0.0
    """Weight of the divergence of logits: 0 is CRD, 1 is CRD + KD."""
    temperature: PositiveFloat = 4.0
    """Divisor of both sides' logits, unitless; the divergence is multiplied by its square."""
    contrast_temperature: PositiveFloat = 0.07
    """Divisor of the cosines, unitless."""
    negatives: PositiveInt = 16384
    """Rows that a sample is told from; drawn with replacement where there are fewer."""
    negatives_from: Literal["other_class", "others"] = "other_class"
    """`other_class`: rows of other classes, as published; `others`: every row but the sample's own, without labels."""
    bank: BankConfig = BankConfig()
    """Where the rows of the banks lie, and in which precision."""
    bank_momentum: float = Field(default=0.5, ge=0, lt=1)
    """Share of the old row when a bank row is updated."""
    embedding_dim: PositiveInt = 128
    """Width of the projected embeddings and of the banks."""


class CRD(ProjectedMethod):
    """Cross entropy where there is a label, contrast with the teacher everywhere."""

    def __init__(self, config: Config, setup: Setup):
        super().__init__(config, setup)
        self.banks = Banks(config.bank, ("teacher",), config.embedding_dim, setup, momentum=config.bank_momentum)
        self.candidates = Candidates(
            setup.train_label_N, n_positive=1, n_negative=config.negatives, negatives=config.negatives_from
        )
        self.state = nn.ModuleDict({"banks": self.banks, "candidates": self.candidates})

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput:
        c = self.config
        student = model(batch)
        with torch.no_grad():
            teacher = self.frozen["teacher"](batch)
        own_BD, other_BD = self.model.own(student.feature_BD), self.model.other(teacher.feature_BD)
        rows = {"index": batch.index_B, "teacher.student": own_BD, "teacher.teacher": other_BD}
        arriving, anchors = self.banks.placement.meet(rows, fold_in(batch.key_B, batch.step), world)
        choice = Choice(self.candidates(anchors["key"], anchors["index"]), 1, (1, c.negatives))
        both = (anchors["teacher.student"], anchors["teacher.teacher"])
        parts = {
            "task": labelled_cross_entropy(student.logits_BC, batch.label_B, self.labelled_share),
            "contrast": self.banks.pair("teacher")(
                own_BD, other_BD, both, choice, temperature=c.contrast_temperature, world=world
            ),
        }
        loss = parts["task"] + c.beta * parts["contrast"]
        if c.alpha:
            parts["kl_teacher"] = kl_at_temperature(student.logits_BC, teacher.logits_BC, c.temperature)
            loss = loss + c.alpha * parts["kl_teacher"]
        detached = {name: part.detach() for name, part in parts.items()}
        gauges = teacher_gauges(teacher, batch, self.labelled_share)
        return StepOutput(loss, detached, gauges, (arriving,), step=batch.step)

    def after_step(self, out: StepOutput, world: World) -> None:
        self.banks.after_step(out, world)


def build(config: Config, setup: Setup) -> CRD:
    return CRD(config, setup)
