"""Keeps torch's optimizers and its DDP from loading torch's compiler where nothing is compiled.

That is a third of the time until a first step, and a thousand files that each rank reads from a shared disk.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["postpone_compiler"]

COMPILER = "torch._dynamo"


def postpone_compiler() -> None:
    """Put a stand-in where torch looks for its compiler, which is loaded when anything but eager execution asks for it.

    Does nothing where it is loaded already, or where this torch keeps it elsewhere.
    """
    if COMPILER in sys.modules:
        return
    spec = importlib.util.find_spec(COMPILER)
    if spec is None or spec.submodule_search_locations is None:
        return
    stand_in = _StandIn(
        COMPILER,
        disable=_disable,
        graph_break=_graph_break,
        utils=_StandIn(f"{COMPILER}.utils", get_optimize_ddp_mode=_ddp_mode),
        trace_rules=_StandIn(f"{COMPILER}.trace_rules", clear_lru_cache=lambda: None),
    )
    stand_in.__spec__, stand_in.__path__ = spec, list[str]()
    sys.modules[COMPILER] = stand_in
    sys.meta_path.insert(0, _Submodules())


class _StandIn(ModuleType):
    """Knows what eager execution asks for; whatever else is asked for is the real module's."""

    def __init__(self, name: str, **known: Any):
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # somebody looks through all modules
            raise AttributeError(name)
        _load()
        return getattr(importlib.import_module(self.__name__), name)


class _Submodules(MetaPathFinder):
    """Loads the compiler when a module of its is imported while the stand-in is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{COMPILER}.") or not isinstance(sys.modules.get(COMPILER), _StandIn):
            return None
        real = _load()
        if fullname in sys.modules:  # came with it: a second copy would have classes of its own
            return ModuleSpec(fullname, _Loaded(sys.modules[fullname]))
        return PathFinder.find_spec(fullname, real.__path__, target)


class _Loaded(Loader):
    """Of a module that is there: leaves it as it is."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def _load() -> ModuleType:
    if isinstance(sys.modules.get(COMPILER), _StandIn):
        del sys.modules[COMPILER]
    return importlib.import_module(COMPILER)


def _real() -> Any:
    """The compiler, where it is loaded."""
    module = sys.modules.get(COMPILER)
    return None if module is None or isinstance(module, _StandIn) else module


def _disable(fn: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
    """As the compiler's: the function as it is until there is a compiler, then what that makes of it."""
    disabled: list[Callable[..., Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled and (real := _real()) is not None and hasattr(real, "disable"):  # not while it is being loaded
            disabled.append(real.disable(fn, *arguments, **options))
        return (disabled[0] if disabled else fn)(*args, **kwargs)

    return call


def _graph_break(*arguments: Any) -> None:
    if (real := _real()) is not None:
        real.graph_break(*arguments)


def _ddp_mode() -> str:
    return "ddp_optimizer"  # the default of a setting that nobody can have changed without loading the compiler
