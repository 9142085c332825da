"""Every sample of a split is scored exactly once, whatever the number of ranks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distkd.base import World
from distkd.data.manifest import Split
from distkd.errors import DataError, NonFiniteError
from distkd.metrics.classification import classification_metrics
from distkd.metrics.levels import to_patient
from distkd.metrics.predictions import read_predictions
from distkd.train.evaluate import SplitReport, evaluate, write_report
from distkd.train.job import Job, assemble
from distkd.train.loop import score, train
from distkd.train.settings import EvalConfig
from tests.laws.common import settings_of
from tests.small import Small


def _score(world: World, config: dict[str, Any], split: Split) -> SplitReport | None:
    return score(assemble(settings_of(config), world), split)


def _train(world: World, config: dict[str, Any]) -> None:
    train(settings_of(config), world)


def _report(job: Job, split: Split = "test", **settings: Any) -> SplitReport:
    return evaluate(
        job.method.predict,
        job.method.trainable,
        job.dataset,
        split,
        EvalConfig(**settings),
        micro_batch=5,
        device=job.device,
        dtype=job.dtype,
        world=job.world,
    )


@pytest.fixture(scope="module")
def job(small: Small) -> Job:
    return assemble(small.settings("picture"), World())


@pytest.mark.parametrize("split, n", [("test", 18), ("val", 8)])
def test_one_two_and_four_ranks_say_the_same_of_every_sample(ranks: Any, small: Small, split: Split, n: int):
    """18 samples on 4 ranks, in batches of 2: some ranks have a batch more, one batch is not full."""
    config = small.config("teacher", batch={"global_batch": 8}, engine={"precision": "fp64"})
    [alone] = ranks(1).run(_score, config=config, split=split)
    assert len(set(alone.predictions.key)) == len(alone.predictions.key) == n
    for size in (2, 4):
        first, *others = ranks(size).run(_score, config=config, split=split)
        assert first.predictions.key == alone.predictions.key
        assert np.abs(first.predictions.probability_NC - alone.predictions.probability_NC).max() < 1e-12
        for report in (first, *others):
            assert report.metrics == alone.metrics
            assert {level: found.to_dict() for level, found in report.levels.items()} == {
                level: found.to_dict() for level, found in alone.levels.items()
            }
        assert [report.predictions for report in others] == [None] * (size - 1)


def test_a_rank_without_a_sample_takes_part(ranks: Any, small: Small, tmp_path: Path):
    """A split of two samples on four ranks."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in small.shards.iterdir():
        (shards / path.name).symlink_to(path)
    content = json.loads((small.shards / "manifest.json").read_text())
    columns, fold = content["samples"], content["folds"][0]
    label_of = dict(zip(columns["patient"], columns["label"], strict=True))
    kept = [next(patient for patient in fold["val"] if label_of[patient] == label) for label in (0, 1)]
    fold["train"] += [patient for patient in fold["val"] if patient not in kept]
    fold["val"] = kept
    (shards / "manifest.json").unlink()
    (shards / "manifest.json").write_text(json.dumps(content))
    config = small.config("picture", data={"shards": str(shards)}, engine={"precision": "fp64"})
    [alone] = ranks(1).run(_score, config=config, split="val")
    assert alone.headline.n == 2
    for report in ranks(4).run(_score, config=config, split="val"):
        assert report.metrics == alone.metrics


def test_a_run_ends_with_the_same_files_on_any_ranks(ranks: Any, small: Small, tmp_path: Path):
    """Training, selection and export included; in float64, so that rounding does not show in the written digits."""
    found: list[tuple[Any, ...]] = []
    for size in (1, 2):
        run = {"root": str(tmp_path), "name": f"on-{size}"}
        ranks(size).run(_train, config=small.config("picture", run=run, engine={"precision": "fp64"}))
        folder = tmp_path / f"on-{size}"
        report = json.loads((folder / "eval" / "test.json").read_text())
        predictions = read_predictions(folder / "eval" / "test.predictions.csv")
        found.append((report["metrics"], report["selection"], predictions.key, predictions.label_N.tolist()))
        found[-1] += (predictions.probability_NC.round(8).tolist(),)
        assert sorted(path.name for path in (folder / "events").iterdir()) == [
            f"rank-{rank:05d}.jsonl" for rank in range(size)
        ]
    assert found[0] == found[1]


def test_the_headline_is_at_the_level_asked_for(job: Job):
    sample, patient = _report(job, level="sample"), _report(job, level="patient")
    assert (sample.level, sample.headline.n) == ("sample", 18)
    assert (patient.level, patient.headline.n) == ("patient", 9)
    assert sample.predictions is not None
    merged = to_patient(sample.predictions)
    expected = classification_metrics(merged.probability_NC, merged.label_N, job.dataset.class_names)
    assert patient.headline == expected
    assert patient.levels.keys() == {"sample", "group", "patient"}


def test_the_patient_rule_is_the_configs(job: Job):
    sample = _report(job)
    assert sample.predictions is not None
    for rule in ("mean", "max"):
        merged = to_patient(sample.predictions, rule)
        expected = classification_metrics(merged.probability_NC, merged.label_N, job.dataset.class_names)
        assert _report(job, patient_rule=rule).headline == expected


def test_scoring_leaves_the_model_as_it_was(job: Job):
    before = {name: tensor.clone() for name, tensor in job.method.trainable.state_dict().items()}
    for mode in (True, False):
        job.method.trainable.train(mode)
        first, again = _report(job), _report(job)
        assert job.method.trainable.training is mode
        assert first.predictions is not None
        assert again.predictions is not None
        assert np.array_equal(first.predictions.probability_NC, again.predictions.probability_NC)
    for name, tensor in job.method.trainable.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_scoring_records_no_graph_and_sees_one_plain_view(job: Job):
    seen: list[int] = []

    def predict(batch: Any) -> torch.Tensor:
        seen.append(len(batch.views))
        logits = job.method.predict(batch)
        assert not logits.requires_grad
        return logits

    evaluate(
        predict, job.method.trainable, job.dataset, "val", EvalConfig(),
        micro_batch=3, device=job.device, dtype=job.dtype, world=World(),
    )  # fmt: skip
    assert seen == [1, 1, 1]


def _score_nan(world: World, config: dict[str, Any]) -> str:
    job = assemble(settings_of(config), world)
    try:
        evaluate(
            lambda batch: job.method.predict(batch) + (float("nan") if world.rank == world.size - 1 else 0.0),
            job.method.trainable, job.dataset, "test", EvalConfig(),
            micro_batch=4, device=job.device, dtype=job.dtype, world=world,
        )  # fmt: skip
    except NonFiniteError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("size", [1, 2])
def test_a_prediction_that_is_no_number_stops_all_ranks(ranks: Any, small: Small, size: int):
    found = ranks(size).run(_score_nan, config=small.config("picture"))
    assert len(set(found)) == 1
    assert found[0]


def test_an_empty_split_is_refused(small: Small, job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(job.dataset._of_split, "val", np.array([], dtype=np.int64))  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(DataError, match=r"split 'val' of fold 0 has no samples; choose a fold or split that has some"):
        _report(job, "val")
    assert score(job, "val") is None


def test_a_report_is_json_and_a_table(job: Job, tmp_path: Path):
    report = _report(job)
    write_report(tmp_path, report, {"method": "supervised", "fold": 0, "seed": 1})
    content = json.loads((tmp_path / "eval" / "test.json").read_text())
    assert content["metrics"] == report.headline.metrics
    assert (content["split"], content["n"], content["seed"]) == ("test", 9, 1)
    assert content["levels"].keys() == {"sample", "group", "patient"}
    assert content["per_class"].keys() == {"low", "high"}
    with (tmp_path / "eval" / "test.predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert set(rows[0]) == {"key", "patient", "group", "label", "predicted", "p_low", "p_high"}
    again = read_predictions(tmp_path / "eval" / "test.predictions.csv")
    assert report.predictions is not None
    assert np.array_equal(again.probability_NC, report.predictions.probability_NC)
