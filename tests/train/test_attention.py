"""Maps of a few samples that a run leaves for the report: which samples, which numbers, and when there are none."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distkd.base import World
from distkd.cli import DONE, main
from distkd.config import load
from distkd.data.dataset import Dataset
from distkd.data.transform import DegradedInput, ImageInput
from distkd.ops.draws import text_key
from distkd.report.attention import read_attention
from distkd.train.attention import choose_samples, viewable, write_attention
from distkd.train.export import load_export
from distkd.train.job import assemble
from distkd.train.loop import train
from tests.data.toy import toy_arrays
from tests.laws.common import settings_of
from tests.small import Small

POOLED = {"name": "cnn", "widths": [4], "head": "pooled"}


def config_of(small: Small, root: Path, name: str, kind: str = "picture", **overrides: Any) -> dict[str, Any]:
    """A run whose encoders have a pooled head."""
    modalities = overrides.pop("modalities", ["slide"])
    model = {"modalities": modalities, "encoders": {m: POOLED for m in modalities if m != "gene"}}
    sections = {"model": model, "run": {"root": str(root), "name": name, "epochs": 1}}
    for section, values in overrides.items():
        sections[section] = {**sections.get(section, {}), **values}
    return small.config(kind, **sections)


@pytest.fixture(scope="module")
def runs(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of a colour image, alone and with a vector, students of the half as sharp image and of a grey one."""
    root = tmp_path_factory.mktemp("attention")
    degraded = {"degraded": {"halved": {"of": "slide", "factor": 2, "restore": False}}}
    for config in (
        config_of(small, root, "sharp"),
        config_of(small, root, "both", "teacher", modalities=["gene", "slide"]),
        config_of(small, root, "halved", data=degraded, modalities=["halved"], run={"seed": 5}),
        config_of(
            small, root, "grey", "student", modalities=["coarse"], teacher={"export": str(root / "sharp")}
        ),
    ):  # fmt: skip
        train(settings_of(config), World())
    return root


RUNS = ["sharp", "both", "halved", "grey"]


def maps_file(run: Path, split: str = "test") -> Path:
    return run / "eval" / f"{split}.attention.npz"


@pytest.mark.parametrize("split", ["test", "val"])
def test_every_run_shows_the_same_two_samples_of_each_class(runs: Path, split: str):
    first, *others = (read_attention(maps_file(runs / name, split)) for name in RUNS)
    assert first.label_N.tolist() == [0, 0, 1, 1]
    assert len(set(first.key)) == 4
    for other in others:
        assert other.key == first.key
        assert other.label_N.tolist() == first.label_N.tolist()


def test_samples_are_the_first_of_two_patients_of_their_class_by_a_hash_of_their_key(runs: Path, small: Small):
    dataset = assemble(settings_of(config_of(small, runs, "sharp")), World()).dataset
    about = [dataset.describe(sample) for sample in dataset.split_samples("test").tolist()]
    expected: list[str] = []
    for label in (0, 1):
        drawn = sorted((item for item in about if item["label"] == label), key=lambda item: text_key(item["key"]))
        other = next(item for item in drawn if item["patient"] != drawn[0]["patient"])
        expected += [drawn[0]["key"], other["key"]]
    assert read_attention(maps_file(runs / "sharp")).key == expected


def stub(labels: list[int], order: list[int], patients: int = 1000) -> Any:
    """The part of a data set that choosing reads; sample n of `order` has the key, label and patient of that number."""
    columns = SimpleNamespace(
        key=[f"k{n}" for n in order],
        label=[labels[n] for n in order],
        patient=[f"p{n % patients}" for n in order],
    )
    manifest = SimpleNamespace(samples=columns)
    return SimpleNamespace(
        shard_set=SimpleNamespace(manifest=manifest), split_samples=lambda split: np.arange(len(order))
    )


@pytest.mark.parametrize("n_classes, per_class", [(1, 2), (4, 2), (6, 2), (9, 1), (40, 1)])
def test_choice_follows_keys_and_labels_and_ends_at_twelve(n_classes: int, per_class: int):
    labels = [n % n_classes for n in range(5 * n_classes)] + [-1] * 7
    order = list(range(len(labels)))
    chosen = [f"k{n}" for n in choose_samples(stub(labels, order), "test")]
    of_label = np.bincount([labels[int(key[1:])] for key in chosen], minlength=n_classes)
    assert len(chosen) == min(12, 2 * n_classes)
    assert of_label[:12].min() == per_class
    shuffled = np.random.default_rng(0).permutation(order).tolist()
    other = stub(labels, shuffled)
    assert [other.shard_set.manifest.samples.key[n] for n in choose_samples(other, "test")] == chosen


def test_two_samples_of_a_class_are_of_one_patient_only_where_it_has_no_other():
    labels, order = [n % 2 for n in range(40)], list(range(40))
    for patients, distinct in ((6, 3), (2, 1), (40, 3)):  # of n numbers half the patients have an even one
        dataset = stub(labels, order, patients)
        columns = dataset.shard_set.manifest.samples
        chosen = choose_samples(dataset, "test", per_class=3)
        assert [columns.label[n] for n in chosen] == [0, 0, 0, 1, 1, 1]
        for of_class in (chosen[:3], chosen[3:]):
            assert len({columns.patient[n] for n in of_class}) == distinct
        other = stub(labels, order[::-1], patients)
        assert [other.shard_set.manifest.samples.key[n] for n in choose_samples(other, "test", 3)] == [
            columns.key[n] for n in chosen
        ]


def slow_maps(map_KHW: Tensor, weight_CK: Tensor) -> np.ndarray:
    """Sum of positive products, place by place; then one scale for all classes and places."""
    (n_classes, n_channels), (_, height, width) = weight_CK.shape, map_KHW.shape
    found = np.zeros((n_classes, height, width))
    for c in range(n_classes):
        for i in range(height):
            for j in range(width):
                found[c, i, j] = sum(
                    max(0.0, float(weight_CK[c, k]) * float(map_KHW[k, i, j])) for k in range(n_channels)
                )
    return (found - found.min()) / (found.max() - found.min())


@pytest.mark.parametrize("name", RUNS)
def test_maps_and_predictions_are_those_of_the_exported_student(runs: Path, name: str):
    export = load_export(runs / name)
    model, found = export.load(), read_attention(maps_file(runs / name))
    modality = {"sharp": "slide", "both": "slide", "halved": "halved", "grey": "coarse"}[name]
    assert (found.modality, found.class_names) == (modality, ["low", "high"])
    assert found.size == export.specs[modality].shape[1:]
    dataset = dataset_of(runs / name)
    numbers = {dataset.describe(n)["key"]: n for n in dataset.split_samples("test").tolist()}
    for n, key in enumerate(found.key):
        batch = dataset.batch([numbers[key]], epoch=0, train=False)
        out = model(batch)
        of_image = out.branches.get(modality, out)
        probability_C = out.logits_BC[0].softmax(dim=0)
        assert of_image.map_BKHW is not None
        expected = slow_maps(of_image.map_BKHW[0], model.branch(modality).classifier.weight)
        assert np.abs(found.maps_NChw[n] - expected).max() < 1e-3  # half precision
        assert found.predicted_N[n] == int(probability_C.argmax())
        assert found.probability_N[n] == pytest.approx(float(probability_C.max()), abs=1e-6)


def dataset_of(run: Path) -> Dataset:
    """The data as the run saw it."""
    return assemble(load(run / "config.yaml"), World()).dataset


def test_images_are_those_that_the_model_saw(runs: Path):
    sharp, half, grey = (read_attention(maps_file(runs / name)) for name in ("sharp", "halved", "grey"))
    for n, key in enumerate(sharp.key):
        raw = toy_arrays(int(key.removeprefix("s-")))
        np.testing.assert_array_equal(sharp.image[n], raw["slide"])
        np.testing.assert_array_equal(grey.image[n], raw["coarse"][:, :, 0])
        squares = raw["slide"].reshape(6, 2, 5, 2, 3).mean(axis=(1, 3))
        assert np.abs(half.image[n] - squares).max() <= 0.51


def test_eval_writes_the_same_maps_again(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "sharp", tmp_path / "runs" / "sharp")
    run = tmp_path / "runs" / "sharp"
    before = read_attention(maps_file(run))
    maps_file(run).unlink()
    assert main(["eval", str(run), "--split", "test"]) == DONE
    after = read_attention(maps_file(run))
    assert after.key == before.key
    np.testing.assert_array_equal(after.image, before.image)
    np.testing.assert_allclose(after.maps_NChw, before.maps_NChw, atol=1e-3)
    assert main(["eval", str(run), "--split", "train"]) == DONE
    assert set(read_attention(maps_file(run, "train")).key).isdisjoint(before.key)


@pytest.mark.parametrize("kind", ["picture", "alone", "teacher"])
def test_a_model_without_a_map_of_an_image_leaves_no_file(small: Small, tmp_path: Path, kind: str):
    assert not list((small.root / kind).rglob("*.npz"))
    job = assemble(small.settings(kind), World())
    path = maps_file(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"of an earlier run")
    write_attention(tmp_path, job.method.student, job.dataset, "test", device=job.device, dtype=job.dtype)
    assert not path.exists()


def test_the_mode_of_the_model_is_put_back(small: Small, runs: Path, tmp_path: Path):
    job = assemble(settings_of(config_of(small, runs, "sharp")), World())
    for training in (True, False):
        job.method.student.train(training)
        write_attention(tmp_path, job.method.student, job.dataset, "test", device=job.device, dtype=job.dtype)
        assert job.method.student.training is training
    before = {name: tensor.clone() for name, tensor in job.method.student.state_dict().items()}
    write_attention(tmp_path, job.method.student, job.dataset, "test", device=job.device, dtype=job.dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.method.student.state_dict().items())


def test_a_sample_without_the_image_is_left_out(
    small: Small, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = assemble(settings_of(config_of(small, runs, "sharp")), World())
    absent = choose_samples(job.dataset, "test")[1]
    make = job.dataset.batch

    def without(samples: Any, **options: Any) -> Any:
        batch = make(samples, **options)
        if list(samples) == [absent]:
            batch.present["slide"][:] = False
        return batch

    monkeypatch.setattr(job.dataset, "batch", without)
    write_attention(tmp_path, job.method.student, job.dataset, "test", device=job.device, dtype=job.dtype)
    keys = read_attention(maps_file(runs / "sharp")).key
    assert read_attention(maps_file(tmp_path)).key == [keys[0], *keys[2:]]


def _train(world: World, config: dict[str, Any]) -> None:
    train(settings_of(config), world)


def test_two_ranks_leave_what_one_leaves(ranks: Any, small: Small, tmp_path: Path):
    for size in (1, 2):
        config = config_of(small, tmp_path, f"ranks-{size}", engine={"precision": "fp64"})
        ranks(size).run(_train, config=config)
    one, two = (read_attention(maps_file(tmp_path / f"ranks-{size}")) for size in (1, 2))
    assert one.key == two.key
    np.testing.assert_array_equal(one.image, two.image)
    assert np.abs(one.maps_NChw - two.maps_NChw).max() < 1e-3
    assert one.probability_N == pytest.approx(two.probability_N, abs=1e-9)


def fitted(channels: int) -> ImageInput:
    return ImageInput(
        shape=(4, 4, channels), crop=(4, 4), full_scale=255.0, mean=[0.2] * channels, std=[0.3] * channels
    )


@pytest.mark.parametrize("channels, colours", [(1, ()), (2, ()), (3, (3,)), (4, ())])
def test_an_image_is_stored_as_it_was_before_its_normalisation(channels: int, colours: tuple[int, ...]):
    raw = torch.randint(0, 256, (channels, 9, 6), generator=torch.Generator().manual_seed(0))
    view = viewable((raw / 255 - 0.2) / 0.3, fitted(channels))
    assert (view.shape, view.dtype) == ((9, 6, *colours), np.uint8)
    expected = raw.permute(1, 2, 0) if colours else raw.double().mean(dim=0)
    assert np.abs(view - expected.numpy()).max() <= 0.51
    copy = DegradedInput(of="x", factor=2, restore=False, image=fitted(channels))
    np.testing.assert_array_equal(viewable((raw / 255 - 0.2) / 0.3, copy), view)


def test_a_large_image_is_averaged_down_and_its_shape_kept():
    image = torch.rand(1, 384, 768, generator=torch.Generator().manual_seed(0))
    view = viewable((image - 0.2) / 0.3, fitted(1))
    assert view.shape == (96, 192)
    expected = (image * 255).reshape(96, 4, 192, 4).mean(dim=(1, 3))
    assert np.abs(view - expected.numpy()).max() <= 1.5  # it rounds after rows and after columns


def test_values_outside_of_an_image_are_cut_off():
    view = viewable(torch.tensor([[[-9.0, 9.0]]]), fitted(1))
    assert view.tolist() == [[0, 255]]


def test_no_pictures_are_kept_where_none_are_wanted(small: Small, runs: Path, tmp_path: Path):
    job = assemble(settings_of(config_of(small, runs, "sharp")), World())
    path = maps_file(tmp_path)
    for per_class, exists in ((1, True), (0, False)):
        write_attention(
            tmp_path,
            job.method.student,
            job.dataset,
            "test",
            device=job.device,
            dtype=job.dtype,
            per_class=per_class,
        )
        assert path.exists() == exists


def test_a_full_disk_costs_the_pictures_and_not_the_run(
    small: Small, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    job = assemble(settings_of(config_of(small, runs, "sharp")), World())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distkd.train.attention.write_bytes", full)
    write_attention(tmp_path, job.method.student, job.dataset, "test", device=job.device, dtype=job.dtype)
    assert "No space left on device; the report will lack this run's maps" in caplog.text


@pytest.mark.parametrize("made_of_it", [True, False])
def test_maps_of_two_stored_images_are_pointed_out(
    small: Small, runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, made_of_it: bool
):
    """Whether both show one scene is not in a shard set; of a coarse copy it is known."""
    config = config_of(
        small,
        tmp_path,
        "student",
        modalities=["halved" if made_of_it else "coarse"],
        method={"name": "at_plus"},
        teacher={"export": str(runs / "sharp")},
        data={"degraded": {"halved": {"of": "slide", "factor": 2, "restore": False}}},
    )
    assemble(settings_of(config), World())
    told = [record.getMessage() for record in caplog.records if "stored apart" in record.getMessage()]
    words = (
        "the student's map is of coarse and the teacher's of slide, which are stored apart: they must show the same "
        "scene, place by place; a coarse copy of one image is made by data.degraded"
    )
    assert told == ([] if made_of_it else [words])
