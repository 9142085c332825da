"""The protocol of an engine and the two config sections that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from distkd.base import Forward, StrictConfig

__all__ = ["Engine", "EngineConfig", "OptimConfig"]


class EngineConfig(StrictConfig):
    """How a step is carried out."""

    name: Literal["ddp"] = "ddp"
    """`ddp`: replicated weights, gradients averaged; one process needs no wrapper and gets none."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """`bf16` runs the trunk's forward in bfloat16, weights, losses and agreement in float32; `fp64` is for tests."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    timeout_s: PositiveFloat = 600.0
    """How long a collective waits for a missing rank before the run fails."""


class OptimConfig(StrictConfig):
    """The optimizer and its schedule."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """`adam` puts weight decay into the gradient (L2), as the published methods do; `adamw` decouples it."""
    lr: PositiveFloat = 5e-4
    """Learning rate at the start of the schedule."""
    weight_decay: NonNegativeFloat = 0.0
    """Per step, on every trainable tensor."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the running moments; the first is SGD's momentum."""
    clip: NonNegativeFloat = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """`linear`: epoch e = 1..E runs at lr (1 - e / (E + 1)); `cosine`: per step to zero."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the rate rises linearly from zero, before the schedule applies."""


class Engine(Protocol):
    """Drives the optimizer; the loop calls `accumulate`, `backward` and `step` in that order."""

    def wrap(self, trainable: nn.Module, groups: Sequence[dict[str, Any]]) -> Forward: ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr_scale: float) -> Tensor: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...
