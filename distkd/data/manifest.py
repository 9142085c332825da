"""The JSON that describes a shard set: what is in it, where each byte lies, who is in which split.

The types alone: `manifest_file` reads and writes them, `consistency` compares their parts with each other, `shardset`
and `verify` compare them with the files.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints, ValidationError, model_validator

from distkd.errors import DataError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "SPLITS",
    "VOLUMES",
    "Description",
    "Fold",
    "Manifest",
    "Modality",
    "Samples",
    "Shard",
    "Space",
    "Split",
    "check_modality",
    "closest",
    "explain",
    "frame_fault",
    "some",
]

FORMAT_VERSION = 2
"""Version 1 had tars without checksums of their members; it is read as it was."""
MANIFEST = "manifest.json"
VOLUMES = "volumes.zarr"
"""Folder of the zarr group in a set that holds volumes."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

SHOWN = 5
"""How many of many faults a message names."""
_VALUE_CHARACTERS = 60
"""Of a wrong value in a message."""
_SINGULAR = 1e-6
"""An affine's axes span this part of the volume that orthogonal ones of their lengths would, or less."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
"""WebDataset takes everything after the first dot for the extension, so a key has none."""


_FILE = rf"^([A-Za-z0-9_-]+\.tar|{re.escape(VOLUMES)}(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+)$"
"""Nothing that leaves the folder: no part of a path begins with a dot."""

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
"""What an int64 holds, also when two of them are added."""
Row = tuple[float, float, float, float]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class Modality(_Strict):
    """One kind of input as it is stored, before any transform."""

    kind: Literal["vector", "image", "volume"]
    dtype: Literal["uint8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64"]
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """(features,) of a vector, (height, width, channels) of an image, (channels, x, y, z) of a volume."""
    """Of a volume the largest (x, y, z) of the set; each sample's own is in its space."""
    codec: Literal["npy", "png", "jpg", "zarr"]
    unit: str = ""
    features: list[str] | None = None
    """Names of a vector's columns, in order."""
    role: Literal["input", "target", "aux"] = "input"
    """A target is the label map of a segmentation; aux are numbers about a sample that no model is given."""
    values: list[int] | None = None
    """Raw values of a target in the order of the class names, where these are not 0, 1, 2..."""
    chunk: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """zarr: what is read and checked as one block, of one sample's values."""
    compression: Literal["none", "zstd"] = "none"
    """zarr: of each chunk."""


class Space(_Strict):
    """Where a sample's voxels lie, so that a prediction can be written back in the scanner's frame."""

    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Voxels along x, y, z, in the order of the file."""
    affine: tuple[Row, Row, Row, Row] | None = None
    """Voxel indices to millimetres, rows of a 4 x 4 matrix; None where no file says it."""
    spacing: tuple[float, float, float] | None = None
    """Millimetres between voxels; None where no file says it."""

    @model_validator(mode="after")
    def _is_a_frame(self) -> Self:
        if self.affine is None or self.spacing is None:
            return self
        if fault := frame_fault(self.affine, self.spacing):
            raise ValueError(fault)
        return self


class Shard(_Strict):
    """One tar, or one file of the zarr group."""

    file: Annotated[str, StringConstraints(pattern=_FILE)]
    samples: Count
    """Samples that begin in it; 0 of a zarr file that holds no sample's first values."""
    bytes: Count
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Samples(_Strict):
    """All samples, column by column; the position in the columns is the number of the sample."""

    key: list[Key]
    patient: list[str]
    group: list[str | None]
    """A level between sample and patient, such as the region of interest that a patch was cut from."""
    label: list[int]
    """Class, or -1 where it is unknown."""
    shard: list[Count]
    offset: list[Count]
    """Of the sample's first tar header."""
    bytes: dict[Name, list[tuple[Count, Count] | None]]
    """Per modality (offset in the file, size) of the encoded values; null where the sample lacks it."""
    crc32c: dict[Name, list[Count | None]] = {}
    """Tars: CRC-32C of each of these byte ranges; empty in sets of version 1."""
    file: dict[Name, list[Count | None]] = {}
    """zarr: number in `shards` of the file that holds a sample's values."""
    space: list[Space | None] = []
    """Of each sample of a set with volumes; empty in others."""


class Fold(_Strict):
    """Patients by split; who is in none of them takes no part in this fold."""

    train: list[str]
    val: list[str]
    test: list[str]

    def patients(self, split: Split) -> list[str]:
        return {"train": self.train, "val": self.val, "test": self.test}[split]


class Description(_Strict):
    """What the maker of a shard set states; the rest of the manifest is counted."""

    task: Name
    problem: Literal["classification", "segmentation"] = "classification"
    """One class for a sample, or one for each voxel of a target."""
    container: Literal["wds", "zarr"] = "wds"
    """WebDataset tars, or one zarr group."""
    class_names: Annotated[list[str], Field(min_length=2)]
    modalities: Annotated[dict[Name, Modality], Field(min_length=1)]
    excluded: dict[str, str] = {}
    """Columns of the raw data that are no inputs, and why: they leak the label, or belong to another task."""
    source: str
    licence: str


class Manifest(Description):
    """`manifest.json`."""

    format_version: Literal[1, 2] = FORMAT_VERSION
    shards: list[Shard]
    samples: Samples
    folds: Annotated[list[Fold], Field(min_length=1)]
    split_rule: str
    split_seed: int | None

    @property
    def n_samples(self) -> int:
        return len(self.samples.key)

    @property
    def n_patients(self) -> int:
        return len(set(self.samples.patient))


def explain(error: ValidationError) -> str:
    """pydantic's faults on one line, the first few of them, with their paths and the values found."""
    faults: list[Any] = error.errors(include_url=False)
    return some([_fault(fault) for fault in faults[:SHOWN]] + [""] * (len(faults) - SHOWN), "; ")


def _fault(fault: dict[str, Any]) -> str:
    words = fault["msg"].removeprefix("Value error, ")
    place = ".".join(map(str, fault["loc"])) or "file"
    found = "" if fault["type"] in ("missing", "json_invalid", "value_error") else f", found {_short(fault['input'])}"
    return f"{place}: {words[:1].lower()}{words[1:]}{found}"


def _short(value: object) -> str:
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = shorten.maxlong = _VALUE_CHARACTERS
    text = shorten.repr(value)
    return text if len(text) <= _VALUE_CHARACTERS else text[: _VALUE_CHARACTERS - 3] + "..."


def some(items: Sequence[str], separator: str = ", ") -> str:
    """The first few of them, and how many there are beyond."""
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return separator.join([*items[:SHOWN], *more])


def frame_fault(affine: Sequence[Sequence[float]], spacing: Sequence[float]) -> str:
    """Why these do not place a volume in the scanner's frame, or empty."""
    if not all(map(math.isfinite, (*(value for row in affine for value in row), *spacing))):
        return f"affine {affine} and spacing {spacing} hold values that are not finite"
    if min(spacing) <= 0:
        return f"spacing is {spacing}, expected more than 0 mm along each axis"
    if tuple(affine[3]) != (0, 0, 0, 1):
        return f"the affine's last row is {tuple(affine[3])}, expected (0, 0, 0, 1)"
    (a, b, c), (d, e, f), (g, h, i) = (row[:3] for row in affine[:3])
    spanned = abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
    if spanned <= _SINGULAR * math.hypot(a, d, g) * math.hypot(b, e, h) * math.hypot(c, f, i):
        return f"affine {affine} is singular, expected three axes that span a volume"
    return ""


def closest(name: str, available: Iterable[str]) -> str:
    """`; did you mean 'x'?` and what there is, for the end of a message."""
    names = sorted(available)
    near = difflib.get_close_matches(name, names, n=1)
    return (f"; did you mean {near[0]!r}?" if near else "") + f"; available: {', '.join(names) or 'none'}"


def check_modality(description: Description, name: str) -> Modality:
    """The modality of that name.

    Raises:
        DataError: it is excluded from the inputs, with the reason, or there is none of that name.
    """
    if name in description.modalities:
        return description.modalities[name]
    if name in description.excluded:
        raise DataError(
            f"{name!r} is excluded from the inputs of task {description.task!r}: {description.excluded[name]}; "
            f"use one of {', '.join(sorted(description.modalities))}"
        )
    raise DataError(f"unknown modality {name!r} for task {description.task!r}{closest(name, description.modalities)}")
