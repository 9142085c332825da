"""Metrics against golden numbers, against scikit-learn used plainly, and where they are undefined."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from distkd.errors import NonFiniteError, ShapeError
from distkd.metrics.classification import METRICS, PER_CLASS, classification_metrics

GOLDEN = Path(__file__).parents[1] / "golden"
GRADES = ["II", "III", "IV"]


def random_case(n: int, c: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    draws = np.random.default_rng(seed)
    probability = draws.dirichlet(np.ones(c), size=n).reshape(n, c)
    return probability, draws.integers(0, c, size=n), [f"class {k}" for k in range(c)]


def test_golden_numbers_of_dc_distill():
    # derived from the released code of the method; card dc-distill-gk-refine, section 6; tolerance of float64
    golden = json.loads((GOLDEN / "dc-distill-gk-refine.json").read_text())["metrics"]
    report = classification_metrics(np.exp(golden["log_probs"]), np.array(golden["labels"]), GRADES)
    for name in ("auc_micro", "ap_micro", "f1_micro"):
        assert report.metrics[name] == pytest.approx(golden[name], abs=1e-12)
    assert report.per_class["IV"]["f1"] == pytest.approx(golden["f1_grade4"], abs=1e-12)


def test_hand_counted_confusion_gives_every_value():
    # labels a a a b b, predictions a a b b a
    probability = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.6, 0.4]])
    report = classification_metrics(probability, np.array([0, 0, 0, 1, 1]), ["a", "b"])
    assert report.confusion == [[2, 1], [1, 1]]
    assert report.per_class["a"] == {"f1": 4 / 6, "recall": 2 / 3, "precision": 2 / 3, "support": 3}
    assert report.per_class["b"] == {"f1": 2 / 4, "recall": 1 / 2, "precision": 1 / 2, "support": 2}
    assert report.metrics["accuracy"] == report.metrics["f1_micro"] == pytest.approx(3 / 5)
    assert report.metrics["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert report.metrics["f1_macro"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    # pairs (a, b) ordered rightly by p(a): .9>.6 .9>.4 .8>.6 .8>.4, .3 above neither: 4 of 6
    assert report.metrics["auc_macro"] == pytest.approx(4 / 6)
    # observed disagreement 2/5, by chance (3*2 + 2*3)/25 = 12/25
    assert report.metrics["kappa_quadratic"] == pytest.approx(1 - (2 / 5) / (12 / 25))
    assert report.notes == []


@settings(deadline=None)
@given(n=st.integers(20, 60), c=st.integers(2, 5), seed=st.integers(0, 99))
def test_averages_equal_scikit_learn_where_all_classes_occur(n, c, seed):
    probability, label, names = random_case(n, c, seed)
    label[:c] = np.arange(c)
    report = classification_metrics(probability, label, names)
    predicted = probability.argmax(axis=1)
    assert report.metrics["f1_macro"] == pytest.approx(f1_score(label, predicted, average="macro"))
    assert report.metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, predicted))
    one_hot = np.eye(c)[label]
    assert report.metrics["auc_macro"] == pytest.approx(roc_auc_score(one_hot, probability, average="macro"))
    assert report.metrics["auc_micro"] == pytest.approx(roc_auc_score(one_hot, probability, average="micro"))


@settings(deadline=None)
@given(n=st.integers(0, 12), c=st.integers(1, 5), seed=st.integers(0, 99), unlabelled=st.integers(0, 12))
def test_small_and_lopsided_splits_give_strict_json_and_no_warning(n, c, seed, unlabelled):
    probability, label, names = random_case(n, c, seed)
    label[:unlabelled] = -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = classification_metrics(probability, label, names)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert set(report.metrics) == set(METRICS)
    assert all(set(values) == {*PER_CLASS, "support"} for values in report.per_class.values())
    assert np.sum(report.confusion) == report.n == (label >= 0).sum()
    values = [*report.metrics.values(), *(v for row in report.per_class.values() for v in row.values())]
    assert all(value is None or math.isfinite(value) for value in values)
    assert None not in values or report.notes


@settings(deadline=None)
@given(seed=st.integers(0, 99))
def test_metrics_do_not_depend_on_the_order_of_items(seed):
    probability, label, names = random_case(30, 3, seed)
    order = np.random.default_rng(seed + 1).permutation(30)
    shuffled = classification_metrics(probability[order], label[order], names)
    straight = classification_metrics(probability, label, names)
    assert shuffled.confusion == straight.confusion
    assert shuffled.metrics == pytest.approx(straight.metrics, abs=1e-12)


def test_an_absent_class_is_noted_and_leaves_averages_over_classes_undefined():
    report = classification_metrics(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]), np.array([0, 1]), GRADES)
    assert report.metrics["accuracy"] == 1.0
    assert report.metrics["auc_micro"] == 1.0
    assert report.metrics["balanced_accuracy"] is report.metrics["auc_macro"] is report.metrics["f1_macro"] is None
    assert report.per_class["IV"] == {"f1": None, "recall": None, "precision": None, "support": 0}
    assert report.notes == ["class 'IV' is absent: its recall and the averages over classes are undefined"]


def test_a_class_that_is_never_predicted_has_no_precision_and_an_f1_of_zero():
    report = classification_metrics(np.array([[0.7, 0.3], [0.9, 0.1]]), np.array([0, 1]), ["a", "b"])
    assert report.per_class["b"] == {"f1": 0.0, "recall": 0.0, "precision": None, "support": 1}
    assert report.metrics["f1_macro"] == pytest.approx(1 / 3)
    assert report.notes == ["class 'b' is never predicted: its precision is undefined"]


def test_unlabelled_items_are_left_out_with_a_note():
    report = classification_metrics(np.array([[0.7, 0.3], [0.2, 0.8], [0.4, 0.6]]), np.array([0, 1, -1]), ["a", "b"])
    assert (report.n, report.metrics["accuracy"]) == (2, 1.0)
    assert report.notes == ["1 of 3 items have no label and were left out"]


def test_predictions_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="1 of 2 predictions are not finite, first in row 1; the model has diverg"):
        classification_metrics(np.array([[0.5, 0.5], [np.nan, 0.5]]), np.array([0, 1]), ["a", "b"])


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ShapeError, match=r"shape \(2, 2\) and labels \(2,\), expected \(2, 3\)"):
        classification_metrics(np.full((2, 2), 0.5), np.array([0, 1]), GRADES)


def test_a_label_out_of_range_is_refused():
    with pytest.raises(ShapeError, match=r"label 2 in row 1 is not one of the 2 classes; expected 0 to 1, or -1"):
        classification_metrics(np.full((2, 2), 0.5), np.array([0, 2]), ["a", "b"])
