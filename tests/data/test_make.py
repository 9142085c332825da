"""Recipes by name: only names, only those that need no raw data, and words for all else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from distkd.data import make
from distkd.data.make import available, make_shards
from distkd.data.manifest import MANIFEST
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


SLOW = """
import time
from pathlib import Path

from distkd.data.journal import Journal
from distkd.data.manifest import MANIFEST

NEEDS_RAW = False


def make(raw, out):
    journal = Journal(out, "slow")
    here = Path(__file__).parent
    (here / "begun").touch()
    while not (here / "go").exists():
        time.sleep(0.01)
    if (here / "fail").exists():
        (here / "fail").unlink()
        raise SystemExit("failed")
    with (here / "made").open("a") as file:
        file.write("once ")
    (journal.folder / MANIFEST).write_text("{}")
    journal.publish()
"""
MAKE = """
import sys
from pathlib import Path
from distkd.data.make import make_shards

make_shards("slow", Path(sys.argv[1]), folder=Path(sys.argv[2]))
"""


def start(recipes: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAKE, str(out), str(recipes)], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("first_fails", [False, True])
def test_of_two_processes_one_makes_the_set_and_the_other_waits(recipes: Path, tmp_path: Path, first_fails: bool):
    (recipes / "slow.py").write_text(SLOW)
    out = tmp_path / "sets" / "out"
    with start(recipes, out) as first:
        while not (recipes / "begun").exists():
            assert first.poll() is None
            time.sleep(0.01)
        if first_fails:
            (recipes / "fail").touch()
        with start(recipes, out) as second:
            assert second.stderr is not None
            assert second.stderr.readline() == f"distkd: waits for another process, which makes shard set {out}\n"
            assert second.poll() is None
            (recipes / "go").touch()
            said = second.communicate(timeout=240)[1]
        first.communicate(timeout=240)
    assert (first.returncode, second.returncode) == (int(first_fails), 0), said
    assert (recipes / "made").read_text() == "once "
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / MANIFEST).read_text() == "{}"


def test_a_folder_that_cannot_be_made_is_no_matter_of_an_option_of_the_recipe(recipes: Path):
    with pytest.raises(ConfigError, match=r"set /proc/nope/out cannot be made: .*; name another .*--data\.shards"):
        make_shards("toy", Path("/proc/nope/out"), folder=recipes)
