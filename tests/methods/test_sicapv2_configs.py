"""The configs of configs/sicapv2: the published recipe in every file, and runs from sheets and JPEGs to the metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distkd.base import World
from distkd.cli import main
from distkd.config import load
from distkd.train.job import assemble, dataset_of
from distkd.train.loop import train
from distkd.train.settings import Settings
from shards import sicapv2
from tests.shards import layouts_images as layouts

CONFIGS = Path(__file__).parents[2] / "configs" / "sicapv2"
FILES = sorted(CONFIGS.glob("*.yaml"))
CLASSES = ["NC", "G3", "G4", "G5"]
FACTORS = {"5x": 2, "2.5x": 4, "1.25x": 8}
SHORT: dict[str, Any] = {
    "run.epochs": 1, "batch.global_batch": 4, "data.threads": 0, "engine.device": "cpu", "run.log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sicapv2")


def made(folder: Path, size: int) -> dict[str, Any]:
    """Overrides that name patches of `size` px and a root for their runs."""
    place = folder / str(size)
    if not place.exists():
        sicapv2.make(layouts.sicapv2(place / "raw", size=size), place / "shards", size=size)
    return {"data.shards": str(place / "shards"), "run.root": str(place / "runs")}


def settings_of(name: str, overrides: dict[str, Any], *, encoder: dict[str, Any] | None = None) -> Settings:
    modality = "patch" if name == "teacher" else "coarse"
    network = {"name": "vgg16"} if encoder is None else encoder
    return load(CONFIGS / f"{name}.yaml", {**SHORT, **overrides, "model.encoders": {modality: network}})


def test_there_is_a_teacher_and_each_resolution_in_both_protocols_alone_and_distilled():
    names = {
        f"{power}_{how}_{what}"
        for power in FACTORS
        for how in ("reference", "native")
        for what in ("student_alone", "at_plus")
    }
    assert {path.stem for path in FILES} == names | {"teacher"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_is_the_published_recipe(path: Path):
    """Card `inter-resolution-at-plus`, sections 2 and 5; what a file does not say is the default."""
    settings = load(path)
    [modality] = settings.model.modalities
    encoder = settings.model.encoders[modality]
    assert (encoder.name, str(encoder.weights)) == ("vgg16", "weights/vgg16.safetensors")
    data, augment = settings.data, settings.data.augment
    assert augment.model_dump(exclude_defaults=True) == {
        "hflip": 0.5, "rotation": 45, "scale": (0.95, 1.2), "shift": (0.05, 0), "affine_probability": 0.5,
        "warps": "successive", "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "jitter_probability": 0.5,
        "jitter_order": "random",
    }  # fmt: skip
    assert (data.image_mean, data.image_std, data.balance, data.fold) == ((0,), (1,), "oversample", 0)
    optim = settings.optim
    assert (optim.name, optim.lr, optim.betas, optim.schedule) == ("adam", 1e-4, (0.9, 0.999), "constant")
    assert (optim.weight_decay, optim.clip, optim.warmup_epochs) == (0, 0, 0)
    assert (settings.run.epochs, settings.run.eval_every, settings.batch.global_batch) == (20, 1, 32)
    assert (settings.engine.name, settings.engine.precision) == ("ddp", "fp32")
    kept = settings.eval
    assert data.transform_on == "device"
    assert (kept.select, kept.metric, kept.min_gain, kept.level) == ("best", "kappa_quadratic", 0.01, "sample")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_does_what_its_name_says(path: Path):
    settings = load(path)
    if path.stem == "teacher":
        assert (settings.method.name, settings.model.modalities, settings.data.degraded) == (
            "supervised",
            ["patch"],
            {},
        )
        return
    power, protocol, name = path.stem.split("_", 2)
    assert settings.model.modalities == ["coarse"]
    assert {key: value.model_dump() for key, value in settings.data.degraded.items()} == {
        "coarse": {"of": "patch", "factor": FACTORS[power], "restore": protocol == "reference"}
    }
    if name == "student_alone":
        assert (settings.method.name, settings.teacher.export) == ("supervised", None)
        return
    assert settings.teacher.export == "sicapv2-teacher"
    weights = {key: value for key, value in settings.method.model_dump().items() if key.startswith("alpha_")}
    assert weights == {"alpha_at": 10, "alpha_fm": 0.1, "alpha_kd": 0, "alpha_sr": 0}
    assert settings.method.model_dump()["level_attention"] == -1


def test_a_study_of_the_published_seeds_pairs_students_with_teachers():
    settings = load(CONFIGS / "5x_reference_at_plus.yaml", seed=22)
    assert (settings.run.name, settings.teacher.export) == (
        "sicapv2-5x_reference_at_plus-seed22",
        load(CONFIGS / "teacher.yaml", seed=22).run.name,
    )


def test_a_missing_weights_file_is_told_with_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    place = made(folder, 32)
    monkeypatch.chdir(folder)  # where no folder weights/ is
    words = [word for key, value in place.items() for word in (f"--{key}", value)]
    assert main(["train", str(CONFIGS / "teacher.yaml"), *words]) == 2
    said = capsys.readouterr().err
    assert "weights file weights/vgg16.safetensors does not exist; make it as docs/models.md shows, or start" in said


def checked_evaluation(folder: Path) -> dict[str, Any]:
    """The metrics of the test split, which follow from the confusion matrix."""
    found = json.loads((folder / "eval" / "test.json").read_text())
    confusion = np.array(found["confusion"])
    assert (found["class_names"], confusion.shape, confusion.sum()) == (CLASSES, (4, 4), 12)
    assert (found["level"], found["n"], list(found["per_class"])) == ("sample", 12, CLASSES)
    recalls = confusion.diagonal() / confusion.sum(axis=1)
    assert found["metrics"]["balanced_accuracy"] == pytest.approx(recalls.mean())
    by_chance = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    distance = np.subtract.outer(range(4), range(4)) ** 2
    kappa = 1 - (distance * confusion).sum() / (distance * by_chance).sum()
    assert found["metrics"]["kappa_quadratic"] == pytest.approx(kappa)
    for k, name in enumerate(CLASSES):
        f1 = 2 * confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum())
        assert found["per_class"][name]["f1"] == pytest.approx(f1)
    assert found["selection"]["select_metric"] == "kappa_quadratic"
    return found


@pytest.mark.slow
def test_vgg16_is_trained_and_distilled_at_half_the_resolution_as_published(folder: Path):
    place = made(folder, 32) | {"batch.global_batch": 12, "run.save": "sync"}
    train(settings_of("teacher", place), World())
    train(settings_of("5x_reference_at_plus", place), World())
    for name in ("teacher", "5x_reference_at_plus"):
        checked_evaluation(Path(place["run.root"]) / f"sicapv2-{name}")
    lines = (Path(place["run.root"]) / "sicapv2-5x_reference_at_plus" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "parts" in line]
    assert len(steps) == 36 // 12
    for step in steps:
        assert set(step["parts"]) == {"task", "attention", "features"}
        assert 0 < step["parts"]["attention"] <= 1


@pytest.mark.parametrize(("name", "side"), [("5x_reference_at_plus", 64), ("2.5x_native_at_plus", 16)])
def test_a_protocol_is_the_size_that_a_student_computes_on(folder: Path, name: str, side: int):
    dataset = dataset_of(settings_of(name, made(folder, 64)), World(), ["coarse"])
    assert dataset.input_specs["coarse"].shape == (3, side, side)


def test_a_student_of_an_eighth_of_the_pixels_a_side_computes_on_these_alone(folder: Path):
    place = made(folder, 64)
    place |= {"optim.lr": 0.03, "run.epochs": 3}
    encoder = {"name": "cnn", "widths": [4, 8], "head": "pooled"}  # vgg16 takes 16 px at least
    names = ["teacher", "1.25x_native_student_alone", "1.25x_native_at_plus"]
    for name in names:
        train(settings_of(name, place, encoder=encoder), World())
        checked_evaluation(Path(place["run.root"]) / f"sicapv2-{name}")
    job = assemble(settings_of(names[-1], place, encoder=encoder), World())
    assert job.dataset.input_specs["coarse"].shape == (3, 8, 8)
