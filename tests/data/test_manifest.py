"""The manifest: it comes back as it was written, and every contradiction stops it with words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distkd.data import manifest_file
from distkd.data.manifest import MANIFEST, Modality, Space, check_modality, explain
from distkd.data.manifest_file import read_manifest, write_manifest
from distkd.errors import DataError
from tests.data.toy import write_toy


@pytest.fixture
def content(toy_folder: Path) -> dict[str, Any]:
    return json.loads((toy_folder / MANIFEST).read_text())


def test_manifest_comes_back_as_it_was_written(tmp_path: Path):
    manifest = write_toy(tmp_path / "shards")
    assert read_manifest(tmp_path / "shards") == manifest
    (tmp_path / "again").mkdir()
    write_manifest(manifest, tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (tmp_path / "shards" / MANIFEST).read_bytes()


def test_missing_manifest_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(DataError, match=r"no manifest\.json in .* make one with `python shards/<recipe>\.py --out"):
        read_manifest(tmp_path)


def test_unreadable_manifest_is_a_data_error(tmp_path: Path):
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(DataError, match=r"cannot read .*check the path and its rights"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"is not a valid manifest: file: invalid JSON.*build the shard set again"),
        ('{"format_version": 3}', "has format version 3, this distkd reads 1 to 2; update distkd"),
        ('{"format_version": 0}', "has format version 0, this distkd reads 1 to 2; build the shard set again"),
        ("{}", "is not a valid manifest: task: field required; .*and 5 more"),
    ],
)
def test_damaged_manifest_is_a_data_error(tmp_path: Path, text: str, words: str):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=words):
        read_manifest(tmp_path)


def damage(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a value at a dotted place."""

    def change(content: dict[str, Any]) -> None:
        *path, last = place.split(".")
        target: Any = content
        for part in path:
            target = target[int(part) if isinstance(target, list) else part]
        target[int(last) if isinstance(target, list) else last] = value

    return change


def drop_last_label(content: dict[str, Any]) -> None:
    content["samples"]["label"].pop()


def repeat_key(content: dict[str, Any]) -> None:
    content["samples"]["key"][1] = content["samples"]["key"][0]


def repeat_key_elsewhere(content: dict[str, Any]) -> None:
    content["samples"]["key"][-1] = content["samples"]["key"][0]


def label_many(content: dict[str, Any]) -> None:
    content["samples"]["label"][:8] = range(5, 13)
    content["samples"]["label"][40] = -2


def drop_gene(content: dict[str, Any]) -> None:
    del content["modalities"]["gene"]


def repeat_shard(content: dict[str, Any]) -> None:
    content["shards"][1]["file"] = content["shards"][0]["file"]


def move_a_patient(content: dict[str, Any]) -> None:
    content["folds"][1]["test"].append(content["folds"][1]["train"][0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damage("task", 3), "task: input should be a valid string, found 3;"),
        (damage("samples.label.0", "1"), r"samples\.label\.0: input should be a valid integer, found '1';"),
        (damage("colour", "red"), "colour: extra inputs are not permitted, found 'red';"),
        (damage("shards.0.sha256", "abc"), r"shards\.0\.sha256: string should match pattern"),
        (damage("shards.0.file", "../secret.tar"), r"shards\.0\.file: string should match pattern"),
        (damage("samples.key.0", "a.b"), r"key\.0: string should match pattern '\^\[A-Za-z0-9_-\]\+\$', found 'a\.b';"),
        (damage("samples.key.0", "." * 5000), r"found '\.{28}\.\.\.\.{27,29}'; build"),
        (
            damage("samples.offset.0", 2**62),
            r"samples\.offset\.0: input should be less than 4611686018427387904, found",
        ),
        (damage("samples.bytes.gene.0", [0, 10**40]), r"samples\.bytes\.gene\.0\.1: input should be"),
        (
            damage("modalities.gene.kind", "sound"),
            r"modalities\.gene\.kind: input should be 'vector', 'image' or 'volume'",
        ),
        (damage("folds", []), "folds: list should have at least 1 item"),
        (drop_last_label, r"samples\.label has 47 entries, key has 48"),
        (drop_gene, r"samples\.bytes has \['coarse', 'gene', 'slide'\], modalities has \['coarse', 'slide'\]"),
        (repeat_key, r"key 's-000' occurs 2 times, in 'toy-000000\.tar';"),
        (repeat_key_elsewhere, r"key 's-000' occurs 2 times, in 'toy-000000\.tar', 'toy-\d+\.tar';"),
        (repeat_shard, "shard 'toy-000000.tar' is listed 2 times"),
        (damage("class_names", ["low", "low"]), "class name 'low' occurs 2 times"),
        (damage("samples.label.0", 5), r"labels \[5\] are outside -1\.\.1 \(2 class names\): sample 's-000' has 5"),
        (label_many, r"labels \[-2, 5, 6, 7, 8, and 4 more\] are outside -1\.\.1 .*: sample 's-040' has -2;"),
        (damage("excluded.gene", "twice"), r"\['gene'\] are both modalities and excluded"),
        (damage("samples.shard.0", 99), r"samples name shards \[99\], there are"),
        (damage("shards.0.samples", 7), r"shard 'toy-000000\.tar' has 7 samples, the columns list \d+"),
        (damage("samples.bytes.slide.0", [0, 10**9]), "'slide' of sample 's-000' ends after its shard"),
        (damage("folds.0.val.0", "nobody"), "fold 0 names patients without samples: 'nobody'"),
        (damage("modalities.gene.shape", [5, 1]), r"'gene' is a vector of shape \(5, 1\), expected 1 dimensions"),
        (
            damage("modalities.gene.shape", [10**12]),
            r"'gene' of sample 's-000' has 148 bytes, values of shape \(10+,\) take 40+ \(so 32 samples\)",
        ),
        (damage("modalities.gene.features", ["a"]), r"'gene' has 1 feature names for shape \(5,\)"),
        (damage("modalities.slide.dtype", "float32"), "'slide' is stored as png, which holds uint8 images"),
        (move_a_patient, r"patient in two splits of fold 1: 'p\d+' \(train and test\); .*by patient"),
    ],
)
def test_every_contradiction_is_named(
    toy_folder: Path, content: dict[str, Any], change: Callable[[dict[str, Any]], None], words: str
):
    change(content)
    (toy_folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        read_manifest(toy_folder)


def test_many_faults_are_counted_and_the_first_are_shown(toy_folder: Path, content: dict[str, Any]):
    content["samples"]["key"] = ["same"] * 6 + content["samples"]["key"][6:]
    content["samples"]["label"][0] = 9
    content["class_names"] = ["low", "low"]
    for number in range(3):
        content["folds"][number]["val"].append("nobody")
    (toy_folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"itself: .*occurs 6 times, in .*; .*fold 1 names .*; and 1 more; build"):
        read_manifest(toy_folder)


def test_a_column_that_leaks_is_refused_with_its_reason(toy: Any):
    with pytest.raises(DataError, match="'outcome' is excluded from the inputs of task 'toy': it is known only after"):
        check_modality(toy.manifest, "outcome")


def test_an_unknown_modality_gets_a_suggestion(toy: Any):
    with pytest.raises(
        DataError, match=r"unknown modality 'genes' .*did you mean 'gene'\?; available: coarse, gene, slide"
    ):
        check_modality(toy.manifest, "genes")
    assert isinstance(check_modality(toy.manifest, "gene"), Modality)


EYE = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("affine", "spacing", "words"),
    [
        (EYE, (0.0, 1.0, 1.0), r"spacing is \(0\.0, 1\.0, 1\.0\), expected more than 0 mm"),
        (EYE, (1.0, 1.0, -1.0), r"spacing is \(1\.0, 1\.0, -1\.0\), expected more than 0 mm"),
        (EYE, (1.0, math.inf, 1.0), "hold values that are not finite"),
        ([[math.nan, 0.0, 0.0, 0.0], *EYE[1:]], (1.0, 1.0, 1.0), "hold values that are not finite"),
        (
            [*EYE[:3], [0.0, 0.0, 0.0, 2.0]],
            (1.0, 1.0, 1.0),
            r"last row is \(0\.0, 0\.0, 0\.0, 2\.0\), expected \(0, 0, 0, 1\)",
        ),
        ([EYE[0], EYE[0], *EYE[2:]], (1.0, 1.0, 1.0), "is singular, expected three axes"),
        ([[0.0] * 4, *EYE[1:]], (1.0, 1.0, 1.0), "is singular, expected three axes"),
    ],
)
def test_a_space_that_places_no_volume_is_refused(affine: Any, spacing: tuple[float, ...], words: str):
    frame = {"shape": [4, 5, 6], "affine": affine, "spacing": spacing}
    with pytest.raises(ValidationError, match=words):
        Space.model_validate_json(json.dumps(frame))
    with pytest.raises(ValidationError, match=words) as caught:
        Space(shape=(4, 5, 6), affine=tuple(map(tuple, affine)), spacing=spacing)  # pyright: ignore[reportArgumentType]
    assert re.search(rf"^file: [^V]*{words}", explain(caught.value))


def test_small_voxels_and_turned_axes_are_a_space():
    affine = ((0.0, -1e-3, 0.0, 9.0), (1e-3, 0.0, 2e-4, 0.0), (0.0, 0.0, 5.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    assert Space(shape=(4, 5, 6), affine=affine, spacing=(1e-3, 1e-3, 5.0)).affine == affine


def test_the_version_is_read_without_parsing_the_text_twice(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest_file, "_Version", None)
    assert read_manifest(toy_folder).n_samples == 48
    text = (toy_folder / MANIFEST).read_text()
    (toy_folder / MANIFEST).write_text(text.replace('"format_version": 2', '"format_version": 7'))
    with pytest.raises(DataError, match="has format version 7, this distkd reads 1 to 2; update distkd"):
        read_manifest(toy_folder)
