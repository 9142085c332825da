"""The registry is the folder: one method, one file, with its `Config` and its `build(config, setup)` in it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from distkd.errors import ConfigError
from distkd.methods._protocol import Method, MethodConfig, ParamGroup, Setup

__all__ = ["Method", "MethodConfig", "ParamGroup", "Setup", "available", "build", "config_class"]


def available() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def _module(name: str) -> ModuleType:
    if name not in available():
        close = difflib.get_close_matches(name, available(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"unknown method {name!r}; available: {', '.join(available())}{hint}")
    return importlib.import_module(f"{__name__}.{name}")


def config_class(name: str) -> type[MethodConfig]:
    """The typed `method` section of a method.

    Raises:
        ConfigError: no file of that name.
    """
    return _module(name).Config


def build(config: MethodConfig, setup: Setup) -> Method:
    """The method that `config.name` names, in `setup.dtype`."""
    method: Method = _module(config.name).build(config, setup)
    for part in (method.trainable, method.frozen, method.state):
        part.to(setup.dtype)
    return method
