"""Runs for the tests that kill: a config long enough that every signal meets it at work, and its uninterrupted twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.launch.processes import Launched, ranks_command
from tests.laws.common import law_config

__all__ = ["law_run", "run_to_the_end", "write_config"]


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


def run_to_the_end(config: dict[str, Any], root: Path, *, ranks: int) -> Path:
    """Train without interruption; the run folder."""
    path, folder = write_config(config, root)
    with Launched(ranks_command(path, ranks=ranks), root / "log") as run:
        assert run.wait() == 0, run.said()
    return folder
