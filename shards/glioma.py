"""Gliomas in the PathomicFusion layout: slide regions and genomics, WHO grade II, III or IV.

--raw DIR is the folder data/TCGA_GBMLGG:
  all_st/               regions of interest (ROI), 1024 px: TCGA-06-0174-01Z-00-DX3.<uuid>_1.png; .jpg is taken too
  all_st_patches_512/   for --level patches: 9 patches of each, 512 px; the name is the ROI's, `_` and anything
  all_dataset.csv       genomics: all columns but the patient's and those listed as metadata below are `omic`
  grade_data.csv        Grade (2, 3, 4 or II, III, IV) and Molecular subtype
  pnas_splits.csv       patient and one column a fold with Train or Test; not needed with --folds
Columns are found by these names, whatever the case, spaces or underscores:
  patient   TCGA ID, patient_id, patient, bcr_patient_barcode, case_id, or the first column if it has no name
  grade     Grade, histologic grade, WHO grade, neoplasm_histologic_grade
  subtype   Molecular subtype, IDH/codel subtype, IDH.codel.subtype
  --level roi      a sample is a ROI (`path`, 1024 px: evaluation crops the centre)
  --level patches  a sample is a patch (`path`, 512 px); its group is the ROI, so that scores can be joined
Images are stored as they are: PNG where any is a PNG, JPEG where all are; what is no 8-bit RGB is converted.
`omic` is the patient's row. Blank cells stay missing values; a patient without a row lacks the modality. Patients
without grade or molecular subtype are left out, as published; --keep-incomplete keeps them, and trains without a label
on those that have no grade.
The folds are the published splits, a part of each training list held out by patient for validation, or --folds N.
Terms of the data: TCGA open access; as prepared by PathomicFusion: GPL-3.0, non-commercial academic use.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.manifest import Description, Fold, Modality
from distkd.data.raw.image_file import read_square
from distkd.data.raw.recipe import Made, Skipped, arguments, number, raw_file, read_table, run, tables_digest
from distkd.data.splits import hold_out, patient_folds
from distkd.data.write import Encoded, Sample, ShardWriter
from distkd.errors import ConfigError, DataError

NEEDS_RAW = True
FOLDER = "PathomicFusion's glioma data (all_st/, all_dataset.csv, grade_data.csv, pnas_splits.csv)"
CLASS_NAMES = ["II", "III", "IV"]
GRADES = {"2": 0, "ii": 0, "3": 1, "iii": 1, "4": 2, "iv": 2}
VAL_SHARE = 0.15
N_OMICS = 80
SIZES = {"roi": 1024, "patches": 512}
ALIASES = {
    "patient": ("tcga id", "patient id", "patient", "bcr patient barcode", "case id", ""),
    "grade": ("grade", "histologic grade", "who grade", "neoplasm histologic grade"),
    "subtype": ("molecular subtype", "idh/codel subtype", "idh codel subtype"),
}
"""Names of a column, plain as `_plain` makes them."""
METADATA = {
    r"(.* )?grade": "it is the label",
    r"histology|histological type|histomolecular subtype|oncotree code": "the diagnosis, which the grade is a part of",
    r"(molecular|idh[ /]codel) subtype": "sums up IDH mutation and codeletion, which are in omic",
    r"(overall )?survival.*|os( .*)?|time to.*|.*follow up.*|censored|event|vital status|days to.*": (
        "the outcome, known only after the grade"
    ),
    r"age( .*)?|gender|sex|race|ethnicity": "a clinical fact that neither the slide nor the omics hold",
    r"index(es)?|unnamed.*|": "the number of a row",
}
"""Columns that are no omics, as patterns of the whole plain name, and why."""
UNIT = "copy number; 1 mutated or codeleted, 0 not"
_BARCODE = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?![A-Z0-9])", re.IGNORECASE)
_Image: TypeAlias = tuple[str, str, Path]
"""Group, patient and file of a sample."""


@dataclass(frozen=True)
class Options:
    """What is made."""

    level: Literal["roi", "patches"] = "roi"
    size: int | None = None
    """Side of the images in pixels; None: 1024 of a region, 512 of a patch."""
    folds: int | None = None
    """Folds of our own; None: the published ones."""
    keep_incomplete: bool = False
    val_share: float = VAL_SHARE
    omics: int = N_OMICS
    exclude: tuple[str, ...] = ()
    """Further columns of all_dataset.csv that are no omics."""


@dataclass
class _Patient:
    label: int | None
    omic: np.ndarray | None = None


@dataclass(frozen=True)
class _Table:
    path: Path
    rows: list[dict[str, str]]

    @property
    def header(self) -> list[str]:
        return list(self.rows[0])

    def column(self, what: str) -> str:
        """The name under which this table has it."""
        of_plain = {_plain(name): name for name in reversed(self.header)}
        for alias in ALIASES[what]:
            if alias in of_plain and (alias or of_plain[alias] == self.header[0]):
                return of_plain[alias]
        raise DataError(
            f"{str(self.path)!r} has no column for the {what}; looked for {', '.join(filter(None, ALIASES[what]))}; "
            f"it has {', '.join(map(repr, self.header))}; rename one"
        )

    def by_patient(self) -> dict[str, dict[str, str]]:
        column = self.column("patient")
        found: dict[str, dict[str, str]] = {}
        for row in self.rows:
            patient = _barcode(row[column])
            if patient is None:
                where = f"{column!r} in {str(self.path)!r} is {row[column]!r}"
                raise DataError(f"{where}, expected a barcode such as TCGA-06-0174; mend the table")
            if patient in found:
                raise DataError(f"patient {patient!r} is listed twice in {str(self.path)!r}; leave one row")
            found[patient] = row
        return found


def make(raw: Path | None, out: Path, *, options: Options | None = None, seed: int = 0) -> Made:
    """Shard set of the regions, or of their patches."""
    if raw is None:
        raise DataError(f"no raw data; name with --raw the folder of {FOLDER}")
    options = options or Options()
    _check(options)
    skipped = Skipped()
    hint = ", or ask for folds of your own with --folds 5"
    grades, omics = _table(raw, "grade_data.csv"), _table(raw, "all_dataset.csv")
    splits = _table(raw, "pnas_splits.csv", hint) if options.folds is None else None
    columns = _omic_columns(omics, options)
    images = _images(raw, options.level, skipped)
    patients = _patients(grades, splits, images, options, skipped)
    images = [image for image in images if image[1] in patients]
    _add_omics(patients, omics, columns)
    if not images:
        raise DataError(f"no image of {str(raw)!r} is of a patient to use; {'; '.join(skipped.lines())}")
    folds, rule = _folds(patients, splits, options, seed)
    side = options.size or SIZES[options.level]
    codec = "jpg" if all(path.suffix.lower() != ".png" for _, _, path in images) else "png"
    image = Modality(kind="image", dtype="uint8", shape=(side, side, 3), codec=codec, unit="sRGB")
    omic = Modality(kind="vector", dtype="float32", shape=(len(columns),), codec="npy", unit=UNIT, features=columns)
    description = Description(
        task="glioma_grade",
        class_names=CLASS_NAMES,
        modalities={"path": image, "omic": omic},
        excluded=_excluded([grades, omics], columns, options),
        source="TCGA-GBM and TCGA-LGG as prepared for Pathomic Fusion (Chen 2020); its splits: Mobadersany 2018",
        licence="TCGA open access; as prepared: GPL-3.0, non-commercial academic use; not to be shipped",
    )
    items = ((_key(one[2].stem), partial(_load, one, patients[one[1]], image)) for one in images)
    tables = tables_digest(*(table.path for table in (grades, omics, splits) if table))
    with ShardWriter(out, description, options=f"{options}, seed {seed}, tables {tables}") as writer:
        writer.split(folds, rule=rule, seed=seed)
        writer.add_all(items, total=len(images), label="images")
    assert writer.manifest is not None
    return Made(writer.manifest, skipped)


def _check(options: Options) -> None:
    for name, value, least in (("size", options.size, 1), ("omics", options.omics, 1), ("folds", options.folds, 2)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}, expected at least {least}")
    if not 0 <= options.val_share < 1:
        raise ConfigError(f"--val-share is {options.val_share:g}, expected 0 <= share < 1")


def _plain(name: str) -> str:
    """Lower case, words apart by one space; a byte order mark is none of the name."""
    return " ".join(re.split(r"[\s_.-]+", name.removeprefix("\ufeff").strip().lower())).strip()


def _table(raw: Path, name: str, hint: str = "") -> _Table:
    path = raw_file(raw, name, FOLDER + hint)
    return _Table(path, read_table(path, []))


def _barcode(text: str) -> str | None:
    match = _BARCODE.match(text.strip())
    return match[1].upper() if match else None


def _missing(text: str) -> bool:
    return text.strip().lower() in ("", "nan", "na", "n/a", "none", "missing")


def _key(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)


def _why_no_omic(column: str, options: Options) -> str | None:
    if _plain(column) in {_plain(name) for name in options.exclude}:
        return "named with --exclude"
    return next((why for pattern, why in METADATA.items() if re.fullmatch(pattern, _plain(column))), None)


def _omic_columns(table: _Table, options: Options) -> list[str]:
    strangers = [name for name in options.exclude if _plain(name) not in map(_plain, table.header)]
    if strangers:
        which = f"{', '.join(map(repr, strangers))}, which {str(table.path)!r} has not"
        raise DataError(f"--exclude names {which}; it has {', '.join(map(repr, table.header))}")
    patient = table.column("patient")
    columns = [name for name in table.header if name != patient and _why_no_omic(name, options) is None]
    if len(columns) != options.omics:  # a column too many may be a fact that gives the label away
        raise DataError(
            f"{str(table.path)!r} has {len(columns)} columns of omics, expected {options.omics}: "
            f"{', '.join(map(repr, columns))}; name those that are none with --exclude, or the true number with --omics"
        )
    return columns


def _excluded(tables: list[_Table], columns: list[str], options: Options) -> dict[str, str]:
    return {
        name: _why_no_omic(name, options) or "not an input of the published task"
        for table in tables
        for name in table.header
        if name not in (table.column("patient"), *columns)
    }


def _patients(
    grades: _Table, splits: _Table | None, images: list[_Image], options: Options, skipped: Skipped
) -> dict[str, _Patient]:
    """Those of the grade table who take part, sorted."""
    grade, subtype = grades.column("grade"), grades.column("subtype")
    known, listed = grades.by_patient(), splits.by_patient() if splits else None
    for _, patient, path in images:
        if patient not in known:
            skipped.add("image of a patient who is not in grade_data.csv", path.name)
    pictured = {patient for _, patient, _ in images}
    found: dict[str, _Patient] = {}
    for patient, row in sorted(known.items()):
        label = _label(row[grade], patient, grades.path)
        if patient not in pictured:
            skipped.add("patient without an image", patient)
        elif listed is not None and patient not in listed:
            skipped.add("patient in no published split", patient)
        elif label is None and not options.keep_incomplete:
            skipped.add("patient without a grade", patient)
        elif _missing(row[subtype]) and not options.keep_incomplete:
            skipped.add("patient without a molecular subtype", patient)
        else:
            found[patient] = _Patient(label)
    return found


def _label(text: str, patient: str, path: Path) -> int | None:
    if _missing(text):
        return None
    grade = _plain(re.sub(r"\.0+$", "", text.strip())).removeprefix("grade ").removeprefix("g")
    if grade not in GRADES:
        raise DataError(f"grade of patient {patient!r} is {text!r} in {str(path)!r}, expected 2, 3, 4 or a blank")
    return GRADES[grade]


def _add_omics(patients: dict[str, _Patient], table: _Table, columns: list[str]) -> None:
    rows = table.by_patient()
    for patient, about in patients.items():
        cells = {column: rows[patient][column] for column in columns if patient in rows}
        where = f"of patient {patient!r} in {str(table.path)!r}"
        omic = [number("" if _missing(cell) else cell, f"{column!r} {where}") for column, cell in cells.items()]
        if not np.isnan(omic).all():
            about.omic = np.array(omic, dtype=np.float32)


def _images(raw: Path, level: str, skipped: Skipped) -> list[_Image]:
    """Of each sample, sorted by file name."""
    regions = {path.stem: (_key(path.stem), patient, path) for patient, path in _files(raw, "all_st", skipped)}
    if level == "roi":
        return list(regions.values())
    found: list[_Image] = []
    with_patch: set[str] = set()
    for patient, path in _files(raw, "all_st_patches_512", skipped):
        region = path.stem.rpartition("_")[0]
        while region and region not in regions:  # the longest name that is a region's
            region = region.rpartition("_")[0]
        if region:
            with_patch.add(region)
            found.append((_key(region), patient, path))
        else:
            skipped.add("patch of no region in all_st/", path.name)
    for region in regions:
        if region not in with_patch:
            skipped.add("region without a patch", region)
    return found


def _files(raw: Path, folder: str, skipped: Skipped) -> list[tuple[str, Path]]:
    """(patient, image), sorted by file name."""
    if not (raw / folder).is_dir():
        raise DataError(f"raw data {str(raw)!r} has no folder {folder!r}; name with --raw the folder of {FOLDER}")
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(path for path in (raw / folder).iterdir() if not path.name.startswith(".")):
        patient = _barcode(path.name)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            skipped.add(f"no image in {folder}/", path.name)
        elif patient is None:
            skipped.add("file name that does not start with a TCGA barcode", path.name)
        elif path.stem in found:
            both = f"{found[path.stem][1].name!r} and {path.name!r}"
            raise DataError(f"{folder}/ has {both}, expected one file of a name; remove one")
        else:
            found[path.stem] = (patient, path)
    return list(found.values())


def _load(image: _Image, about: _Patient, modality: Modality) -> Sample:
    group, patient, path = image
    arrays: dict[str, np.ndarray | Encoded] = {"path": read_square(path, modality)}
    if about.omic is not None:
        arrays["omic"] = about.omic
    return Sample(arrays, patient=patient, label=about.label, group=group)


def _folds(patients: dict[str, _Patient], splits: _Table | None, options: Options, seed: int) -> tuple[list[Fold], str]:
    share = options.val_share
    if splits is None:
        assert options.folds is not None
        labels = [UNLABELLED if about.label is None else about.label for about in patients.values()]
        rule = f"{options.folds} folds by patient, stratified by grade; {share:g} of the rest for validation"
        return patient_folds(list(patients), labels, n_folds=options.folds, val_share=share, seed=seed), rule
    numbered = {name: re.search(r"(\d+)$", _plain(name)) for name in splits.header if name != splits.column("patient")}
    columns = sorted((int(match[1]), name) for name, match in numbered.items() if match)
    if not columns:
        raise DataError(
            f"{str(splits.path)!r} has no column for a split; expected names such as 'Randomization - 1'; it has "
            f"{', '.join(map(repr, splits.header))}"
        )
    rows = splits.by_patient()
    folds = [_fold(name, fold, rows, patients, share, seed) for fold, name in columns]
    return folds, f"the {len(folds)} published splits; {share:g} of each training list, by grade, for validation"


def _fold(
    column: str, fold: int, rows: dict[str, dict[str, str]], patients: dict[str, _Patient], share: float, seed: int
) -> Fold:
    of_split: dict[str, list[str]] = {"train": [], "test": []}
    for patient in patients:
        split = rows[patient][column].strip().lower()
        if split not in of_split:
            where = f"{column!r} of patient {patient!r} in pnas_splits.csv"
            raise DataError(f"{where} is {rows[patient][column]!r}, expected Train or Test; mend the table")
        of_split[split].append(patient)
    graded = {patient: label for patient in of_split["train"] if (label := patients[patient].label) is not None}
    train, val = hold_out(graded, share, seed=(seed, fold))
    # who has no grade cannot be scored, and being of the test list may not be trained on either
    return Fold(
        train=sorted(train + [patient for patient in of_split["train"] if patients[patient].label is None]),
        val=val,
        test=sorted(patient for patient in of_split["test"] if patients[patient].label is not None),
    )


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, raw=f"folder of {FOLDER}")
    add = parser.add_argument
    add("--level", choices=list(SIZES), default="roi", help="what a sample is (default roi)")
    add("--size", type=int, metavar="PX", help="side of the images (default 1024, patches 512)")
    add("--folds", type=int, metavar="N", help="folds of our own instead of the published splits")
    add("--keep-incomplete", action="store_true", help="keep patients without grade or molecular subtype")
    add("--val-share", type=float, default=VAL_SHARE, help=f"of what is trained on (default {VAL_SHARE})")
    add("--omics", type=int, default=N_OMICS, metavar="N", help=f"columns of omics (default {N_OMICS})")
    add("--exclude", nargs="+", default=[], metavar="COLUMN", help="columns of all_dataset.csv that are no omics")
    return run(_make, parser, argv)


def _make(options: argparse.Namespace) -> Made:
    options.exclude = tuple(options.exclude)
    chosen = {name: value for name, value in vars(options).items() if name in Options.__dataclass_fields__}
    return make(options.raw, options.out, options=Options(**chosen), seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
