"""Metrics of a classifier over a whole split. A value that is undefined is None and a note says why, never NaN."""

# Shapes: N items, C classes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distkd.base import UNLABELLED
from distkd.errors import NonFiniteError, ShapeError

__all__ = ["METRICS", "PER_CLASS", "ClassificationReport", "classification_metrics"]

METRICS = (
    "accuracy",
    "balanced_accuracy",
    "auc_micro",
    "auc_macro",
    "ap_micro",
    "f1_micro",
    "f1_macro",
    "kappa_quadratic",
)
PER_CLASS = ("f1", "recall", "precision")


@dataclass(frozen=True)
class ClassificationReport:
    """Everything that `eval/<split>.json` says about one level of one split."""

    n: int
    """Items that were scored: those with a label."""
    metrics: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    """Class name to f1, recall, precision and support (number of items of the class)."""
    confusion: list[list[int]]
    """Rows are labels, columns predictions, both in class order."""
    class_names: list[str]
    notes: list[str]
    """Why values are missing or items were left out."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def classification_metrics(
    probability_NC: np.ndarray, label_N: np.ndarray, class_names: Sequence[str]
) -> ClassificationReport:
    """Scores predictions against labels.

    Args:
        probability_NC: scores that rank as probabilities do; rows need not sum to one. The predicted class is the
            largest, the first of equals.
        label_N: int, 0 <= label < C, or `UNLABELLED`: such items are left out, with a note.
        class_names: C names in the order of the columns.

    Returns:
        `auc_micro` and `ap_micro` pool the C one-against-rest problems; the macro averages and `balanced_accuracy`
        are over all C classes and None when one of them is undefined, so that folds stay comparable.

    Raises:
        ShapeError: the three do not fit together.
        NonFiniteError: a probability is NaN or infinite.
    """
    probability_NC, label_N = _checked(np.asarray(probability_NC, dtype=np.float64), np.asarray(label_N), class_names)
    notes: list[str] = []
    known_N = label_N != UNLABELLED
    if not known_N.all():
        notes.append(f"{int((~known_N).sum())} of {len(label_N)} items have no label and were left out")
    probability_NC, label_N = probability_NC[known_N], label_N[known_N]
    c = len(class_names)
    confusion_CC = np.zeros((c, c), dtype=np.int64)
    np.add.at(confusion_CC, (label_N, probability_NC.argmax(axis=1)), 1)
    per_class = _per_class(confusion_CC, class_names, notes)
    metrics = _metrics(probability_NC, label_N, per_class, notes)
    return ClassificationReport(
        n=len(label_N),
        metrics=metrics,
        per_class=per_class,
        confusion=[[int(count) for count in row] for row in confusion_CC],
        class_names=list(class_names),
        notes=notes,
    )


def _checked(
    probability_NC: np.ndarray, label_N: np.ndarray, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    n, c = len(label_N), len(class_names)
    if probability_NC.shape != (n, c) or label_N.ndim != 1:
        raise ShapeError(
            f"probabilities have shape {probability_NC.shape} and labels {label_N.shape}, expected ({n}, {c}) and "
            f"({n},) for the {c} classes {list(class_names)}"
        )
    bad_row = ~np.isfinite(probability_NC).all(axis=1)
    if bad_row.any():
        raise NonFiniteError(
            f"{int(bad_row.sum())} of {n} predictions are not finite, first in row {int(bad_row.argmax())}; "
            f"the model has diverged: lower optim.lr or take an earlier checkpoint"
        )
    outside = (label_N < 0) & (label_N != UNLABELLED) | (label_N >= c)
    if outside.any():
        raise ShapeError(
            f"label {int(label_N[outside.argmax()])} in row {int(outside.argmax())} is not one of the {c} classes; "
            f"expected 0 to {c - 1}, or {UNLABELLED} for unknown"
        )
    return probability_NC, label_N.astype(np.int64)


def _per_class(
    confusion_CC: np.ndarray, class_names: Sequence[str], notes: list[str]
) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for k, name in enumerate(class_names):
        hit = int(confusion_CC[k, k])
        labelled, predicted = int(confusion_CC[k].sum()), int(confusion_CC[:, k].sum())
        if not labelled:
            notes.append(f"class {name!r} is absent: its recall and the averages over classes are undefined")
        elif not predicted:
            notes.append(f"class {name!r} is never predicted: its precision is undefined")
        found[name] = {
            "f1": 2 * hit / (labelled + predicted) if labelled + predicted else None,
            "recall": hit / labelled if labelled else None,
            "precision": hit / predicted if predicted else None,
            "support": labelled,
        }
    return found


def _metrics(
    probability_NC: np.ndarray,
    label_N: np.ndarray,
    per_class: dict[str, dict[str, float | None]],
    notes: list[str],
) -> dict[str, float | None]:
    # here, since it takes a second to load: only the rank that scores waits for it, and only once it does
    from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_auc_score

    n, c = probability_NC.shape
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    if not n:
        notes.append("no item has a label: no metric is defined")
        return metrics
    predicted_N = probability_NC.argmax(axis=1)
    metrics["accuracy"] = float((predicted_N == label_N).mean())
    metrics["f1_micro"] = metrics["accuracy"]  # the same number where an item has one label and one prediction
    if c < 2:
        notes.append("there is one class: ranking and agreement are undefined")
        return metrics
    is_class_NC = np.eye(c, dtype=np.int64)[label_N]
    metrics["auc_micro"] = float(roc_auc_score(is_class_NC.ravel(), probability_NC.ravel()))
    metrics["ap_micro"] = float(average_precision_score(is_class_NC.ravel(), probability_NC.ravel()))
    present = np.unique(label_N)
    if len(present) == c:
        metrics["auc_macro"] = float(
            np.mean([roc_auc_score(is_class_NC[:, k], probability_NC[:, k]) for k in range(c)])
        )
        metrics["balanced_accuracy"] = sum(values["recall"] or 0.0 for values in per_class.values()) / c
        metrics["f1_macro"] = sum(values["f1"] or 0.0 for values in per_class.values()) / c
    if len(np.union1d(present, predicted_N)) > 1:
        metrics["kappa_quadratic"] = float(
            cohen_kappa_score(label_N, predicted_N, labels=np.arange(c), weights="quadratic")
        )
    else:
        notes.append("labels and predictions are all of one class: kappa_quadratic is undefined")
    return metrics
