"""The words that all layers share: process layout, a batch, what a model and a step return, strict configs.

Nothing here computes; the layers above decide what to do with these values.
"""

# Shapes: B samples of this rank and pass, C classes, D feature width, N rows of the training set, K channels of a map
# of H x W places

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from distkd.world import World

__all__ = [
    "UNLABELLED",
    "Arriving",
    "Batch",
    "Forward",
    "InputSpec",
    "Outputs",
    "Pending",
    "StepOutput",
    "StrictConfig",
    "World",
]

UNLABELLED = -1
"""Label of a sample whose class is unknown or hidden: it is distilled, never scored by cross entropy."""


class StrictConfig(BaseModel):
    """A frozen section of the config: unknown keys, wrong types and out-of-range values are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a model receives of one modality, after the transform and without the batch dimension."""

    kind: Literal["vector", "image", "volume"]
    shape: tuple[int, ...]
    """(features,) of a vector, (channels, height, width) of an image, (channels, x, y, z) of a volume."""


class Pending(Protocol):
    """Inputs that travel as they are stored, and are made where a batch arrives."""

    def make(self, device: torch.device, dtype: torch.dtype) -> Sequence[dict[str, Tensor]]:
        """What the views of the batch still lack, one mapping a view."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one rank and one pass, and where in the run they are.

    Everything random downstream is a function of `key_B` (seed, epoch, sample) or of `(seed, step)`, so that no draw
    depends on the rank.
    """

    views: tuple[dict[str, Tensor], ...]
    """Independently augmented copies; each maps a modality to (B, ...) values, float. The target of a segmentation is
    among them, int64 (B, x, y, z) class numbers, `UNLABELLED` where a sample has none."""
    present: dict[str, Tensor]
    """Modality to (B,) bool; where it is false the values are zero."""
    label_B: Tensor
    """int64 class, or `UNLABELLED`."""
    index_B: Tensor
    """int64 row of the sample in the training set of the fold, the address in a memory bank; -1 outside of it."""
    sample_B: Tensor
    """int64 number of the sample in the manifest."""
    key_B: Tensor
    """int64 hash of (seed, epoch, sample)."""
    seed: int = 0
    step: int = 0
    epoch: int = 0
    progress: float = 0.0
    """Share of the run that is done, 0 <= progress < 1."""
    pending: Pending | None = None
    """What `to` completes the views with; None once it has."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.views[0]

    def __len__(self) -> int:
        return self.label_B.shape[0]

    def view(self, number: int) -> Batch:
        """The same samples with view `number` first; the last view stands in where fewer were made."""
        assert self.pending is None, "views are complete after `to`"
        return replace(self, views=(self.views[min(number, len(self.views) - 1)],))

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On `device`, with floating-point inputs as `dtype` and nothing pending; this one where it is so already."""

        def made(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else x.dtype, non_blocking=True)

        values = [x for view in self.views for x in view.values()]
        there = self.label_B.device == device and all(
            x.device == device and (x.dtype == dtype or not x.is_floating_point()) for x in values
        )
        if there and self.pending is None:
            return self
        views = tuple({name: made(x) for name, x in view.items()} for view in self.views)
        if self.pending is not None:
            both = zip(views, self.pending.make(device, dtype), strict=True)
            views = tuple({name: (view | late)[name] for name in self.present} for view, late in both)
        return replace(
            self,
            views=views,
            pending=None,
            present={name: x.to(device, non_blocking=True) for name, x in self.present.items()},
            label_B=self.label_B.to(device, non_blocking=True),
            index_B=self.index_B.to(device, non_blocking=True),
            sample_B=self.sample_B.to(device, non_blocking=True),
            key_B=self.key_B.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model returns."""

    feature_BD: Tensor
    """Trunk output, before the classifier."""
    logits_BC: Tensor
    branches: dict[str, Outputs] = field(default_factory=dict[str, "Outputs"])
    """Per modality, where a multi-modal model has a head for each; empty otherwise."""
    map_BKHW: Tensor | None = None
    """Activations whose mean over places is `feature_BD`, signed as the network makes them; only of a pooled head."""
    inner_BKHW: Tensor | None = None
    """Those of an earlier stage, where the trunk was asked to hand them out."""


class Forward(Protocol):
    """The engine-wrapped trainable module: the only call that records a graph through the student."""

    def __call__(self, batch: Batch) -> Outputs: ...


class Arriving(Protocol):
    """Rows of all ranks that may still be on their way."""

    def wait(self) -> dict[str, Tensor]:
        """By name, (G, ...), in rank order."""
        ...


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One pass of a method."""

    loss: Tensor
    """The scalar to run backward on; mean over this rank's samples."""
    parts: dict[str, Tensor]
    """Named losses before weighting, detached scalars."""
    gauges: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Other scalars worth a curve: `weight/<loss>` and `cosine/<loss>|<loss>`, equal on all ranks unless they are the
    gate's, which like `teacher/task` tell of this rank's samples; their mean over ranks tells of all."""
    rows: tuple[Arriving, ...] = ()
    """What memories are written with after the step, for each pass; the global batch is pass by pass, rank by rank."""
    step: int = 0

    @staticmethod
    def merge(outs: Sequence[StepOutput]) -> StepOutput:
        """The passes of one step as one output: scalars averaged, rows in pass order."""
        if len(outs) == 1:
            return outs[0]
        return StepOutput(
            loss=torch.stack([out.loss.detach() for out in outs]).mean(),
            parts={name: torch.stack([out.parts[name] for out in outs]).mean() for name in outs[0].parts},
            gauges={name: torch.stack([out.gauges[name] for out in outs]).mean() for name in outs[0].gauges},
            rows=tuple(arriving for out in outs for arriving in out.rows),
            step=outs[0].step,
        )
