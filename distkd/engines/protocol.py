"""The protocol of an engine and the two config sections that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from distkd.base import Forward, StrictConfig
from distkd.errors import ConfigError

__all__ = ["Engine", "EngineConfig", "Entry", "OptimConfig", "Update"]


class EngineConfig(StrictConfig):
    """How a step is carried out."""

    name: Literal["ddp", "deepspeed", "fsdp"] = "ddp"
    """`ddp`: whole weights on every rank; `deepspeed`: ZeRO, see `zero_stage`; `fsdp`: sharded by torch (FSDP2)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed spreads over the ranks: 1 optimizer state, 2 gradients too, 3 weights too, 0 nothing."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """`bf16`, `fp16`: the model's forward in half precision; weights, losses and agreement stay float32. `fp16` scales
    the loss. `fp64` is for tests."""
    compile: bool = False
    """Compile the model with `torch.compile`; the first steps take minutes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    timeout_s: PositiveFloat = 600.0
    """How long a collective waits for a missing rank before the run fails."""
    debug: bool = False
    """Compare every collective over the ranks before it starts, and name the ranks that disagree; slow."""

    @model_validator(mode="after")
    def _fits(self) -> EngineConfig:
        if self.name == "deepspeed" and self.precision in ("fp16", "fp64"):
            other = "bf16" if self.precision == "fp16" else "fp32"
            raise ConfigError(
                f"engine.precision={self.precision} is not available under deepspeed; use {other}, or engine.name ddp"
            )
        if self.name == "fsdp" and self.precision == "fp16":
            raise ConfigError("engine.precision=fp16 is not available under fsdp; use bf16, or engine.name ddp")
        if self.compile and self.name != "ddp":
            raise ConfigError(f"engine.compile is not available under {self.name}; use engine.name ddp, or do without")
        return self


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
    fused: Literal["auto", "apex", "torch", "none"] = "auto"
    """The update as one kernel: NVIDIA `apex`, or `torch`'s own; `none` loops over the tensors. `auto` takes apex on
    CUDA where it is installed, otherwise torch."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One whole tensor of a checkpoint.

    Names are equal in all engines: `trainable/<key of the state dict>`, `optimizer/<parameter>/<field>` with torch's
    field names, `engine/<name>` for what the engine itself remembers.
    """

    name: str
    nbytes: int
    read: Callable[[], Tensor]
    """The tensor as it stands, perhaps sharing memory with the live one. A collective where weights are spread over
    ranks: every rank calls it, in the order of the entries."""
    steady: bool = False
    """Whether what `read` gave changes in the engine's `step` or after it, so that it can be copied until then."""
    local: bool = False
    """Whether only this rank has it, under a name of its own, so that nobody else can write it."""


@dataclass(frozen=True, slots=True)
class Update:
    """What became of a step."""

    norm: Tensor
    """Norm of the averaged gradient before clipping, a scalar on the device, equal on all ranks."""
    applied: bool = True
    """False where the gradient was not finite and the engine was told to skip such steps."""


class Engine(Protocol):
    """Drives the optimizer; the loop calls `accumulate`, `backward` and `step` in that order."""

    sharded: bool
    """Whether parameters are spread over the ranks between their uses."""
    own_work: tuple[str, ...]
    """Phases of a step in which no rank waits for another, but for what goes through `distkd.comm`."""

    def wrap(
        self, trainable: nn.Module, groups: Sequence[dict[str, Any]], *, outside: Sequence[nn.Parameter] = ()
    ) -> Forward:
        """The module that records the graph; `outside` are parameters that losses use beyond its forward."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around a pass; ranks exchange gradients in the last pass of a step only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of a pass. Raises LostRankError where another rank was gone when its gradient was needed."""
        ...

    def step(self, lr_scale: float) -> Update:
        """One update of the weights at `lr_scale` times each group's rate."""
        ...

    def traffic(self, passes: int, *, follows: bool) -> dict[str, int]:
        """Bytes that this rank hands to the collectives of the library below in a step of so many passes.

        By what travels, `gradients` and `weights`, and from their sizes: what goes through `distkd.comm` is counted
        there, and no checkpoint or evaluation is in it. About right where a module of the model runs more than once
        in a forward, or not at all.

        Args:
            follows: whether the weights are `whole` once more after each step.
        """
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Inside, parameters are whole tensors on every rank, to be read. Collective where `sharded`."""
        ...

    def entries(self) -> list[Entry]:
        """Everything that the engine must find again to go on; the same names on every rank."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what any engine's `entries` gave, at any number of ranks.

        Raises:
            CheckpointError: tensors are missing, or belong to another model or optimizer.
        """
        ...
