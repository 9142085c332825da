"""A method on made-up vectors and images, in float64, with everything that is random a function of a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distkd import methods
from distkd.base import UNLABELLED, Batch, InputSpec, World
from distkd.methods import Method, MethodConfig, Setup
from distkd.models.build import ModelConfig, build

__all__ = ["N_CLASSES", "ROWS", "SMALL", "SPECS", "batch_of", "gradients", "make"]

SPECS = {
    "gene": InputSpec("vector", (5,)),
    "cells": InputSpec("vector", (4,)),
    "scan": InputSpec("image", (2, 12, 12)),
}
ROWS, N_CLASSES = 24, 3

SMALL: dict[str, dict[str, Any]] = {
    "dc_distill": {"embedding_dim": 4, "positives": 6, "negatives": 8, "keep_positive": 3, "keep_negative": 5},
    "dc_teacher": {"l1": {"gene": 1e-2}},
}

_MAPPED = {"scan": {"name": "cnn", "widths": [4, 6], "head": "pooled"}}


def model_config(method: str, **settings: Any) -> ModelConfig:
    """Two vectors, one of them where there is a teacher; an image for one of them where maps are needed."""
    kind = methods.config_class(method)
    student = {"modalities": _seen(kind, 1 if kind.needs_teacher else 2), "feature_dim": 6, "norm": "group"}
    return ModelConfig.model_validate({**student, **_encoders(kind), "dropout": 0.0, **settings})


def _seen(kind: type[MethodConfig], n: int) -> list[str]:
    return ["gene", "scan" if kind.needs_maps else "cells"][-n:]


def _encoders(kind: type[MethodConfig]) -> dict[str, Any]:
    return {"encoders": _MAPPED} if kind.needs_maps else {}


def make(
    method: str,
    *,
    labels: Tensor | None = None,
    model: dict[str, Any] | None = None,
    seed: int = 3,
    world: World | None = None,
    teacher_dropout: float = 0.0,
    **config: Any,
) -> Method:
    """A method with 24 rows of three classes; a teacher on both modalities where it needs one."""
    settings = {"name": method, **SMALL.get(method, {}), **config}
    kind = methods.config_class(method)
    two = {"modalities": _seen(kind, 2), **_encoders(kind)}
    both = model_config("supervised", feature_dim=7, dropout=teacher_dropout, **two)
    teacher = build(both, SPECS, N_CLASSES, seed=9).double().eval().requires_grad_(False)
    teacher.role = "teacher"
    setup = Setup(
        model=model_config(method, **(model or {})),
        specs=SPECS,
        n_classes=N_CLASSES,
        train_label_N=torch.arange(ROWS) % N_CLASSES if labels is None else labels,
        seed=seed,
        world=world or World(),
        teacher=teacher if kind.needs_teacher else None,
        dtype=torch.float64,
    )
    return methods.build(kind.model_validate(settings), setup)


def batch_of(rows: list[int], *, unlabelled: tuple[int, ...] = (), step: int = 0, views: int = 2) -> Batch:
    """Some rows of the training set; `unlabelled` are rows whose label is hidden."""
    index = torch.tensor(rows)
    label = torch.where(torch.isin(index, torch.tensor(unlabelled or (-5,))), UNLABELLED, index % N_CLASSES)

    def view(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(100 * step + number)
        draw = {name: torch.randn(ROWS, *spec.shape, generator=generator).double() for name, spec in SPECS.items()}
        return {name: values[index] for name, values in draw.items()}

    return Batch(
        views=tuple(view(number) for number in range(views)),
        present={name: torch.ones(len(rows), dtype=torch.bool) for name in SPECS},
        label_B=label,
        index_B=index,
        sample_B=index,
        key_B=index * 7 + 1000 * step,
        seed=3,
        step=step,
    )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
