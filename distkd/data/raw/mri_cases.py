"""Folders of MRI examinations as BraTS hands them out: found by their names, checked by their headers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from distkd.data.progress import track
from distkd.data.raw.nifti import Frame, read_frame, same_affine
from distkd.data.write import Skipped
from distkd.errors import DataError

__all__ = ["SEQUENCES", "Case", "OnError", "UnusableCase", "check_frames", "find_cases", "guarded", "numbering"]

T = TypeVar("T")
OnError = Literal["fail", "skip"]

SEQUENCES = ("flair", "t1", "t1ce", "t2")
GRADES = ("HGG", "LGG")
NAMES_2023 = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "seg": "seg"}
FILE = re.compile(
    r"(?P<case>.+?)(?P<mark>[_-])(?P<name>flair|t1ce|t1|t2|seg|t2f|t1n|t1c|t2w)\.nii(\.gz)?", re.IGNORECASE
)
ODD_SEG = re.compile(r".+_segm\.nii(\.gz)?", re.IGNORECASE)
"""One case of BraTS 2020 has its label map under the name of its origin (W39_1998.09.19_Segm.nii)."""


@dataclass
class Case:
    """A folder of one examination."""

    name: str
    grade: str | None
    folder: Path
    files: dict[str, Path] = field(default_factory=dict[str, Path])
    numbering: Literal["2018", "2023"] = "2018"

    @property
    def patient(self) -> str:
        return re.sub(r"-\d{3}$", "", self.name) if self.numbering == "2023" else self.name


class UnusableCase(DataError):
    """A case that --on-error skip may leave out; `reason` is what the report counts."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{message}; or leave the case out with --on-error skip")
        self.reason = reason


def find_cases(raw: Path, skipped: Skipped, on_error: OnError, content: str) -> list[Case]:
    """Cases by name, with their files by sequence; `content` says what the folder should hold.

    Raises:
        DataError: there is none, a name is used twice, or (`fail`) a folder holds what is no sequence of its case.
    """
    if not raw.is_dir():
        raise DataError(f"raw data {str(raw)!r} is no folder; name with --raw the folder of {content}")
    folders: list[tuple[str | None, Path]] = []
    for folder in _subfolders(raw):
        grade = folder.name.upper()
        folders += [(grade, below) for below in _subfolders(folder)] if grade in GRADES else [(None, folder)]
    cases: dict[str, Case] = {}
    for grade, folder in sorted(folders, key=lambda pair: pair[1].name):
        try:
            case = _case(folder, grade)
        except UnusableCase as fault:
            if on_error == "fail":
                raise
            skipped.add(fault.reason, folder.name)
            continue
        if case.name in cases:
            raise DataError(f"case {case.name!r} is in {str(cases[case.name].folder)!r} and {str(folder)!r}; keep one")
        cases[case.name] = case
    if not cases:
        raise DataError(f"raw data {str(raw)!r} holds no case; name with --raw the folder of {content}")
    return list(cases.values())


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _case(folder: Path, grade: str | None) -> Case:
    case = Case(folder.name, grade, folder)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith((".nii", ".nii.gz")):
            continue
        match = FILE.fullmatch(path.name)
        if match and match["case"] == folder.name:
            name = match["name"].lower()
            if match["mark"] == "-":
                case.numbering = "2023"
            name = NAMES_2023.get(name, name)
        elif ODD_SEG.fullmatch(path.name):
            name = "seg"
        else:
            raise UnusableCase(
                "a file whose name says no sequence",
                f"case {folder.name!r} has the file {path.name!r}, expected "
                f"{folder.name}_{{{','.join(SEQUENCES)},seg}}.nii or .nii.gz (2023: -{{{','.join(NAMES_2023)}}}); "
                "rename or remove it",
            )
        if name in case.files:
            raise UnusableCase(
                "a sequence in two files",
                f"case {folder.name!r} has {name} twice: {case.files[name].name!r} and {path.name!r}; remove one",
            )
        case.files[name] = path
    if not set(SEQUENCES) & set(case.files):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "nothing"
        raise UnusableCase(
            "no sequence in the folder",
            f"case folder {str(folder)!r} holds {found}, expected at least one of {', '.join(SEQUENCES)} as .nii or "
            ".nii.gz; copy it again, or name the folder above the cases with --raw",
        )
    return case


def numbering(cases: list[Case]) -> Literal["2018", "2023"]:
    """Of the labels, by the file names of all cases.

    Raises:
        DataError: the names follow both.
    """
    found = {case.numbering: case.name for case in cases}
    if len(found) > 1:
        raise DataError(
            f"the file names follow two numberings of the labels: 2018 to 2021 as in {found['2018']!r}, 2023 as in "
            f"{found['2023']!r}; say with --labels which one the label maps have"
        )
    return "2023" if "2023" in found else "2018"


def check_frames(cases: list[Case], skipped: Skipped, on_error: OnError) -> dict[str, Frame]:
    """The one frame that all files of a case have, by case; headers alone are read.

    Raises:
        DataError: (`fail`) a header is unreadable, or the files of a case differ in shape or affine.
    """
    frames: dict[str, Frame] = {}
    for case in track(cases, "headers", total=len(cases)):
        try:
            frames[case.name] = _frame(case)
        except UnusableCase as fault:
            if on_error == "fail":
                raise
            skipped.add(fault.reason, case.name)
    return frames


def _frame(case: Case) -> Frame:
    first: tuple[str, Frame] | None = None
    for name in (*SEQUENCES, "seg"):
        if name not in case.files:
            continue
        frame = guarded(case, lambda path=case.files[name]: read_frame(path))
        if first is None:
            first = name, frame
        _compare(case, first, name, frame)
    assert first is not None, case
    return first[1]


def _compare(case: Case, first: tuple[str, Frame], name: str, frame: Frame) -> None:
    expected = first[1]
    files = f"{case.files[first[0]].name!r} and {case.files[name].name!r}"
    if frame.shape != expected.shape:
        raise UnusableCase(
            "files of other shapes",
            f"the files of case {case.name!r} differ in shape: {files} have {expected.shape} and {frame.shape}; "
            "expected co-registered files of one shape: register them",
        )
    if not same_affine(frame, expected):
        raise UnusableCase(
            "files of other affines",
            f"the files of case {case.name!r} differ in affine: {files} have {_rows(expected)} and {_rows(frame)}; "
            "expected co-registered files in one frame: register them",
        )


def _rows(frame: Frame) -> str:
    return " / ".join(" ".join(f"{value:g}" for value in row) for row in frame.affine[:3])


def guarded(case: Case, read: Callable[[], T]) -> T:
    """What `read` gives; its complaints name the case and may be skipped."""
    try:
        return read()
    except DataError as error:
        raise UnusableCase("a file that cannot be used", f"case {case.name!r}: {error}") from error
