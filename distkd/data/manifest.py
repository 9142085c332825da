"""The JSON that describes a shard set: what is in it, where each byte lies, who is in which split.

Pure: it reads and checks the description; whether the files agree with it is the business of `shardset` and `verify`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from distkd.base import UNLABELLED
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
    "check_patient_law",
    "closest",
    "explain",
    "read_manifest",
    "write_manifest",
]

FORMAT_VERSION = 2
"""Version 1 had tars without checksums of their members; it is read as it was."""
MANIFEST = "manifest.json"
VOLUMES = "volumes.zarr"
"""Folder of the zarr group in a set that holds volumes."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_SHOWN = 5
"""How many of many faults a message names."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
"""WebDataset takes everything after the first dot for the extension, so a key has none."""


_FILE = rf"^([A-Za-z0-9_-]+\.tar|{re.escape(VOLUMES)}(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+)$"
"""Nothing that leaves the folder: no part of a path begins with a dot."""

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
    affine: tuple[Row, Row, Row, Row]
    """Voxel indices to millimetres, rows of a 4 x 4 matrix."""
    spacing: tuple[float, float, float]
    """Millimetres between voxels."""


class Shard(_Strict):
    """One tar, or one file of the zarr group."""

    file: Annotated[str, StringConstraints(pattern=_FILE)]
    samples: NonNegativeInt
    """Samples that begin in it; 0 of a zarr file that holds no sample's first values."""
    bytes: NonNegativeInt
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Samples(_Strict):
    """All samples, column by column; the position in the columns is the number of the sample."""

    key: list[Key]
    patient: list[str]
    group: list[str | None]
    """A level between sample and patient, such as the region of interest that a patch was cut from."""
    label: list[int]
    """Class, or -1 where it is unknown."""
    shard: list[NonNegativeInt]
    offset: list[NonNegativeInt]
    """Of the sample's first tar header."""
    bytes: dict[Name, list[tuple[NonNegativeInt, NonNegativeInt] | None]]
    """Per modality (offset in the file, size) of the encoded values; null where the sample lacks it."""
    crc32c: dict[Name, list[NonNegativeInt | None]] = {}
    """Tars: CRC-32C of each of these byte ranges; empty in sets of version 1."""
    file: dict[Name, list[NonNegativeInt | None]] = {}
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


class _Version(BaseModel):
    format_version: int | None = None


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a shard set.

    Raises:
        DataError: there is none, it is damaged or of another version, or it contradicts itself.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"no {MANIFEST} in {str(folder)!r}, so it is not a shard set; make one with "
            f"`python shards/<recipe>.py --out {folder}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}; check the path and its rights") from error
    try:
        found = _Version.model_validate_json(text).format_version
        if found is not None and not 1 <= found <= FORMAT_VERSION:
            raise DataError(
                f"{str(path)!r} has format version {found}, this distkd reads 1 to {FORMAT_VERSION}; "
                + ("update distkd" if found > FORMAT_VERSION else "build the shard set again")
            )
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise DataError(
            f"{str(path)!r} is not a valid manifest: {explain(error)}; build the shard set again"
        ) from error
    check_consistency(manifest, str(path))
    return manifest


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """One line per top-level field, so that the head of the file is readable and equal content gives equal bytes."""
    fields = manifest.model_dump(mode="json")
    lines = [
        f" {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in sorted(fields.items())
    ]
    (folder / MANIFEST).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def explain(error: ValidationError) -> str:
    """pydantic's faults on one line, the first few of them, with their paths."""
    faults = error.errors(include_url=False)
    shown = [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg'].lower()}" for fault in faults[:_SHOWN]]
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "; ".join(shown + more)


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


def check_patient_law(manifest: Manifest) -> None:
    """No patient is in two splits of a fold.

    Raises:
        DataError: naming the fold, the patients and their splits.
    """
    for number, fold in enumerate(manifest.folds):
        splits_of: dict[str, list[str]] = {}
        for split in SPLITS:
            for patient in fold.patients(split):
                splits_of.setdefault(patient, []).append(split)
        twice = [f"{patient!r} ({' and '.join(splits)})" for patient, splits in splits_of.items() if len(splits) > 1]
        if twice:
            raise DataError(
                f"patient in two splits of fold {number}: {_some(twice)}; a patient's samples must stay in one split: "
                "build the shard set again with folds by patient"
            )


def check_consistency(manifest: Manifest, where: str) -> None:
    """The manifest agrees with itself; `where` starts the message.

    Raises:
        DataError: with all the faults found, the first few in words.
    """
    faults = list(_faults(manifest))
    if faults:
        raise DataError(f"{where} contradicts itself: {_some(faults, '; ')}; build the shard set again")
    check_patient_law(manifest)


def _faults(manifest: Manifest) -> Iterable[str]:
    samples, n = manifest.samples, manifest.n_samples
    columns: Mapping[str, list[object]] = {  # pyright: ignore[reportAssignmentType]
        "patient": samples.patient,
        "group": samples.group,
        "label": samples.label,
        "shard": samples.shard,
        "offset": samples.offset,
        **{f"bytes.{name}": column for name, column in samples.bytes.items()},
        **{f"crc32c.{name}": column for name, column in samples.crc32c.items()},
        **{f"file.{name}": column for name, column in samples.file.items()},
        **({"space": samples.space} if samples.space else {}),
    }
    uneven = [
        f"samples.{name} has {len(column)} entries, key has {n}" for name, column in columns.items() if len(column) != n
    ]
    expected = {"bytes": samples.bytes}
    expected |= {"crc32c": samples.crc32c} if samples.crc32c else {}
    expected |= {"file": samples.file} if manifest.container == "zarr" or samples.file else {}
    uneven += [
        f"samples.{column} has {sorted(found)}, modalities has {sorted(manifest.modalities)}"
        for column, found in expected.items()
        if set(found) != set(manifest.modalities)
    ]
    if uneven:
        yield from uneven
        return  # the checks below walk the columns together
    if n == 0:
        yield "it has no samples"
    yield from (f"key {key!r} occurs {count} times" for key, count in Counter(samples.key).items() if count > 1)
    yield from (
        f"class name {name!r} occurs {count} times"
        for name, count in Counter(manifest.class_names).items()
        if count > 1
    )
    highest = len(manifest.class_names) - 1
    wrong = {label for label in samples.label if not UNLABELLED <= label <= highest}
    if wrong:
        yield f"labels {sorted(wrong)} are outside {UNLABELLED}..{highest} ({len(manifest.class_names)} class names)"
    both = sorted(set(manifest.excluded) & set(manifest.modalities))
    if both:
        yield f"{both} are both modalities and excluded"
    for name, modality in manifest.modalities.items():
        yield from (f"modality {name!r} {fault}" for fault in _modality_faults(modality))
        if (modality.codec == "zarr") != (manifest.container == "zarr"):
            yield f"modality {name!r} is stored as {modality.codec}, the container is {manifest.container}"
    yield from _problem_faults(manifest)
    yield from _shard_faults(manifest)
    yield from _space_faults(manifest)
    known = set(samples.patient)
    for number, fold in enumerate(manifest.folds):
        strangers = [p for split in SPLITS for p in fold.patients(split) if p not in known]
        if strangers:
            yield f"fold {number} names patients without samples: {_some([repr(p) for p in strangers])}"


def _modality_faults(modality: Modality) -> Iterable[str]:
    dimensions = {"vector": 1, "image": 3, "volume": 4}[modality.kind]
    if len(modality.shape) != dimensions:
        yield f"is a {modality.kind} of shape {modality.shape}, expected {dimensions} dimensions"
    elif modality.features is not None and len(modality.features) != math.prod(modality.shape):
        yield f"has {len(modality.features)} feature names for shape {modality.shape}"
    elif modality.kind == "volume" and modality.codec != "zarr":
        yield f"is a volume stored as {modality.codec}, expected zarr"
    elif modality.chunk is not None and (modality.codec != "zarr" or len(modality.chunk) != len(modality.shape)):
        yield f"is stored as {modality.codec} with chunks {modality.chunk} of shape {modality.shape}"
    elif modality.codec in ("png", "jpg") and (
        modality.kind != "image" or modality.dtype != "uint8" or modality.shape[2] not in (1, 3)
    ):
        yield f"is stored as {modality.codec}, which holds uint8 images of 1 or 3 channels only"


def _problem_faults(manifest: Manifest) -> Iterable[str]:
    targets = [name for name, modality in manifest.modalities.items() if modality.role == "target"]
    if manifest.problem == "segmentation" and len(targets) != 1:
        yield f"it is a segmentation with targets {targets}, expected one modality of that role"
    if manifest.problem == "classification" and targets:
        yield f"it is a classification with targets {targets}, expected none"
    n_classes = len(manifest.class_names)
    for name in targets:
        values = manifest.modalities[name].values
        if values is not None and (len(values) != n_classes or len(set(values)) != n_classes):
            yield f"target {name!r} has values {values} for {n_classes} class names"


def _space_faults(manifest: Manifest) -> Iterable[str]:
    volumes = {name: modality for name, modality in manifest.modalities.items() if modality.kind == "volume"}
    if volumes and not manifest.samples.space:
        yield f"it has volumes {sorted(volumes)} without samples.space"
        return
    for name, modality in volumes.items():
        for number, space in enumerate(manifest.samples.space):
            if manifest.samples.bytes[name][number] is None:
                continue
            if space is None or any(own > most for own, most in zip(space.shape, modality.shape[1:], strict=True)):
                found = None if space is None else space.shape
                yield f"sample {manifest.samples.key[number]!r} has space {found}, {name!r} holds {modality.shape}"


def _shard_faults(manifest: Manifest) -> Iterable[str]:
    samples, shards = manifest.samples, manifest.shards
    yield from (
        f"shard {name!r} is listed {count} times"
        for name, count in Counter(s.file for s in shards).items()
        if count > 1
    )
    counts = Counter(samples.shard)
    outside = sorted(number for number in counts if number >= len(shards))
    if outside:
        yield f"samples name shards {outside}, there are {len(shards)}"
        return
    for number, shard in enumerate(shards):
        if counts[number] != shard.samples:
            yield f"shard {shard.file!r} has {shard.samples} samples, the columns list {counts[number]}"
    size_of = np.array([shard.bytes for shard in shards], dtype=np.int64)
    for name, column in samples.bytes.items():
        files = np.array(samples.shard, dtype=np.int64)
        if name in samples.file:
            files = np.array([0 if number is None else number for number in samples.file[name]], dtype=np.int64)
            strangers = sorted(set(files.tolist()) - set(range(len(shards))))
            if strangers:
                yield f"samples.file.{name} names shards {strangers[:_SHOWN]}, there are {len(shards)}"
                continue
            unequal = [
                key
                for key, a, b in zip(samples.key, column, samples.file[name], strict=True)
                if (a is None) != (b is None)
            ]
            if unequal:
                yield f"{name!r} of {_some(unequal)} has bytes without a file, or a file without bytes"
        ends = size_of[files]
        places = np.array([place or (0, 0) for place in column], dtype=np.int64).reshape(-1, 2)
        beyond = np.flatnonzero(places.sum(axis=1) > ends)
        if len(beyond):
            yield f"{name!r} of sample {samples.key[beyond[0]]!r} ends after its shard"


def _some(items: list[str], separator: str = ", ", render: Callable[[str], str] = str) -> str:
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return separator.join([render(item) for item in items[:_SHOWN]] + more)
