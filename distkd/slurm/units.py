"""What a submission is to train: configs by fold and seed, as the stages of a plan."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distkd.data.remote.transport import is_url
from distkd.slurm.plan import Run, Stage
from distkd.train.folder import read_outcome
from distkd.train.settings import Settings

__all__ = ["Options", "Unit", "each_run_once", "numbers_of", "stages_of"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A config for one fold and seed, as loaded."""

    config: Path
    fold: int | None
    seed: int | None
    settings: Settings
    teachers: Sequence[Path]
    """Resolved folders of which one is its teacher's run."""

    @property
    def streamed(self) -> bool:
        """Whether its shard set has a URL."""
        return self.settings.data.shards is not None and is_url(self.settings.data.shards)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says besides configs, folds and seeds."""

    nodes: int | None = None
    ranks_per_node: int | None = None
    time: str | None = None
    lead_s: int = 120
    together: bool = False
    elastic: int | None = None
    throttle: int | None = None
    report: bool = True
    dry_run: bool = False
    allow_change: bool = False
    words: Sequence[str] = ()
    """The overrides, as typed."""


def each_run_once(units: Sequence[Unit]) -> list[Unit]:
    """The first of the units that mean the same run."""
    return list({unit.settings.folder.resolve(): unit for unit in reversed(units)}.values())[::-1]


def numbers_of(units: Sequence[Unit]) -> tuple[set[int | None], set[int | None]]:
    return {unit.fold for unit in units}, {unit.seed for unit in units}


def stages_of(units: Sequence[Unit], again: bool) -> list[Stage]:
    """The units by config, each with the array id that means it to the scripts; `again`: also those that are done.

    The id is the place in the list of folds, of seeds, or of their pairs, folds first: a seed may be any number, an id
    not (`MaxArraySize`).
    """
    configs = list(dict.fromkeys(unit.config for unit in units))
    folds, seeds = (sorted(numbers, key=lambda number: number or 0) for numbers in numbers_of(units))
    task_of = {pair: task for task, pair in enumerate(itertools.product(folds, seeds))}
    place_of = {
        unit.settings.folder.resolve(): (configs.index(unit.config), task_of[unit.fold, unit.seed]) for unit in units
    }
    runs: list[dict[int, Run]] = [{} for _ in configs]
    names: list[str] = [""] * len(configs)
    for unit in units:
        number, here = place_of[unit.settings.folder.resolve()]
        teacher = next((place_of[folder] for folder in unit.teachers if folder in place_of), None)
        folder = unit.settings.folder
        runs[number][here] = Run(folder, not again and _is_done(folder), teacher, unit.streamed)
        names[number] = names[number] or _bare(unit)
    return [
        Stage(name, str(config), dict(sorted(of_config.items())))
        for name, config, of_config in zip(names, configs, runs, strict=True)
    ]


def _bare(unit: Unit) -> str:
    """Its name without fold and seed."""
    name = unit.settings.run.name
    for word, number in (("fold", unit.fold), ("seed", unit.seed)):
        if number is not None:
            name = re.sub(rf"[-_]?{word}{number}(?!\d)", "", name)
    return name or unit.settings.run.name


def _is_done(folder: Path) -> bool:
    outcome = read_outcome(folder)
    return outcome is not None and outcome["state"] == "done"
