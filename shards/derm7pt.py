"""Derm7pt skin lesions: dermoscopic and clinical image, patient's facts, seven-point checklist; five diagnoses.

--raw DIR is the folder release_v0:
  images/                    the pictures that meta.csv names in its columns derm and clinic
  meta/meta.csv              one row a case
  meta/train_indexes.csv, valid_indexes.csv, test_indexes.csv   column `indexes`: numbers of rows of meta.csv, from 0
A sample is a case. Its label is the diagnosis, in the five groups of Kawahara et al. 2019: BCC, NEV, MEL, MISC, SK.
  derm, clinic   images, JPEG: scaled so that the short side is --size, then the middle cut out (--fit crop, the
                 default), or so that the long side is --size, on black (--fit pad); what is of that size is stored as
                 it is, and the rest is encoded again (quality 95)
  meta           one-hot elevation, location and sex: what a clinic knows beside the pictures
  checklist      one-hot seven criteria, which experts judged on the pictures: privileged, none of a student's inputs
The categories are those of the whole table, sorted, each a named feature; a blank cell is a missing value in all of its
features. A case without a picture lacks that modality.
The one fold is the published split: 413, 203 and 395 of 1,011 cases. Each case counts as a patient, since the release
does not say which cases are of one person. Cases in none of the three lists are left out and counted.
Terms of the data: those of its site (derm.cs.sfu.ca), where it is to be asked for; cite Kawahara et al. 2019.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from distkd.data.codec import IMAGE_FAULTS
from distkd.data.manifest import Description, Fold, Modality
from distkd.data.raw.recipe import Made, Skipped, arguments, raw_file, read_table, run, tables_digest
from distkd.data.write import Encoded, Sample, ShardWriter
from distkd.errors import ConfigError, DataError

NEEDS_RAW = True
FOLDER = "derm7pt release_v0 (images/ and meta/)"
GROUPS = {
    "BCC": ("basal cell carcinoma",),
    "NEV": (
        "blue nevus",
        "clark nevus",
        "combined nevus",
        "congenital nevus",
        "dermal nevus",
        "recurrent nevus",
        "reed or spitz nevus",
    ),
    "MEL": (
        "melanoma",
        "melanoma (in situ)",
        "melanoma (less than 0.76 mm)",
        "melanoma (0.76 to 1.5 mm)",
        "melanoma (more than 1.5 mm)",
        "melanoma metastasis",
    ),
    "MISC": ("dermatofibroma", "lentigo", "melanosis", "miscellaneous", "vascular lesion"),
    "SK": ("seborrheic keratosis",),
}
CLASS_NAMES = list(GROUPS)
LABELS = {diagnosis: label for label, names in enumerate(GROUPS.values()) for diagnosis in names}
VECTORS = {
    "meta": ("elevation", "location", "sex"),
    "checklist": (
        "pigment_network",
        "streaks",
        "pigmentation",
        "regression_structures",
        "dots_and_globules",
        "blue_whitish_veil",
        "vascular_structures",
    ),
}
PICTURES = ("derm", "clinic")
EXCLUDED = {
    "diagnosis": "it is the label",
    "seven_point_score": "the points of the checklist added up, a verdict on melanoma that says nothing beyond them",
    "management": "decided upon the diagnosis, so it tells the label",
    "level_of_diagnostic_difficulty": "rated by experts who knew the diagnosis",
    "notes": "free text that may name the diagnosis",
    "case_id": "a name, not a finding",
}
LISTS = {"train": "meta/train_indexes.csv", "val": "meta/valid_indexes.csv", "test": "meta/test_indexes.csv"}
SIZE = 512
Fit: TypeAlias = Literal["crop", "pad"]


def make(raw: Path | None, out: Path, *, size: int = SIZE, fit: Fit = "crop") -> Made:
    """Shard set of the cases, images of `size` pixels."""
    if raw is None:
        raise DataError(f"no raw data; name with --raw the folder of {FOLDER}")
    if size < 1:
        raise ConfigError(f"--size is {size}, expected at least 1 pixel")
    columns = ["case_num", "diagnosis", *PICTURES, *(name for names in VECTORS.values() for name in names)]
    rows = read_table(raw_file(raw, "meta/meta.csv", FOLDER), columns)
    cases = _cases(rows)
    split_of = _splits(raw, list(cases))
    skipped = Skipped()
    for case in cases:
        if case not in split_of:
            skipped.add("case in none of the three lists", case)
    chosen = {case: row for case, row in sorted(cases.items()) if case in split_of}
    label_of = {case: _label(row, case) for case, row in chosen.items()}
    pictures = _pictures(raw, chosen)
    picture = Modality(kind="image", dtype="uint8", shape=(size, size, 3), codec="jpg", unit="sRGB")
    features = {name: _features(rows, columns) for name, columns in VECTORS.items()}
    description = Description(
        task="skin_lesion",
        class_names=CLASS_NAMES,
        modalities={
            **dict.fromkeys(PICTURES, picture),
            **{
                name: Modality(
                    kind="vector",
                    dtype="float32",
                    shape=(len(pairs),),
                    codec="npy",
                    unit="one-hot",
                    features=[f"{column}={value}" for column, value in pairs],
                )
                for name, pairs in features.items()
            },
        },
        excluded=EXCLUDED,
        source="derm7pt release_v0 (Kawahara et al. 2019), derm.cs.sfu.ca",
        licence="the terms of derm.cs.sfu.ca; not to be shipped",
    )
    fold = Fold(**{split: sorted(case for case in chosen if split_of[case] == split) for split in LISTS})
    tables = tables_digest(raw / "meta/meta.csv", *(raw / name for name in LISTS.values()))
    with ShardWriter(out, description, options=f"fit {fit}, tables {tables}") as writer:
        writer.split([fold], rule="the published split; each case counts as a patient", seed=None)
        items = _items(chosen, label_of, pictures, features, picture, fit)
        writer.add_all(items, total=len(chosen), label="cases")
    assert writer.manifest is not None
    return Made(writer.manifest, skipped)


def _cases(rows: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Rows by the name of the case, in the order of the table, to which the lists refer."""
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows):
        text = row["case_num"].strip()
        if not (text.isascii() and text.isdigit()):
            raise DataError(f"row {number} of meta.csv has case_num {text!r}, expected a number; mend meta.csv")
        case = f"case-{int(text):04d}"
        if case in found:
            raise DataError(f"row {number} of meta.csv repeats case_num {text}; leave one row for each case")
        found[case] = row
    return found


def _splits(raw: Path, cases: list[str]) -> dict[str, str]:
    """Split by case; a case in two lists would be trained on and tested on."""
    found: dict[str, str] = {}
    for split, name in LISTS.items():
        for row in read_table(raw_file(raw, name, FOLDER), ["indexes"]):
            text = row["indexes"].strip()
            if not (text.isascii() and text.isdigit()) or int(text) >= len(cases):
                raise DataError(
                    f"{name} lists row {text!r}, meta.csv has rows 0 to {len(cases) - 1}; copy both files again"
                )
            case = cases[int(text)]
            if case in found:
                where = f"{found[case]} and {split}" if found[case] != split else f"{split} twice"
                raise DataError(
                    f"patient {case!r}, row {text} of meta.csv, is in {where} ({LISTS[found[case]]}, {name}), expected "
                    "in one list, once; mend the lists"
                )
            found[case] = split
    return found


def _label(row: Mapping[str, str], case: str) -> int:
    diagnosis = " ".join(row["diagnosis"].lower().split())
    if diagnosis not in LABELS:
        raise DataError(
            f"diagnosis of {case!r} in meta.csv is {row['diagnosis']!r}, expected one of {', '.join(sorted(LABELS))}; "
            "mend meta.csv"
        )
    return LABELS[diagnosis]


def _pictures(raw: Path, cases: Mapping[str, dict[str, str]]) -> dict[str, dict[str, Path]]:
    """Files by modality and case; names are found whatever their case, as on the systems the release was made on."""
    folder = raw / "images"
    if not folder.is_dir():
        raise DataError(f"raw data {str(raw)!r} has no folder 'images'; name with --raw the folder of {FOLDER}")
    there = {path.relative_to(folder).as_posix().lower(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    named = {name: {case: row[name].strip() for case, row in cases.items()} for name in PICTURES}
    absent = [file for files in named.values() for file in files.values() if file and file.lower() not in there]
    if absent:
        raise DataError(
            f"{str(folder)!r} lacks {len(absent)} pictures that meta.csv names: {', '.join(sorted(absent)[:3])}"
            f"{', ...' if len(absent) > 3 else ''}; copy the release again"
        )
    return {name: {case: there[file.lower()] for case, file in files.items() if file} for name, files in named.items()}


def _features(rows: list[dict[str, str]], columns: tuple[str, ...]) -> list[tuple[str, str]]:
    """(column, category) of each feature."""
    found = [(column, value) for column in columns for value in sorted({_category(row[column]) for row in rows} - {""})]
    if not found:
        raise DataError(f"columns {', '.join(columns)} of meta.csv are blank in all rows; copy it again")
    return found


def _category(text: str) -> str:
    return " ".join(text.lower().split())


def _one_hot(row: Mapping[str, str], features: list[tuple[str, str]]) -> np.ndarray:
    cells = [(_category(row[column]), value) for column, value in features]
    return np.array([float(cell == value) if cell else np.nan for cell, value in cells], dtype=np.float32)


def _items(
    cases: Mapping[str, dict[str, str]],
    label_of: Mapping[str, int],
    pictures: Mapping[str, Mapping[str, Path]],
    features: Mapping[str, list[tuple[str, str]]],
    modality: Modality,
    fit: Fit,
) -> Iterator[tuple[str, partial[Sample]]]:
    for case, row in cases.items():
        vectors = {name: _one_hot(row, pairs) for name, pairs in features.items()}
        files = {name: of_case[case] for name, of_case in pictures.items() if case in of_case}
        yield case, partial(_load, case, label_of[case], vectors, files, modality, fit)


def _load(
    case: str,
    label: int,
    vectors: Mapping[str, np.ndarray],
    files: Mapping[str, Path],
    modality: Modality,
    fit: Fit,
) -> Sample:
    stored = {name: _stored(path, modality, fit) for name, path in files.items()}
    return Sample({**stored, **vectors}, patient=case, label=label)


def _stored(path: Path, modality: Modality, fit: Fit) -> np.ndarray | Encoded:
    """The file as it is where it fits the modality, its pixels in the right size otherwise."""
    size = (modality.shape[0], modality.shape[1])
    try:
        with Image.open(path) as image:
            # readers ignore the tag of how the camera was held, so only what needs no turning stays as it is
            if (image.size, image.mode, image.format) == (size, "RGB", "JPEG") and image.getexif().get(0x0112, 1) == 1:
                return Encoded(path.read_bytes())
            colour = ImageOps.exif_transpose(image).convert("RGB")
            fitted = (ImageOps.fit if fit == "crop" else ImageOps.pad)(colour, size, Image.Resampling.LANCZOS)
            return np.asarray(fitted)
    except IMAGE_FAULTS as error:
        raise DataError(f"cannot read the picture {str(path)!r}: {error}; copy it again") from error


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, raw=f"folder of {FOLDER}")
    parser.add_argument("--size", type=int, default=SIZE, metavar="PX", help=f"side of the images (default {SIZE})")
    parser.add_argument("--fit", choices=["crop", "pad"], default="crop", help="how they become square (default crop)")
    return run(_make, parser, argv)


def _make(options: argparse.Namespace) -> Made:
    return make(options.raw, options.out, size=options.size, fit=options.fit)


if __name__ == "__main__":
    sys.exit(main())
