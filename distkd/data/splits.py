"""Who is trained on and who is tested: folds by patient, stratified by label, as a function of a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from distkd.base import UNLABELLED
from distkd.data.manifest import SPLITS, Fold, Manifest, Split
from distkd.errors import DataError
from distkd.ops.draws import fold_in, integer_key, text_key

__all__ = [
    "check_classes",
    "choose_labelled",
    "hold_out",
    "label_of_patient",
    "patient_folds",
    "split_numbers",
]


def label_of_patient(patients: Sequence[str], labels: Sequence[int]) -> dict[str, int]:
    """The most frequent known label of each patient's samples, the smaller one in a tie; -1 where none is known."""
    counts: dict[str, Counter[int]] = {}
    for patient, label in zip(patients, labels, strict=True):
        count = counts.setdefault(patient, Counter())
        if label != UNLABELLED:
            count[label] += 1
    return {
        patient: min(count, key=lambda label: (-count[label], label)) if count else UNLABELLED
        for patient, count in counts.items()
    }


def hold_out(stratum: Mapping[str, int], share: float, *, seed: Sequence[int] | int) -> tuple[list[str], list[str]]:
    """Patients kept and held out, sorted; of each stratum `share`, rounded, but one at least and never all."""
    if not 0 <= share < 1:
        raise DataError(f"share to hold out is {share:g}, expected 0 <= share < 1")
    generator = np.random.default_rng(seed)
    kept: list[str] = []
    held: list[str] = []
    for members in _shuffled_strata(stratum, generator):
        n_held = 0 if share == 0 else min(max(1, round(share * len(members))), len(members) - 1)
        held += members[:n_held]
        kept += members[n_held:]
    return sorted(kept), sorted(held)


def patient_folds(
    patients: Sequence[str], labels: Sequence[int], *, n_folds: int, val_share: float, seed: int
) -> list[Fold]:
    """Cross-validation folds by patient, stratified by the patient's label.

    Args:
        patients: of each sample, as in the manifest.
        labels: of each sample, -1 where unknown; patients without a label are only ever trained on.
        n_folds: each labelled patient is tested in exactly one of them.
        val_share: of the labelled patients that are not tested, 0 <= val_share < 1.
        seed: the folds are a function of it, of the set of patients and of their labels, not of any order.

    Raises:
        DataError: a class has fewer patients than needed to be in every split of every fold.
    """
    label_of = label_of_patient(patients, labels)
    stratum = {patient: label for patient, label in label_of.items() if label != UNLABELLED}
    unlabelled = [patient for patient, label in label_of.items() if label == UNLABELLED]
    _check_counts(Counter(stratum.values()), n_folds, least=3 if val_share else 2)
    tested: list[list[str]] = [[] for _ in range(n_folds)]
    dealt = 0  # dealing goes on where the last class stopped, so that folds differ by one patient at most
    for members in _shuffled_strata(stratum, np.random.default_rng(seed)):
        for patient in members:
            tested[dealt % n_folds].append(patient)
            dealt += 1
    folds: list[Fold] = []
    for number, test in enumerate(tested):
        rest = {patient: label for patient, label in stratum.items() if patient not in set(test)}
        train, val = hold_out(rest, val_share, seed=(seed, number))
        folds.append(Fold(train=sorted(train + unlabelled), val=val, test=sorted(test)))
    return folds


def _check_counts(count_of: Mapping[int, int], n_folds: int, least: int) -> None:
    if n_folds < 2:
        raise DataError(f"{n_folds} fold{'' if n_folds == 1 else 's'}, expected at least 2; use more")
    needed = max(n_folds, least)
    parts = "train, val and test" if least == 3 else "train and test"
    for label, count in sorted(count_of.items()):
        if count >= needed:
            continue
        patients = f"{count} patient{'' if count == 1 else 's'}"
        if len(count_of) == 1:  # of a segmentation, say: there is no class to merge
            raise DataError(
                f"{patients}; {n_folds} folds with {parts} need at least {needed}; "
                + ("add patients" if count < least else "add patients or use fewer folds")
            )
        raise DataError(
            f"class {label} has {patients}, {n_folds} folds with {parts} need at least {needed} of each class; "
            "use fewer folds or merge classes"
        )


def split_numbers(manifest: Manifest, fold: int, split: Split) -> np.ndarray:
    """Numbers of the samples in a split of a fold, ascending, int64.

    Raises:
        DataError: there is no such fold.
    """
    if not 0 <= fold < len(manifest.folds):
        raise DataError(
            f"data.fold={fold}, the shard set of task {manifest.task!r} has folds 0..{len(manifest.folds) - 1}"
        )
    chosen = set(manifest.folds[fold].patients(split))
    return np.flatnonzero([patient in chosen for patient in manifest.samples.patient]).astype(np.int64)


def choose_labelled(label_N: np.ndarray, sample_N: np.ndarray, n_labelled: int, seed: int) -> np.ndarray:
    """(N,) bool: which training samples keep their label.

    Each class gets its share, rounded up for the first; within a class a hash of (seed, sample) decides. A smaller
    number chooses a subset of what a larger one does.

    Raises:
        DataError: there are not that many labels.
    """
    known = np.flatnonzero(label_N != UNLABELLED)
    if n_labelled > len(known):
        raise DataError(
            f"data.labelled={n_labelled}, the fold has {len(known)} labelled training samples; "
            "use at most that, or leave it out"
        )
    key = fold_in(torch.tensor(integer_key(seed, text_key("labelled"))), torch.as_tensor(sample_N[known])).numpy()
    share = np.empty(len(known))
    for label in np.unique(label_N[known]):
        members = np.flatnonzero(label_N[known] == label)
        share[members[np.argsort(key[members])]] = np.arange(len(members)) / len(members)
    order = np.lexsort((label_N[known], share))
    kept_N = np.zeros(len(label_N), dtype=bool)
    kept_N[known[order[:n_labelled]]] = True
    return kept_N


def check_classes(manifest: Manifest, fold: int) -> None:
    """Every class is in the training split of a fold and in its other splits, where these are not empty.

    Raises:
        DataError: naming fold, split and classes.
    """
    labels = np.array(manifest.samples.label, dtype=np.int64)
    for split in SPLITS:
        numbers = split_numbers(manifest, fold, split)
        if split != "train" and len(numbers) == 0:
            continue
        found = set(labels[numbers].tolist())
        absent = [name for label, name in enumerate(manifest.class_names) if label not in found]
        if absent:
            raise DataError(
                f"no sample of class {', '.join(map(repr, absent))} in split {split!r} of fold {fold} "
                f"({len(numbers)} samples); use another fold, or build the shard set with fewer folds or merged classes"
            )


def _shuffled_strata(stratum: Mapping[str, int], generator: np.random.Generator) -> list[list[str]]:
    strata: list[list[str]] = []
    for label in sorted(set(stratum.values())):
        members = sorted(patient for patient, value in stratum.items() if value == label)
        strata.append([members[i] for i in generator.permutation(len(members))])
    return strata
