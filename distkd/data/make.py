"""Shard sets that need no raw data: run a recipe of the repository's `shards/` folder by its name."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import distkd
from distkd.data.journal import BusyError, real_folder, wait_for_builder
from distkd.data.manifest import MANIFEST, closest
from distkd.errors import ConfigError, DataError
from distkd.files import raise_disk_fault

__all__ = ["available", "make_shards"]


def available(folder: Path | None = None) -> list[str]:
    """Names of the recipes; the registry is the folder."""
    folder = _recipes() if folder is None else folder
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def make_shards(name: str, out: Path, *, folder: Path | None = None) -> None:
    """Make the shard set `out`, where it is not there, with a recipe that needs no `--raw`.

    Of several processes that make the same one the others wait for the first.

    Args:
        folder: of the recipes; the repository's own where it is None.

    Raises:
        ConfigError: no such recipe, it needs raw data, the recipes are not there, or the folder cannot be made.
        DataError: the recipe failed; nothing is left behind.
    """
    folder = _recipes() if folder is None else folder
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name not in available(folder):
        raise ConfigError(f"data.make names no recipe: {name!r}{closest(name, available(folder))}")
    path = folder / f"{name}.py"
    recipe = _load(path)
    if getattr(recipe, "NEEDS_RAW", True):
        raise ConfigError(
            f"recipe {name!r} needs raw data, so data.make cannot run it; run `python {path} --raw DIR --out DIR` "
            "and name the result with data.shards"
        )
    try:
        parent = real_folder(out).parent
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise_disk_fault(f"the folder of shard set {out}", error)
        why = f"shard set {out} cannot be made: {error.strerror}"
        raise ConfigError(f"{why}; name another folder with --data.shards") from error
    _make(recipe, out)


def _make(recipe: ModuleType, out: Path) -> None:
    """Run the recipe, or let another process that does finish; where that one fails it is tried here."""
    said = False
    while not (out / MANIFEST).exists():
        try:
            recipe.make(None, out)
            return
        except BusyError:
            if not said:
                print(f"distkd: waits for another process, which makes shard set {out}", file=sys.stderr, flush=True)
            said = True
            wait_for_builder(out)
        except DataError:
            if not (out / MANIFEST).exists():  # otherwise another process has just finished it
                raise


def _recipes() -> Path:
    folder = Path(distkd.__file__).resolve().parent.parent / "shards"
    if not folder.is_dir():
        raise ConfigError(
            f"data.make needs the recipes of the repository, which are not installed: no folder {str(folder)!r}; "
            "work in a clone of the repository, or name an existing shard set with data.shards"
        )
    return folder


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"distkd_recipe_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
