"""TCGA glioma patients: omics and the outputs of published histology networks, WHO grade II, III or IV.

--raw DIR holds patients.csv, omics.csv.gz, histology_patient.csv and splits15.csv. One sample a patient:
  omics       copy numbers, mutations and RNA-seq together; also apart as omics_cnv, omics_mut, omics_rnaseq
  histology   15 outputs of networks that never saw the patient (a weak student input, but a real one)
The folds are the 15 published train/test splits; a part of each training list is held out for validation. Patients
without omics stay, their omics recorded as missing; patients without a grade are trained on without a label.
Beware: three quarters of the grade IV patients have no omics and nearly all others have them, so a model that sees
both kinds can read the grade off the gap; --paired-only leaves that way out.
Terms of the data: TCGA open access, ODbL 1.0 (cBioPortal), GPL-3.0 and non-commercial for the network outputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from distkd.data.manifest import Description, Fold, Modality
from distkd.data.raw.recipe import Made, Skipped, arguments, number, raw_file, read_table, run, tables_digest, track
from distkd.data.splits import hold_out
from distkd.data.write import ShardWriter
from distkd.errors import DataError

NEEDS_RAW = True
FOLDER = "TCGA glioma tables (patients.csv, omics.csv.gz, histology_patient.csv, splits15.csv)"
GRADES = {"2": 0, "3": 1, "4": 2}
N_FOLDS = 15
VAL_SHARE = 0.15
OMICS_PARTS = ("cnv", "mut", "rnaseq")
EXCLUDED = {
    "grade": "it is the label",
    "oncotree_code": "it encodes the grade: GBM is IV, AASTR and AOAST are III",
    "survival_days": "the outcome, known only after the grade",
    "event": "the outcome, known only after the grade",
    "idh1_mut": "repeats IDH1_mut of the omics, and comes from another source where a patient has no omics",
    "age": "a clinical fact that neither the slide nor the omics hold",
    "is_female": "a clinical fact that neither the slide nor the omics hold",
    "n_roi": "how many regions a study cut says nothing that the clinic would know",
    "n_test_folds": "a property of the published splits",
    "has_omics": "a property of the collection that tells the grade: most without omics are IV",
    "has_histology": "a property of the collection",
    "has_lgg_mri": "a property of the collection, and there are grades II and III only in it",
    "in_pathomicfusion": "a property of the collection",
}


def make(
    raw: Path | None, out: Path, *, paired_only: bool = False, val_share: float = VAL_SHARE, seed: int = 0
) -> Made:
    """Shard set of the patients; with `paired_only` those that have omics and histology."""
    if raw is None:
        raise DataError(f"no raw data; name with --raw the folder of {FOLDER}")
    patients = _by_patient(raw, "patients.csv", [*(set(EXCLUDED) - {"n_test_folds"}), "loh_1p19q"])
    omics = _by_patient(raw, "omics.csv.gz", [])
    histology = _by_patient(raw, "histology_patient.csv", ["n_test_folds"])
    splits = _by_patient(raw, "splits15.csv", [f"fold_{fold}" for fold in range(1, N_FOLDS + 1)])
    columns_of = _columns(omics, histology, raw)
    skipped = Skipped()
    chosen = _choose(patients, omics, histology, splits, skipped, paired_only)
    if not chosen:
        raise DataError(f"no patient of {str(raw)!r} is in all of the tables; {'; '.join(skipped.lines())}")
    label_of = {patient: _grade(patients[patient]["grade"], patient) for patient in chosen}
    n_unknown = sum(not row["loh_1p19q"] for row in patients.values())
    description = Description(
        task="glioma_grade",
        class_names=["II", "III", "IV"],
        modalities={
            name: Modality(
                kind="vector",
                dtype="float32",
                shape=(len(columns),),
                codec="npy",
                unit=UNITS[name],
                features=columns,
            )
            for name, columns in columns_of.items()
        },
        excluded={**EXCLUDED, "loh_1p19q": f"unknown for {n_unknown} of {len(patients)} patients"},
        source="TCGA-GBM and TCGA-LGG through cBioPortal; tables of PORPOISE (Chen 2022), network outputs of Pathomic "
        "Fusion (Chen 2020), splits of Mobadersany 2018",
        licence="TCGA open access; ODbL 1.0; network outputs GPL-3.0, non-commercial academic use; not to be shipped",
    )
    tables = tables_digest(
        *(raw / name for name in ("patients.csv", "omics.csv.gz", "histology_patient.csv", "splits15.csv"))
    )
    with ShardWriter(out, description, options=f"{paired_only} {val_share} seed {seed}, tables {tables}") as writer:
        for patient in track(chosen, "patients"):
            rows = {"histology": histology[patient]}
            if patient in omics:
                rows.update({name: omics[patient] for name in columns_of if name != "histology"})
            arrays = {
                name: np.array(
                    [number(row[column], f"{column} of patient {patient!r}") for column in columns_of[name]],
                    dtype=np.float32,
                )
                for name, row in rows.items()
            }
            writer.add(patient, arrays, patient=patient, label=label_of[patient])
        folds = [_fold(f"fold_{fold}", fold, splits, label_of, val_share, seed) for fold in range(1, N_FOLDS + 1)]
        writer.split(
            folds,
            rule=f"the 15 published splits; {val_share:g} of each training list, by grade, is the validation part",
            seed=seed,
        )
    assert writer.manifest is not None
    return Made(writer.manifest, skipped)


UNITS = {
    "histology": "log-probabilities and hazards",
    "omics": "copy number -2..2, mutated 0/1, RNA-seq z-score",
    "omics_cnv": "copy number -2..2",
    "omics_mut": "mutated 0/1",
    "omics_rnaseq": "z-score",
}


def _by_patient(raw: Path, name: str, columns: list[str]) -> dict[str, dict[str, str]]:
    path = raw_file(raw, name, FOLDER)
    rows: dict[str, dict[str, str]] = {}
    for row in read_table(path, ["patient_id", *columns]):
        if row["patient_id"] in rows:
            raise DataError(f"patient {row['patient_id']!r} is listed twice in {str(path)!r}; leave one row")
        rows[row["patient_id"]] = row
    return rows


def _columns(omics: dict[str, dict[str, str]], histology: dict[str, dict[str, str]], raw: Path) -> dict[str, list[str]]:
    """Columns of each modality, in the order of the files."""
    header = list(next(iter(omics.values())))
    parts = {f"omics_{part}": [column for column in header if column.endswith(f"_{part}")] for part in OMICS_PARTS}
    empty = [name for name, columns in parts.items() if not columns]
    if empty:
        raise DataError(
            f"{str(raw / 'omics.csv.gz')!r} has no columns for {', '.join(empty)}; expected names such as IDH1_mut"
        )
    outputs = [column for column in next(iter(histology.values())) if column not in ("patient_id", "n_test_folds")]
    return {"omics": [column for columns in parts.values() for column in columns], **parts, "histology": outputs}


def _choose(
    patients: dict[str, dict[str, str]],
    omics: dict[str, dict[str, str]],
    histology: dict[str, dict[str, str]],
    splits: dict[str, dict[str, str]],
    skipped: Skipped,
    paired_only: bool,
) -> list[str]:
    chosen: list[str] = []
    for patient in sorted(patients):
        if patient not in splits:
            skipped.add("in no published split, so never trained on or tested", patient)
        elif patient not in histology:
            skipped.add("no histology outputs: never a test case of the published networks", patient)
        elif paired_only and patient not in omics:
            skipped.add("no omics (--paired-only)", patient)
        else:
            chosen.append(patient)
    return chosen


def _grade(text: str, patient: str) -> int | None:
    if text and text not in GRADES:
        raise DataError(
            f"grade of patient {patient!r} is {text!r}, expected {', '.join(GRADES)} or a blank; mend patients.csv"
        )
    return GRADES[text] if text else None


def _fold(
    column: str,
    fold: int,
    splits: dict[str, dict[str, str]],
    label_of: dict[str, int | None],
    val_share: float,
    seed: int,
) -> Fold:
    of_split: dict[str, list[str]] = {"train": [], "test": []}
    for patient in label_of:
        split = splits[patient][column]
        if split not in of_split:
            raise DataError(f"{column} of patient {patient!r} is {split!r}, expected train or test; mend splits15.csv")
        of_split[split].append(patient)
    graded = {patient: label for patient in of_split["train"] if (label := label_of[patient]) is not None}
    train, val = hold_out(graded, val_share, seed=(seed, fold))
    unlabelled = [patient for patient in of_split["train"] if label_of[patient] is None]
    # who has no grade cannot be scored, and being of the test list may not be trained on either
    return Fold(
        train=sorted(train + unlabelled),
        val=val,
        test=sorted(patient for patient in of_split["test"] if label_of[patient] is not None),
    )


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, raw=f"folder of {FOLDER}")
    parser.add_argument("--paired-only", action="store_true", help="leave out patients without omics")
    parser.add_argument(
        "--val-share", type=float, default=VAL_SHARE, help=f"of each training list (default {VAL_SHARE})"
    )
    return run(_make, parser, argv)


def _make(options: argparse.Namespace) -> Made:
    return make(
        options.raw, options.out, paired_only=options.paired_only, val_share=options.val_share, seed=options.seed
    )


if __name__ == "__main__":
    sys.exit(main())
