"""Cross entropy and nothing else: a teacher on all its modalities, or the student alone, the measure of others."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from distkd.base import Batch, Forward, StepOutput, World
from distkd.methods._plain import PlainMethod
from distkd.methods._protocol import MethodConfig, Setup
from distkd.ops.kd import labelled_cross_entropy

__all__ = ["Config", "Supervised", "build"]


class Config(MethodConfig):
    """Supervised training."""

    name: Literal["supervised"] = "supervised"
    branch_weight: NonNegativeFloat = 1.0
    """Weight of the cross entropy of each modality's own head, where the model has several modalities."""


class Supervised(PlainMethod):
    """Cross entropy of the fused head, and of each modality's own head."""

    def __init__(self, config: Config, setup: Setup):
        super().__init__(setup.build_student())
        self.config = config
        self.labelled_share = setup.labelled_share

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput:
        out = model(batch)
        parts = {"task": labelled_cross_entropy(out.logits_BC, batch.label_B, self.labelled_share)}
        for modality, branch in out.branches.items():
            parts[f"task/{modality}"] = labelled_cross_entropy(branch.logits_BC, batch.label_B, self.labelled_share)
        loss = parts["task"]
        for name, part in parts.items():
            if name != "task":
                loss = loss + self.config.branch_weight * part
        return StepOutput(loss, {name: part.detach() for name, part in parts.items()}, step=batch.step)


def build(config: Config, setup: Setup) -> Supervised:
    return Supervised(config, setup)
