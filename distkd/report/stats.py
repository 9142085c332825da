"""Means with 95 % intervals over folds or seeds, and differences paired by fold and seed. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["Estimate", "Unit", "estimate", "paired", "units_of", "verdict"]

Unit = tuple[int, int]
"""Fold and seed of a run."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over n folds (or seeds) and its two-sided 95 % interval by Student's t."""

    mean: float
    low: float | None
    """None for n = 1: one value has no interval."""
    high: float | None
    n: int
    t: float | None
    """Mean over its standard error; None where the error is zero or unknown."""


def estimate(values: Sequence[float]) -> Estimate | None:
    """None of no values."""
    n = len(values)
    if n == 0:
        return None
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, None, None, 1, None)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    # differences that are equal up to rounding have no error to divide by
    return Estimate(mean, mean - half, mean + half, n, mean / error if error > 1e-12 else None)


def units_of(values: Mapping[Unit, float]) -> list[float]:
    """The values to count as independent: one per fold, its seeds averaged, or one per seed where there is one fold.

    Seeds of one fold share its patients: to count them all would make the interval too narrow.
    """
    folds = sorted({fold for fold, _ in values})
    if len(folds) <= 1:
        return [values[unit] for unit in sorted(values)]
    return [float(np.mean([value for unit, value in sorted(values.items()) if unit[0] == fold])) for fold in folds]


def paired(values: Mapping[Unit, float], baseline: Mapping[Unit, float]) -> Estimate | None:
    """Mean of value - baseline over the folds and seeds that both have; None where there is none."""
    return estimate(units_of({unit: values[unit] - baseline[unit] for unit in values if unit in baseline}))


def verdict(difference: Estimate | None) -> str:
    """What the interval of a paired difference says, in plain words; higher is better."""
    if difference is None:
        return "no common fold and seed"
    if difference.low is None or difference.high is None:
        return "one pair: no interval, no evidence"
    if difference.low > 0:
        return "gain"
    if difference.high < 0:
        return "loss"
    return "no evidence of a gain" if difference.mean >= 0 else "no evidence of a gain, nor of a loss"
