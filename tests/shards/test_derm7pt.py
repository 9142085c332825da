"""Derm7pt: five diagnoses, two pictures in one size, the checklist as a privileged vector, the published split."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkd.data.dataset import DataConfig, Dataset
from distkd.data.shardset import ShardSet
from distkd.data.splits import check_classes
from distkd.errors import ConfigError, DataError
from shards import derm7pt
from tests.shards import layouts_images as layouts
from tests.shards.layouts_images import CRITERIA, N_DERM, change, derm_file, put

SIZE = 16
META = "meta/meta.csv"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.derm7pt(tmp_path_factory.mktemp("derm7pt") / "raw")


@pytest.fixture
def raw(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "raw"))


@pytest.fixture(scope="module")
def cases(pristine: Path) -> ShardSet:
    derm7pt.make(pristine, pristine.parent / "out", size=SIZE)
    return ShardSet(pristine.parent / "out")


def case(number: int) -> str:
    return f"case-{number:04d}"


def test_each_case_is_a_sample_and_a_patient(cases: ShardSet):
    samples = cases.manifest.samples
    assert samples.key == samples.patient == [case(number) for number in range(1, N_DERM + 1)]
    assert cases.manifest.class_names == ["BCC", "NEV", "MEL", "MISC", "SK"]
    assert samples.label == [number % 5 for number in range(N_DERM)]
    cases.verify()


def test_the_fold_is_the_published_split(cases: ShardSet):
    (fold,) = cases.manifest.folds
    assert fold.train == [case(number) for number in range(1, 11)]
    assert fold.val == [case(number) for number in range(11, 16)]
    assert fold.test == [case(number) for number in range(16, 21)]
    check_classes(cases.manifest, 0)


@pytest.mark.parametrize(
    ("diagnosis", "group"), [(name, group) for group in derm7pt.GROUPS for name in derm7pt.GROUPS[group]]
)
def test_diagnoses_are_grouped(diagnosis: str, group: str):
    label = derm7pt._label({"diagnosis": f" {diagnosis.capitalize()}"}, "case-0001")
    assert derm7pt.CLASS_NAMES[label] == group


def test_all_twenty_diagnoses_of_the_release_have_one_group():
    assert len(derm7pt.LABELS) == sum(map(len, derm7pt.GROUPS.values())) == 20


def test_vectors_are_one_hot_with_named_features(cases: ShardSet):
    found = {name: cases.manifest.modalities[name].features for name in ("meta", "checklist")}
    assert found["meta"] == [
        "elevation=flat",
        "elevation=nodular",
        "elevation=palpable",
        "location=back",
        "location=head neck",
        "sex=female",
        "sex=male",
    ]
    assert found["checklist"] == [f"{name}={value}" for name, values in CRITERIA.items() for value in sorted(values)]
    for sample in range(len(cases)):
        arrays = cases.read(sample, ["meta", "checklist"])
        assert arrays["meta"].sum() == 3
        ones = [found["checklist"][n] for n in np.flatnonzero(arrays["checklist"])]
        assert ones == [f"{name}={values[sample % len(values)]}" for name, values in CRITERIA.items()]


def test_a_picture_of_the_right_size_is_stored_as_it_is(pristine: Path, cases: ShardSet):
    for view in derm7pt.PICTURES:
        assert (
            layouts.stored_bytes(cases.folder, view, case(1)) == (pristine / "images" / derm_file(0, view)).read_bytes()
        )


def flat(raw: Path, number: int, view: str, width: int, height: int, middle: int, **options: object) -> None:
    """A picture with bars of another grey on its long ends."""
    pixels = np.full((height, width, 3), 20, dtype=np.uint8)
    if width > height:
        pixels[:, (width - height) // 2 : (width + height) // 2] = middle
    else:
        pixels[(height - width) // 2 : (height + width) // 2] = middle
    Image.fromarray(pixels).save(raw / "images" / derm_file(number, view), quality=100, **options)


def test_other_pictures_are_scaled_and_cropped_or_padded(raw: Path, tmp_path: Path):
    flat(raw, 1, "derm", 96, 48, 200)
    flat(raw, 1, "clinic", 48, 96, 120)
    for fit in ("crop", "pad"):
        derm7pt.make(raw, tmp_path / fit, size=SIZE, fit=fit)
    cropped = ShardSet(tmp_path / "crop").read(1, ["derm", "clinic"])
    assert np.abs(cropped["derm"][:, 2:-2].astype(int) - 200).max() < 20
    assert np.abs(cropped["clinic"][2:-2].astype(int) - 120).max() < 20
    padded = ShardSet(tmp_path / "pad").read(1, ["derm", "clinic"])
    assert padded["derm"][:2].max() < 20
    assert padded["derm"][8, 8].min() > 180
    assert padded["clinic"][:, -2:].max() < 20


def test_a_picture_held_sideways_is_turned(raw: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    pixels[:, : SIZE // 2] = 250
    Image.fromarray(pixels).save(raw / "images" / derm_file(0, "derm"), quality=100, exif=exif)
    derm7pt.make(raw, tmp_path / "out", size=SIZE)
    turned = ShardSet(tmp_path / "out").read(0, ["derm"])["derm"]
    assert turned[:6].min() > 200
    assert turned[10:].max() < 50


def test_the_same_bytes_twice(pristine: Path, cases: ShardSet, tmp_path: Path):
    derm7pt.make(pristine, tmp_path / "again", size=SIZE)
    assert layouts.bytes_of(tmp_path / "again") == layouts.bytes_of(cases.folder)


def test_file_names_are_found_whatever_their_case(raw: Path, tmp_path: Path, cases: ShardSet):
    change(META, lambda rows: rows[4].update(derm=rows[4]["derm"].upper()))(raw)
    derm7pt.make(raw, tmp_path / "out", size=SIZE)
    assert layouts.bytes_of(tmp_path / "out") == layouts.bytes_of(cases.folder)


def test_blank_cells_are_missing_values_and_missing_pictures(raw: Path, tmp_path: Path):
    change(META, lambda rows: rows[3].update(sex="", clinic=""))(raw)
    derm7pt.make(raw, tmp_path / "out", size=SIZE)
    shard_set = ShardSet(tmp_path / "out")
    meta = shard_set.read(3, ["meta"])["meta"]
    assert np.isnan(meta).tolist() == [False] * 5 + [True] * 2
    assert shard_set.has("clinic").tolist() == [number != 3 for number in range(N_DERM)]
    assert shard_set.has("derm").all()


def test_cases_in_no_list_are_left_out_and_counted(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    change("meta/test_indexes.csv", lambda rows: rows.pop())(raw)
    assert derm7pt.main(["--raw", str(raw), "--out", str(tmp_path / "out"), "--size", str(SIZE)]) == 0
    text = capsys.readouterr().out
    assert "skipped 1: case in none of the three lists (case-0020)" in text
    assert "19 samples of 19 patients" in text
    assert "1 fold (the published split; each case counts as a patient); patients of fold 0: train 10, val 5" in text


@pytest.mark.parametrize("column", ["diagnosis", "seven_point_score", "management", "level_of_diagnostic_difficulty"])
def test_columns_that_leak_are_refused_as_inputs(cases: ShardSet, column: str):
    with pytest.raises(DataError, match=f"'{column}' is excluded from the inputs of task 'skin_lesion': "):
        Dataset(cases, DataConfig(), [column], seed=0)


def drop_column(raw: Path) -> None:
    rows = layouts.read_rows(raw / META)
    layouts.table(raw / META, [{name: cell for name, cell in row.items() if name != "streaks"} for row in rows])


def blank(raw: Path) -> None:
    change(META, lambda rows: [row.update(elevation="", location="", sex="") for row in rows])(raw)


def no_list(raw: Path) -> None:
    (raw / "meta" / "valid_indexes.csv").unlink()


def no_folder(raw: Path) -> None:
    shutil.rmtree(raw / "images")


def no_pictures(raw: Path) -> None:
    for number in range(4):
        (raw / "images" / derm_file(number, "clinic")).unlink()


def cut_picture(raw: Path) -> None:
    path = raw / "images" / derm_file(1, "derm")
    path.write_bytes(path.read_bytes()[:-300])


def cut_fitting_picture(raw: Path) -> None:
    path = raw / "images" / derm_file(0, "derm")
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            put("meta/valid_indexes.csv", 0, "indexes", 4),
            r"patient 'case-0005', row 4 of meta\.csv, is in train and val \(.*train_ind.*valid_ind.*\), expected",
        ),
        (put("meta/test_indexes.csv", 1, "indexes", 15), r"patient 'case-0016', row 15 of meta\.csv, is in test twice"),
        (
            put("meta/test_indexes.csv", 1, "indexes", 20),
            r"meta/test_indexes\.csv lists row '20', meta\.csv has rows 0 to 19; copy both files again",
        ),
        (put("meta/test_indexes.csv", 1, "indexes", -1), r"lists row '-1', meta\.csv has rows 0 to 19"),
        (put("meta/test_indexes.csv", 1, "indexes", "x"), r"lists row 'x', meta\.csv has rows 0 to 19"),
        (
            put(META, 6, "diagnosis", "wart"),
            r"diagnosis of 'case-0007' in meta\.csv is 'wart', expected one of basal cell carcinoma, .*; mend",
        ),
        (put(META, 6, "case_num", 3), r"row 6 of meta\.csv repeats case_num 3; leave one row for each case"),
        (put(META, 6, "case_num", "A3"), r"row 6 of meta\.csv has case_num 'A3', expected a number; mend meta\.csv"),
        (drop_column, r"meta\.csv' has no column streaks; it has case_num, diagnosis"),
        (blank, r"columns elevation, location, sex of meta\.csv are blank in all rows; copy it again"),
        (no_list, r"has no file 'meta/valid_indexes\.csv'; name with --raw the folder of derm7pt release_v0"),
        (no_folder, "has no folder 'images'; name with --raw the folder of derm7pt release_v0"),
        (
            no_pictures,
            r"images' lacks 4 pictures that meta\.csv names: FDL/C001\.jpg, FDL/C003\.jpg, NEL/C000\.jpg, \.\.\.; copy",
        ),
        (cut_picture, r"cannot read the picture '.*FDL/D001\.jpg': .*truncated.*; copy it again"),
        (cut_fitting_picture, r"'derm' of sample 'case-0001' is not a readable image .*truncated.*; mend the raw file"),
    ],
)
def test_bad_raw_data_is_named_and_nothing_is_written(
    raw: Path, tmp_path: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
):
    damage(raw)
    with pytest.raises(DataError, match=words):
        derm7pt.make(raw, tmp_path / "out", size=SIZE)
    assert derm7pt.main(["--raw", str(raw), "--out", str(tmp_path / "out"), "--size", str(SIZE)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_size_of_no_pixels_is_named(pristine: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--size is 0, expected at least 1 pixel"):
        derm7pt.make(pristine, tmp_path / "out", size=0)
