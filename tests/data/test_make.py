"""Recipes by name: only names, only those that need no raw data, and words for all else."""

from __future__ import annotations

from pathlib import Path

import pytest

from distkd.data import make
from distkd.data.make import available, make_shards
from distkd.errors import ConfigError

RECIPE = """
from __future__ import annotations

from dataclasses import dataclass

NEEDS_RAW = {needs_raw}


@dataclass
class Options:
    size: int = 1


def make(raw, out):
    out.mkdir()
    (out / "made").write_text(repr(raw))
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "toy.py").write_text(RECIPE.format(needs_raw=False))
    (folder / "patients.py").write_text(RECIPE.format(needs_raw=True))
    (folder / "_common.py").write_text("")
    return folder


def test_a_recipe_is_run_by_its_name(recipes: Path, tmp_path: Path):
    make_shards("toy", tmp_path / "out", folder=recipes)
    assert (tmp_path / "out" / "made").read_text() == "None"


def test_the_folder_is_the_registry(recipes: Path):
    assert available(recipes) == ["patients", "toy"]
    assert {"lc25000_lung", "synthetic", "tcga_glioma", "uci_mfeat"} <= set(available())


@pytest.mark.parametrize("name", ["tyo", "../toy", "toy.py", "os", "_common", ""])
def test_anything_but_a_recipes_name_is_refused(recipes: Path, tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=r"data\.make names no recipe: .*; available: patients, toy"):
        make_shards(name, tmp_path / "out", folder=recipes)
    assert not (tmp_path / "out").exists()


def test_a_near_name_is_suggested(recipes: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'patient'; did you mean 'patients'\?"):
        make_shards("patient", tmp_path / "out", folder=recipes)


def test_a_recipe_that_needs_raw_data_says_how_to_run_it(recipes: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'patients' needs raw data, .*python .*patients\.py --raw DIR --out DIR"):
        make_shards("patients", tmp_path / "out", folder=recipes)


def test_an_installation_without_recipes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(make.distkd, "__file__", str(tmp_path / "distkd" / "__init__.py"))
    with pytest.raises(ConfigError, match="needs the recipes of the repository, which are not installed: no folder"):
        make_shards("toy", tmp_path / "out")
