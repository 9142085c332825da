"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from distkd.engines import OptimConfig

__all__ = ["lr_scale"]


def lr_scale(config: OptimConfig, step: int, *, steps_per_epoch: int, epochs: int) -> float:
    """What the learning rate is multiplied by at a step, 0-based; independent of the world size.

    `linear` is constant within an epoch: epoch e = 1..E has 1 - e / (E + 1), as the published code schedules it.
    """
    scale = 1.0
    if config.schedule == "linear":
        scale = 1 - (step // steps_per_epoch + 1) / (epochs + 1)
    elif config.schedule == "cosine":
        scale = 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs)))
    warmup = config.warmup_epochs * steps_per_epoch
    return scale * min(1.0, (step + 1) / warmup) if warmup else scale
