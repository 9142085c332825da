"""Folds: by patient, stratified, a function of seed and patients, and never a patient twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkd.data.consistency import check_patient_law
from distkd.data.manifest import Fold
from distkd.data.shardset import ShardSet
from distkd.data.splits import (
    check_classes,
    hold_out,
    label_of_patient,
    patient_folds,
    split_numbers,
)
from distkd.errors import DataError

counts = st.lists(st.integers(5, 23), min_size=2, max_size=4)


def people(counts: list[int], samples_each: int = 1) -> tuple[list[str], list[int]]:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    patients = [f"p{i}" for i in range(len(labels))]
    return [p for p in patients for _ in range(samples_each)], [x for x in labels for _ in range(samples_each)]


@given(counts=counts, n_folds=st.integers(2, 5), samples_each=st.integers(1, 3), seed=st.integers(0, 9))
def test_each_patient_is_in_one_split_and_tested_once(counts: list[int], n_folds: int, samples_each: int, seed: int):
    patients, labels = people(counts, samples_each)
    folds = patient_folds(patients, labels, n_folds=n_folds, val_share=0.2, seed=seed)
    for fold in folds:
        assert sorted(fold.train + fold.val + fold.test) == sorted(set(patients))
    assert sorted(p for fold in folds for p in fold.test) == sorted(set(patients))


@given(counts=counts, n_folds=st.integers(2, 5), seed=st.integers(0, 9))
def test_classes_are_spread_evenly(counts: list[int], n_folds: int, seed: int):
    patients, labels = people(counts)
    label_of = dict(zip(patients, labels, strict=True))
    folds = patient_folds(patients, labels, n_folds=n_folds, val_share=0.2, seed=seed)
    for label in range(len(counts)):
        tested = [sum(label_of[p] == label for p in fold.test) for fold in folds]
        assert max(tested) - min(tested) <= 1
        assert all(any(label_of[p] == label for p in fold.val) for fold in folds)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 1


@given(order=st.permutations(range(24)))
def test_folds_do_not_depend_on_the_order_of_the_samples(order: list[int]):
    patients, labels = people([12, 12])
    expected = patient_folds(patients, labels, n_folds=3, val_share=0.2, seed=4)
    shuffled = patient_folds([patients[i] for i in order], [labels[i] for i in order], n_folds=3, val_share=0.2, seed=4)
    assert shuffled == expected
    assert patient_folds(patients, labels, n_folds=3, val_share=0.2, seed=5) != expected


def test_patients_without_a_label_are_only_trained_on():
    patients, labels = people([9, 9])
    folds = patient_folds([*patients, "unknown"], [*labels, -1], n_folds=3, val_share=0.2, seed=0)
    assert all("unknown" in fold.train for fold in folds)


def test_no_validation_part_when_its_share_is_zero():
    assert all(not fold.val for fold in patient_folds(*people([4, 4]), n_folds=2, val_share=0, seed=0))


def test_too_few_patients_of_a_class_are_refused():
    with pytest.raises(DataError, match=r"class 1 has 2 patients, 3 folds .* at least 3 .*use fewer folds or merge"):
        patient_folds(*people([9, 2]), n_folds=3, val_share=0.2, seed=0)


@pytest.mark.parametrize(
    ("counts", "n_folds", "words"),
    [
        ([1], 5, "^1 patient; 5 folds with train, val and test need at least 5; add patients$"),
        ([4], 5, "^4 patients; 5 folds with train, val and test need at least 5; add patients or use fewer folds$"),
        ([9, 1], 3, "^class 1 has 1 patient, 3 folds "),
        ([9, 9], 1, "^1 fold, expected at least 2"),
    ],
)
def test_too_few_patients_are_told_in_words_that_fit(counts: list[int], n_folds: int, words: str):
    with pytest.raises(DataError, match=words):
        patient_folds(*people(counts), n_folds=n_folds, val_share=0.2, seed=0)


def test_a_patient_counts_with_its_most_frequent_label():
    patients = ["a", "a", "a", "b", "b", "c"]
    assert label_of_patient(patients, [2, 1, 1, 3, 2, -1]) == {"a": 1, "b": 2, "c": -1}


@given(counts=counts, share=st.floats(0.01, 0.9), seed=st.integers(0, 5))
def test_holding_out_keeps_and_takes_some_of_each_class(counts: list[int], share: float, seed: int):
    stratum = dict(zip(*people(counts), strict=True))
    kept, held = hold_out(stratum, share, seed=seed)
    assert sorted(kept + held) == sorted(stratum)
    for label, count in enumerate(counts):
        taken = Counter(stratum[p] for p in held)[label]
        assert taken == min(max(1, round(share * count)), count - 1)


def test_a_share_outside_of_zero_to_one_is_refused():
    with pytest.raises(DataError, match="share to hold out is 1, expected 0 <= share < 1"):
        hold_out({"a": 0}, 1, seed=0)


def test_split_numbers_are_the_samples_of_the_splits_patients(toy: ShardSet):
    fold = toy.manifest.folds[1]
    expected = [i for i, patient in enumerate(toy.manifest.samples.patient) if patient in fold.val]
    assert split_numbers(toy.manifest, 1, "val").tolist() == expected


def test_unknown_fold_is_refused_with_what_there_is(toy: ShardSet):
    with pytest.raises(DataError, match=r"data\.fold=3, the shard set of task 'toy' has folds 0\.\.2"):
        split_numbers(toy.manifest, 3, "train")


def test_a_patient_in_two_splits_is_named(toy: ShardSet):
    fold = toy.manifest.folds[0]
    twice = Fold(train=fold.train, val=[*fold.val, fold.train[0]], test=[*fold.test, fold.train[0]])
    manifest = toy.manifest.model_copy(update={"folds": [twice]})
    with pytest.raises(DataError, match=rf"two splits of fold 0: '{fold.train[0]}' \(train and val and test\)"):
        check_patient_law(manifest)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_class_absent_from_a_split_is_named(toy: ShardSet, split: str):
    fold, label_of = (
        toy.manifest.folds[0],
        dict(zip(toy.manifest.samples.patient, toy.manifest.samples.label, strict=True)),
    )
    low_only = {name: list(fold.patients(name)) for name in ("train", "val", "test")}
    low_only[split] = [patient for patient in low_only[split] if label_of[patient] == 0]
    manifest = toy.manifest.model_copy(update={"folds": [Fold(**low_only)]})
    with pytest.raises(
        DataError, match=rf"no sample of class 'high' in split '{split}' of fold 0 \(\d+ samples\); use another"
    ):
        check_classes(manifest, 0)


def test_an_empty_validation_or_test_split_is_allowed(toy: ShardSet):
    fold = Fold(train=sorted(set(toy.manifest.samples.patient)), val=[], test=[])
    check_classes(toy.manifest.model_copy(update={"folds": [fold]}), 0)
    assert len(np.unique(split_numbers(toy.manifest, 0, "train"))) > 0
