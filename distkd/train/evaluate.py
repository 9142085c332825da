"""Metrics over a whole split: every sample once at any world size, at the level of samples, groups and patients."""

# Shapes: B samples of this rank, C classes, N samples of the split

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distkd.base import Batch, World
from distkd.comm.world import broadcast_object, gather_objects
from distkd.data.dataset import Dataset
from distkd.data.loader import eval_batches
from distkd.data.manifest import Split
from distkd.errors import DataError, DistkdError
from distkd.files import write_json
from distkd.metrics.classification import ClassificationReport, classification_metrics
from distkd.metrics.levels import levels
from distkd.metrics.predictions import Predictions, write_predictions
from distkd.train.settings import EvalConfig

__all__ = ["SplitReport", "evaluate", "write_report"]


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What evaluation found; `predictions` only on the main rank."""

    split: str
    level: str
    levels: dict[str, ClassificationReport]
    predictions: Predictions | None

    @property
    def headline(self) -> ClassificationReport:
        return self.levels[self.level]

    @property
    def metrics(self) -> dict[str, float]:
        """The headline metrics that are defined."""
        return {name: value for name, value in self.headline.metrics.items() if value is not None}


@torch.no_grad()
def evaluate(
    predict: Callable[[Batch], Tensor],
    modules: nn.Module,
    dataset: Dataset,
    split: Split,
    config: EvalConfig,
    *,
    micro_batch: int,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
) -> SplitReport:
    """Score a model on a split in eval mode; its mode is put back.

    Args:
        predict: batch to logits (B, C).
        modules: what must be in eval mode meanwhile.

    Raises:
        DataError: the split is empty, none of it can be read, or too many samples cannot be read; on all ranks.
        NonFiniteError: a prediction is NaN or infinite; on all ranks.

    Collectives: one gather of objects and one broadcast; ranks may have different numbers of batches.
    """
    if len(dataset.split_samples(split)) == 0:
        raise DataError(f"split {split!r} of fold {dataset.fold} has no samples; choose a fold or split that has some")
    was_training = modules.training
    modules.eval()
    samples: list[np.ndarray] = []
    log_probability: list[np.ndarray] = []
    for batch in eval_batches(dataset, split, world, micro_batch):
        logits_BC = predict(batch.to(device, dtype))
        samples.append(batch.sample_B.numpy())
        log_probability.append(logits_BC.double().log_softmax(dim=-1).cpu().numpy())
    modules.train(was_training)
    parts = gather_objects((samples, log_probability, dataset.unreadable.untold()), world)
    dataset.unreadable.tell(untold for *_, untold in parts)
    report: dict[str, ClassificationReport] = {}
    predictions: Predictions | None = None
    failure: DistkdError | None = None
    n = len(dataset.split_samples(split))
    if not any(part[0] for part in parts):
        error = DataError(f"none of the {n} samples of split {split!r} can be read; run `distkd shards verify`")
        error.shared = True
        raise error
    if world.is_main:
        sample_N = np.concatenate([array for part in parts for array in part[0]])
        log_NC = np.concatenate([array for part in parts for array in part[1]])
        order = np.argsort(sample_N)
        predictions = _predictions(dataset, sample_N[order], np.exp(log_NC[order]))
        try:
            for level, items in levels(predictions, config.patient_rule).items():
                report[level] = classification_metrics(items.probability_NC, items.label_N, dataset.class_names)
        except DistkdError as error:
            failure = error  # for all ranks: they wait in the broadcast
        if len(sample_N) < n:
            for level_report in report.values():
                level_report.notes.append(f"{n - len(sample_N)} of {n} samples cannot be read and are left out")
    report, failure = broadcast_object((report, failure), world)
    if failure is not None:
        raise failure
    return SplitReport(split, config.level if config.level in report else "sample", report, predictions)


def _predictions(dataset: Dataset, sample_N: np.ndarray, probability_NC: np.ndarray) -> Predictions:
    about = [dataset.describe(int(sample)) for sample in sample_N]
    return Predictions(
        key=[item["key"] for item in about],
        patient=[item["patient"] for item in about],
        group=[item["group"] for item in about],
        label_N=np.array([item["label"] for item in about], dtype=np.int64),
        probability_NC=probability_NC,
        class_names=list(dataset.class_names),
    )


def write_report(folder: Path, report: SplitReport, about: dict[str, Any]) -> None:
    """`eval/<split>.json` and `<split>.predictions.csv`; called on the main rank."""
    assert report.predictions is not None
    headline = report.headline
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    content = {
        **about,
        "split": report.split,
        "level": report.level,
        "n": headline.n,
        "metrics": headline.metrics,
        "per_class": headline.per_class,
        "levels": {
            level: {"n": found.n, "metrics": found.metrics, "per_class": found.per_class, "notes": found.notes}
            for level, found in report.levels.items()
        },
        "confusion": headline.confusion,
        "class_names": headline.class_names,
    }
    write_predictions(folder / "eval" / f"{report.split}.predictions.csv", report.predictions)
    write_json(folder / "eval" / f"{report.split}.json", content)
