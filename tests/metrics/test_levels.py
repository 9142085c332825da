"""Aggregation from samples to groups and patients against slow references, in any order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkd.errors import DataError
from distkd.metrics.levels import levels, to_group, to_patient
from distkd.metrics.predictions import Predictions


def cohort(seed: int, n: int = 24) -> Predictions:
    """Up to 5 patients with up to 3 regions each; the label belongs to the patient."""
    draws = np.random.default_rng(seed)
    patient = draws.integers(0, 5, size=n)
    return Predictions(
        key=[f"s{row:03d}" for row in draws.permutation(n)],
        patient=[f"P{number}" for number in patient],
        group=[f"roi{number}" for number in draws.integers(0, 3, size=n)],
        label_N=patient % 3,
        probability_NC=draws.dirichlet(np.ones(3), size=n),
        class_names=["II", "III", "IV"],
    )


def reordered(p: Predictions, order: np.ndarray) -> Predictions:
    return Predictions(
        key=[p.key[row] for row in order],
        patient=[p.patient[row] for row in order],
        group=[p.group[row] for row in order],
        label_N=p.label_N[order],
        probability_NC=p.probability_NC[order],
        class_names=p.class_names,
    )


def rows_of(p: Predictions, patient: str, group: str | None = None) -> np.ndarray:
    wanted = [n for n in range(len(p)) if p.patient[n] == patient and group in (None, p.group[n])]
    return p.probability_NC[wanted]


@settings(deadline=None)
@given(seed=st.integers(0, 99))
def test_a_group_is_the_renormalised_mean_of_log_probabilities(seed):
    samples = cohort(seed)
    groups = to_group(samples)
    assert len(groups) == len(set(zip(samples.patient, samples.group, strict=True)))
    for n in range(len(groups)):
        member = rows_of(samples, groups.patient[n], groups.group[n])
        product = np.prod(member, axis=0) ** (1 / len(member))
        np.testing.assert_allclose(groups.probability_NC[n], product / product.sum(), atol=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 99))
def test_a_patient_is_the_mean_of_its_groups(seed):
    samples = cohort(seed)
    groups, patients = to_group(samples), to_patient(samples)
    assert patients.key == sorted(set(samples.patient))
    for n, name in enumerate(patients.key):
        np.testing.assert_allclose(patients.probability_NC[n], rows_of(groups, name).mean(axis=0), atol=1e-12)
        assert patients.label_N[n] == int(name[1:]) % 3


@settings(deadline=None)
@given(seed=st.integers(0, 99))
def test_the_max_rule_takes_each_class_largest_log_probability_over_the_samples(seed):
    samples = cohort(seed)
    patients = to_patient(samples, "max")
    for n, name in enumerate(patients.key):
        np.testing.assert_allclose(np.log(patients.probability_NC[n]), np.log(rows_of(samples, name)).max(axis=0))


@settings(deadline=None)
@given(seed=st.integers(0, 99), rule=st.sampled_from(["mean", "max"]))
def test_levels_are_bit_equal_in_any_order(seed, rule):
    samples = cohort(seed)
    shuffled = reordered(samples, np.random.default_rng(seed + 1).permutation(len(samples)))
    for name, level in levels(samples, rule).items():
        other = levels(shuffled, rule)[name]
        if name != "sample":
            assert level.key == other.key
            assert level.probability_NC.tobytes() == other.probability_NC.tobytes()
            assert level.label_N.tobytes() == other.label_N.tobytes()


def test_regions_of_the_same_name_in_two_patients_stay_apart():
    two = Predictions(["a", "b"], ["P0", "P1"], ["1", "1"], np.array([0, 1]), np.eye(2), ["x", "y"])
    assert to_group(two).key == ["P0/1", "P1/1"]


def test_a_probability_of_zero_stays_finite():
    two = Predictions(["a", "b"], ["P", "P"], ["1", "1"], np.array([0, 0]), np.array([[1.0, 0.0]] * 2), ["x", "y"])
    np.testing.assert_allclose(to_group(two).probability_NC, [[1.0, 0.0]], atol=1e-300)


def test_an_unlabelled_sample_takes_the_label_of_its_patient():
    two = Predictions(["a", "b"], ["P", "P"], [None, None], np.array([-1, 1]), np.full((2, 2), 0.5), ["x", "y"])
    assert to_patient(two).label_N.tolist() == [1]
    assert list(levels(two)) == ["sample", "patient"]


def test_levels_without_one_label_per_item_do_not_exist():
    tiles = Predictions(["a", "b"], ["P", "P"], ["1", "2"], np.array([0, 1]), np.full((2, 2), 0.5), ["x", "y"])
    assert list(levels(tiles)) == ["sample", "group"]


def test_a_patient_of_two_classes_is_refused_by_name():
    tiles = Predictions(["a", "b"], ["P", "P"], ["1", "2"], np.array([0, 1]), np.full((2, 2), 0.5), ["x", "y"])
    with pytest.raises(DataError, match=r"P has samples of the classes \['x', 'y'\], expected one class; evaluate at"):
        to_patient(tiles)


def test_nothing_in_nothing_out():
    none = Predictions([], [], [], np.zeros(0, np.int64), np.zeros((0, 2)), ["x", "y"])
    assert len(to_patient(none)) == 0
    assert to_patient(none).probability_NC.shape == (0, 2)
