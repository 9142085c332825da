"""Published lists of cases by split: a JSON of folds, or a text file for each split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from distkd.data.manifest import explain
from distkd.errors import DataError

__all__ = ["read_lists"]


def read_lists(paths: tuple[Path, ...], patient_of: dict[str, str]) -> list[dict[str, list[str]]]:
    """Case names by split, of each fold of the lists.

    Raises:
        DataError: a list is unreadable, names cases that are not there, or a patient is in two splits of a fold.
    """
    is_json = len(paths) == 1 and paths[0].suffix == ".json"
    folds = _json_folds(paths[0]) if is_json else [_text_fold(paths)]
    for number, fold in enumerate(folds):
        splits_of: dict[str, set[str]] = {}
        for split, names in fold.items():
            unknown = [name for name in names if name not in patient_of]
            if unknown:
                raise DataError(
                    f"split list, fold {number}, {split}: {len(unknown)} of {len(names)} cases are not in --raw: "
                    f"{', '.join(unknown[:5])}; mend the list or --raw"
                )
            for name in names:
                splits_of.setdefault(patient_of[name], set()).add(split)
        twice = sorted(patient for patient, splits in splits_of.items() if len(splits) > 1)
        if twice:
            raise DataError(
                f"split list, fold {number}: patient {twice[0]!r} is in {' and '.join(sorted(splits_of[twice[0]]))} "
                f"({len(twice)} such patients); a patient's cases must stay in one split: mend the list"
            )
    return folds


class _Entry(BaseModel):
    train_samples: Annotated[list[str], Field(min_length=1)]
    valid_samples: Annotated[list[str], Field(min_length=1)]


def _json_folds(path: Path) -> list[dict[str, list[str]]]:
    try:
        entries = TypeAdapter(list[_Entry]).validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the split list {str(path)!r}: {error}") from error
    except ValidationError as error:
        raise DataError(
            f"split list {str(path)!r} is not of the form "
            f'[{{"train_samples": [...], "valid_samples": [...]}}, ...]: {explain(error)}; mend the list'
        ) from error
    if not entries:
        raise DataError(f"split list {str(path)!r} has no fold")
    return [
        {"train": [_case(name) for name in entry.train_samples], "test": [_case(name) for name in entry.valid_samples]}
        for entry in entries
    ]


def _text_fold(paths: tuple[Path, ...]) -> dict[str, list[str]]:
    fold: dict[str, list[str]] = {}
    for path in paths:
        splits = [split for split in ("train", "val", "test") if split in path.stem.lower()]
        if len(splits) != 1 or splits[0] in fold:
            raise DataError(
                f"split list {str(path)!r}: its name says {' and '.join(splits) or 'no split'}, expected one .json, or "
                "text files of which each has one of train, val, test in its name"
            )
        try:
            lines = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the split list {str(path)!r}: {error}") from error
        if not lines:
            raise DataError(f"split list {str(path)!r} is empty, expected a case folder a line")
        fold[splits[0]] = [_case(line) for line in lines]
    if "train" not in fold:
        raise DataError(f"split lists {', '.join(map(str, paths))} have no training list; name one with train in it")
    return fold


def _case(line: str) -> str:
    """The case of a line such as HGG/Brats18_2013_10_1 or BraTS2021_00000."""
    return line.rstrip("/").rsplit("/", 1)[-1]
