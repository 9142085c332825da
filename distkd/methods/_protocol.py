"""What a method is: the protocol that the loop drives, and what a method is given to build itself from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from distkd.base import Batch, Forward, InputSpec, StepOutput, StrictConfig, World
from distkd.models.build import Classifier, ModelConfig, build
from distkd.ops.draws import integer_key, text_key

__all__ = ["Method", "MethodConfig", "ParamGroup", "Setup"]

ParamGroup = dict[str, Any]
"""As torch's optimizers take it: `params` and whatever differs from the optimizer's defaults."""


class MethodConfig(StrictConfig):
    """Base of the `method` section; a method adds its own fields below `name`."""

    needs_teacher: ClassVar[bool] = False
    """Whether `teacher.export` must name a trained teacher."""
    needs_maps: ClassVar[bool] = False
    """Whether student and teacher must hand out a map, as image encoders with a pooled head do."""
    views: ClassVar[int] = 1
    """Independently augmented copies of a sample that a step reads."""

    name: Any  # each method narrows it to the one text that it is
    """Which method: a file of `distkd/methods`."""

    @property
    def second_order(self) -> bool:
        """Whether a step differentiates what the student's forward gave, and the backward that result again."""
        return False


@dataclass(frozen=True, slots=True)
class Setup:
    """The task and the place that a method is built for."""

    model: ModelConfig
    specs: Mapping[str, InputSpec]
    n_classes: int
    train_label_N: Tensor
    """int64 label of every row of the training set, negative where unknown or hidden."""
    seed: int
    world: World
    teacher: Classifier | None = None
    dtype: torch.dtype = torch.float32
    memory_bytes: int = 2**62
    """Memory of the device, or this rank's share of the host's where it computes there; unlimited if not told."""

    @property
    def labelled_share(self) -> float:
        """Share of the training set that has a label."""
        return (self.train_label_N >= 0).float().mean().item()

    def build_student(self, role: str = "student") -> Classifier:
        """A model of the configured architecture; another role, other initial weights."""
        specs = {name: self.specs[name] for name in self.model.modalities}
        return build(self.model, specs, self.n_classes, seed=integer_key(self.seed, text_key(role)))


class Method(Protocol):
    """One way of learning. Built once, moved to the device, then driven by `train.loop`."""

    config: Any
    student: Classifier
    """The model that is evaluated and exported, a part of `trainable`."""
    trainable: nn.Module
    """Everything that learns, projection heads included: what the engine wraps. `trainable(batch)` is the student."""
    frozen: nn.ModuleDict
    """Teachers: no gradient, not in checkpoints, identified by a digest."""
    state: nn.ModuleDict
    """Banks, mean teacher, running weights: in checkpoints, never optimised."""
    outside: Sequence[nn.Parameter]
    """Learning parameters that `step` uses beyond `model(batch)`: engines keep them whole on every rank."""
    follows_weights: bool
    """Whether `after_step` reads the trained weights, as a mean teacher does."""

    def groups(self) -> list[ParamGroup]: ...

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput: ...

    def after_step(self, out: StepOutput, world: World) -> None: ...

    def after_eval(self, report: Mapping[str, float], world: World) -> None: ...

    def predict(self, batch: Batch) -> Tensor: ...
