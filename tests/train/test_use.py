"""A finished run in use: scored again, handed on, and asked about new items."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkd.base import World
from distkd.cli import DONE, USER, main
from distkd.metrics.predictions import Predictions, read_predictions
from distkd.train.loop import train
from tests.data.toy import toy_arrays
from tests.laws.common import settings_of
from tests.small import METHODS, Small

Capture = pytest.CaptureFixture[str]
FEATURES = ["a", "b", "c", "d", "e"]


def predict(source: Path, output: Path, *inputs: Path) -> Predictions:
    assert main(["predict", str(source), *map(str, inputs), "--output", str(output)]) == DONE
    return read_predictions(output / "predictions.csv")


def of(predictions: Predictions) -> dict[str, np.ndarray]:
    return dict(zip(predictions.key, predictions.probability_NC, strict=True))


def trained(small: Small, kind: str, split: str = "test") -> dict[str, np.ndarray]:
    """What the run wrote when it ended."""
    return of(read_predictions(small.root / kind / "eval" / f"{split}.predictions.csv"))


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal up to the rounding of float32 in other batch sizes."""
    assert found.keys() == expected.keys()
    for key, probability in expected.items():
        assert found[key] == pytest.approx(probability, abs=1e-6), key


@pytest.fixture
def run(small: Small, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a finished run, to be written into."""

    def copy(kind: str) -> Path:
        shutil.copytree(small.root / kind, tmp_path / "runs" / kind)
        return tmp_path / "runs" / kind

    return copy


# eval


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("split", ["test", "val"])
def test_eval_finds_what_the_run_found(
    small: Small, run: Callable[[str], Path], capsys: Capture, kind: str, split: str
):
    folder = run(kind)
    expected = json.loads((folder / "eval" / f"{split}.json").read_text())
    shutil.rmtree(folder / "eval")
    assert main(["eval", str(folder), "--split", split]) == DONE
    assert json.loads(capsys.readouterr().out) == {
        name: value for name, value in expected["metrics"].items() if value is not None
    }
    assert json.loads((folder / "eval" / f"{split}.json").read_text()) == expected
    same(of(read_predictions(folder / "eval" / f"{split}.predictions.csv")), trained(small, kind, split))


def test_eval_scores_the_training_split_without_augmentation(run: Callable[[str], Path]):
    folder = run("alone")
    assert main(["eval", str(folder), "--split", "train"]) == DONE
    assert len(read_predictions(folder / "eval" / "train.predictions.csv")) == 28


def test_eval_takes_overrides(run: Callable[[str], Path], capsys: Capture):
    folder = run("alone")
    assert main(["eval", str(folder), "--eval.level", "sample"]) == DONE
    content = json.loads((folder / "eval" / "test.json").read_text())
    assert (content["level"], content["n"]) == ("sample", 18)
    assert main(["eval", str(folder), "--evil.level", "sample"]) == USER
    assert "evil: unknown key; did you mean 'eval'?" in capsys.readouterr().err


def test_eval_refuses_patients_that_the_run_was_trained_on(run: Callable[[str], Path], capsys: Capture):
    folder = run("alone")
    before = (folder / "eval" / "test.json").read_text()
    assert main(["eval", str(folder), "--data.fold", "1"]) == USER
    text = capsys.readouterr().err
    assert f"run {folder} was trained on other samples (fold 0 of " in text
    assert "than fold 1 of " in text
    assert "so split 'test' may hold some of them; score the run's own fold, or use `distkd predict`" in text
    assert (folder / "eval" / "test.json").read_text() == before


def test_eval_wants_an_export(run: Callable[[str], Path], capsys: Capture):
    folder = run("alone")
    shutil.rmtree(folder / "export")
    assert main(["eval", str(folder)]) == USER
    assert f"run {folder} has no export yet; finish it with `distkd train" in capsys.readouterr().err


# export


def test_an_export_stands_alone(small: Small, tmp_path: Path, run: Callable[[str], Path], capsys: Capture):
    folder, out = run("picture"), tmp_path / "clinic"
    assert main(["export", str(folder), "--output", str(out)]) == DONE
    assert capsys.readouterr().out == f"{out}\n"
    shutil.rmtree(folder)
    assert sorted(path.name for path in out.iterdir()) == ["model.json", "student.safetensors"]
    card = json.loads((out / "model.json").read_text())
    assert card["class_names"] == ["low", "high"]
    assert card["inputs"] == {"slide": {"kind": "image", "shape": [3, 12, 10]}}
    assert card["method"] == "supervised"
    assert card["selection"]["select_metric"] == "auc_macro"
    found = of(predict(out, tmp_path / "out", small.shards))
    expected = trained(small, "picture")
    same({key: found[key] for key in expected}, expected)


def test_an_export_may_be_written_again(tmp_path: Path, run: Callable[[str], Path], capsys: Capture):
    folder, out = run("alone"), tmp_path / "clinic"
    for _ in range(2):
        assert main(["export", str(folder), "--output", str(out)]) == DONE
    assert main(["export", str(folder)]) == DONE
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "export")
    assert main(["export", str(out), "--output", str(out)]) == DONE


@pytest.mark.parametrize("holds", ["letter.txt", "deep/letter.txt"])
def test_an_export_replaces_nothing_else(tmp_path: Path, run: Callable[[str], Path], capsys: Capture, holds: str):
    """`--output ~` must not empty somebody's home."""
    home = tmp_path / "home"
    (home / holds).parent.mkdir(parents=True)
    (home / holds).write_text("dear")
    assert main(["export", str(run("alone")), "--output", str(home)]) == USER
    assert f"output {home} exists and is no export; name a new folder with --output" in capsys.readouterr().err
    assert (home / holds).read_text() == "dear"
    assert main(["export", str(tmp_path / "runs" / "alone"), "--output", str(home / holds)]) == USER


def test_a_damaged_export_is_not_handed_on(tmp_path: Path, run: Callable[[str], Path], capsys: Capture):
    folder = run("alone")
    with (folder / "export" / "student.safetensors").open("ab") as file:
        file.write(b"?")
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == USER
    assert "SHA-256 differs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# predict


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("place", ["", "export"])
def test_a_shard_set_is_predicted_as_in_training(small: Small, tmp_path: Path, kind: str, place: str):
    """Also where samples lack a modality: every third has no `gene`."""
    found = predict(small.root / kind / place, tmp_path, small.shards)
    assert found.class_names == ["low", "high"]
    assert len(found) == 54
    assert np.allclose(found.probability_NC.sum(axis=1), 1)
    for split in ("test", "val"):
        expected = trained(small, kind, split)
        same({key: of(found)[key] for key in expected}, expected)


def genes(small: Small) -> dict[int, np.ndarray]:
    """The vectors of the test split, some with a gap."""
    numbers = [int(key.removeprefix("s-")) for key in trained(small, "alone")]
    return {number: toy_arrays(number)["gene"] for number in numbers if number % 3 != 2}


def test_an_array_is_predicted_row_by_row(small: Small, tmp_path: Path):
    values = genes(small)
    assert any(np.isnan(row).any() for row in values.values())
    np.save(tmp_path / "rows.npy", np.stack(list(values.values())).astype(np.float64))
    found = of(predict(small.root / "alone", tmp_path / "out", tmp_path / "rows.npy"))
    expected = trained(small, "alone")
    same(found, {f"rows-{row}": expected[f"s-{number:03d}"] for row, number in enumerate(values)})


def test_one_vector_is_an_array_of_one_row(small: Small, tmp_path: Path):
    number, values = next(iter(genes(small).items()))
    np.save(tmp_path / "row.npy", values)
    found = of(predict(small.root / "alone", tmp_path / "out", tmp_path / "row.npy"))
    same(found, {"row-0": trained(small, "alone")[f"s-{number:03d}"]})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_by_its_header(small: Small, tmp_path: Path, encoding: str):
    """Columns in any order, others left out, empty cells missing; spreadsheets put a byte order mark in front."""
    values = genes(small)
    with (tmp_path / "table.csv").open("w", newline="", encoding=encoding) as file:
        table = csv.writer(file)
        table.writerow(["e", "d", "key", "ward", "c", "b", "a"])
        for number, row in values.items():
            a, b, c, d, e = ("" if np.isnan(value) else repr(float(value)) for value in row)
            table.writerow([e, d, f"case {number}", "7b", c, b, a])
    found = of(predict(small.root / "alone", tmp_path / "out", tmp_path / "table.csv"))
    expected = trained(small, "alone")
    same(found, {f"case {number}": expected[f"s-{number:03d}"] for number in values})


def test_rows_without_a_key_are_numbered(small: Small, tmp_path: Path):
    (tmp_path / "t.csv").write_text("a,b,c,d,e\n1,2,3,4,5\n,,,,\n")
    assert predict(small.root / "alone", tmp_path, tmp_path / "t.csv").key == ["t-0", "t-1"]


@pytest.mark.parametrize("suffix", ["png", "PNG"])
def test_images_are_predicted_as_in_training(small: Small, tmp_path: Path, suffix: str):
    expected = trained(small, "picture")
    files = [tmp_path / f"{key}.{suffix}" for key in expected]
    for path, key in zip(files, expected, strict=True):
        Image.fromarray(toy_arrays(int(key.removeprefix("s-")))["slide"]).save(path, format="PNG")
    same(of(predict(small.root / "picture", tmp_path / "out", *files)), expected)


def test_a_grey_student_reads_a_grey_image(small: Small, tmp_path: Path):
    key, expected = next(iter(trained(small, "student").items()))
    Image.fromarray(toy_arrays(int(key.removeprefix("s-")))["coarse"][:, :, 0]).save(tmp_path / f"{key}.png")
    same(of(predict(small.root / "student", tmp_path / "out", tmp_path / f"{key}.png")), {key: expected})


class Refusals:
    """What `distkd predict` says to what it cannot take."""

    def __init__(self, small: Small, folder: Path, capsys: Capture):
        self.small, self.folder, self.capsys = small, folder, capsys

    def __call__(self, kind: str, *names: str) -> str:
        inputs = [str(self.folder / name) for name in names]
        out = self.folder / "out"
        assert main(["predict", str(self.small.root / kind), *inputs, "--output", str(out)]) == USER
        captured = self.capsys.readouterr()
        assert captured.err.count("distkd: ") == 1
        assert "Traceback" not in captured.err
        assert not out.exists()
        return captured.err.removeprefix("distkd: ").strip()


@pytest.fixture
def refused(small: Small, tmp_path: Path, capsys: Capture) -> Refusals:
    return Refusals(small, tmp_path, capsys)


def test_an_input_must_exist(refused: Refusals):
    assert refused("alone", "absent.csv").endswith(
        "absent.csv is neither a file nor a shard set; give .npy or .csv files, or a shard set with gene"
    )
    assert refused("picture", "").endswith("give .png or .jpg files, or a shard set with slide")


def test_a_single_file_cannot_hold_two_modalities(refused: Refusals):
    (refused.folder / "x.csv").write_text("a\n1\n")
    assert refused("teacher", "x.csv") == (
        "the model sees gene, slide; a single file cannot hold them, give a shard set"
    )


@pytest.mark.parametrize(
    "kind, name", [("alone", "x.png"), ("alone", "x.txt"), ("picture", "x.npy"), ("picture", "x.csv")]
)
def test_a_file_of_another_kind_is_refused(refused: Refusals, kind: str, name: str):
    (refused.folder / name).write_text("")
    assert refused(kind, name).startswith(f"the student cannot take {refused.folder / name}; give .")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "lacks 5 columns that the student needs, first ['a', 'b', 'c']"),
        ("a,b,d\n1,2,3\n", "lacks 2 columns that the student needs, first ['c', 'e']"),
        ("a,b,c,d,e\n1,2,x,4,5\n", "line 2: could not convert string to float: 'x'; empty means missing"),
        ("a,b,c,d,e\n1,2,3,4\n", "line 2: the number of cells is not that of the header (5)"),
        ("a,b,c,d,e\n1,2,3,4,5,6\n", "line 2: the number of cells is not that of the header (5)"),
        ("a,b,c,d,e\n1,2,3,4,5\n1,2,inf,4,5\n", "item 't-1': 'gene' holds infinite values"),
        ("a,b,c,d,e\n", "no item in "),
        ("key,a,b,c,d,e\nk,1,2,3,4,5\nk,1,2,3,4,5\n", "two items have the key 'k': in "),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_its_place(refused: Refusals, text: str, words: str):
    (refused.folder / "t.csv").write_text(text)
    message = refused("alone", "t.csv")
    assert words in message
    assert str(refused.folder / "t.csv") in message


def test_a_table_in_another_encoding_is_refused(refused: Refusals):
    (refused.folder / "t.csv").write_bytes(b"a,b,c,d,e\n1,2,3,4,5\n\xe4")
    assert "cannot be read: 'utf-8' codec" in refused("alone", "t.csv")


@pytest.mark.parametrize(
    "array, words",
    [
        (
            np.zeros((2, 4)),
            "has float64 values of shape (2, 4), the student expects numbers of shape (items, 5) of 'gene'",
        ),
        (np.zeros((2, 5, 1)), "has float64 values of shape (2, 5, 1)"),
        (np.array([["x"] * 5]), "has <U1 values of shape (1, 5)"),
        (np.zeros((0, 5)), "no item in "),
    ],
)
def test_an_array_that_does_not_fit_is_refused(refused: Refusals, array: np.ndarray, words: str):
    np.save(refused.folder / "x.npy", array)
    assert words in refused("alone", "x.npy")


def test_an_array_of_objects_is_a_pickle_and_refused(refused: Refusals):
    np.save(refused.folder / "x.npy", np.array([{}] * 5, dtype=object), allow_pickle=True)
    assert "x.npy cannot be read: Object arrays cannot be loaded when allow_pickle=False" in refused("alone", "x.npy")
    (refused.folder / "y.npy").write_bytes(pickle.dumps([1]))
    assert "y.npy cannot be read: " in refused("alone", "y.npy")


def test_an_image_that_does_not_fit_is_refused(refused: Refusals):
    Image.fromarray(np.zeros((10, 12, 3), dtype=np.uint8)).save(refused.folder / "wide.png")
    message = refused("picture", "wide.png")
    assert message.startswith(f"{refused.folder / 'wide.png'}, item 'wide': 'slide' is uint8 of shape (10, 12, 3), ")
    assert "expected an image of shape (12, 10, 3)" in message
    (refused.folder / "torn.png").write_bytes(b"\x89PNG\r\n")
    assert f"image {refused.folder / 'torn.png'} cannot be read" in refused("picture", "torn.png")


def test_two_files_of_one_name_are_refused(refused: Refusals):
    for folder in ("a", "b"):
        (refused.folder / folder).mkdir()
        Image.fromarray(toy_arrays(0)["slide"]).save(refused.folder / folder / "x.png")
    message = refused("picture", "a/x.png", "b/x.png")
    assert message == (
        f"two items have the key 'x': in {refused.folder / 'a' / 'x.png'} and in {refused.folder / 'b' / 'x.png'}; "
        "rename one"
    )


def test_shards_without_the_modality_are_refused(refused: Refusals, small: Small):
    content = json.loads((small.shards / "manifest.json").read_text())
    (refused.folder / "shards").mkdir()
    for path in small.shards.glob("*.tar"):
        (refused.folder / "shards" / path.name).symlink_to(path)
    del content["modalities"]["slide"], content["samples"]["bytes"]["slide"], content["samples"]["crc32c"]["slide"]
    (refused.folder / "shards" / "manifest.json").write_text(json.dumps(content))
    assert "unknown modality 'slide' for task 'toy'" in refused("picture", "shards")


def test_the_output_must_be_a_folder(small: Small, tmp_path: Path, capsys: Capture):
    (tmp_path / "t.csv").write_text("a,b,c,d,e\n1,2,3,4,5\n")
    (tmp_path / "file").write_text("")
    arguments = [str(small.root / "alone"), str(tmp_path / "t.csv"), "--output", str(tmp_path / "file")]
    assert main(["predict", *arguments]) == USER
    assert f"cannot write {tmp_path / 'file' / 'predictions.csv'}: " in capsys.readouterr().err


def test_a_shard_set_brings_patient_group_and_label(small: Small, tmp_path: Path):
    found = predict(small.root / "alone", tmp_path, small.shards)
    samples = json.loads((small.shards / "manifest.json").read_text())["samples"]
    known = {key: n for n, key in enumerate(samples["key"])}
    rows = [known[key] for key in found.key]
    assert found.patient == [samples["patient"][n] for n in rows]
    assert found.group == [samples["group"][n] for n in rows]
    assert found.label_N.tolist() == [samples["label"][n] for n in rows]
    assert len({*found.patient}) > 1


def test_labels_go_by_the_names_of_classes_that_the_student_knows(small: Small, tmp_path: Path):
    content = json.loads((small.shards / "manifest.json").read_text())
    shards = tmp_path / "shards"
    shutil.copytree(small.shards, shards)
    content["class_names"] = ["high", "huge"]
    (shards / "manifest.json").write_text(json.dumps(content))
    found = predict(small.root / "alone", tmp_path / "out", shards)
    label = dict(zip(content["samples"]["key"], content["samples"]["label"], strict=True))
    assert found.label_N.tolist() == [{0: 1, 1: -1, -1: -1}[label[key]] for key in found.key]


def test_what_an_earlier_call_left_does_not_stay_when_one_fails(small: Small, tmp_path: Path, capsys: Capture):
    (tmp_path / "t.csv").write_text("a,b,c,d,e\n1,2,3,4,5\n")
    (tmp_path / "bad.csv").write_text("a,b,c,d,e\n1,2,x,4,5\n")
    for source, table in ((small.root / "alone", "bad.csv"), (tmp_path, "t.csv")):
        predict(small.root / "alone", tmp_path / "out", tmp_path / "t.csv")
        assert main(["predict", str(source), str(tmp_path / table), "--output", str(tmp_path / "out")]) == USER
        assert not (tmp_path / "out" / "predictions.csv").exists()


def test_an_input_is_not_written_over(small: Small, tmp_path: Path, capsys: Capture):
    path = tmp_path / "predictions.csv"
    path.write_text("a,b,c,d,e\n1,2,3,4,5\n")
    assert main(["predict", str(small.root / "alone"), str(path), "--output", str(tmp_path)]) == USER
    assert f"input {path} would be overwritten; name another folder with --output" in capsys.readouterr().err
    assert path.read_text().startswith("a,b")


@pytest.mark.parametrize("restore", [True, False])
def test_a_student_of_a_coarse_copy_names_both_sizes_that_it_takes(
    small: Small, tmp_path: Path, capsys: Capture, restore: bool
):
    copy = {"degraded": {"halved": {"of": "slide", "factor": 2, "restore": restore}}}
    model = {"modalities": ["halved"], "encoders": {"halved": {"name": "cnn", "widths": [4]}}}
    run = {"root": str(tmp_path), "name": "halved", "epochs": 1}
    train(settings_of(small.config("picture", model=model, data=copy, run=run)), World())
    for size in ((12, 10), (6, 5)):
        Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(tmp_path / f"{size[0]}.png")
    assert len(predict(tmp_path / "halved", tmp_path, tmp_path / "12.png", tmp_path / "6.png")) == 2
    Image.fromarray(np.zeros((7, 7, 3), dtype=np.uint8)).save(tmp_path / "odd.png")
    assert main(["predict", str(tmp_path / "halved"), str(tmp_path / "odd.png"), "--output", str(tmp_path)]) == USER
    assert (
        "expected an image of shape (12, 10, 3) (height, width, channels) or, of an image scanned at the coarse "
        "resolution, (6, 5, 3); prepare it as"
    ) in capsys.readouterr().err


def test_the_source_must_be_a_run_or_an_export(tmp_path: Path, capsys: Capture):
    assert main(["predict", str(tmp_path), "x.csv", "--output", str(tmp_path / "out")]) == USER
    assert f"no export in {tmp_path}: expected model.json there or in {tmp_path / 'export'}" in capsys.readouterr().err
