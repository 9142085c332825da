"""Intervals against numbers worked out by hand and against scipy's own."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distkd.report.stats import Estimate, estimate, paired, units_of, verdict

values = st.floats(0, 1)


def test_mean_and_interval_by_hand():
    # 0.8, 0.9, 1.0: deviation 0.1, error 0.1 / sqrt(3), Student's 97.5 % point for 2 degrees of freedom 4.302653
    found = estimate([0.8, 0.9, 1.0])
    assert found is not None
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.9, 0.9 - half, 0.9 + half))
    assert (found.n, found.t) == (3, pytest.approx(0.9 / (0.1 / math.sqrt(3))))


@settings(deadline=None)
@given(st.lists(values, min_size=2, max_size=20).filter(lambda x: np.std(x) > 1e-6))
def test_interval_and_t_equal_those_of_scipy(numbers):
    found = estimate(numbers)
    wanted: Any = stats.ttest_1samp(numbers, 0.0)
    low, high = wanted.confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high, found.t) == pytest.approx((low, high, wanted.statistic))


def test_one_value_has_no_interval_and_none_no_estimate():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimate([0.5]) == Estimate(0.5, None, None, 1, None)
        assert estimate([]) is None


def test_equal_values_have_a_point_for_an_interval_and_no_t():
    assert estimate([0.25, 0.25]) == Estimate(0.25, 0.25, 0.25, 2, None)


def test_seeds_of_a_fold_are_averaged_before_folds_are_counted():
    assert units_of({(0, 0): 0.2, (0, 1): 0.4, (1, 0): 0.9}) == [pytest.approx(0.3), 0.9]


def test_seeds_count_where_there_is_one_fold():
    assert units_of({(2, 1): 0.4, (2, 0): 0.2}) == [0.2, 0.4]


def test_differences_are_paired_by_fold_and_seed():
    ours = {(0, 0): 0.9, (0, 1): 0.7, (0, 2): 0.1}
    base = {(0, 1): 0.6, (0, 0): 0.5, (0, 3): 0.9}
    assert paired(ours, base) == estimate([0.9 - 0.5, 0.7 - 0.6])
    assert paired(ours, {(1, 0): 0.5}) is None


@pytest.mark.parametrize(
    ("low", "mean", "high", "words"),
    [
        (0.01, 0.02, 0.03, "gain"),
        (-0.01, 0.02, 0.05, "no evidence of a gain"),
        (0.0, 0.01, 0.02, "no evidence of a gain"),
        (-0.05, -0.02, 0.01, "no evidence of a gain, nor of a loss"),
        (-0.03, -0.02, -0.01, "loss"),
        (None, 0.5, None, "one pair: no interval, no evidence"),
    ],
)
def test_words_follow_the_interval(low, mean, high, words):
    assert verdict(Estimate(mean, low, high, 3, None)) == words


def test_no_pair_no_words_about_evidence():
    assert verdict(None) == "no common fold and seed"
