"""What a user can get wrong: exit code 2, one message that says what to do, nothing half-written left behind."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distkd.base import World
from distkd.cli import DONE, USER, main
from distkd.config import load
from distkd.data.manifest import Manifest
from distkd.errors import ConfigError, DistkdError
from distkd.metrics.jsonl import read_jsonl
from distkd.train.loop import train
from tests.laws.common import settings_of
from tests.small import Small

Edit = Callable[[dict[str, Any]], None]


class Place:
    """A folder with shards and a teacher of one's own, to be damaged, and what `distkd train` says to it."""

    def __init__(self, folder: Path, small: Small, capsys: pytest.CaptureFixture[str]):
        self.folder, self.small, self.capsys = folder, small, capsys
        self.runs = folder / "runs"
        self.shards = folder / "shards"
        self.teacher = folder / "teacher"
        shutil.copytree(small.shards, self.shards)
        shutil.copytree(small.root / "teacher" / "export", self.teacher)

    def write(self, kind: str, **overrides: Any) -> Path:
        overrides["data"] = {"shards": str(self.shards), **overrides.get("data", {})}
        if kind == "student":
            overrides["teacher"] = {"export": str(self.teacher), **overrides.get("teacher", {})}
        return self.small.write(self.folder, kind, **overrides)

    def refused(self, kind: str = "alone", *words: str, **overrides: Any) -> str:
        """The one message of a run that is refused before it begins."""
        before = sorted(self.runs.rglob("*"))
        text = self.said([str(self.write(kind, **overrides)), *words])
        assert sorted(self.runs.rglob("*")) == before, "something was left behind"
        return text

    def said(self, arguments: list[str], code: int = USER) -> str:
        self.capsys.readouterr()
        assert main(["train", *arguments]) == code
        captured = self.capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        _, _, message = captured.err.rpartition("distkd: ")
        assert captured.err.count("distkd: ") == (code == USER)
        return message.strip()

    def manifest(self, edit: Edit) -> None:
        path = self.shards / "manifest.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    def card(self, edit: Edit) -> None:
        path = self.teacher / "model.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    def outcome(self, name: str) -> dict[str, Any]:
        return json.loads((self.runs / name / "outcome.json").read_text())


@pytest.fixture
def place(tmp_path: Path, small: Small, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, small, capsys)


# shards


def test_a_shard_is_missing(place: Place):
    tar = min(place.shards.glob("*.tar"))
    tar.unlink()
    assert place.refused() == (
        f"shard {tar.name!r} is missing from {str(place.shards)!r}; copy it again or build it again; "
        "`distkd shards verify` checks every byte"
    )


def test_a_shard_is_truncated(place: Place):
    tar = min(place.shards.glob("*.tar"))
    size = tar.stat().st_size
    os.truncate(tar, size - 1000)
    assert f"shard {tar.name!r} is truncated: {size - 1000} bytes, manifest says {size}; copy it" in place.refused()


def test_the_manifest_disagrees_with_itself(place: Place):
    place.manifest(lambda content: content["shards"][0].update(samples=content["shards"][0]["samples"] + 1))
    message = place.refused()
    assert "manifest.json contradicts itself: shard" in message
    assert message.endswith("build the shard set again")


def test_the_manifest_disagrees_with_a_shard(place: Place):
    """Sizes are looked at when a set is opened; the content when a sample is read."""

    def swap(content: dict[str, Any]) -> None:
        places = content["samples"]["bytes"]["slide"]
        places[:] = [[offset, size // 2] for offset, size in places]

    place.manifest(swap)
    text = place.said([str(place.write("picture"))])
    assert "'slide' of sample" in text
    assert "`distkd shards verify` checks every byte" in text
    assert place.outcome("picture")["kind"] == "data"


def test_there_are_no_shards(place: Place):
    assert "no manifest.json in '/nowhere', so it is not a shard set; make one with" in place.refused(
        data={"shards": "/nowhere"}
    )
    assert place.refused(data={"shards": None}) == (
        "data.shards is missing; name a shard set, or a recipe with data.make"
    )


def test_a_recipe_cannot_be_run(place: Place):
    assert "data.make names no recipe: 'synthetik'; did you mean 'synthetic'?" in place.refused(
        data={"shards": None, "make": "synthetik"}
    )
    assert "recipe 'tcga_glioma' needs raw data, so data.make cannot run it; run `python" in place.refused(
        data={"shards": None, "make": "tcga_glioma"}
    )


def test_a_sample_is_damaged(place: Place):
    """Found when it is read, so during training: the run folder says so, and a mended shard lets it go on."""
    manifest = Manifest.model_validate_json((place.shards / "manifest.json").read_text())
    tar = place.shards / manifest.shards[0].file
    whole = tar.read_bytes()
    content = bytearray(whole)
    for spot, shard in zip(manifest.samples.bytes["slide"], manifest.samples.shard, strict=True):
        if spot is not None and shard == 0:
            content[spot[0] : spot[0] + 8] = b"no image"
    tar.write_bytes(content)
    path = place.write("picture")
    text = place.said([str(path)])
    assert text.startswith("'slide' of sample 's-")
    assert f"in shard {tar.name!r}" in text
    outcome = place.outcome("picture")
    assert outcome == {"state": "failed", "kind": "data", "step": 0, "attempt": 1, "message": text}
    assert not list((place.runs / "picture" / "checkpoints").iterdir())
    tar.write_bytes(whole)
    assert main(["train", str(path)]) == DONE
    assert place.outcome("picture") == {"state": "done", "kind": None, "step": 6, "attempt": 2, "message": ""}


# modalities, folds, labels


def test_a_modality_is_unknown(place: Place):
    message = place.refused(model={"modalities": ["gnee"]})
    assert message == ("unknown modality 'gnee' for task 'toy'; did you mean 'gene'?; available: coarse, gene, slide")


def test_a_column_that_leaks_the_label_is_no_input(place: Place):
    message = place.refused(model={"modalities": ["gene", "outcome"]})
    assert message == (
        "'outcome' is excluded from the inputs of task 'toy': it is known only after the label; "
        "use one of coarse, gene, slide"
    )


def test_an_encoder_does_not_fit_its_modality(place: Place):
    message = place.refused(model={"encoders": {"gene": {"name": "cnn"}}})
    assert message == "model.encoders.gene: cnn does not take a modality of kind vector; use mlp or snn"


def test_a_patient_is_in_two_splits(place: Place):
    place.manifest(lambda content: content["folds"][0]["test"].append(content["folds"][0]["train"][0]))
    message = place.refused()
    assert message.startswith("patient in two splits of fold 0: 'p")
    assert "(train and test); a patient's samples must stay in one split" in message


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_class_is_absent_from_a_split(place: Place, split: str):
    def edit(content: dict[str, Any]) -> None:
        chosen, columns = set(content["folds"][0][split]), content["samples"]
        columns["label"] = [
            0 if patient in chosen else label
            for patient, label in zip(columns["patient"], columns["label"], strict=True)
        ]

    place.manifest(edit)
    assert f"no sample of class 'high' in split {split!r} of fold 0 (" in place.refused()


def test_there_is_no_such_fold(place: Place):
    assert place.refused(data={"fold": 3}) == "data.fold=3, the shard set of task 'toy' has folds 0..2"


def test_there_are_fewer_labels_than_asked_for(place: Place):
    assert "data.labelled=500, the fold has 28 labelled training samples; use at most that" in place.refused(
        data={"labelled": 500}
    )
    assert "data.labelled=1 leaves no label of class 'high' in fold 0; use at least 2" in place.refused(
        data={"labelled": 1}
    )


# batches and devices


def test_there_are_fewer_samples_than_a_batch(place: Place):
    assert place.refused(batch={"global_batch": 64}) == (
        "the fold has 28 training samples, fewer than batch.global_batch=64; set batch.global_batch to 28 at most"
    )


def test_the_batch_is_not_a_multiple_of_the_passes(place: Place):
    message = place.refused(batch={"global_batch": 8, "micro_batch": 3})
    assert message.startswith(
        "batch.global_batch=8 is not a multiple of micro_batch x world size = 3 x 1 = 3; use 6, or"
    )


def _refusal(world: World, config: dict[str, Any]) -> str | None:
    try:
        train(settings_of(config), world)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("size", [2, 4])
def test_the_batch_is_not_a_multiple_of_the_world(ranks: Any, small: Small, tmp_path: Path, size: int):
    batch = 4 * size + 1
    config = small.config("alone", run={"root": str(tmp_path / "runs")}, batch={"global_batch": batch})
    said = f"batch.global_batch={batch} is not a multiple of the world size {size}; use {4 * size} or another number of"
    assert ranks(size).run(_refusal, config=config) == [f"{said} ranks"] * size
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_there_is_no_device(place: Place):
    message = place.refused(engine={"device": "cuda"})
    assert message.startswith("engine.device is cuda, but this torch finds no CUDA device; use cpu or auto")


# methods


def test_the_method_is_unknown(place: Place):
    message = place.refused("alone", "--method.name", "supervized")
    assert "method.name: unknown method 'supervized'; available: " in message
    assert "did you mean 'supervised'?" in message


@pytest.mark.parametrize(
    "kind, method, words",
    [
        (
            "teacher",
            {"name": "dc_teacher", "l1": {"omic": 1}},
            "method.l1 names 'omic', which is not in model.modalities",
        ),
        (
            "student",
            {"name": "dc_distill", "negatives": 4, "keep_negative": 5},
            "method.keep_negative=5 is more than method.negatives=4",
        ),
    ],
)
def test_a_setting_does_not_fit_the_others(place: Place, kind: str, method: dict[str, Any], words: str):
    assert words in place.refused(kind, method=method)


# teachers


def test_the_teacher_is_not_named(place: Place):
    message = place.refused("student", teacher={"export": None})
    assert message == (
        "method 'logit_kd' needs a teacher; set teacher.export to a run folder, or to the name of a run below "
        f"run.root={place.runs}"
    )


def test_a_teacher_that_is_not_used_is_mentioned(place: Place, caplog: pytest.LogCaptureFixture):
    assert main(["train", str(place.write("alone", teacher={"export": "absent"}))]) == DONE
    assert [record.getMessage() for record in caplog.records] == [
        "method supervised needs no teacher; teacher.export is not used"
    ]


def test_the_teacher_is_missing(place: Place):
    message = place.refused("student", teacher={"export": "absent"})
    assert message == (
        f"no export in {place.runs / 'absent'}: expected model.json there or in {place.runs / 'absent' / 'export'}; "
        "train the teacher first"
    )


def test_the_teacher_is_not_finished(place: Place):
    unfinished = place.folder / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("method: supervised\n")
    message = place.refused("student", teacher={"export": str(unfinished)})
    assert message == f"run {unfinished} has no export yet; finish it with `distkd train {unfinished / 'config.yaml'}`"


@pytest.mark.parametrize("change", [{"task": "grade"}, {"class_names": ["high", "low"]}])
def test_the_teacher_has_another_task(place: Place, change: dict[str, Any]):
    place.card(lambda card: card.update(change))
    message = place.refused("student")
    assert f"teacher {place.teacher} was trained for task " in message
    assert "this run has task 'toy' with classes ['low', 'high']; name a teacher of this task" in message


def test_the_teacher_sees_what_is_not_there(place: Place):
    def edit(card: dict[str, Any]) -> None:
        card["model"]["modalities"].append("proteins")
        card["inputs"]["proteins"] = {"kind": "vector", "shape": [3]}

    place.card(edit)
    message = place.refused("student")
    assert f"teacher {place.teacher} sees 'proteins', but shard set {place.shards} has coarse, gene, slide" in message


def test_the_teacher_knows_the_test_patients(place: Place):
    message = place.refused("student", data={"fold": 1})
    assert f"teacher {place.teacher} was trained on other samples (fold 0 of " in message
    assert (
        f"(fold 1 of {place.shards}), so it may know the test patients; train the teacher on the same fold" in message
    )


@pytest.mark.parametrize(
    "data, was, now",
    [
        ({"augment": {"crop": 8}}, "3 x 12 x 10 image", "3 x 8 x 8 image"),
        ({"image_mean": [0.1]}, "with mean [0.5, 0.5, 0.5]", "with mean [0.1, 0.1, 0.1]"),
    ],
)
def test_the_teacher_would_see_other_images(place: Place, data: dict[str, Any], was: str, now: str):
    if "augment" in data:
        data = {"augment": {"crop": {"slide": 8}}}
    message = place.refused("student", data=data)
    assert f"teacher {place.teacher} was trained on 'slide' as 3 x 12 x 10 image" in message
    assert was in message
    assert now in message
    assert "set data.augment.crop, data.image_mean and data.image_std as the teacher's config has them" in message


class Malice:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["teacher.pt", "teacher.pth", "teacher.pkl", "pytorch_model.bin"])
def test_a_pickle_is_no_teacher(place: Place, name: str):
    path = place.folder / name
    path.write_bytes(pickle.dumps(Malice(place.folder / "owned")))
    message = place.refused("student", teacher={"export": str(path)})
    assert message.startswith(f"{path} is a pickle, which can run code when it is read; only safetensors exports")
    assert not (place.folder / "owned").exists()


def test_a_pickle_in_the_place_of_weights_is_not_read(place: Place):
    weights = place.teacher / "student.safetensors"
    weights.write_bytes(pickle.dumps(Malice(place.folder / "owned")))
    assert "SHA-256 differs" in place.refused("student")
    place.card(lambda card: card.update(sha256=hashlib.sha256(weights.read_bytes()).hexdigest()))
    message = place.refused("student")
    assert "does not hold the model that model.json describes" in message
    assert "only safetensors are accepted, no pickles: export again" in message
    assert not (place.folder / "owned").exists()


def test_the_teachers_weights_are_damaged(place: Place):
    weights = place.teacher / "student.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert place.refused("student") == (
        f"{weights} is not the file that model.json was written for (SHA-256 differs); export again"
    )


def test_the_teachers_weights_are_missing(place: Place):
    (place.teacher / "student.safetensors").unlink()
    assert place.refused("student") == f"{place.teacher} has model.json but no student.safetensors; export again"


def test_the_teachers_weights_are_of_another_model(place: Place):
    weights = place.teacher / "student.safetensors"
    tensors = load_file(weights)
    tensors.pop("fused_classifier.weight")
    save_file(tensors, weights)
    place.card(lambda card: card.update(sha256=hashlib.sha256(weights.read_bytes()).hexdigest()))
    assert "does not hold the model that model.json describes: Error(s) in loading state_dict" in place.refused(
        "student"
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "model.json cannot be read: "),
        ("[]", "model.json cannot be read: "),
        ('{"format": 1}', "model.json cannot be read: 'inputs'; export the teacher again"),
        ('{"format": 99}', "model.json has format 99, this version reads up to 1; update distkd"),
    ],
)
def test_the_teachers_card_is_damaged(place: Place, text: str, words: str):
    (place.teacher / "model.json").write_text(text)
    assert words in place.refused("student")


# run folders


def test_the_run_folder_belongs_to_another_config(place: Place):
    assert main(["train", str(place.write("alone"))]) == DONE
    message = place.refused(
        "alone", run={"epochs": 3, "seed": 4, "log_every": 5}, optim={"lr": 0.1}, model={"feature_dim": 7}
    )
    assert message.splitlines() == [
        f"run folder {place.runs / 'alone'} was made with another config:",
        "  model.feature_dim: 6 in the folder, 7 now",
        "  optim.lr: 0.0005 in the folder, 0.1 now",
        "  run.epochs: 2 in the folder, 3 now",
        "  run.seed: 1 in the folder, 4 now",  # log_every may change
        "use another --run.name, remove the folder, or pass --allow-change to go on with the new values",
    ]
    assert load(place.runs / "alone" / "config.yaml").optim.lr == 0.0005


def test_a_change_may_be_allowed(place: Place):
    assert main(["train", str(place.write("alone"))]) == DONE
    path = place.write("alone", run={"epochs": 3}, optim={"lr": 0.1})
    assert main(["train", str(path), "--allow-change"]) == DONE
    outcome = place.outcome("alone")
    assert (outcome["state"], outcome["step"], outcome["attempt"]) == ("done", 9, 2)
    assert load(place.runs / "alone" / "config.yaml").optim.lr == 0.1
    events = read_jsonl(place.runs / "alone" / "events" / "rank-00000.jsonl")
    [changed] = [event for event in events if event["event"] == "changed"]
    assert changed["step"] == 6
    assert changed["keys"] == {"optim.lr": [0.0005, 0.1], "run.epochs": [2, 3]}


def _dim(factor: int, **data: Any) -> dict[str, Any]:
    """A student of a coarse copy of the slide."""
    encoders = {"dim": {"name": "cnn", "widths": [4]}}
    return {
        "model": {"modalities": ["dim"], "encoders": encoders},
        "data": {"degraded": {"dim": {"of": "slide", "factor": factor}}, **data},
    }


def test_no_change_of_inputs_or_of_the_selection_is_allowed(place: Place):
    """The best student of before would be exported as one of the new inputs."""
    assert main(["train", str(place.write("picture", **_dim(2)))]) == DONE
    other = _dim(1, image_mean=[0.25]) | {"eval": {"metric": "accuracy"}}
    changed = [
        "  data.degraded.dim.factor: 2 in the {0}, 1 now",
        "  data.image_mean: [0.5] in the {0}, [0.25] now",
        "  eval.metric: 'auc_macro' in the {0}, 'accuracy' now",
    ]
    message = place.refused("picture", "--allow-change", **other, optim={"lr": 0.1})
    assert message.splitlines() == [
        "checkpoint step-00000006 was trained on other inputs, or its best student selected otherwise:",
        *[line.format("checkpoint") for line in changed],
        "put these back, or use another --run.name",
    ]
    message = place.refused("picture", **other)  # and it is not offered
    assert message.splitlines() == [
        f"run folder {place.runs / 'picture'} was made with another config:",
        *[line.format("folder") for line in changed],
        "use another --run.name, or remove the folder",
    ]


def test_an_allowed_change_must_fit_the_checkpoint(place: Place):
    assert main(["train", str(place.write("alone"))]) == DONE
    before = (place.runs / "alone" / "config.yaml").read_text()
    message = place.refused("alone", "--allow-change", model={"feature_dim": 7})
    assert "does not fit this model" in message
    assert (place.runs / "alone" / "config.yaml").read_text() == before


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_the_micro_batch_is_changed_on_the_way(place: Place, micro_batch: int):
    folder = place.runs / "alone"
    assert main(["train", str(place.write("alone"))]) == DONE
    (folder / "outcome.json").write_text(json.dumps({**place.outcome("alone"), "state": "interrupted"}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = place.refused("alone", batch={"micro_batch": micro_batch})
    assert message == (
        f"checkpoint step-00000006 was trained with 8 samples per pass over all ranks, now there are {micro_batch}; "
        "batch statistics and agreement would change: set --batch.micro_batch 8 or leave it out"
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_teacher_is_changed_on_the_way(place: Place):
    path = place.write("student")
    assert main(["train", str(path)]) == DONE
    other = place.write("teacher", run={"seed": 9})
    assert main(["train", str(other)]) == DONE
    folder = place.runs / "student"
    (folder / "outcome.json").unlink()
    shutil.rmtree(place.teacher)
    shutil.copytree(place.runs / "teacher" / "export", place.teacher)
    assert place.refused("student") == (
        f"checkpoint step-00000006 was trained with another teacher than {place.teacher} is now; put that one back, "
        "or use another --run.name"
    )


def test_every_checkpoint_is_damaged(place: Place):
    assert main(["train", str(place.write("alone"))]) == DONE
    folder = place.runs / "alone"
    (folder / "outcome.json").unlink()
    for weights in folder.glob("checkpoints/*/rank-00000.safetensors"):
        weights.write_bytes(b"")
    assert place.refused("alone") == (
        f"every checkpoint in {folder / 'checkpoints'} is damaged (digests differ); remove the folder to start again"
    )


def test_a_checkpoint_is_of_a_newer_version(place: Place):
    assert main(["train", str(place.write("alone"))]) == DONE
    folder = place.runs / "alone"
    (folder / "outcome.json").unlink()
    for path in folder.glob("checkpoints/*/meta.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))
    assert "has format 9, this version reads up to 2; update distkd" in place.refused("alone")


def test_the_run_folder_cannot_be_written(place: Place):
    (place.folder / "file").write_text("")
    message = place.refused("alone", run={"root": str(place.folder / "file")})
    assert message == (
        f"cannot write run folder {place.folder / 'file' / 'alone'}: Not a directory; choose another --run.root"
    )


def _refused_together(world: World, config: dict[str, Any]) -> tuple[str, str]:
    try:
        train(settings_of(config), world)
    except DistkdError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    "damage, kind",
    [
        ("checkpoints", "CheckpointError"),
        ("root", "ConfigError"),
        ("shard", "DataError"),
        ("teacher", "CheckpointError"),
    ],
)
def test_all_ranks_are_refused_together(ranks: Any, place: Place, damage: str, kind: str):
    """No rank is left waiting in a collective for one that has found the mistake."""
    assert main(["train", str(place.write("student"))]) == DONE
    config = settings_of(load(place.write("student")).model_dump(mode="json")).model_dump(mode="json")
    (place.runs / "student" / "outcome.json").unlink()
    if damage == "checkpoints":
        for weights in place.runs.glob("student/checkpoints/*/rank-00000.safetensors"):
            weights.write_bytes(b"")
        config["batch"]["micro_batch"] = 4
    elif damage == "root":
        (place.folder / "file").write_text("")
        config["run"]["root"] = str(place.folder / "file")
    elif damage == "shard":
        min(place.shards.glob("*.tar")).unlink()
    else:
        (place.teacher / "student.safetensors").unlink()
    first, second = ranks(2).run(_refused_together, config=config)
    assert first == second
    assert first[0] == kind
