"""Folds of a table: as its column `split` or `fold` says, or made by patient."""

from __future__ import annotations

from collections.abc import Mapping

from distkd.base import UNLABELLED
from distkd.data.manifest import SPLITS, Fold, Split
from distkd.data.raw.table import Roles, Row, TableOptions
from distkd.data.raw.table_problems import Problems, first_few
from distkd.data.splits import hold_out, label_of_patient, patient_folds
from distkd.errors import DataError

__all__ = ["make_folds"]

WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def make_folds(
    rows: list[Row], labels: list[int], roles: Roles, options: TableOptions, seed: int, problems: Problems
) -> tuple[list[Fold], str]:
    """Folds and their rule in words; a class that is unknown is -1 in `labels`, and all are 0 of a segmentation."""
    stratum = label_of_patient([row.patient for row in rows], labels)
    before = problems.count
    try:
        if "split" in roles.columns:
            made = _by_split(rows, stratum, options.val_share, seed, problems)
        elif "fold" in roles.columns:
            made = _by_fold(rows, stratum, options.val_share, seed, problems)
        else:
            patients = [row.patient for row in rows]
            folds = patient_folds(patients, labels, n_folds=options.folds, val_share=options.val_share, seed=seed)
            stratified = "" if roles.is_segmentation else ", stratified by label"
            made = folds, f"by patient{stratified}{_held(options.val_share)}"
    except DataError as error:
        problems.add(str(error))
        return [], ""
    if problems.count == before:
        for number, fold in enumerate(made[0]):
            empty = [split for split in ("train", "test") if not fold.patients(split)]
            if empty:
                problems.add(
                    f"fold {number} has no patient with a label for {' and '.join(empty)}; every fold needs some"
                )
    return made


def _by_split(
    rows: list[Row], stratum: Mapping[str, int], share: float, seed: int, problems: Problems
) -> tuple[list[Fold], str]:
    for row in rows:
        if row.part.lower() not in WORDS:
            problems.add(f"it is {row.part!r}, expected train, val or test", row=row.line, column="split")
    part_of = _one_part(rows, {row.part: WORDS.get(row.part.lower(), row.part) for row in rows}, "split", problems)
    members: dict[str, list[str]] = {split: [] for split in SPLITS}
    for patient, part in part_of.items():
        members.setdefault(part, []).append(patient)
    # who has no label cannot be scored, and being of another split may not be trained on either
    scored = {split: sorted(p for p in members[split] if stratum[p] != UNLABELLED) for split in ("val", "test")}
    if members["val"]:
        return [Fold(train=sorted(members["train"]), val=scored["val"], test=scored["test"])], "the column 'split'"
    train, val = _held_out(members["train"], stratum, share, (seed, 0))
    return [Fold(train=train, val=val, test=scored["test"])], f"the column 'split'{_held(share)}"


def _by_fold(
    rows: list[Row], stratum: Mapping[str, int], share: float, seed: int, problems: Problems
) -> tuple[list[Fold], str]:
    for row in rows:
        if not (row.part.isdecimal() and len(row.part) < 5):
            problems.add(f"it is {row.part!r}, expected a number from 0", row=row.line, column="fold")
    numbers = sorted({int(row.part) for row in rows if row.part.isdecimal() and len(row.part) < 5})
    first = 1 if len(numbers) > 1 and numbers == list(range(1, len(numbers) + 1)) else 0
    if first:
        problems.note(f"column 'fold' counts from 1: fold 1 of the table is fold 0 of the set, of {len(numbers)} folds")
    n_folds = max(numbers, default=0) + 1
    absent = sorted(set(range(first, n_folds)) - set(numbers)) if n_folds <= 2 * len(rows) else []
    if n_folds < 2 or absent:
        missing = f"no row of fold {first_few(absent)}" if absent else f"{n_folds} fold"
        problems.add(f"it has {missing}, expected numbers from 0 without a gap, 2 folds or more", column="fold")
    part_of = _one_part(
        rows, {row.part: str(int(row.part)) if row.part.isdecimal() else row.part for row in rows}, "fold", problems
    )
    folds: list[Fold] = []
    for number in numbers:
        test = sorted(p for p, part in part_of.items() if part == str(number) and stratum[p] != UNLABELLED)
        rest = [patient for patient, part in part_of.items() if part != str(number)]
        train, val = _held_out(rest, stratum, share, (seed, number - first))
        folds.append(Fold(train=train, val=val, test=test))
    return folds, f"the column 'fold', each tested once{_held(share)}"


def _one_part(rows: list[Row], meaning: Mapping[str, str], column: str, problems: Problems) -> dict[str, str]:
    """The split or fold of each patient; a patient in two is a problem."""
    rows_of: dict[str, dict[str, int]] = {}
    for row in rows:
        rows_of.setdefault(row.patient, {}).setdefault(meaning[row.part], row.line)
    for patient, parts in rows_of.items():
        if len(parts) > 1 and patient:
            where = " and ".join(f"{part} (row {line})" for part, line in sorted(parts.items()))
            problems.add(
                f"patient {patient!r} is in two {column}s: {where}; a patient's rows must stay in one: mend the table",
                column=column,
            )
    return {patient: next(iter(parts)) for patient, parts in rows_of.items()}


def _held_out(
    patients: list[str], stratum: Mapping[str, int], share: float, seed: tuple[int, int]
) -> tuple[list[str], list[str]]:
    train, val = hold_out({p: stratum[p] for p in patients if stratum[p] != UNLABELLED}, share, seed=seed)
    return sorted(train + [p for p in patients if stratum[p] == UNLABELLED]), val


def _held(share: float) -> str:
    return f"; {share:g} of the rest is the validation part" if share else ""
