"""torch's optimizers from the config, and the names under which their state is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from distkd.engines.protocol import OptimConfig
from distkd.errors import CheckpointError

__all__ = ["OPTIMIZER", "TRAINABLE", "check_fields", "make_optimizer"]

TRAINABLE, OPTIMIZER = "trainable/", "optimizer/"
"""Prefixes of the entries of a checkpoint."""

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_FIELDS = {"adam": _MOMENTS, "adamw": _MOMENTS, "sgd": {"momentum_buffer"}}
"""What each optimizer remembers of a parameter."""


def make_optimizer(config: OptimConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of the config over these groups."""
    groups = [dict(group) for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.betas[0], weight_decay=config.weight_decay, foreach=True
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, foreach=True)


def check_fields(config: OptimConfig, fields: Iterable[str]) -> None:
    """Whether saved fields belong to this optimizer.

    Raises:
        CheckpointError: they are another optimizer's.
    """
    found = set(fields)
    if found - _FIELDS[config.name]:
        raise CheckpointError(
            f"the checkpoint holds {', '.join(sorted(found))} of another optimizer than optim.name={config.name}, "
            f"which keeps {', '.join(sorted(_FIELDS[config.name]))}; train with the old one"
        )
