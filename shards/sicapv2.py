"""SICAPv2 prostate biopsies: 512-px patches, Gleason grade: benign (NC), G3, G4, G5.

--raw DIR is the folder of the release:
  images/                                    the patches, <slide>_Block_Region_..._xini_6803_yini_59786.jpg
  partition/Test/Test.xlsx                   the test patches
  partition/Validation/Val1..Val4/Train.xlsx and Test.xlsx   what is trained on, and the validation part, of each fold
Each sheet has the columns image_name and NC, G3, G4, G5, of which exactly one is 1; G4C (cribriform growth, a part of
G4) is no label here and is left out, as are masks/ and wsi_labels.xlsx.
The one modality is `patch`. JPEGs of the right size are stored as they are, once, at 512 px: the coarse views of a
student that sees less are made when they are read (`data.degraded`).
Fold k - 1 is Valk: its Train.xlsx to train on, its Test.xlsx for validation, Test/Test.xlsx for the test. The patient
of a patch is the part of its name before _Block_, the slide; the release splits by patient, and that no slide is in two
splits of a fold is checked before any image is read.
Left out and counted: images in no sheet, and images of a sheet that are not there, if these are 1 % at most.
Terms of the data: those of its page, Mendeley Data 10.17632/9xxm58dvs3; cite Silva-Rodriguez et al. 2020.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from distkd.data.manifest import Description, Fold, Modality
from distkd.data.raw.image_file import read_square
from distkd.data.raw.recipe import Made, Skipped, arguments, raw_file, run, tables_digest
from distkd.data.write import Sample, ShardWriter
from distkd.errors import ConfigError, DataError

NEEDS_RAW = True
FOLDER = "SICAPv2 (images/ and partition/)"
CLASS_NAMES = ["NC", "G3", "G4", "G5"]
SIZE = 512
TEST = "partition/Test/Test.xlsx"
N_FOLDS = 4
MISSING_SHARE = 0.01
"""Of the images that the sheets name; more missing than that is a copy that was not finished."""


def make(raw: Path | None, out: Path, *, size: int = SIZE) -> Made:
    """Shard set of the labelled patches of `size` pixels."""
    if raw is None:
        raise DataError(f"no raw data; name with --raw the folder of {FOLDER}")
    if size < 1:
        raise ConfigError(f"--size is {size}, expected at least 1 pixel")
    sheets = _sheets(raw)
    label_of: dict[str, int] = {}
    for name, rows in sheets.items():
        for image, label in rows.items():
            if label_of.setdefault(image, label) != label:
                raise DataError(
                    f"{image!r} is {CLASS_NAMES[label]} in {name!r} and {CLASS_NAMES[label_of[image]]} in a sheet "
                    "before it, expected one class; mend the sheets"
                )
    skipped = Skipped()
    files = _present(raw, label_of, skipped)
    folds = [_fold(fold, sheets, files) for fold in range(N_FOLDS)]
    patch = Modality(kind="image", dtype="uint8", shape=(size, size, 3), codec="jpg", unit="sRGB")
    description = Description(
        task="gleason_grade",
        class_names=CLASS_NAMES,
        modalities={"patch": patch},
        excluded={
            "G4C": "cribriform growth is a part of G4: it tells the label",
            "masks": "the annotation that the label was taken from",
            "wsi_labels": "the grade of the whole biopsy, from which the label of its patches follows in part",
        },
        source="SICAPv2 (Silva-Rodriguez et al. 2020), Mendeley Data 10.17632/9xxm58dvs3",
        licence="that of its page on Mendeley Data; not to be shipped",
    )
    tables = tables_digest(*(raw / name for name in sheets))
    with ShardWriter(out, description, options=f"size {size}, tables {tables}") as writer:
        writer.split(
            folds, rule=f"the {N_FOLDS} published validation splits and the one published test split", seed=None
        )
        writer.add_all(_items(files, label_of, patch), total=len(files), label="patches")
    assert writer.manifest is not None
    return Made(writer.manifest, skipped)


def _sheet_of(fold: int, name: str) -> str:
    return f"partition/Validation/Val{fold + 1}/{name}.xlsx"


def _sheets(raw: Path) -> dict[str, dict[str, int]]:
    """Class by image of each sheet."""
    names = [TEST, *(_sheet_of(fold, name) for fold in range(N_FOLDS) for name in ("Train", "Test"))]
    paths = [raw_file(raw, name, FOLDER) for name in names]
    return {name: _read_sheet(path) for name, path in zip(names, paths, strict=True)}


def _read_sheet(path: Path) -> dict[str, int]:
    rows = _rows(path)
    header = [str(cell).strip() for cell in rows[0]] if rows else []
    absent = [name for name in ("image_name", *CLASS_NAMES) if name not in header]
    if absent:
        raise DataError(f"{str(path)!r} has no column {', '.join(absent)}; it has {', '.join(header) or 'none'}")
    found: dict[str, int] = {}
    for number, cells in enumerate(rows[1:], start=2):
        if all(cell is None for cell in cells):
            continue  # spreadsheets often end with empty rows
        row = dict(zip(header, cells, strict=True))
        image = str(row["image_name"] or "").strip()
        flags = [row[name] for name in CLASS_NAMES]
        if not image or any(flag not in (0, 1) for flag in flags) or flags.count(1) != 1:
            raise DataError(
                f"{str(path)!r} row {number}: {image!r} has {', '.join(map(str, flags))} for {', '.join(CLASS_NAMES)}, "
                "expected a name, one 1 and else 0; mend the sheet"
            )
        image = image if Path(image).suffix else f"{image}.jpg"
        if image in found:
            raise DataError(f"{str(path)!r} row {number}: {image!r} is listed twice; leave one row")
        found[image] = flags.index(1)
    if not found:
        raise DataError(f"{str(path)!r} has no rows; copy it again")
    return found


def _rows(path: Path) -> list[tuple[Any, ...]]:
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of styles, which are not read
            book = load_workbook(path, read_only=True, data_only=True)
            try:
                sheet = book.worksheets[0]
                sheet.reset_dimensions()  # the size that the file states may be wrong
                return list(sheet.iter_rows(values_only=True))
            finally:
                book.close()
    except (OSError, ValueError, KeyError, IndexError, SyntaxError, zipfile.BadZipFile, InvalidFileException) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}; copy it again") from error


def _present(raw: Path, label_of: dict[str, int], skipped: Skipped) -> dict[str, Path]:
    """The labelled images that are there, sorted."""
    folder = raw / "images"
    if not folder.is_dir():
        raise DataError(f"raw data {str(raw)!r} has no folder 'images'; name with --raw the folder of {FOLDER}")
    there = {path.name: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    absent = sorted(set(label_of) - set(there))
    if len(absent) > MISSING_SHARE * len(label_of):
        raise DataError(
            f"{str(folder)!r} lacks {len(absent)} of the {len(label_of)} images that the sheets name, such as "
            f"{', '.join(absent[:3])}; expected {MISSING_SHARE:.0%} at most: copy the release again"
        )
    for name in absent:
        skipped.add("image of a sheet that is not there", name)
    for name in there:
        if name not in label_of:
            skipped.add("image in no sheet", name)
    return {name: there[name] for name in sorted(label_of) if name in there}


def _slide(image: str) -> str:
    slide, mark, _ = image.partition("_Block_")
    if not mark or not slide:
        raise DataError(
            f"image name {image!r} does not tell the slide; expected <slide>_Block_<region>...; mend the sheets"
        )
    return slide


def _fold(fold: int, sheets: dict[str, dict[str, int]], files: dict[str, Path]) -> Fold:
    of_split = {"train": _sheet_of(fold, "Train"), "val": _sheet_of(fold, "Test"), "test": TEST}
    slides = {split: {_slide(image) for image in sheets[name] if image in files} for split, name in of_split.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted(slides[one] & slides[other])
        if both:
            raise DataError(
                f"slide {both[0]!r} is in {of_split[one]!r} and in {of_split[other]!r}, {len(both)} such slides in "
                f"fold {fold}, expected each in one split; mend the sheets"
            )
    return Fold(**{split: sorted(names) for split, names in slides.items()})


def _items(
    files: dict[str, Path], label_of: dict[str, int], modality: Modality
) -> Iterator[tuple[str, partial[Sample]]]:
    for name, path in files.items():
        yield re.sub(r"[^A-Za-z0-9_-]", "_", path.stem), partial(_load, path, label_of[name], modality)


def _load(path: Path, label: int, modality: Modality) -> Sample:
    return Sample({"patch": read_square(path, modality)}, patient=_slide(path.name), label=label)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, raw=f"folder of {FOLDER}")
    parser.add_argument("--size", type=int, default=SIZE, metavar="PX", help=f"side that patches have (default {SIZE})")
    return run(_make, parser, argv)


def _make(options: argparse.Namespace) -> Made:
    return make(options.raw, options.out, size=options.size)


if __name__ == "__main__":
    sys.exit(main())
