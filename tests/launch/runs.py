"""Runs for the tests that kill: a config long enough that every signal meets it at work, and its uninterrupted twin."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from distkd.base import World
from distkd.train.loop import train
from tests.laws.common import law_config, settings_of
from tests.pool import Pool, Ranks

__all__ = ["Finish", "finisher", "law_run", "write_config"]

_PATIENCE_S = 600.0
"""How long a whole run may take; beside a dozen other processes it takes minutes."""

Finish = Callable[[dict[str, Any], Path, int], Path]
"""Of a config, a root and a number of ranks: train from where the run below the root stands to its end; its folder."""


def law_run(method: str, shards: Path, root: Path, **overrides: Any) -> dict[str, Any]:
    """90 steps in 3 epochs of a method's law run, a checkpoint every 6; `overrides` replace sections' fields.

    Every such run is named `run`, so that what two of them leave behind is equal to the byte.
    """
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "epochs": 3, "log_every": 1, "checkpoint_every": 6},
        "batch": {"global_batch": 8},
        "engine": {"precision": "fp32", "timeout_s": 120},
    }
    for section, values in overrides.items():
        sections[section] = sections.get(section, {}) | values
    config = law_config(method, shards, root, **sections)
    if config["teacher"]["export"] is not None:
        config["teacher"] = {"export": str(root / "teacher")}  # the run has a root of its own
    return config


def write_config(config: dict[str, Any], root: Path) -> tuple[Path, Path]:
    """The config as a file, and the folder of its run, both below `root`."""
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "run": {**config["run"], "root": str(root)}}))
    return path, root / config["run"]["name"]


def finisher(pool: Pool) -> Finish:
    """Without a launcher, on ranks that are there already, for runs of which only the end matters; from any thread."""
    turn = threading.Lock()

    def finish(config: dict[str, Any], root: Path, ranks: int) -> Path:
        root.mkdir(exist_ok=True)
        _, folder = write_config(config, root)
        config = {**config, "run": {**config["run"], "root": str(root)}}
        with turn:
            Ranks(pool, ranks, _PATIENCE_S).run(_train, config=config)
        return folder

    return finish


def _train(world: World, config: dict[str, Any]) -> None:
    train(settings_of(config), world)
