"""Anybody's table that is wrong or suspicious: every problem at once, by row and column, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkd.errors import DataError
from shards import generic
from shards.generic import Options
from tests.shards import layouts_volumes as layouts
from tests.shards.layouts_tables import LABELS, examined, problems_of, save_image, study, volumes, write


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
