"""Makes a rank of a test's run stop itself where the test wants it held; `tests/launch/held.py` asks for it.

Python imports this file by its name at the start of each process that has its folder on the path. A rank is its own
clock: however fast it is and however slow the test, it is held after the same step of the same attempt.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_TRAINS = "distkd.train.loop"
_RANK = int(os.environ.get("RANK", "0"))


class _Holds:
    """Where this rank is to be held; a file for each time that it was, with its process id, outlives the process."""

    def __init__(self, folder: str, ranks: int, moments: list[int | str]):
        self.ranks, self.moments = ranks, moments
        self.files = [Path(folder) / f"{number}-{_RANK}" for number in range(len(moments))]

    def left(self) -> list[tuple[int | str, Path]]:
        return [pair for pair in zip(self.moments, self.files, strict=True) if not pair[1].exists()]

    def begin(self) -> None:
        """At the start of a process of torchrun's."""
        if self.left() and int(os.environ["WORLD_SIZE"]) != self.ranks:
            while True:
                signal.pause()  # the nodes have not all met: torchrun ends this rank when they do
        if self.left() and self.left()[0][0] == "start":
            _stop(self.left()[0][1])

    def watch(self, module: ModuleType) -> None:
        """Hold the rank between two steps of its training."""
        names, first = vars(module), []
        train_step = names["train_step"]

        def watched(job: Any, passes: Sequence[Any], watch: Any) -> Any:
            step = passes[0].step
            first.append(step) if not first else None
            for moment, file in self.left()[:1]:
                if moment != "start" and step - first[0] >= int(moment):
                    _stop(file)
            return train_step(job, passes, watch)

        names["train_step"] = watched


class _Finder:
    """Hands the module that trains to `watch` once it is executed."""

    def __init__(self, holds: _Holds):
        self.holds = holds

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TRAINS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.holds.watch(module)

        spec.loader.exec_module = exec_module
        return spec


def _stop(file: Path) -> None:
    aside = file.with_name(f".{file.name}")
    aside.write_text(str(os.getpid()))
    aside.replace(file)  # who looks for it reads it
    os.kill(os.getpid(), signal.SIGSTOP)


if "DISTKD_TEST_HOLD" in os.environ:
    _holds = _Holds(**json.loads(os.environ["DISTKD_TEST_HOLD"]))
    if "RANK" in os.environ:
        _holds.begin()
    sys.meta_path.insert(0, _Finder(_holds))
