"""The made-up patients: their layout, and the gap that was planted, measured by plain classifiers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distkd.data.dataset import DataConfig, Dataset
from distkd.data.shardset import ShardSet
from distkd.errors import ConfigError
from shards import synthetic
from shards.synthetic import Options


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("tiny") / "shards"
    synthetic.make(None, out)
    return ShardSet(out)


def test_layout_is_that_of_a_slide_study(tiny: ShardSet):
    samples = tiny.manifest.samples
    assert {name: m.shape for name, m in tiny.manifest.modalities.items()} == {
        "cells": (12,),
        "omic": (16,),
        "path": (32, 32, 3),
    }
    assert 300 < len(tiny) < 700
    assert tiny.manifest.n_patients == 240
    assert len(set(samples.group)) == len(tiny)
    assert all(str(group).startswith(patient) for group, patient in zip(samples.group, samples.patient, strict=True))
    assert np.bincount(samples.label).min() > len(tiny) / 5


def test_omics_belong_to_the_patient_and_images_to_the_region(tiny: ShardSet):
    of_patient: dict[str, list[int]] = {}
    for number, patient in enumerate(tiny.manifest.samples.patient):
        of_patient.setdefault(patient, []).append(number)
    several = [numbers for numbers in of_patient.values() if len(numbers) > 1 and tiny.has("omic")[numbers[0]]]
    for first, second, *_ in several[:10]:
        np.testing.assert_array_equal(tiny.read(first, ["omic"])["omic"], tiny.read(second, ["omic"])["omic"])
        assert (tiny.read(first, ["path"])["path"] != tiny.read(second, ["path"])["path"]).any()
        assert len({tiny.manifest.samples.label[first], tiny.manifest.samples.label[second]}) == 1


def test_some_patients_lack_omics_and_some_values_are_gaps(tiny: ShardSet):
    has = tiny.has("omic")
    assert 0.02 < 1 - has.mean() < 0.25
    gaps = np.mean([np.isnan(tiny.read(i, ["omic"])["omic"]).mean() for i in np.flatnonzero(has)[:200].tolist()])
    assert 0.005 < gaps < 0.05


def accuracy(shard_set: ShardSet, name: str) -> float:
    data = Dataset(shard_set, DataConfig(threads=0), [name], seed=0)
    train = data.batch(data.split_samples("train"), epoch=0, train=False)
    test = data.batch(data.split_samples("test"), epoch=0, train=False)
    keep, keep_test = train.present[name].numpy(), test.present[name].numpy()
    model = LogisticRegression(max_iter=2000).fit(train.inputs[name].numpy()[keep], train.label_B.numpy()[keep])
    return float(model.score(test.inputs[name].numpy()[keep_test], test.label_B.numpy()[keep_test]))


def test_the_gap_is_what_was_asked_for(tmp_path: Path):
    found: dict[float, float] = {}
    for gap in (0.0, 0.6, 1.0):
        synthetic.make(None, tmp_path / str(gap), options=Options(kind="vectors", patients=500, max_regions=1, gap=gap))
        shard_set = ShardSet(tmp_path / str(gap))
        found[gap] = accuracy(shard_set, "cells")
        assert accuracy(shard_set, "omic") > 0.65
    assert found[0.0] > found[0.6] + 0.08
    assert found[0.6] > found[1.0] + 0.08
    assert found[1.0] == pytest.approx(1 / 3, abs=0.08)


def test_images_show_severity_as_density(tmp_path: Path):
    synthetic.make(None, tmp_path / "out", options=Options(gap=0.0, missing=0.0))
    shard_set = ShardSet(tmp_path / "out")
    images = [shard_set.read(i, ["path"])["path"].astype(float) for i in range(len(shard_set))]
    ink = np.array([(image.mean(axis=2).max() - image.mean(axis=2)).mean() for image in images])
    labels = np.array(shard_set.manifest.samples.label)
    assert ink[labels == 0].mean() < ink[labels == 1].mean() < ink[labels == 2].mean()


def test_a_patient_does_not_depend_on_how_many_there_are(tmp_path: Path, tiny: ShardSet):
    synthetic.make(None, tmp_path / "out", options=Options(patients=30))
    few = ShardSet(tmp_path / "out")
    for sample in range(20):
        for name, values in few.read(sample, few.manifest.modalities).items():
            np.testing.assert_array_equal(values, tiny.read(sample, [name])[name])


def test_full_size_layout_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [
        "--patients",
        "30",
        "--max-regions",
        "1",
        "--image-size",
        "128",
        "--omic-width",
        "80",
        "--patches",
        "2",
    ]
    assert synthetic.main(["--out", str(tmp_path / "out"), *arguments, "--folds", "2"]) == 0
    shard_set = ShardSet(tmp_path / "out")
    assert shard_set.manifest.modalities["path"].shape == (128, 128, 3)
    assert shard_set.manifest.modalities["omic"].shape == (80,)
    assert len(shard_set) == 60
    assert len(set(shard_set.manifest.samples.group)) == 30
    assert "60 samples of 30 patients" in capsys.readouterr().out


def test_seeds_differ(tmp_path: Path, tiny: ShardSet):
    synthetic.make(None, tmp_path / "out", seed=1, options=Options(patients=30))
    assert (ShardSet(tmp_path / "out").read(0, ["cells"])["cells"] != tiny.read(0, ["cells"])["cells"]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(gap=1.5), r"--gap is 1\.5, expected 0 to 1"),
        (Options(missing=-1), "--missing is -1, expected 0 to 1"),
        (Options(patients=3), "--patients is 3, expected at least 30"),
        (Options(image_size=4), "--image-size is 4, expected at least 8"),
        (Options(like="brats", patients=10), "--patients is 10, expected at least 30"),
        (Options(volume_size=(24, 24, 4)), r"--volume-size is \(24, 24, 4\), expected at least 8 voxels"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: Options, words: str):
    with pytest.raises(ConfigError, match=words):
        synthetic.make(None, tmp_path / "out", options=options)


LIKES: dict[str, Options] = {
    "derm7pt": Options(like="derm7pt", patients=30, missing=0.3),
    "sicapv2": Options(like="sicapv2", patients=40),
    "brats": Options(like="brats", patients=30, missing=0.3, volume_size=(14, 12, 10)),
}


@pytest.mark.parametrize("like", LIKES)
def test_look_alikes_are_the_same_twice_and_sound(like: str, tmp_path: Path):
    for name in ("one", "two"):
        synthetic.make(None, tmp_path / name, options=LIKES[like], seed=3)
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 1
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    shard_set = ShardSet(tmp_path / "one")
    shard_set.verify()
    synthetic.make(None, tmp_path / "other", options=LIKES[like], seed=4)
    other = ShardSet(tmp_path / "other")
    name = {"derm7pt": "clinic", "sicapv2": "patch", "brats": "t1ce"}[like]
    assert (other.read(0, [name])[name] != shard_set.read(0, [name])[name]).any()


def test_look_alikes_have_the_layout_of_the_real_sets(tmp_path: Path):
    manifests = {
        like: synthetic.make(None, tmp_path / like, options=options).manifest for like, options in LIKES.items()
    }
    derm, patch, brain = manifests["derm7pt"], manifests["sicapv2"], manifests["brats"]
    assert (derm.task, derm.class_names) == ("skin_lesion", ["BCC", "NEV", "MEL", "MISC", "SK"])
    assert list(derm.modalities) == ["derm", "clinic", "meta", "checklist"]
    assert np.bincount(derm.samples.label).tolist() == [3, 12, 9, 3, 3]
    assert 0 < ShardSet(tmp_path / "derm7pt").has("derm").mean() < 1
    assert ShardSet(tmp_path / "derm7pt").has("clinic").all()
    assert (patch.task, list(patch.modalities)) == ("gleason_grade", ["patch"])
    assert len(set(patch.samples.group)) == 40 < patch.n_samples
    assert (brain.task, brain.problem, brain.container) == ("brain_tumour", "segmentation", "zarr")
    assert brain.modalities["seg"].values == [0, 1, 2, 4]
    assert brain.modalities["t1"].shape == (1, 14, 12, 10)
    assert sorted({str(group) for group in brain.samples.group}) == ["HGG", "LGG"]
    brains = ShardSet(tmp_path / "brats")
    for number in range(8):
        labels = set(np.unique(brains.read(number, ["seg"])["seg"]).tolist())
        assert labels == ({0, 1, 2} if brain.samples.group[number] == "LGG" else {0, 1, 2, 4})
    missing = [1 - brains.has(name).mean() for name in ("flair", "t1", "t2")]
    assert 0 < sum(missing) < 1
    assert brains.has("t1ce").all()


def score(features: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> float:
    """Accuracy of a plain classifier on the last third of the samples' numbers."""
    test = numbers >= np.quantile(numbers, 2 / 3)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features[~test], labels[~test])
    return float(model.score(features[test], labels[test]))


def picture_features(image_HWC: np.ndarray) -> list[float]:
    """Colour of the middle, and how much is dark."""
    grey = image_HWC.astype(float).mean(axis=2)
    size = len(grey)
    middle = grey[size // 2 - 3 : size // 2 + 3, size // 2 - 3 : size // 2 + 3].mean()
    edge = grey[:3].mean()
    return [middle - edge, float((grey < (middle + edge) / 2).mean())]


@pytest.mark.parametrize("gap", [0.0, 0.6])
def test_the_gap_of_skin_lesions(tmp_path: Path, gap: float):
    options = Options(like="derm7pt", patients=400, missing=0.0, gap=gap)
    synthetic.make(None, tmp_path / "out", options=options)
    shard_set = ShardSet(tmp_path / "out")
    labels, numbers = np.array(shard_set.manifest.samples.label), np.arange(len(shard_set))
    found = {
        name: score(
            np.array([picture_features(shard_set.read(i, [name])[name]) for i in range(len(shard_set))]),
            labels,
            numbers,
        )
        for name in ("derm", "clinic")
    }
    checklist = np.array([shard_set.read(i, ["checklist"])["checklist"] for i in range(len(shard_set))])
    assert score(checklist, labels, numbers) > 0.7
    assert found["derm"] > 0.7
    if gap == 0:
        assert found["clinic"] == pytest.approx(found["derm"], abs=0.1)
    else:
        assert found["clinic"] < found["derm"] - 0.2


def texture_features(image_HWC: np.ndarray, coarse: int) -> list[float]:
    """Log-spread of a copy of 1/coarse the size, and of what its halving takes away."""
    grey = image_HWC.astype(float).mean(axis=2)
    side = len(grey) // coarse
    copy = grey.reshape(side, coarse, side, coarse).mean(axis=(1, 3))
    half = copy.reshape(side // 2, 2, side // 2, 2).mean(axis=(1, 3)).repeat(2, axis=0).repeat(2, axis=1)
    return [float(np.log(copy.std())), float(np.log((copy - half).std()))]


@pytest.mark.parametrize("gap", [0.0, 0.8])
def test_the_gap_of_tiles_is_in_what_a_coarse_copy_loses(tmp_path: Path, gap: float):
    synthetic.make(None, tmp_path / "out", options=Options(like="sicapv2", patients=300, gap=gap, image_size=64))
    shard_set = ShardSet(tmp_path / "out")
    labels, numbers = np.array(shard_set.manifest.samples.label), np.arange(len(shard_set))
    images = [shard_set.read(i, ["patch"])["patch"] for i in range(len(shard_set))]
    sharp, blurred = (
        score(np.array([texture_features(image, coarse) for image in images]), labels, numbers) for coarse in (1, 4)
    )
    assert sharp > 0.7
    if gap == 0:
        assert blurred == pytest.approx(sharp, abs=0.12)
    else:
        assert blurred < sharp - 0.2


@pytest.mark.parametrize("gap", [0.0, 0.6])
def test_the_gap_of_brains_is_in_the_sequence_of_the_student(tmp_path: Path, gap: float):
    options = Options(like="brats", patients=30, gap=gap, missing=0.0, student="t1")
    synthetic.make(None, tmp_path / "out", options=options)
    shard_set = ShardSet(tmp_path / "out")
    found: dict[str, float] = {}
    for name in ("flair", "t2", "t1"):
        voxels: list[np.ndarray] = []
        tumour: list[np.ndarray] = []
        for number in range(len(shard_set)):
            arrays = shard_set.read(number, [name, "seg"])
            inside = arrays[name] > 0
            voxels.append(arrays[name][inside])
            tumour.append(arrays["seg"][inside] > 0)
        area = float(roc_auc_score(np.concatenate(tumour), np.concatenate(voxels)))
        found[name] = max(area, 1 - area)
    assert min(found["flair"], found["t2"]) > 0.95
    if gap == 0:
        assert found["t1"] > 0.95
    else:
        assert found["t1"] < found["flair"] - 0.1


def test_volumes_come_in_zarr_alone_and_the_rest_in_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--patients", "30", "--out", str(tmp_path / "out")]
    assert synthetic.main([*arguments, "--format", "zarr"]) == 2
    assert "--format zarr is for volumes, --like glioma has none; leave it out" in capsys.readouterr().err
    volumes = ["--like", "brats", "--volume-size", "8", "9", "10", "--student", "t2", "--format", "zarr"]
    assert synthetic.main([*arguments, *volumes]) == 0
    assert ShardSet(tmp_path / "out").manifest.modalities["t2"].shape == (1, 8, 9, 10)
