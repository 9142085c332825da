"""The made-up patients: their layout, and the gap that was planted, measured by plain classifiers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from distkd.data.dataset import DataConfig, Dataset
from distkd.data.wds import ShardSet
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
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: Options, words: str):
    with pytest.raises(ConfigError, match=words):
        synthetic.make(None, tmp_path / "out", options=options)
