"""Stage 1 of DC-Distill: a multi-modal teacher whose three heads are also taught by its own mean teacher.

Source: card `dc-distill-gk-refine`, section 3. The gradient of the fused head stops before the encoders when
`model.detach_branches` is true (`cut_fuse_grad` of the released code, on in the paper).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from distkd.base import Batch, Forward, Outputs, StepOutput, World
from distkd.errors import ConfigError
from distkd.methods._plain import PlainMethod
from distkd.methods._protocol import MethodConfig, Setup
from distkd.models.ema import MeanTeacher
from distkd.ops.kd import kl_at_temperature, labelled_cross_entropy

__all__ = ["Config", "DCTeacher", "build"]


class Config(MethodConfig):
    """The multi-modal teacher of DC-Distill."""

    views: ClassVar[int] = 2

    name: Literal["dc_teacher"] = "dc_teacher"
    kd_weight: NonNegativeFloat = 1.0
    """Weight of the divergence of each head from its mean teacher; no ramp-up."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Upper bound of the mean teacher's memory; it starts at 0 and grows as 1 - 1 / (step + 1)."""
    l1: dict[str, NonNegativeFloat] = Field(default_factory=dict[str, NonNegativeFloat])
    """Modality to weight of the L1 norm of all parameters of its network, head included (3e-4 on the omics)."""


class DCTeacher(PlainMethod):
    """Likelihood of every head, divergence of every head from its mean teacher, sparsity of chosen encoders."""

    def __init__(self, config: Config, setup: Setup):
        unknown = sorted(set(config.l1) - set(setup.model.modalities))
        if unknown:
            raise ConfigError(
                f"method.l1 names {unknown[0]!r}, which is not in model.modalities {setup.model.modalities}"
            )
        super().__init__(setup.build_student())
        self.config = config
        self.labelled_share = setup.labelled_share
        # another seed: before its first update the mean teacher is a stranger, as in the source
        self.mean_teacher = MeanTeacher(setup.build_student("mean_teacher"), decay=config.ema_decay)
        self.state["mean_teacher"] = self.mean_teacher
        self.follows_weights = True
        self.outside = [p for modality in config.l1 for p in self.student.branch_parameters(modality)]

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput:
        out = model(batch)
        mean = self.mean_teacher(batch.view(1))
        task = torch.stack(
            [labelled_cross_entropy(head.logits_BC, batch.label_B, self.labelled_share) for head in _heads(out)]
        )
        kl = torch.stack(
            [kl_at_temperature(a.logits_BC, b.logits_BC, 1.0) for a, b in zip(_heads(out), _heads(mean), strict=True)]
        )
        parts = {"task": task.sum(), "kl_mean_teacher": kl.sum(), "l1": self._l1(task)}
        loss = parts["task"] + self.config.kd_weight * parts["kl_mean_teacher"] + parts["l1"]
        return StepOutput(loss, {name: part.detach() for name, part in parts.items()}, step=batch.step)

    def _l1(self, like: Tensor) -> Tensor:
        total = like.new_zeros(())
        for modality, weight in self.config.l1.items():
            parameters = self.student.branch_parameters(modality)
            total = total + weight * torch.stack([p.abs().sum() for p in parameters]).sum()
        return total

    def after_step(self, out: StepOutput, world: World) -> None:
        self.mean_teacher.update(self.student, out.step)


def _heads(out: Outputs) -> list[Outputs]:
    return [*out.branches.values(), out]


def build(config: Config, setup: Setup) -> DCTeacher:
    return DCTeacher(config, setup)
