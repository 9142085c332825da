"""Anybody's table: what its columns are, files kept as they are, splits as stated, and every problem at once."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distkd.data.raw.table_problems import Problems
from distkd.data.shardset import ShardSet
from distkd.errors import DataError
from shards import generic
from shards.generic import Options
from tests.shards import layouts_volumes as layouts

LABELS = ("benign", "malignant")


def pixels(number: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def save_image(path: Path, number: int, **more: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels(number)).save(path, **more)


def template_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(generic.TEMPLATE)))


def write(folder: Path, rows: list[dict[str, str]], name: str = "table.csv") -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def study(folder: Path, *, patients: int = 12) -> list[dict[str, str]]:
    """Rows with an image and two numbers; the caller changes and writes them."""
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, str]] = []
    for number in range(patients):
        save_image(folder / "photos" / f"{number}.png", number)
        rows.append(
            {
                "patient": f"patient {number}",
                "label": LABELS[number % 2],
                "photo": f"photos/{number}.png",
                "clinic.age": str(40 + number),
                "clinic.score": str(number / 8),
            }
        )
    return rows


def examined(table: Path, options: Options | None = None) -> Problems:
    problems = Problems()
    generic.examine(table, options or Options(), problems, seed=0, every_value=True)
    return problems


def problems_of(table: Path, options: Options | None = None) -> list[str]:
    return examined(table, options).lines


def test_the_template_with_its_photos_becomes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        generic.main(["--template"])
    assert stop.value.code == 0
    (tmp_path / "table.csv").write_text(capsys.readouterr().out)
    for number, row in enumerate(template_rows()):
        if row["image:photo"]:
            save_image(tmp_path / row["image:photo"], number)
    arguments = ["--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    assert generic.main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "table.csv: 9 rows of 8 patients" in text
    assert "image 'photo': 8 of 9 rows, 12 x 16 x 3 uint8, files kept as they are" in text
    assert "vector 'clinic': 9 of 9 rows, 2 float32, age, score; 2 values are blank" in text
    assert "1 fold: the column 'split'" in text
    assert "note:" not in text
    assert "classes: benign 5, malignant 4" in text
    assert "fold 0: patients train 4, val 2, test 2" in text
    assert "no problems; run the same command without --dry-run" in text
    assert generic.main(arguments) == 0
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    manifest = shard_set.manifest
    assert manifest.samples.key[0] == "row-0000002"
    assert manifest.folds[0].test == ["gina", "hugo"]
    assert manifest.class_names == ["benign", "malignant"]
    assert manifest.samples.label == [0, 0, 1, 0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(shard_set.read(0, ["photo"])["photo"], pixels(0))
    np.testing.assert_array_equal(shard_set.read(1, ["clinic"])["clinic"], np.array([61, np.nan], np.float32))
    assert shard_set.has("photo").tolist() == [True] * 4 + [False] + [True] * 4


def test_files_are_kept_as_they_are(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["photo"] = f"photos/{number}.jpg"
        save_image(tmp_path / row["photo"], number, quality=50)
    generic.make(write(tmp_path, rows), tmp_path / "out")
    manifest = ShardSet(tmp_path / "out").manifest
    assert manifest.modalities["photo"].codec == "jpg"
    place = manifest.samples.bytes["photo"][5]
    assert place is not None
    tar = (tmp_path / "out" / manifest.shards[0].file).read_bytes()
    assert tar[place[0] : sum(place)] == (tmp_path / "photos" / "5.jpg").read_bytes()


def test_turned_and_mixed_images_are_packed_upright(tmp_path: Path):
    rows = study(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(pixels(3))).save(tmp_path / "photos" / "3.png", exif=turned)
    Image.fromarray(pixels(4)[:, :, 0]).save(tmp_path / "photos" / "4.png")
    Image.fromarray(pixels(5)).quantize().save(tmp_path / "photos" / "5.png")
    generic.make(write(tmp_path, rows), tmp_path / "out")
    shard_set = ShardSet(tmp_path / "out")
    np.testing.assert_array_equal(shard_set.read(3, ["photo"])["photo"], pixels(3))
    np.testing.assert_array_equal(shard_set.read(4, ["photo"])["photo"], np.repeat(pixels(4)[:, :, :1], 3, axis=2))
    assert shard_set.read(5, ["photo"])["photo"].shape == (12, 16, 3)


def test_images_of_other_sizes_are_brought_to_one(tmp_path: Path):
    rows = study(tmp_path)
    Image.fromarray(np.full((30, 20, 3), 77, np.uint8)).save(tmp_path / "photos" / "3.png")
    table = write(tmp_path, rows)
    words = "30 x 20 px (height x width), most have 12 x 16; mend it; or bring all to one with --size H,W"
    assert problems_of(table) == [f"row 5, column 'photo': {words}"]
    assert generic.main(["--raw", str(table), "--out", str(tmp_path / "out"), "--size", "8,10"]) == 0
    shard_set = ShardSet(tmp_path / "out")
    assert shard_set.manifest.modalities["photo"].shape == (8, 10, 3)
    assert (shard_set.read(3, ["photo"])["photo"] == 77).all()


def test_columns_have_roles_by_header_and_by_their_cells(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        np.save(tmp_path / f"{number}.npy", np.arange(5.0) + number)
        row |= {"Deep Features": f"{number}.npy", "vector:more": f"{number}.npy", "notes": "seen", "key": f"k{number}"}
        row |= {"group": f"lesion {number // 2}", "ki67": str(number), "her2": ""}
    options = Options(vectors=(("stain", ("ki67", "her2")),))
    made = generic.make(write(tmp_path, rows), tmp_path / "out", options=options)
    manifest = made.manifest
    assert {name: (m.kind, m.shape) for name, m in manifest.modalities.items()} == {
        "photo": ("image", (12, 16, 3)),
        "deep_features": ("vector", (5,)),
        "more": ("vector", (5,)),
        "clinic": ("vector", (2,)),
        "stain": ("vector", (2,)),
    }
    assert manifest.modalities["clinic"].features == ["age", "score"]
    assert manifest.modalities["stain"].features == ["ki67", "her2"]
    assert manifest.excluded == {"notes": "its header gives it no role"}
    assert (manifest.samples.key[3], manifest.samples.group[3]) == ("k3", "lesion 1")
    np.testing.assert_array_equal(ShardSet(tmp_path / "out").read(2, ["more"])["more"], np.arange(5.0) + 2)


def test_equal_tables_give_equal_bytes(tmp_path: Path):
    table = write(tmp_path, study(tmp_path))
    generic.make(table, tmp_path / "one")
    generic.make(table, tmp_path / "two", options=Options(threads=1))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_spreadsheets_with_semicolons_and_a_byte_order_mark_are_read(tmp_path: Path):
    table = write(tmp_path, study(tmp_path))
    text = table.read_text().replace(",", ";") + ";;;;\n\n"
    table.write_text("\ufeff" + text, encoding="utf-8")
    assert problems_of(table) == []


def test_folds_are_those_of_the_column(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["fold"] = str(number // 4)
    rows[0]["label"] = ""
    manifest = generic.make(write(tmp_path, rows), tmp_path / "out", options=Options(val_share=0.2)).manifest
    assert [len(fold.test) for fold in manifest.folds] == [3, 4, 4]  # who has no label is not tested
    assert "patient 0" in manifest.folds[1].train
    assert all(len(fold.val) == 2 for fold in manifest.folds)


def test_a_validation_part_is_held_out_where_the_table_has_none(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["split"] = "Test" if number < 4 else "Training"
    table = write(tmp_path, rows)
    fold = generic.make(table, tmp_path / "out", options=Options(val_share=0.25)).manifest.folds[0]
    assert (len(fold.train), len(fold.val), len(fold.test)) == (6, 2, 4)
    fold = generic.make(table, tmp_path / "none", options=Options(val_share=0)).manifest.folds[0]
    assert (len(fold.train), len(fold.val), len(fold.test)) == (8, 0, 4)


def test_classes_are_sorted_as_numbers_or_given(tmp_path: Path):
    rows = study(tmp_path, patients=30)
    for number, row in enumerate(rows):
        row["label"] = ("2", "10", "1")[number % 3]
    table = write(tmp_path, rows)
    assert generic.make(table, tmp_path / "out").manifest.class_names == ["1", "2", "10"]
    made = generic.make(table, tmp_path / "given", options=Options(classes=("10", "2", "1"))).manifest
    assert made.samples.label[:3] == [1, 0, 2]
    for number, row in enumerate(rows):
        row["label"] = str(number % 3)
    made = generic.make(write(tmp_path, rows), tmp_path / "numbers", options=Options(classes=("a", "b", "c"))).manifest
    assert (made.class_names, made.samples.label[:3]) == (["a", "b", "c"], [0, 1, 2])


def volumes(folder: Path, *, target: bool) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for number in range(10):
        layouts.save(folder / f"{number}.nii.gz", layouts.voxels(number, "t1", "2020", (6, 5, 4 + number % 2)))
        layouts.save(folder / f"{number}-m.nii", layouts.voxels(number, "seg", "2023", (6, 5, 4 + number % 2)))
        np.save(folder / f"{number}.npy", layouts.voxels(number, "t2", "2020", (6, 5, 4 + number % 2)) / 2)
        rows.append({"patient": f"p{number}", "volume:t1": f"{number}.nii.gz", "second": f"{number}.npy"})
        rows[-1] |= {"target:mask": f"{number}-m.nii"} if target else {"label": LABELS[number % 2]}
    return rows


def test_volumes_with_a_target_are_a_segmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = volumes(tmp_path, target=True)
    rows[7]["second"] = ""
    table = write(tmp_path, rows)
    arguments = ["--raw", str(table), "--out", str(tmp_path / "out"), "--classes", "ground,core,rim,edge"]
    assert generic.main([*arguments, "--dry-run"]) == 0
    assert "classes by value: 0 ground, 1 core, 2 rim, 3 edge" in capsys.readouterr().out
    assert generic.main(arguments) == 0
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    manifest = shard_set.manifest
    assert (manifest.problem, manifest.container) == ("segmentation", "zarr")
    assert manifest.modalities["t1"].shape == (1, 6, 5, 5)
    assert shard_set.has("second").tolist() == [True] * 7 + [False] + [True] * 2
    for number in (0, 1):
        arrays = shard_set.read(number, ["t1", "mask", "t1_stats"])
        np.testing.assert_array_equal(arrays["t1"][0], layouts.voxels(number, "t1", "2020", (6, 5, 4 + number)))
        np.testing.assert_array_equal(arrays["mask"][0], layouts.voxels(number, "seg", "2023", (6, 5, 4 + number)))
    space = manifest.samples.space[0]
    assert space is not None
    np.testing.assert_array_equal(space.affine, layouts.AFFINE)
    assert "second" in manifest.modalities


def test_volumes_with_labels_are_a_classification(tmp_path: Path):
    rows = volumes(tmp_path, target=False)
    for row in rows:
        row["clinic.age"] = "50"
    manifest = generic.make(write(tmp_path, rows), tmp_path / "out").manifest
    assert (manifest.problem, manifest.container) == ("classification", "zarr")
    assert ShardSet(tmp_path / "out").read(3, ["clinic"])["clinic"].tolist() == [50]


def test_volumes_that_do_not_fit_are_problems(tmp_path: Path):
    rows = volumes(tmp_path, target=True)
    options = Options(classes=("ground", "core", "rim", "edge"))
    layouts.save(tmp_path / "2-m.nii", np.zeros((3, 3, 3), np.uint8))
    layouts.save(tmp_path / "3-m.nii", layouts.voxels(3, "seg", "2023", (6, 5, 5)), np.eye(4))
    layouts.save(tmp_path / "4-m.nii", layouts.voxels(4, "seg", "2018", (6, 5, 4)))
    layouts.cut(tmp_path / "5.nii.gz")
    np.save(tmp_path / "6.npy", np.full((6, 5, 4), np.inf))
    found = problems_of(write(tmp_path, rows), options)
    assert len(found) == 5
    assert found[0].startswith("row 6, column 'target:mask': ")
    assert "has the label 4 (" in found[0]
    assert "expected 0 to 3; mend the map, or name more --classes" in found[0]
    assert found[1].startswith("row 7, column 'volume:t1': cannot read ")
    assert "holds inf at 0,0,0 (120 values are NaN or infinite)" in found[2]
    assert found[3] == "row 4: t1 has (6, 5, 4) voxels, mask has (3, 3, 3); register them"
    assert found[4] == "row 5: t1 and mask have different affines; register them"
    rows = [{**row, "image:photo": "a.png", "label": "x"} for row in rows]
    save_image(tmp_path / "a.png", 0)
    found = problems_of(write(tmp_path, rows), options)
    assert "both a column 'label' and a target; a set is for one of them: make two" in found
    assert "images (photo) beside volumes; a set holds one of the two: make two tables" in found


def test_every_problem_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = study(tmp_path, patients=20)
    for number, row in enumerate(rows):
        row |= {"key": f"k{number}", "split": ("train", "train", "val", "test")[number // 2 % 4]}
    rows[0]["key"] = "k1"
    rows[1]["split"] = "Trial"
    rows[2]["patient"] = ""
    rows[3]["photo"] = "photos/none.png"
    (tmp_path / "photos" / "4.png").write_bytes((tmp_path / "photos" / "4.png").read_bytes()[:200])
    rows[5]["clinic.age"] = "nan"
    rows[6]["clinic.age"] = "old"
    rows[7]["clinic.score"] = "1e999"
    rows[8]["patient"] = "patient 6"  # of the test part
    rows[9]["label"] = "bening"
    rows[10]["key"] = "k 10"
    rows[11] |= {"photo": "", "clinic.age": "", "clinic.score": ""}
    Image.fromarray(np.zeros((12, 16), np.uint16)).save(tmp_path / "photos" / "12.png")
    table = write(tmp_path, rows)
    table.write_text(table.read_text() + "too,few,cells\n")
    arguments = ["--raw", str(table), "--out", str(tmp_path / "out"), "--classes", ",".join(LABELS)]
    assert generic.main([*arguments, "--dry-run"]) == 2
    text, errors = capsys.readouterr()
    expected = [
        "1. row 22: it has 3 cells, the header has 7; mend the row",
        "2. row 3, column 'key': 'k1' is the key of row 2, too; make keys unique",
        "3. row 4, column 'patient': it is blank, expected who the sample is of; fill it in",
        "4. row 5, column 'photo': there is no file 'photos/none.png', looked for ",
        "5. row 7, column 'clinic.age': 'nan' is no finite number; leave the cell blank if it is missing",
        "6. row 8, column 'clinic.age': 'old' is no number; expected one, or a blank where it is missing",
        "7. row 9, column 'clinic.score': '1e999' is no finite number; leave the cell blank if it is missing",
        "8. row 12, column 'key': 'k 10' is no usable key, expected 1 to 80 letters, digits, - or _",
        "9. row 13: every input is blank; fill one in or remove the row",
        "10. row 11, column 'label': 'bening' is none of --classes, expected benign, malignant, or 0 to 1",
        "11. row 3, column 'split': it is 'Trial', expected train, val or test",
        "12. column 'split': patient 'patient 6' is in two splits: test (row 8) and train (row 10); a patient's",
        "13. row 6, column 'photo': cannot read the image ",
        "14. row 14, column 'photo': ",
    ]
    found = [line for line in text.splitlines() if line[0].isdigit()]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)
    assert "expected 8 bits a channel" in found[-1]
    assert f"14 problems in {table}; mend the table and run this again" in errors
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"has 13 problems: row 22: .*; and 10 more; list all of them with --dry-run"):
        generic.make(table, tmp_path / "out", options=Options(classes=LABELS))  # a cut image has a sound header


def test_what_only_the_values_show_stops_the_build_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = study(tmp_path)
    path = tmp_path / "photos" / "4.png"
    path.write_bytes(path.read_bytes()[:300])
    table = write(tmp_path, rows)
    assert generic.main(["--raw", str(table), "--out", str(tmp_path / "out")]) == 2
    assert "'photo' of sample 'row-0000006' is not a readable image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def drop(column: str) -> Callable[[list[dict[str, str]]], None]:
    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            del row[column]

    return change


def put(**cells: str) -> Callable[[list[dict[str, str]]], None]:
    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row |= cells

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("patient"), "no column 'patient', the header has label, photo, clinic.age, clinic.score; splits are by"),
        (drop("label"), "no column 'label', the header has patient, photo, clinic.age, clinic.score; add one, blank"),
        (put(split="train", fold="0"), "both a column 'split' and a column 'fold', expected one of them or none"),
        (put(label="benign"), "column 'label': 1 class ('benign'), expected at least 2; fill in the labels"),
        (
            put(fold="1"),
            "column 'fold': it has no row of fold 0, expected numbers from 0 without a gap, 2 folds or more",
        ),
        (put(fold="0"), "column 'fold': it has 1 fold, expected numbers from 0 without a gap, 2 folds or more"),
        (put(split="train"), "fold 0 has no patient with a label for test; every fold needs some"),
        (put(split="test"), "fold 0 has no patient with a label for train; every fold needs some"),
        (
            put(photo="notes.txt", **{"image:x": "notes.txt"}),
            "rows 2, 3, 4 and 9 more, column 'image:x': 'notes.txt' is no file of a known",
        ),
        (
            put(**{"image:photo": "photos/0.png"}),
            "column 'image:photo': gives the name 'photo', which column 'photo' has",
        ),
        (
            put(**{"image:1": "photos/0.png"}),
            "column 'image:1': gives no usable name ('1'), expected letters and digits",
        ),
        (put(**{"photo.x": "1"}), "the name 'photo' is used for files and for numbers; rename one"),
    ],
)
def test_a_wrong_table_is_explained(tmp_path: Path, change: Callable[[list[dict[str, str]]], None], words: str):
    rows = study(tmp_path)
    change(rows)
    assert any(line.startswith(words) for line in problems_of(write(tmp_path, rows))), problems_of(
        tmp_path / "table.csv"
    )


def test_too_few_patients_for_the_folds_is_a_problem(tmp_path: Path):
    found = problems_of(write(tmp_path, study(tmp_path, patients=6)))
    assert len(found) == 1
    assert "class 0 has 3 patients, 5 folds with train, val and test need at least 5 of each class" in found[0]


def test_labels_that_are_measurements_are_a_problem(tmp_path: Path):
    rows = [{"patient": f"p{k}", "label": f"{k / 7}", "a.b": "1"} for k in range(150)]
    assert any("150 different labels in 150 rows, such as '0.0'" in line for line in problems_of(write(tmp_path, rows)))


@pytest.mark.parametrize("classes", [("benign",), ("benign", "benign"), ("benign", "malignant", "")])
def test_class_names_must_differ(tmp_path: Path, classes: tuple[str, ...]):
    found = problems_of(write(tmp_path, study(tmp_path)), Options(classes=classes))
    assert found[0] == f"--classes is {', '.join(classes)!r}, expected at least 2 different names"


def test_columns_that_vector_names_must_be_there(tmp_path: Path):
    found = problems_of(write(tmp_path, study(tmp_path)), Options(vectors=(("x", ("clinic.age", "mass")),)))
    header = "patient, label, photo, clinic.age, clinic.score"
    assert found == [f"column 'mass': --vector x: the header has no such column, it has {header}"]


def test_pickles_are_never_loaded(tmp_path: Path):
    rows = study(tmp_path)
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    rows[0]["vector:deep"] = "bad.npy"
    for row in rows[1:]:
        row["vector:deep"] = ""
    found = problems_of(write(tmp_path, rows))
    assert "row 2, column 'vector:deep': cannot read the array" in found[0]
    assert found[1] == "column 'vector:deep': no file of it can be used, expected at least one; fill it in or remove it"


def test_problems_that_differ_in_the_row_alone_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = study(tmp_path, patients=20)
    for number, row in enumerate(rows):
        row |= {"clinic.sex": "mf"[number % 2], "clinic.score": "NA", "clinic.age": "" if number < 3 else "old"}
    table = write(tmp_path, rows)
    assert generic.main(["--raw", str(table), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    text, errors = capsys.readouterr()
    words = "is no number; expected one, or a blank where it is missing; of words make columns of 0 and 1, one a word"
    assert [line for line in text.splitlines() if line[0].isdigit()] == [
        "1. rows 2, 3, 4 and 17 more, column 'clinic.score': 'NA' is no number; leave the cell blank if it is missing",
        f"2. row 2, column 'clinic.sex': 'm' {words}",
        f"3. row 3, column 'clinic.sex': 'f' {words}",
        f"4. row 4, column 'clinic.sex': 'm' {words}; and 17 more like these",
        f"5. rows 5, 6, 7 and 14 more, column 'clinic.age': 'old' {words}",
    ]
    assert "57 problems in" in errors
    assert "sex; 3 values are blank" in text
    with pytest.raises(DataError, match=r"has 57 problems: rows 2, 3, 4 and 17 more, .*; and 35 more; list all"):
        generic.make(table, tmp_path / "out")


def test_decimal_commas_are_read_where_they_separate_nothing(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["clinic.age"] = f"3{number % 10},5"
    table = write(tmp_path, rows)
    assert all("write it with a point, 3" in line for line in problems_of(table))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    found = examined(table)
    assert (found.lines, found.notes) == (
        [],
        ["note: column 'clinic.age' has decimal commas, such as '30,5', read as 30.5"],
    )
    generic.make(table, tmp_path / "out")
    assert ShardSet(tmp_path / "out").read(3, ["clinic"])["clinic"][0] == 33.5


def test_labels_that_mean_the_same_are_not_two_classes(tmp_path: Path):
    rows = study(tmp_path, patients=24)
    for number, row in enumerate(rows):
        row["label"] = ("1", "1.0", "2", "2")[number % 4]
    assert problems_of(write(tmp_path, rows)) == ["column 'label': '1' and '1.0' are one number; write them alike"]
    for number, row in enumerate(rows):
        row["label"] = ("Benign", "malignant", "benign", "malignant")[number % 4]
    assert problems_of(write(tmp_path, rows)) == [
        "column 'label': 'Benign' and 'benign' are one word; write them alike"
    ]


@pytest.mark.parametrize("word", ["NaN", "NA", "None", "n.a.", "null", "-"])
def test_words_for_nothing_are_no_class(tmp_path: Path, word: str):
    rows = study(tmp_path)
    rows[4]["label"] = word
    words = f"row 6, column 'label': {word!r} says that there is none; leave it blank"
    found = problems_of(write(tmp_path, rows))
    assert len(found) == 1
    assert found[0].startswith(words)
    assert problems_of(tmp_path / "table.csv", Options(classes=(*LABELS, word), folds=2, val_share=0)) != found


def test_suspicious_tables_are_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = study(tmp_path, patients=14)
    for number, row in enumerate(rows):
        row["split"] = "train" if number < 8 else "val" if number < 10 else "test"
    rows[13]["label"] = "rare"
    rows[2] |= {name: rows[0][name] for name in ("photo", "clinic.age", "clinic.score")}
    rows[3] |= {name: rows[0][name] for name in ("photo", "clinic.age", "clinic.score")}
    rows.append({**rows[-1], "patient": "Summe", "label": "", "photo": "", "split": "train"})
    for row in rows:
        row["tumour_mask"] = row["photo"]
    table = write(tmp_path, rows)
    expected = [
        "note: class 'rare' has no row in train of fold 0; such a fold cannot be trained on: move patients, or merge",
        "note: class 'rare' has no row in val of fold 0; ",
        "note: rows with the same files and numbers: 2 and 4 and 5 (different patients, different labels); remove what",
        "note: row 16 ('Summe'): named like a total; remove it, if it is no sample",
        "note: column 'tumour_mask' looks like a label map (by its name) and is an input; call it target:tumour_mask",
    ]
    for more in (["--dry-run"], []):
        assert generic.main(["--raw", str(table), "--out", str(tmp_path / "out"), *more]) == 0
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        for note, start in zip(notes, expected, strict=True):
            assert note.startswith(start)


def test_a_label_map_among_the_inputs_is_seen_by_its_values(tmp_path: Path):
    rows = volumes(tmp_path, target=False)
    for number, row in enumerate(rows):
        row["second"] = f"{number}-m.nii"
    (note,) = examined(write(tmp_path, rows), Options(folds=2)).notes
    assert note.startswith("note: column 'second' looks like a label map (by its values 0, 1, 2, 3) and is an input;")


def test_arrays_have_no_anatomy(tmp_path: Path):
    rows = volumes(tmp_path, target=False)
    for row in rows:
        row["volume:t1"] = ""
    rows[0]["volume:t1"] = "0.nii.gz"
    manifest = generic.make(write(tmp_path, rows), tmp_path / "out").manifest
    first, second = manifest.samples.space[:2]
    assert first is not None
    assert first.affine is not None  # the NIfTI file beside it knows
    assert second is not None
    assert (second.affine, second.spacing, second.shape) == (None, None, (6, 5, 5))


def test_a_target_without_classes_stops_with_that_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = write(tmp_path, volumes(tmp_path, target=True))
    assert generic.main(["--raw", str(table), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    text, errors = capsys.readouterr()
    assert text == ""
    assert errors.startswith(
        f"error: table {str(table)!r} has a target, which needs --classes: the names of its values"
    )
    assert errors.count("\n") == 1


def test_other_headers_are_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = {"patient": "Patient ID", "label": "Diagnosis"}
    rows = [{names.get(name, name): cell for name, cell in row.items()} for row in study(tmp_path)]
    header = "the header has Patient ID, Diagnosis, photo, clinic.age, clinic.score"
    assert problems_of(write(tmp_path, rows)) == [
        f"no column 'patient', {header}; did you mean 'Patient ID'? rename it to 'patient'",
        f"no column 'label', {header}; did you mean 'Diagnosis'? rename it to 'label'",
    ]
    assert generic.main(["--raw", str(tmp_path), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    text = capsys.readouterr().out
    assert "table.csv: 12 rows\n" in text
    assert not any(line.startswith(("  classes", "  fold")) for line in text.splitlines())


def test_folds_may_be_counted_from_one(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["fold"] = str(number // 4 + 1)
    found = examined(write(tmp_path, rows))
    assert found.lines == []
    assert found.notes[0] == "note: column 'fold' counts from 1: fold 1 of the table is fold 0 of the set, of 3 folds"
    manifest = generic.make(tmp_path, tmp_path / "out").manifest
    assert [fold.test[0] for fold in manifest.folds] == ["patient 0", "patient 4", "patient 10"]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("C:\\Users\\ida\\1.png", "; that is a Windows path: copy the file beside the table, and name it from"),
        ("photos\\1.png", "; that is a Windows path: write 'photos/1.png'"),
        ("../1.png", "; paths start at the table's folder"),
    ],
)
def test_a_missing_file_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: str, words: str):
    rows = study(tmp_path / "own")
    rows[1]["photo"] = cell
    write(tmp_path / "own", rows)
    monkeypatch.chdir(tmp_path / "own")
    (line,) = problems_of(Path("table.csv"))
    place = tmp_path / "1.png" if cell.startswith("..") else tmp_path / "own" / cell
    assert line.startswith(f"row 3, column 'photo': there is no file {cell!r}, looked for {str(place)!r}{words}")


def test_folds_of_a_segmentation_are_not_stratified(tmp_path: Path):
    table = write(tmp_path, volumes(tmp_path, target=True))
    options = Options(classes=("ground", "core", "rim", "edge"))
    manifest = generic.make(table, tmp_path / "out", options=options).manifest
    assert manifest.split_rule == "by patient; 0.15 of the rest is the validation part"
    write(tmp_path, volumes(tmp_path, target=True)[:1])
    assert problems_of(table, options) == ["1 patient; 5 folds with train, val and test need at least 5; add patients"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"expected one table \(\.csv\), found none; name with --raw your table"),
        ({"a.csv": b"x", "b.csv": b"x"}, r"expected one table \(\.csv\), found a\.csv, b\.csv"),
        ({"a.csv": b"patient,label\n"}, r"has no rows below its header; see --template for an example"),
        (
            {"a.csv": b"patient,x\n1,\xe4\n"},
            r"a\.csv': line 2 is not in UTF-8 but, .* plain 'CSV' .*; save it as 'CSV UTF",
        ),
        ({"a.csv": "patient\n1\n".encode("utf-16")}, r"a\.csv': it is in UTF-16, expected .*; save it as 'CSV UTF-8'"),
        ({"a.csv": b"PK\x03\x04..."}, r"a\.csv': it is a spreadsheet, expected a CSV in UTF-8; save it as 'CSV UTF-8'"),
        ({"a.csv": b'patient\n"1"2\n'}, r"cannot read the table '.*a\.csv': .*; expected a CSV, save it again"),
    ],
)
def test_without_a_table_nothing_is_read(tmp_path: Path, files: dict[str, bytes], words: str):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        generic.make(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("argument", [["--size", "8"], ["--size", "0,8"], ["--vector", "x"], ["--task", "My set"]])
def test_arguments_are_explained(tmp_path: Path, argument: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        generic.main(["--raw", str(tmp_path), "--out", str(tmp_path / "out"), *argument])
    assert stop.value.code == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.real_data
def test_a_real_table_of_skin_lesions(real: Callable[[str], Path], tmp_path: Path):
    folder = real("ham10000_small")
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = [
        {
            "patient": row["lesion_id"],
            "label": row["dx"],
            "key": row["image_id"],
            "image:derm": str(folder / row["file"]),
            "clinic.age": row["age"],
            "sex": row["sex"],
        }
        for row in rows
    ]
    manifest = generic.make(write(tmp_path, own), tmp_path / "out").manifest
    assert manifest.n_samples == len(rows)
    assert manifest.class_names == sorted({row["dx"] for row in rows})
    assert manifest.modalities["derm"].codec == "jpg"
    assert len(manifest.folds) == 5
    shard_set = ShardSet(tmp_path / "out")
    with Image.open(folder / rows[7]["file"]) as image:
        number = manifest.samples.key.index(rows[7]["image_id"])
        np.testing.assert_array_equal(shard_set.read(number, ["derm"])["derm"], np.asarray(image))
