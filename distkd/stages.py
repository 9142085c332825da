"""Several configs as the stages of one study: which there are, and which comes after which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distkd import config
from distkd.errors import ConfigError
from distkd.train.job import teacher_folder
from distkd.train.settings import Settings

__all__ = ["Place", "in_order", "load_all", "teacher_folders"]

Place = tuple[Path, int | None, int | None]
"""Config file, fold and seed; None where the config's own is meant."""


def load_all(
    paths: Sequence[Path], overrides: Mapping[str, Any], *, folds: Sequence[int] | None, seeds: Sequence[int] | None
) -> dict[Place, Settings]:
    """The settings of each config, fold and seed.

    Raises:
        ConfigError: all that is wrong with one of them.
    """
    return {
        (path, fold, seed): config.load(path, overrides, fold=fold, seed=seed)
        for fold in folds or [None]
        for seed in seeds or [None]
        for path in paths
    }


def in_order(stages: Sequence[Settings]) -> list[Settings]:
    """The stages, each after the one whose run it names as its teacher, otherwise in the order given.

    Raises:
        ConfigError: stages wait for each other, or two different ones mean the same run folder.
    """
    of_folder: dict[Path, Settings] = {}
    for stage in stages:
        if of_folder.setdefault(stage.folder.resolve(), stage) != stage:
            raise ConfigError(f"two stages with different configs have the run folder {stage.folder}; give them names")
    ordered: dict[Path, Settings] = {}

    def place(folder: Path, waiting: tuple[Path, ...]) -> None:
        if folder in waiting:
            names = [of_folder[item].run.name for item in (*waiting[waiting.index(folder) :], folder)]
            raise ConfigError(f"stages wait for each other as teachers: {' -> '.join(names)}; mend a teacher.export")
        if folder in ordered:
            return
        for other in teacher_folders(of_folder[folder]):
            if other in of_folder:
                place(other, (*waiting, folder))
        ordered[folder] = of_folder[folder]

    for folder in of_folder:
        place(folder, ())
    return list(ordered.values())


def teacher_folders(stage: Settings) -> list[Path]:
    """Run folders that `teacher.export` may mean."""
    if stage.teacher.export is None:
        return []
    found = teacher_folder(stage).resolve()
    return [found, found.parent] if found.name == "export" else [found]
