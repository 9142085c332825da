"""Run folders as values: what was configured, logged and measured, and how it ended. Reads, decides nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from distkd.errors import DataError
from distkd.metrics.jsonl import read_jsonl

__all__ = ["Evaluation", "Run", "find_runs", "load_run"]

log = logging.getLogger(__name__)

_MAX_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`eval/<split>.json`."""

    n: int
    level: str
    metrics: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    confusion: list[list[int]]
    class_names: list[str]
    levels: dict[str, dict[str, Any]]
    notes: list[str]
    selection: dict[str, Any]
    """Which weights were measured."""

    def metrics_at(self, level: str) -> dict[str, float | None]:
        return self.metrics if level == self.level else self.levels.get(level, {}).get("metrics", {})


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    config: dict[str, Any]
    outcome: dict[str, Any]
    records: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    evaluation: Evaluation | None

    def get(self, path: str, default: Any = None) -> Any:
        """A config value by its dotted path."""
        value: Any = self.config
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return default
            value = value[name]
        return default if value is None else value

    @property
    def name(self) -> str:
        return str(self.get("run.name", self.folder.name))

    @property
    def seed(self) -> int:
        return int(self.get("run.seed", 0))

    @property
    def fold(self) -> int:
        return int(self.get("data.fold", 0))

    @property
    def unit(self) -> tuple[int, int]:
        return self.fold, self.seed

    @property
    def method(self) -> str:
        section = self.config.get("method", "unknown")
        return str(section.get("name", "unknown")) if isinstance(section, Mapping) else str(section)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(map(str, self.get("model.modalities", ())))

    @property
    def state(self) -> str:
        """done, interrupted, failed, or unfinished where the run has not said how it ended."""
        return str(self.outcome.get("state", "unfinished"))

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    @cached_property
    def environment(self) -> dict[str, Any]:
        return _read_json(self.folder / "environment.json", default={})

    @cached_property
    def about_data(self) -> dict[str, Any]:
        """Facts of the data set, from the run's own record and from its shards' manifest where that still exists."""
        card = _read_json(self.folder / "export" / "model.json", default={})
        shards = card.get("shards") or self.get("data.shards")
        manifest = {} if shards is None else _manifest_facts(Path(shards) / "manifest.json")
        facts = manifest | card | (self.environment.get("data") or {})
        return {key: facts[key] for key in _FACTS if facts.get(key) is not None}


_FACTS = ("task", "class_names", "n_samples", "n_patients", "split_rule", "split_seed", "source", "licence", "excluded")


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders among and below `paths`, sorted, each once; runs whose job has not begun are left out and named.

    Raises:
        DataError: a path does not exist, or there is no run at or below it.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            state = "is a file, not a folder" if path.exists() else "does not exist"
            raise DataError(f"run folder {path} {state}; name a run folder, or a folder of run folders such as runs/")
        below = _runs_below(path, _MAX_DEPTH)
        if not below and (path / "jobs.jsonl").is_file():
            log.warning("run %s is left out: it was submitted and never began", path)
        elif not below:
            raise DataError(
                f"no run found at or below {path}: expected a folder with config.yaml in it; "
                f"`distkd train CONFIG` makes one"
            )
        found |= {folder.resolve(): folder for folder in below}
    if not found:
        raise DataError("no run that has begun is named; name a run folder, or a folder of run folders such as runs/")
    return sorted(found.values(), key=str)


def _runs_below(folder: Path, depth: int) -> list[Path]:
    if (folder / "config.yaml").is_file():
        return [folder]
    if depth == 0:
        return []
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [run for child in children for run in _runs_below(child, depth - 1)]


def load_run(folder: Path, split: str) -> Run:
    """Reads one run folder; only config.yaml must be there.

    Raises:
        DataError: a file is not what its name says.
    """
    config = _parsed(folder / "config.yaml", yaml.safe_load)
    return Run(
        folder=folder,
        config=config,
        outcome=_read_json(folder / "outcome.json", default={}),
        records=read_jsonl(folder / "metrics.jsonl"),
        evaluation=_evaluation(folder / "eval" / f"{split}.json"),
    )


def _evaluation(path: Path) -> Evaluation | None:
    raw = _read_json(path, default=None)
    if raw is None:
        return None
    missing = [key for key in ("n", "metrics", "per_class", "confusion", "class_names") if key not in raw]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; write it again with `distkd eval {path.parent.parent} "
            f"--split {path.stem}`"
        )
    level, levels = str(raw.get("level", "sample")), raw.get("levels") or {}
    return Evaluation(
        n=raw["n"],
        level=level,
        metrics=raw["metrics"],
        per_class=raw["per_class"],
        confusion=raw["confusion"],
        class_names=[str(name) for name in raw["class_names"]],
        levels=levels,
        notes=raw.get("notes") or levels.get(level, {}).get("notes") or [],
        selection=raw.get("selection") or {},
    )


def _manifest_facts(path: Path) -> dict[str, Any]:
    manifest = _read_json(path, default={})
    samples = manifest.get("samples")
    if isinstance(samples, Mapping) and "patient" in samples:
        manifest |= {"n_samples": len(samples["patient"]), "n_patients": len(set(samples["patient"]))}
    return manifest


def _read_json(path: Path, *, default: Any) -> Any:
    return _parsed(path, json.loads) if path.is_file() else default


def _parsed(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason}); take it from a copy, or leave this run out") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected a mapping; it is not of a run of distkd")
    return value
