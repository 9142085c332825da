"""Ranking numbers against scikit-learn's, with many equal scores and few of them, and against pairs counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_auc_score

from distkd.metrics.ranking import average_precision, kappa_quadratic, roc_auc


@given(n=st.integers(2, 200), distinct=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_they_are_those_of_scikit_learn(n: int, distinct: int, share: float, seed: int):
    draws = np.random.default_rng(seed)
    score = draws.integers(0, distinct, n) / distinct
    label = (draws.random(n) < share).astype(np.int64)
    label[:2] = 0, 1
    assert roc_auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-13)
    assert average_precision(label, score) == pytest.approx(average_precision_score(label, score), abs=1e-13)


@given(n=st.integers(2, 60), c=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_so_is_the_agreement_of_ordered_classes(n: int, c: int, seed: int):
    draws = np.random.default_rng(seed)
    label, predicted = draws.integers(0, c, n), draws.integers(0, c, n)
    label[0], predicted[0] = 0, 1
    confusion = np.zeros((c, c), dtype=np.int64)
    np.add.at(confusion, (label, predicted), 1)
    expected = cohen_kappa_score(label, predicted, labels=np.arange(c), weights="quadratic")
    assert kappa_quadratic(confusion) == pytest.approx(expected, abs=1e-12)


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    label, score = np.array([1, 0, 1, 0, 0]), np.array([0.9, 0.9, 0.4, 0.4, 0.1])
    # of six pairs: .9 against .9 a half, above .4 and .1; .4 below .9, against .4 a half, above .1
    assert roc_auc(label, score) == pytest.approx((0.5 + 1 + 1 + 0 + 0.5 + 1) / 6)
    assert roc_auc(label, np.zeros(5)) == 0.5
