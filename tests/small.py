"""Runs that take less than a second: the toy shards, a teacher on two modalities, students on one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distkd.base import World
from distkd.train.loop import train
from distkd.train.settings import Settings
from tests.data.toy import write_toy
from tests.laws.common import settings_of

__all__ = ["Small", "make_small"]

METHODS: dict[str, dict[str, Any]] = {
    "teacher": {"name": "supervised"},
    "alone": {"name": "supervised"},
    "picture": {"name": "supervised"},
    "student": {"name": "logit_kd"},
}
MODALITIES = {"teacher": ["gene", "slide"], "alone": ["gene"], "picture": ["slide"], "student": ["coarse"]}


@dataclass(frozen=True)
class Small:
    """A shard set of 54 samples and a root of trained runs, one of each of `METHODS`; look, do not write."""

    shards: Path
    root: Path

    def config(self, kind: str, **overrides: Any) -> dict[str, Any]:
        """The config of a run; `overrides` replace fields of whole sections."""
        images = [name for name in MODALITIES[kind] if name != "gene"]
        config: dict[str, Any] = {
            "run": {"root": str(self.root), "name": kind, "epochs": 2, "log_every": 1, "seed": 1},
            "method": METHODS[kind],
            "model": {
                "modalities": MODALITIES[kind],
                "feature_dim": 6,
                "encoders": {name: {"name": "cnn", "widths": [4]} for name in images},
            },
            "data": {"shards": str(self.shards), "threads": 0},
            "batch": {"global_batch": 8},
            "engine": {"device": "cpu"},
            "teacher": {"export": str(self.root / "teacher") if kind == "student" else None},
        }
        for section, values in overrides.items():
            config[section] = {**config.get(section, {}), **values}
        return config

    def settings(self, kind: str, **overrides: Any) -> Settings:
        return settings_of(self.config(kind, **overrides))

    def write(self, folder: Path, kind: str, **overrides: Any) -> Path:
        """The config as a file in `folder`, its runs below `folder/runs`."""
        config = self.config(kind, **{**overrides, "run": {"root": str(folder / "runs"), **overrides.get("run", {})}})
        path = folder / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path


def make_small(folder: Path) -> Small:
    write_toy(folder / "shards", n_samples=54)
    small = Small(folder / "shards", folder / "runs")
    for kind in METHODS:
        train(small.settings(kind), World())
    return small
