"""A table of one's own data: what each column is, what each row says, and every problem with it at once.

One CSV, one row a sample. The header gives the columns their roles, see `read_roles`.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distkd.data.progress import track
from distkd.data.raw.table_problems import Problems
from distkd.data.raw.volume_parts import Compression
from distkd.errors import DataError

__all__ = [
    "NOT_VALUES",
    "FileKind",
    "Roles",
    "Row",
    "TableOptions",
    "read_cells",
    "read_roles",
    "read_rows",
]

FileKind = Literal["image", "volume", "target", "vector", ""]
"""What a column of files holds; empty where the files themselves have to say it (.npy)."""

NAMES = ("key", "patient", "group", "label", "split", "fold")
SUFFIXES: dict[str, FileKind] = {
    ".png": "image",
    ".jpg": "image",
    ".jpeg": "image",
    ".tif": "image",
    ".tiff": "image",
    ".bmp": "image",
    ".nii": "volume",
    ".nii.gz": "volume",
    ".npy": "",
}
NOT_VALUES = frozenset(("nan", "na", "n/a", "n.a.", "n.a", "#n/a", "none", "null", "nil", "-", "--", ".", "?"))
"""What people and programs write into a cell that is blank."""
MEANT = {
    "patient": r"patient|subject|participant|proband|person|^(pid|pat|patid|patnr|case|caseid|fall|fallnr|mrn|id)$",
    "label": r"label|diagnos|class|klasse|outcome|target|^(y|dx|grade|befund)$",
}
"""Headers, their letters and digits alone, that mean a column that every table has."""
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True)
class TableOptions:
    """How a table is read."""

    classes: tuple[str, ...] = ()
    """Class names in order; of the labels, sorted, where empty."""
    vectors: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Columns gathered into a vector, beside those named NAME.column."""
    size: tuple[int, int] | None = None
    """(height, width) to which images are brought."""
    folds: int = 5
    """Made by patient, where the table has neither splits nor folds."""
    val_share: float = 0.15
    """Of the patients that are not tested, where the table names none for validation."""
    container: Literal["wds", "zarr"] = "wds"
    """Of images and numbers; volumes are always in zarr."""
    compression: Compression = "zstd"
    """Of volumes."""
    threads: int = 2


@dataclass
class Roles:
    """What each column is."""

    columns: dict[str, str] = field(default_factory=dict[str, str])
    """Of `NAMES`: the column's header."""
    files: dict[str, tuple[str, FileKind]] = field(default_factory=dict[str, "tuple[str, FileKind]"])
    """Modality to the column of its files."""
    numbers: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Modality to the columns of its numbers."""
    ignored: list[str] = field(default_factory=list[str])

    @property
    def is_segmentation(self) -> bool:
        return any(kind == "target" for _, kind in self.files.values())

    def features(self, name: str) -> list[str]:
        return [column.split(".", 1)[1] if column.startswith(f"{name}.") else column for column in self.numbers[name]]


@dataclass(frozen=True)
class Row:
    """One sample, as the table states it."""

    line: int
    key: str
    patient: str
    group: str | None
    label: str
    part: str
    """The cell of the split or of the fold."""
    files: dict[str, Path]
    numbers: dict[str, tuple[float, ...]]
    """NaN where a cell is blank or is no number."""
    blank: dict[str, int]
    """Cells without anything, of those vectors that have a number."""


def read_cells(path: Path, problems: Problems) -> tuple[list[str], list[tuple[int, dict[str, str]]], bool]:
    """Header, (line, cells by column) of each row that is not blank, and whether a number may have a decimal comma.

    Commas, semicolons or tabs separate the cells.

    Raises:
        DataError: the file cannot be read, or is empty.
    """
    text = _text(path)
    comma = max(",;\t", key=text.partition("\n")[0].count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
        header = [cell.strip() for cell in next(reader, list[str]())]
        lines = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise DataError(f"cannot read the table {str(path)!r}: {error}; expected a CSV, save it again") from error
    rows = [(line, cells) for line, cells in lines if any(cell.strip() for cell in cells)]
    if not rows:
        raise DataError(f"table {str(path)!r} has no rows below its header; see --template for an example")
    for name, count in Counter(header).items():
        if count > 1 and name:
            problems.add(f"the header has it {count} times, expected once; rename one", column=name)
    good: list[tuple[int, dict[str, str]]] = []
    for line, cells in rows:
        if len(cells) != len(header):
            problems.add(f"it has {len(cells)} cells, the header has {len(header)}; mend the row", row=line)
        else:
            good.append((line, {name: cell.strip() for name, cell in zip(header, cells, strict=True) if name}))
    return [name for name in header if name], good, comma != ","


def _text(path: Path) -> str:
    """Of a file in UTF-8; spreadsheets have a format for it, and it is not the one that they offer first."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the table {str(path)!r}: {error}; check the path and its rights") from error
    found = ""
    if data.startswith(b"PK\x03\x04"):
        found = "it is a spreadsheet"
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:1000]:
        found = "it is in UTF-16"
    else:
        try:
            return data.decode("utf-8-sig")  # spreadsheets write a byte order mark
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            found = f"line {line} is not in UTF-8 but, it seems, in a spreadsheet's plain 'CSV' (Latin-1)"
    raise DataError(f"cannot read the table {str(path)!r}: {found}, expected a CSV in UTF-8; save it as 'CSV UTF-8'")


def read_roles(
    header: list[str], rows: list[tuple[int, dict[str, str]]], options: TableOptions, problems: Problems
) -> Roles:
    """What each column is, by its header, or by its cells where they are paths.

    `patient label split fold group key` are themselves; `image:NAME`, `volume:NAME`, `target:NAME` and `vector:NAME`
    hold files of that kind; `NAME.column` is a number of the vector NAME.
    """
    roles = Roles()
    gathered = {column: name for name, columns in options.vectors for column in columns}
    for column in dict.fromkeys(header):
        prefix, colon, rest = column.partition(":")
        vector, dot, feature = column.partition(".")
        if column.lower() in NAMES:
            roles.columns[column.lower()] = column
        elif column in gathered:
            continue
        elif colon and prefix in ("image", "volume", "target", "vector"):
            _add_files(roles, column, _name(rest, column, problems), prefix, problems)
        elif (kind := _kind_of_cells(column, rows)) is not None:
            _add_files(roles, column, _name(column, column, problems), kind, problems)
        elif dot and feature:
            roles.numbers.setdefault(_name(vector, column, problems), []).append(column)
        else:
            roles.ignored.append(column)
    for name, columns in options.vectors:
        absent = [column for column in columns if column not in header]
        for column in absent:
            problems.add(f"--vector {name}: the header has no such column, it has {', '.join(header)}", column=column)
        roles.numbers.setdefault(_name(name, name, problems), []).extend(c for c in columns if c not in absent)
    _check_roles(roles, header, problems)
    return roles


def _check_roles(roles: Roles, header: list[str], problems: Problems) -> None:
    if "patient" not in roles.columns:
        way_out = _meant("patient", roles) or "splits are by patient: add one"
        problems.add(f"no column 'patient', the header has {', '.join(header)}; {way_out}")
    if roles.is_segmentation == ("label" in roles.columns):
        problems.add(
            "both a column 'label' and a target; a set is for one of them: make two"
            if roles.is_segmentation
            else f"no column 'label', the header has {', '.join(header)}; "
            + (_meant("label", roles) or "add one, blank where it is unknown")
        )
    if sum(kind == "target" for _, kind in roles.files.values()) > 1:
        problems.add("several targets, expected one; merge them into one label map")
    if "split" in roles.columns and "fold" in roles.columns:
        problems.add("both a column 'split' and a column 'fold', expected one of them or none; remove one")
    if not any(kind != "target" for _, kind in roles.files.values()) and not roles.numbers:
        problems.add(
            "no column is an input; name one image:NAME, volume:NAME or vector:NAME for files, NAME.column for numbers"
        )
    for name in sorted(set(roles.files) & set(roles.numbers)):
        problems.add(f"the name {name!r} is used for files and for numbers; rename one")


def _meant(role: str, roles: Roles) -> str:
    """The column without a role that is probably meant."""
    plain = {re.sub(r"[^a-z0-9]", "", column.lower()): column for column in roles.ignored}
    near = [name for name in plain if re.search(MEANT[role], name)] or difflib.get_close_matches(role, plain)
    return f"did you mean {plain[near[0]]!r}? rename it to {role!r}" if near else ""


def _add_files(roles: Roles, column: str, name: str, kind: FileKind, problems: Problems) -> None:
    if name in roles.files:
        problems.add(f"gives the name {name!r}, which column {roles.files[name][0]!r} has; rename one", column=column)
    roles.files[name] = (column, kind)


def _name(text: str, column: str, problems: Problems) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        problems.add(f"gives no usable name ({text!r}), expected letters and digits, a letter first", column=column)
        return f"column_{name}"
    return name


def _kind_of_cells(column: str, rows: list[tuple[int, dict[str, str]]]) -> FileKind | None:
    """Of a column whose every cell is a path, or None."""
    kinds: set[FileKind | None] = {_kind_of_path(cells[column]) for _, cells in rows if cells[column]}
    return next(iter(kinds)) if len(kinds) == 1 else None


def _kind_of_path(cell: str) -> FileKind | None:
    return next((SUFFIXES[suffix] for suffix in SUFFIXES if cell.lower().endswith(suffix)), None)


def read_rows(
    rows: list[tuple[int, dict[str, str]]], roles: Roles, folder: Path, problems: Problems, *, decimal_comma: bool
) -> list[Row]:
    """The rows, in the order of the table; what is wrong with a cell is a problem and leaves the cell out."""
    found: list[Row] = []
    line_of: dict[str, int] = {}
    for line, cells in track(rows, "rows", total=len(rows)):
        own = {name: cells[column] for name, column in roles.columns.items()}
        key = own.get("key") or f"row-{line:07d}"
        if not _KEY.fullmatch(key):
            problems.add(f"{key!r} is no usable key, expected 1 to 80 letters, digits, - or _", row=line, column="key")
        elif key in line_of:
            problems.add(f"{key!r} is the key of row {line_of[key]}, too; make keys unique", row=line, column="key")
        line_of.setdefault(key, line)
        if "patient" in own and not own["patient"]:
            problems.add("it is blank, expected who the sample is of; fill it in", row=line, column="patient")
        files = _files(line, cells, roles, folder, problems)
        numbers = {
            name: values
            for name, columns in roles.numbers.items()
            if (values := _numbers(line, cells, columns, problems, decimal_comma)) is not None
        }
        if not any(cells[column] for column, kind in roles.files.values() if kind != "target") and not numbers:
            also = "" if own.get("label") or "label" not in own else ", the label too"
            problems.add(f"every input is blank{also}; fill one in or remove the row", row=line)
        found.append(
            Row(
                line=line,
                key=key,
                patient=own.get("patient", ""),
                group=own.get("group") or None,
                label=own.get("label", ""),
                part=own.get("split") or own.get("fold") or "",
                files=files,
                numbers=numbers,
                blank={name: sum(not cells[column] for column in roles.numbers[name]) for name in numbers},
            )
        )
    return found


def _files(line: int, cells: dict[str, str], roles: Roles, folder: Path, problems: Problems) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, (column, kind) in roles.files.items():
        cell = cells[column]
        if not cell:
            continue
        path = folder / cell  # an absolute path stays one
        expected = "volume" if kind == "target" else kind
        suffix = _kind_of_path(cell)
        if suffix is None or (suffix and expected and suffix != expected):
            known = [s for s, k in SUFFIXES.items() if not expected or k in (expected, "")]
            problems.add(f"{cell!r} is no file of a known kind, expected {', '.join(known)}", row=line, column=column)
        elif not path.is_file():
            problems.add(
                f"there is no file {cell!r}, looked for {os.path.abspath(path)!r}; {_way_to_file(cell)}",
                row=line,
                column=column,
            )
        else:
            files[name] = path
    return files


def _way_to_file(cell: str) -> str:
    if re.match(r"[A-Za-z]:[\\/]|\\\\", cell):
        return "that is a Windows path: copy the file beside the table, and name it from the table's folder"
    if "\\" in cell:
        return f"that is a Windows path: write {cell.replace(chr(92), '/')!r}"
    return "paths start at the table's folder"


def _numbers(
    line: int, cells: dict[str, str], columns: Sequence[str], problems: Problems, decimal_comma: bool
) -> tuple[float, ...] | None:
    """Numbers of a vector, NaN where blank; None where all are."""
    values: list[float] = []
    for column in columns:
        cell = cells[column]
        values.append(math.nan)
        if not cell:
            continue
        text = cell
        if decimal_comma and _DECIMAL_COMMA.fullmatch(cell):
            text = cell.replace(",", ".")
            problems.note(f"column {column!r} has decimal commas, such as {cell!r}, read as {text}", about=column)
        try:
            values[-1] = float("" if "_" in text else text)
        except ValueError:
            problems.add(f"{cell!r} is no number; {_way_to_number(cell)}", row=line, column=column)
            continue
        if not math.isfinite(values[-1]):
            problems.add(
                f"{cell!r} is no finite number; leave the cell blank if it is missing", row=line, column=column
            )
    return tuple(values) if any(cells[column] for column in columns) else None


def _way_to_number(cell: str) -> str:
    if cell.lower() in NOT_VALUES:
        return "leave the cell blank if it is missing"
    if _DECIMAL_COMMA.fullmatch(cell):
        return f"write it with a point, {cell.replace(',', '.')}; commas separate the cells here"
    words = "; of words make columns of 0 and 1, one a word" if not any(c.isdigit() for c in cell) else ""
    return f"expected one, or a blank where it is missing{words}"
