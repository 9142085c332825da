"""What holds for every recipe: a useful --help, the same bytes twice, sound shards, nothing left after an error."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

from distkd.data import make
from distkd.data.raw.recipe import Skipped, number, raw_file, read_table, track
from distkd.data.shardset import ShardSet
from distkd.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = make.available()


def recipe(name: str) -> ModuleType:
    return make._load(ROOT / "shards" / f"{name}.py")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_help_says_what_the_recipe_makes(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        recipe(name).main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--out DIR" in text
    assert "--seed" in text
    doc = ast.get_docstring(ast.parse((ROOT / "shards" / f"{name}.py").read_text()))
    assert doc is not None
    assert doc.splitlines()[0] in text


@pytest.mark.parametrize("name", RECIPES)
def test_bad_raw_data_ends_with_2_and_writes_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--out", str(tmp_path / "out")]
    if name == "synthetic":
        arguments += ["--gap", "2"]
    else:
        arguments += ["--raw", str(tmp_path / "nowhere")]
    assert recipe(name).main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in RECIPES if not recipe(name).NEEDS_RAW])
def test_what_needs_no_raw_data_is_made_by_name_and_twice_the_same(name: str, tmp_path: Path):
    make.make_shards(name, tmp_path / "one")
    make.make_shards(name, tmp_path / "two")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    ShardSet(tmp_path / "one").verify()


@pytest.mark.parametrize("name", [name for name in RECIPES if recipe(name).NEEDS_RAW])
def test_without_raw_data_the_others_say_what_they_need(name: str, tmp_path: Path):
    with pytest.raises(DataError, match="no raw data; name with --raw the folder of"):
        recipe(name).make(None, tmp_path / "out")


def test_interrupted_by_ctrl_c_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    synthetic = recipe("synthetic")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_slide", interrupted)
    assert synthetic.main(["--out", str(tmp_path / "out")]) == 1
    assert "was not written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_skipped_is_counted_by_reason():
    skipped = Skipped()
    for name in ("a", "b", "c", "d"):
        skipped.add("no grade", name)
    skipped.add("no image", "e")
    assert skipped.lines() == ["skipped 4: no grade (a, b, c, ...)", "skipped 1: no image (e)"]


def test_progress_gives_the_items_back():
    assert list(track(range(5), "counting")) == [0, 1, 2, 3, 4]


def test_a_missing_file_names_the_folder_that_is_meant(tmp_path: Path):
    with pytest.raises(DataError, match=r"raw data .* has no file 'a\.csv'; name with --raw the folder of the tables"):
        raw_file(tmp_path, "a.csv", "the tables")
    with pytest.raises(DataError, match=r"raw data .* is no folder, looked for 'a\.csv'"):
        raw_file(tmp_path / "nowhere", "a.csv", "the tables")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"a,b\n1,2\n3\n", r"'.*t\.csv' line 3 has 1 cells, the header has 2; the file is damaged"),
        ("t.csv", b"a,c\n1,2\n", r"has no column b; it has a, c, \.\.\."),
        ("t.csv", b"a,b,a\n1,2,3\n", "has column 'a' twice; rename one"),
        ("t.csv", b"a,b\n", "has no rows; copy it again"),
        ("t.csv", b"a,b\n\xff\xfe,1\n", "cannot read .*copy it again"),
        ("t.csv.gz", b"a,b\n1,2\n", "cannot read .*[Nn]ot a gzipped file"),
        ("t.csv.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\x4b", "cannot read .*copy it again"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_table(tmp_path / name, ["a", "b"])


def test_cells_are_numbers_or_blank():
    assert number("1.5", "x") == 1.5
    assert number(" ", "x") != number("", "x")  # both NaN
    with pytest.raises(DataError, match="age of 'p1' is 'old', expected a number or a blank"):
        number("old", "age of 'p1'")
    with pytest.raises(DataError, match="age of 'p1' is infinite; mend the raw file"):
        number("-inf", "age of 'p1'")
