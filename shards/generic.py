"""Your own data: one table (CSV), one row a sample, to shards.

--raw is the table, or the folder that holds it. Export it from a spreadsheet; its header says what each column is:
  patient        who the sample is of; the splits are by patient                                         needed
  label          the class, a word or a number; blank where it is unknown                                needed
  split          train, val or test; or
  fold           0, 1, 2... or 1, 2, 3...: each is tested once; without both, --folds are made by patient
  image:NAME     a png, jpg, tif or bmp file            volume:NAME    a .nii, .nii.gz or .npy file
  vector:NAME    an .npy file of numbers                target:NAME    a label map (.nii, .npy) instead of `label`
  NAME.column    a number of the vector NAME, such as clinic.age and clinic.score
  key, group     your name of the sample; a level between sample and patient, such as the lesion
A column of paths without image: or volume: is known by its files. Paths start at the table's folder; absolute ones may
point anywhere. A blank cell is a missing number, or in a column of files a missing modality; both are recorded.
Save the table as 'CSV UTF-8'. Where semicolons or tabs separate the cells, numbers may have a decimal comma.
Images and numbers become WebDataset tars, volumes a zarr group; png and jpg files are stored as they are.

In ten minutes:
  python shards/generic.py --template > table.csv        an example to fill in
  python shards/generic.py --raw table.csv --out shards --dry-run        every problem at once, nothing is written
  python shards/generic.py --raw table.csv --out shards
Terms of the data are your own; --source and --licence write them into the manifest.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.manifest import SPLITS, Description
from distkd.data.raw.recipe import Made, arguments, run
from distkd.data.raw.table import Row, TableOptions
from distkd.data.raw.table_files import load_array, load_image, load_labels, load_volume
from distkd.data.raw.table_plan import Plan, examine, space_of
from distkd.data.raw.table_problems import Problems
from distkd.data.raw.volume_parts import input_values, target_values
from distkd.data.write import Sample, ShardWriter
from distkd.errors import ConfigError, DataError
from distkd.files import digest

# Shapes: H W C of an image, C X Y Z of a volume

NEEDS_RAW = True
FOLDER = "your table (one .csv) and the files that it names, or the table itself"
TEMPLATE = """\
patient,label,split,image:photo,clinic.age,clinic.score
anna,benign,train,photos/anna-1.png,61,0.4
anna,benign,train,photos/anna-2.png,61,
ben,malignant,train,photos/ben-1.png,,0.9
carl,benign,train,photos/carl-1.png,48,0.2
dora,malignant,train,,70,0.8
eric,benign,val,photos/eric-1.png,39,0.3
fay,malignant,val,photos/fay-1.png,66,0.7
gina,benign,test,photos/gina-1.png,52,0.1
hugo,malignant,test,photos/hugo-1.png,58,0.6
"""
SHOWN = 3
"""Problems in the message of a build; --dry-run lists all."""


@dataclass(frozen=True)
class Options(TableOptions):
    """How the table is read, and what the manifest says of it."""

    task: str = "own_data"
    source: str = ""
    licence: str = "not stated"


def make(raw: Path | None, out: Path, *, options: Options | None = None, seed: int = 0) -> Made:
    """Shard set of the rows; nothing is written while the table has problems."""
    options = options or Options()
    if options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}, expected at least 1")
    problems = Problems()
    plan = examine(_table(raw), options, problems, seed=seed, every_value=False)
    if problems.count:
        shown = problems.grouped()[:SHOWN]
        more = problems.count - sum(count for _, count in shown)
        raise DataError(
            f"table {str(plan.table)!r} has {_many(problems.count, 'problem')}: {'; '.join(line for line, _ in shown)}"
            f"{f'; and {more} more' if more > 0 else ''}; list all of them with --dry-run"
        )
    for note in problems.notes:
        print(note)
    with ShardWriter(out, _description(plan, options), options=f"{digest(plan.table)} {plan.stored} {seed}") as writer:
        loaders = (
            (row.key, _loader(plan, row, label, seed)) for row, label in zip(plan.rows, plan.labels, strict=True)
        )
        writer.add_all(loaders, total=len(plan.rows), label="samples", threads=options.threads)
        writer.split(plan.folds, rule=plan.rule, seed=seed)
    assert writer.manifest is not None
    return Made(writer.manifest, writer.skipped)


def _table(raw: Path | None) -> Path:
    if raw is None:
        raise DataError(f"no raw data; name with --raw the folder of {FOLDER}")
    if raw.is_file():
        return raw
    tables = sorted(raw.glob("*.csv")) if raw.is_dir() else []
    if len(tables) != 1:
        found = ", ".join(path.name for path in tables[:5]) or ("none" if raw.is_dir() else "no such folder")
        raise DataError(f"{str(raw)!r}: expected one table (.csv), found {found}; name with --raw {FOLDER}")
    return tables[0]


def _description(plan: Plan, options: Options) -> Description:
    return Description(
        task=options.task,
        problem="segmentation" if plan.roles.is_segmentation else "classification",
        container="zarr" if any(m.codec == "zarr" for m in plan.modalities.values()) else "wds",
        class_names=plan.names,
        modalities=plan.modalities,
        excluded={c: "its header gives it no role" for c in plan.roles.ignored if c not in plan.modalities},
        source=options.source or f"the table {plan.table.name}",
        licence=options.licence,
    )


def _loader(plan: Plan, row: Row, label: int, seed: int) -> Callable[[], Sample]:
    def load() -> Sample:
        arrays: dict[str, Any] = {name: np.array(values, dtype=np.float32) for name, values in row.numbers.items()}
        for name, path in row.files.items():
            try:
                arrays |= _arrays(plan, name, path, row.key, seed)
            except DataError as error:
                raise DataError(f"row {row.line}, column {plan.roles.files[name][0]!r}: {error}") from error
        space = space_of(plan, row)
        return Sample(arrays, patient=row.patient, label=label, group=row.group, space=space)

    return load


def _arrays(plan: Plan, name: str, path: Path, key: str, seed: int) -> dict[str, Any]:
    modality = plan.modalities[name]
    if modality.kind == "image":
        height, width, channels = modality.shape
        return {name: load_image(path, (height, width, channels), plan.stored[name])}
    if modality.kind == "vector":
        return {name: load_array(path)}
    if modality.role == "target":
        values = list(range(len(plan.names)))
        return target_values(name, load_labels(path, len(values)), values, seed=seed, sample=key)
    return input_values(name, load_volume(path, modality.dtype))


def _dry_run(options: argparse.Namespace) -> int:
    """Every problem, or what would be made; nothing is written."""
    problems = Problems()
    try:
        chosen = _options(options)
        plan = examine(_table(options.raw), chosen, problems, seed=options.seed, every_value=True)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.out.exists():
        problems.add(f"output {str(options.out)!r} exists already; remove it or name another folder with --out")
    for line in (*summary(plan), *problems.notes):
        print(line)
    for number, line in enumerate(problems.lines, 1):
        print(f"{number}. {line}")
    if problems.count:
        print(f"{_many(problems.count, 'problem')} in {plan.table}; mend the table and run this again", file=sys.stderr)
        return 2
    print("no problems; run the same command without --dry-run")
    return 0


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def summary(plan: Plan) -> list[str]:
    """What the table becomes, for a person to compare with what was meant."""
    rows, roles = plan.rows, plan.roles
    patients = f" of {_many(len({row.patient for row in rows}), 'patient')}" if "patient" in roles.columns else ""
    lines = [f"{plan.table.name}: {_many(len(rows), 'row')}{patients}"]
    for name, modality in plan.modalities.items():
        if modality.role == "aux":
            continue
        have = sum(name in row.files or name in row.numbers for row in rows)
        what = "target" if modality.role == "target" else modality.kind
        detail = {"jpg": ", files kept as they are", "png": ", files kept as they are", "again": ", packed as png"}
        note = detail[plan.stored[name]] if name in plan.stored else ""
        if name in roles.numbers:
            blank = sum(row.blank.get(name, 0) for row in rows)
            words = f"; {_many(blank, 'value')} {'is' if blank == 1 else 'are'} blank" if blank else ""
            note = f", {', '.join(roles.features(name))}{words}"
        shape = " x ".join(map(str, modality.shape))
        lines.append(f"  {what} {name!r}: {have} of {len(rows)} rows, {shape} {modality.dtype}{note}")
    if roles.is_segmentation:
        lines.append(f"  classes by value: {', '.join(f'{k} {name}' for k, name in enumerate(plan.names))}")
    elif "label" in roles.columns:
        counts = Counter(plan.labels)
        unknown = f", {counts[UNLABELLED]} without a label" if counts[UNLABELLED] else ""
        lines.append(f"  classes: {', '.join(f'{name} {counts[k]}' for k, name in enumerate(plan.names))}{unknown}")
    for number, fold in enumerate(plan.folds):
        members = ", ".join(f"{split} {len(fold.patients(split))}" for split in SPLITS)
        lines.append(f"  fold {number}: patients {members}")
    if plan.rule:
        lines.append(f"  {_many(len(plan.folds), 'fold')}: {plan.rule}")
    if roles.ignored:
        lines.append(
            f"  not used, no role in the header: {', '.join(roles.ignored)} (a number: NAME.{roles.ignored[0]})"
        )
    return lines


class _Template(argparse.Action):
    """--template needs no other argument."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(TEMPLATE, end="")
        parser.exit(0)


def main(argv: list[str] | None = None) -> int:
    default = Options()
    parser = arguments(__doc__, raw=FOLDER, formats=("wds", "zarr"))
    parser.add_argument("--template", action=_Template, nargs=0, help="print an example table and stop")
    parser.add_argument("--dry-run", action="store_true", help="list every problem at once, write nothing")
    parser.add_argument("--classes", type=_words, default=(), metavar="A,B,...", help="class names, in order")
    parser.add_argument(
        "--vector", type=_vector, action="append", default=[], metavar="NAME=A,B", help="columns gathered into a vector"
    )
    parser.add_argument("--size", type=_size, default=None, metavar="H,W", help="bring images to this size")
    parser.add_argument("--folds", type=int, default=default.folds, help=f"without split or fold ({default.folds})")
    parser.add_argument("--val-share", type=float, default=default.val_share, help=f"({default.val_share})")
    parser.add_argument("--compression", choices=["zstd", "none"], default=default.compression, help="of volumes")
    parser.add_argument("--threads", type=int, default=default.threads, help=f"that read files ({default.threads})")
    parser.add_argument("--task", type=_task, default=default.task, help=f"a name for the set ({default.task})")
    parser.add_argument("--source", default="", help="where the data come from, for the manifest")
    parser.add_argument("--licence", default=default.licence, help="their terms, for the manifest")
    options = parser.parse_args(argv)
    if options.dry_run:
        return _dry_run(options)
    return run(
        lambda options: make(options.raw, options.out, options=_options(options), seed=options.seed), parser, argv
    )


def _options(options: argparse.Namespace) -> Options:
    chosen = {name: value for name, value in vars(options).items() if name in Options.__dataclass_fields__}
    return Options(**chosen, vectors=tuple(options.vector), container=options.format)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _task(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected small letters, digits and _, a letter first")
    return text


def _vector(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, columns = text.partition("=")
    if not (name and equals and columns):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=column,column")
    return name, _words(columns)


def _size(text: str) -> tuple[int, int]:
    sides = text.split(",")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}, expected H,W in pixels, such as 224,224")
    return int(sides[0]), int(sides[1])


if __name__ == "__main__":
    sys.exit(main())
