"""What a submission is to train: configs by fold and seed, as the stages of a plan."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    site: Path | None = None
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
    """The units by config, each with the array id that the scripts give it; `again`: also those that are done."""
    configs = list(dict.fromkeys(unit.config for unit in units))
    folds, seeds = (sorted(numbers, key=lambda number: number or 0) for numbers in numbers_of(units))
    pairs = list(itertools.product(folds, seeds))

    def task(unit: Unit) -> int:
        if unit.fold is not None and unit.seed is not None:
            return pairs.index((unit.fold, unit.seed))
        return unit.fold or unit.seed or 0

    place_of = {unit.settings.folder.resolve(): (configs.index(unit.config), task(unit)) for unit in units}
    runs: list[dict[int, Run]] = [{} for _ in configs]
    names: list[str] = [""] * len(configs)
    for unit in units:
        number, here = place_of[unit.settings.folder.resolve()]
        teacher = next((place_of[folder] for folder in unit.teachers if folder in place_of), None)
        folder = unit.settings.folder
        runs[number][here] = Run(folder, not again and _is_done(folder), teacher)
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
