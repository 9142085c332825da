"""The whole config of a run as one typed value; each section is declared beside the code that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    StringConstraints,
    field_validator,
    model_validator,
)

from distkd.base import StrictConfig, World
from distkd.data.dataset import DataConfig
from distkd.data.manifest import closest
from distkd.engines import EngineConfig, OptimConfig
from distkd.errors import ConfigError
from distkd.methods import MethodConfig
from distkd.metrics.classification import METRICS
from distkd.metrics.exporter import MetricsConfig
from distkd.models.build import ModelConfig

__all__ = ["BatchConfig", "EvalConfig", "RunConfig", "Settings", "TeacherConfig"]


class RunConfig(StrictConfig):
    """Where a run lives and how long it is."""

    root: Path = Path("runs")
    """Folder of all runs."""
    name: Annotated[str, StringConstraints(min_length=1)] = "run"
    """Folder of this run below `root`; `{fold}` and `{seed}` stand for the run's own."""
    seed: int = 0
    """Source of every random draw."""
    epochs: PositiveInt = 10
    """Passes over the training set."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics; signals are agreed on at these steps too."""
    eval_every: PositiveInt = 1
    """Epochs between two evaluations of the validation split."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between two checkpoints; 0 writes one after each epoch."""
    keep_last: PositiveInt = 2
    """Checkpoints that are kept."""
    keep_best: bool = False
    """Keep the checkpoint of the best student too; its weights are in every later checkpoint anyway."""
    save: Literal["async", "sync"] = "async"
    """`async` copies what a checkpoint needs and writes it while training goes on; `sync` waits for the disk."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite gradient does: end the run, or be counted and left out on all ranks; either way its
    samples are named. Ten in a row always end the run."""


class BatchConfig(StrictConfig):
    """How a step's samples are divided."""

    global_batch: PositiveInt = 64
    """Samples per optimizer step, over all ranks and accumulation passes."""
    micro_batch: PositiveInt | None = None
    """Samples per rank and forward pass; unset divides the global batch over the ranks without accumulation."""

    def per_rank(self, world: World) -> int:
        """Samples per rank and pass.

        Raises:
            ConfigError: the global batch cannot be divided.
        """
        if self.micro_batch is not None:
            return self.micro_batch
        if self.global_batch % world.size:
            raise ConfigError(
                f"batch.global_batch={self.global_batch} is not a multiple of the world size {world.size}; "
                f"use {self._nearest(world.size)} or another number of ranks"
            )
        return self.global_batch // world.size

    def passes(self, world: World) -> int:
        """Forward passes per optimizer step."""
        micro = self.per_rank(world)
        together = micro * world.size
        if self.global_batch % together:
            raise ConfigError(
                f"batch.global_batch={self.global_batch} is not a multiple of micro_batch x world size = "
                f"{micro} x {world.size} = {together}; use {self._nearest(together)}, or leave micro_batch out"
            )
        return self.global_batch // together

    def _nearest(self, unit: int) -> int:
        return max(unit, self.global_batch // unit * unit)


class TeacherConfig(StrictConfig):
    """Where the frozen teacher comes from."""

    export: str | None = None
    """A run or export folder, or the bare name of a run below `run.root`, with the same placeholders as `run.name`."""


class EvalConfig(StrictConfig):
    """What is measured, and which weights are handed on."""

    select: Literal["best", "last"] = "best"
    """`best` exports the weights with the best `metric` on the validation split, `last` those of the last step."""
    metric: str = "auc_macro"
    """Validation metric that selects; higher is better."""
    min_gain: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """By how much it has to exceed the best so far to select anew; the first value always does."""
    attention_samples: NonNegativeInt = 2
    """Samples of each class, at most 12 in all, whose pictures are kept in the run folder with the maps of a model that
    has some, for the report; 0 keeps none."""
    level: Literal["sample", "group", "patient"] = "patient"
    """Level of the headline metrics: single samples, groups such as regions of interest, or patients."""
    patient_rule: Literal["mean", "max"] = "mean"
    """A patient's prediction: mean of the groups' probabilities, or each class's largest log-probability."""

    @field_validator("metric")
    @classmethod
    def _is_known(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ConfigError(f"unknown metric{closest(metric, METRICS)}")
        return metric


class Settings(StrictConfig):
    """Everything that a run depends on; written into the run folder, where it starts the same run again."""

    run: RunConfig = RunConfig()
    method: SerializeAsAny[MethodConfig]
    model: ModelConfig
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _engine_fits(self) -> Settings:
        if self.engine.name != "ddp" and self.optim.fused == "apex":
            raise ConfigError(f"optim.fused=apex is not available under {self.engine.name}; use optim.fused torch")
        plain = self.engine.name == "ddp" and self.engine.precision in ("fp32", "fp64") and not self.engine.compile
        if self.method.second_order and not plain:
            raise ConfigError(
                f"method {self.method.name!r} as configured differentiates the student's outputs within the step, "
                "which is available with engine.name ddp, precision fp32 or fp64, without compile; use these, or "
                "maps that need no backward pass (method.level_attention -1)"
            )
        return self

    @property
    def folder(self) -> Path:
        return self.run.root / self.run.name
