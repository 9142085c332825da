"""How gradients are computed, reduced and applied, behind one small protocol."""

from distkd.engines.ddp import DDPEngine
from distkd.engines.protocol import Engine, EngineConfig, OptimConfig

__all__ = ["DDPEngine", "Engine", "EngineConfig", "OptimConfig"]
