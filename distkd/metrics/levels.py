"""From predictions of patches (samples) to those of regions (groups) and patients. Independent of the items' order."""

# Shapes: N samples, G groups or patients, C classes

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from distkd.base import UNLABELLED
from distkd.errors import DataError
from distkd.metrics.predictions import Predictions

__all__ = ["LEVELS", "PatientRule", "levels", "to_group", "to_patient"]

LEVELS = ("sample", "group", "patient")

PatientRule = Literal["mean", "max"]


def _log(probability: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probability, np.finfo(np.float64).tiny))


def _log_mean(member_NC: np.ndarray) -> np.ndarray:
    """Geometric mean, summing to one."""
    mean_C = _log(member_NC).mean(axis=0)
    p_C = np.exp(mean_C - mean_C.max())
    return p_C / p_C.sum()


def _mean(member_NC: np.ndarray) -> np.ndarray:
    return member_NC.mean(axis=0)


def _max(member_NC: np.ndarray) -> np.ndarray:
    return member_NC.max(axis=0)  # the maximum of log-probabilities, as the logarithm is monotone


def _group_name(predictions: Predictions, row: int) -> tuple[str, str]:
    """Patient and group: two patients may both have a region 1. A sample without a group is one of its own."""
    return predictions.patient[row], predictions.group[row] or predictions.key[row]


def _merge(
    predictions: Predictions, name_of: Callable[[int], tuple[str, ...]], rule: Callable[[np.ndarray], np.ndarray]
) -> Predictions:
    members: dict[tuple[str, ...], list[int]] = {}
    for row in sorted(range(len(predictions)), key=predictions.key.__getitem__):  # one order of sums
        members.setdefault(name_of(row), []).append(row)
    names = sorted(members)
    label_G = np.full(len(names), UNLABELLED, dtype=np.int64)
    for g, name in enumerate(names):
        known = sorted({int(predictions.label_N[row]) for row in members[name]} - {UNLABELLED})
        if len(known) > 1:
            raise DataError(
                f"{'/'.join(name)} has samples of the classes {[predictions.class_names[k] for k in known]}, expected "
                f"one class; evaluate at sample level, or correct the labels and rebuild the shards"
            )
        label_G[g] = known[0] if known else UNLABELLED
    merged = [rule(predictions.probability_NC[members[name]]) for name in names]
    return Predictions(
        key=["/".join(name) for name in names],
        patient=[name[0] for name in names],
        group=[name[1] if len(name) > 1 else None for name in names],
        label_N=label_G,
        probability_NC=np.array(merged, dtype=np.float64).reshape(len(names), len(predictions.class_names)),
        class_names=predictions.class_names,
    )


def to_group(predictions: Predictions) -> Predictions:
    """One item per group: the mean of its samples' log-probabilities, renormalised.

    Raises:
        DataError: samples of one group have different labels.
    """
    return _merge(predictions, lambda row: _group_name(predictions, row), _log_mean)


def to_patient(predictions: Predictions, rule: PatientRule = "mean") -> Predictions:
    """One item per patient.

    Args:
        predictions: at sample level.
        rule: `mean`, the mean of the probabilities of the patient's groups; `max`, for each class the largest
            log-probability among all the patient's samples, whose rows then do not sum to one (the aggregation of the
            released code of DC-Distill, card `dc-distill-gk-refine`, section 6).

    Raises:
        DataError: samples of one patient have different labels.
    """
    items = predictions if rule == "max" else to_group(predictions)
    return _merge(items, lambda row: (items.patient[row],), _max if rule == "max" else _mean)


def levels(predictions: Predictions, rule: PatientRule = "mean") -> dict[str, Predictions]:
    """The levels that exist, finest first: `sample`; `group` where samples have one; `patient`.

    A level at which one item would have two labels does not exist (tiles of several classes from one patient).
    """
    found = {"sample": predictions}
    if any(group is not None for group in predictions.group) and _one_label(predictions, by_group=True):
        found["group"] = to_group(predictions)
    if _one_label(predictions, by_group=False):
        found["patient"] = to_patient(predictions, rule)
    return found


def _one_label(predictions: Predictions, *, by_group: bool) -> bool:
    labels: dict[tuple[str, ...], set[int]] = {}
    for row, label in enumerate(predictions.label_N):
        name = _group_name(predictions, row) if by_group else (predictions.patient[row],)
        labels.setdefault(name, set()).add(int(label))
    return all(len(found - {UNLABELLED}) <= 1 for found in labels.values())
