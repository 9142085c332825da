"""How well scores rank, how well ordered labels agree: numbers of scikit-learn's without the second it takes to load.

Whoever scores at the end of an epoch has the other ranks wait for it, and every process that trains scores.
"""

# Shapes: N items, T distinct scores, C classes

from __future__ import annotations

import numpy as np

__all__ = ["average_precision", "kappa_quadratic", "roc_auc"]


def roc_auc(is_positive_N: np.ndarray, score_N: np.ndarray) -> float:
    """Chance that a positive item has a higher score than a negative one; equal scores count as a half.

    Args:
        is_positive_N: bool or 0 and 1; both must occur.
    """
    true_T, false_T = _counts_above(is_positive_N, score_N)
    assert true_T[-1] > 0 < false_T[-1], (true_T[-1], false_T[-1])
    height_T = np.concatenate([[0.0], true_T / true_T[-1]])
    width_T = np.diff(false_T / false_T[-1], prepend=0.0)
    return float(np.sum(width_T * (height_T[1:] + height_T[:-1]) / 2))


def average_precision(is_positive_N: np.ndarray, score_N: np.ndarray) -> float:
    """Precision at each distinct score, weighted by the recall that it adds; nothing is interpolated.

    Args:
        is_positive_N: bool or 0 and 1; a positive item must occur.
    """
    true_T, false_T = _counts_above(is_positive_N, score_N)
    assert true_T[-1] > 0, true_T[-1]
    return float(np.sum(np.diff(true_T / true_T[-1], prepend=0.0) * true_T / (true_T + false_T)))


def kappa_quadratic(confusion_CC: np.ndarray) -> float:
    """Cohen's kappa where a disagreement weighs the squared distance of the classes: 1 is equal, 0 is chance.

    Args:
        confusion_CC: counts by label and prediction; items in two classes at least, on either side.
    """
    classes = np.arange(len(confusion_CC))
    weight_CC = (classes[:, None] - classes) ** 2
    by_chance_CC = np.outer(confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)) / confusion_CC.sum()
    expected = float(np.sum(weight_CC * by_chance_CC))
    assert expected > 0, confusion_CC
    return 1.0 - float(np.sum(weight_CC * confusion_CC)) / expected


def _counts_above(is_positive_N: np.ndarray, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative items with this score or a higher one, for each distinct score from the highest down."""
    order_N = np.argsort(-score_N, kind="stable")
    last_T = np.flatnonzero(np.append(np.diff(score_N[order_N]) != 0, True))
    true_T = np.cumsum(is_positive_N[order_N], dtype=np.float64)[last_T]
    return true_T, last_T + 1 - true_T
