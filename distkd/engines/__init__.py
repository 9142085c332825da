"""How gradients are computed, reduced and applied, behind one small protocol."""

from __future__ import annotations

import torch

from distkd.base import World
from distkd.engines.compiler import postpone_compiler
from distkd.engines.ddp import DDPEngine
from distkd.engines.optimizer import under
from distkd.engines.protocol import Engine, EngineConfig, Entry, OptimConfig, Update

__all__ = ["DDPEngine", "Engine", "EngineConfig", "Entry", "OptimConfig", "Update", "make_engine", "under"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(
    config: EngineConfig, optim: OptimConfig, world: World, *, device: torch.device, skip: bool = False
) -> Engine:
    """The engine that the config names; packages of an engine are imported only here."""
    autocast = _AUTOCAST.get(config.precision)
    if config.name == "deepspeed":
        from distkd.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(optim, world, device=device, stage=config.zero_stage, autocast=autocast)
    if config.name == "fsdp":
        from distkd.engines.fsdp import FSDPEngine

        return FSDPEngine(optim, world, device=device, autocast=autocast, skip=skip)
    if not config.compile:
        postpone_compiler()
    return DDPEngine(optim, world, device=device, autocast=autocast, skip=skip, compile=config.compile)
