"""timm for the tests. It imports torchvision, of which its networks need nothing but names: empty ones stand in."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

__all__ = ["import_timm"]

_MODULES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


class _Name(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    __path__: list[str] = []  # noqa: RUF012  # a package

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


def import_timm() -> bool:
    """Whether timm is installed; if so it is imported afterwards, and what stood in for torchvision is gone."""
    if importlib.util.find_spec("timm") is None:
        return False
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return True
    names = [f"torchvision{part}" for part in _MODULES]
    for name in names:
        sys.modules[name] = _StandIn(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        import timm  # noqa: F401
    finally:
        for name in names:
            del sys.modules[name]
    return True
