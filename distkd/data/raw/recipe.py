"""What the scripts of `shards/` share: arguments, progress, the report of what was skipped, the exit code."""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distkd.data.journal import aside_of, real_folder
from distkd.data.look.summary import missing_notes
from distkd.data.manifest import SPLITS, Manifest
from distkd.data.progress import track
from distkd.data.write import Skipped
from distkd.errors import DataError, DistkdError
from distkd.files import digest

__all__ = [
    "Made",
    "Skipped",
    "arguments",
    "number",
    "raw_file",
    "read_table",
    "run",
    "tables_digest",
    "track",
]


@dataclass(frozen=True)
class Made:
    """A finished shard set."""

    manifest: Manifest
    skipped: Skipped = field(default_factory=Skipped)


_FORMATS = {"wds": "WebDataset tars", "zarr": "a zarr group of volumes"}


def arguments(
    description: str | None, *, raw: str | None, formats: Sequence[str] = ("wds",)
) -> argparse.ArgumentParser:
    """The options that every recipe has.

    Args:
        raw: what the raw folder must hold, for the help; None where the recipe needs none.
        formats: containers that the recipe can make, the default first.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if raw is not None:
        parser.add_argument("--raw", type=Path, required=True, metavar="DIR", help=raw)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder for shards and manifest.json"
    )
    offered = ", ".join(f"{name} ({_FORMATS[name]})" for name in formats)
    parser.add_argument(
        "--format", choices=list(formats), default=formats[0], help=f"container of the samples: {offered}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of folds and all that is drawn (default 0)")
    return parser


def run(make: Callable[[argparse.Namespace], Made], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, make, report; the exit code: 0 done, 2 bad arguments or raw data, 1 stopped by Ctrl-C."""
    options = parser.parse_args(argv)
    # a shell in the folder that was `.` will be in one that is no more, and finds the set by its whole name
    out = options.out if options.out.name else real_folder(options.out)
    try:
        made = make(options)
    except DistkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        behind = " to go on behind what is finished" if aside_of(options.out).is_dir() else ""
        print(f"stopped; {str(options.out)!r} was not written; start again{behind}", file=sys.stderr)
        return 1
    manifest = made.manifest
    for line in made.skipped.lines():
        print(line)
    for note in missing_notes(manifest):
        print(note)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(f"{_many(manifest.n_samples, 'sample')} of {_many(manifest.n_patients, 'patient')}")
    print(f"{size:.1f} MB in {_many(len(manifest.shards), 'shard')}")
    first = ", ".join(f"{split} {len(manifest.folds[0].patients(split))}" for split in SPLITS)
    rule = manifest.split_rule.removeprefix(f"{len(manifest.folds)} folds ")
    print(f"{_many(len(manifest.folds), 'fold')} ({rule}); patients of fold 0: {first}")
    print(f"wrote {out}; look at it with `distkd shards info {out}`")
    return 0


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def raw_file(raw: Path, name: str, content: str) -> Path:
    """A file that must be there.

    Raises:
        DataError: it is not; `content` says what the folder should be.
    """
    path = raw / name
    if not path.is_file():
        what = "has no file" if raw.is_dir() else "is no folder, looked for"
        raise DataError(f"raw data {str(raw)!r} {what} {name!r}; name with --raw the folder of {content}")
    return path


def tables_digest(*paths: Path) -> str:
    """Of the names and bytes of files that tell what the samples are, for `ShardWriter(options=...)`.

    A build that was interrupted keeps what it read of them, so other tables have to begin anew.

    Raises:
        DataError: a file cannot be read.
    """
    found = hashlib.sha256()
    for path in paths:
        try:
            found.update(f"{path.name} {digest(path)}\n".encode())
        except OSError as error:
            raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}; copy it again") from error
    return found.hexdigest()


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a CSV file, gzipped or not.

    Raises:
        DataError: unreadable, a column is missing or there twice, or a row has another number of cells than the header.
    """
    try:
        with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
            reader = csv.reader(file)
            header = next(reader, list[str]())
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{str(path)!r} has column {', '.join(map(repr, twice))} twice; rename one")
            absent = sorted(set(columns) - set(header))
            if absent:
                raise DataError(f"{str(path)!r} has no column {', '.join(absent)}; it has {', '.join(header[:8])}, ...")
            rows: list[dict[str, str]] = []
            for cells in reader:
                if len(cells) != len(header):
                    raise DataError(
                        f"{str(path)!r} line {reader.line_num} has {len(cells)} cells, the header has {len(header)}; "
                        "the file is damaged or cut off: copy it again"
                    )
                rows.append(dict(zip(header, cells, strict=True)))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:  # a cut gzip stream is an EOFError
        raise DataError(f"cannot read {str(path)!r}: {error or type(error).__name__}; copy it again") from error
    if not rows:
        raise DataError(f"{str(path)!r} has no rows; copy it again")
    return rows


def number(text: str, where: str) -> float:
    """A cell as a number; blank is NaN, a missing value.

    Raises:
        DataError: it is no finite number.
    """
    if not text.strip():
        return float("nan")
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where} is {text!r}, expected a number or a blank; mend the raw file") from None
    if value in (float("inf"), float("-inf")):
        raise DataError(f"{where} is infinite; mend the raw file, or leave it blank if it is missing")
    return value
