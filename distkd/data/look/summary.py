"""What a shard set holds, in numbers: counted from its manifest, for pages and for scripts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.manifest import SPLITS, VOLUMES, Manifest, Modality, Shard, Space
from distkd.data.shardset import ShardSet
from distkd.data.splits import split_numbers

__all__ = [
    "ClassSummary",
    "Combination",
    "ModalitySummary",
    "SpaceSummary",
    "SplitSummary",
    "Summary",
    "missing_notes",
    "summary",
]

# Shapes: S samples of the set, M modalities

_TELLING = 0.2
"""Difference of two classes' shares of missing values above which missing itself tells the class."""


@dataclass(frozen=True)
class ModalitySummary:
    """One modality: how it is stored, how often it is there, what it takes."""

    role: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    chunk: tuple[int, ...] | None
    """Of a volume: what is read and checked as one block."""
    compression: str
    unit: str
    values: list[int] | None
    present: int
    missing: int
    bytes: int
    raw_bytes: int
    """Of the same values as arrays."""

    @property
    def ratio(self) -> float:
        """Raw by stored; 0 where nothing is stored."""
        return self.raw_bytes / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Combination:
    """Samples that have exactly these inputs and targets."""

    modalities: list[str]
    samples: int


@dataclass(frozen=True)
class SpaceSummary:
    """Samples whose voxels lie in the same way."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    orientation: str | None
    """To where the voxel axes run: R or L, A or P, S or I, in the order of the file; None where nothing says it."""
    samples: int


@dataclass(frozen=True)
class ClassSummary:
    """A class, or the samples without one."""

    name: str | None
    samples: int
    patients: int


@dataclass(frozen=True)
class SplitSummary:
    """A split of a fold; `classes` in the order of the class names, then those without a label."""

    fold: int
    split: str
    patients: int
    samples: int
    classes: list[int]


@dataclass(frozen=True)
class Summary:
    """All that `info` prints."""

    folder: str
    format_version: int
    task: str
    problem: str
    container: str
    class_names: list[str]
    samples: int
    patients: int
    groups: int
    bytes: int
    files: int
    smallest: Shard
    largest: Shard
    checksums: list[str]
    source: str
    licence: str
    modalities: dict[str, ModalitySummary]
    combinations: list[Combination]
    spaces: list[SpaceSummary]
    classes: list[ClassSummary]
    """Empty for a segmentation, whose classes are those of voxels."""
    split_rule: str
    split_seed: int | None
    splits: list[SplitSummary]
    excluded: dict[str, str]
    notes: list[str]

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        fields |= {name: getattr(self, name).model_dump() for name in ("smallest", "largest")}
        return json.dumps(fields, indent=1, allow_nan=False)


def summary(shard_set: ShardSet) -> Summary:
    """Everything that can be counted without reading values."""
    manifest = shard_set.manifest
    groups = {group for group in manifest.samples.group if group is not None}
    holding = _holding(manifest)
    return Summary(
        folder=shard_set.place,
        format_version=manifest.format_version,
        task=manifest.task,
        problem=manifest.problem,
        container=manifest.container,
        class_names=manifest.class_names,
        samples=manifest.n_samples,
        patients=manifest.n_patients,
        groups=len(groups),
        bytes=sum(shard.bytes for shard in manifest.shards),
        files=len(manifest.shards),
        smallest=min(holding, key=lambda shard: shard.bytes),
        largest=max(holding, key=lambda shard: shard.bytes),
        checksums=_checksums(manifest),
        source=manifest.source,
        licence=manifest.licence,
        modalities={name: _modality(shard_set, name) for name in manifest.modalities},
        combinations=_combinations(manifest),
        spaces=_spaces(manifest.samples.space),
        classes=_classes(manifest) if manifest.problem == "classification" else [],
        split_rule=manifest.split_rule,
        split_seed=manifest.split_seed,
        splits=_splits(manifest),
        excluded=manifest.excluded,
        notes=missing_notes(manifest),
    )


def _holding(manifest: Manifest) -> list[Shard]:
    """Files whose sizes say how the samples are cut up: neither zarr.json nor the blocks of vectors beside volumes."""
    files = [shard for shard in manifest.shards if not shard.file.endswith(".json")]
    volumes = tuple(f"{VOLUMES}/{name}/" for name, one in manifest.modalities.items() if one.kind == "volume")
    return [shard for shard in files if shard.file.startswith(volumes)] or files


def missing_notes(manifest: Manifest) -> list[str]:
    """A warning for modalities that classes lack so unequally that a model may learn this in place of the values."""
    labels = np.array(manifest.samples.label)
    named_by: dict[str, list[str]] = {}
    for name, places in manifest.samples.bytes.items():
        if manifest.modalities[name].role == "aux":
            continue
        absent = np.array([place is None for place in places])
        shares = {
            class_name: float(absent[labels == label].mean())
            for label, class_name in enumerate(manifest.class_names)
            if (labels == label).any()
        }
        if shares and max(shares.values()) - min(shares.values()) > _TELLING:
            found = ", ".join(f"{class_name} {share:.0%}" for class_name, share in shares.items())
            named_by.setdefault(found, []).append(name)
    return [
        f"note: {', '.join(names)} missing unequally ({found}): that tells the class; compare models on pairs only"
        for found, names in named_by.items()
    ]


def _modality(shard_set: ShardSet, name: str) -> ModalitySummary:
    manifest = shard_set.manifest
    modality = manifest.modalities[name]
    places = manifest.samples.bytes[name]
    present = [number for number, place in enumerate(places) if place is not None]
    return ModalitySummary(
        role=modality.role,
        kind=modality.kind,
        shape=modality.shape,
        dtype=modality.dtype,
        codec=modality.codec,
        chunk=_chunk(shard_set, name, modality),
        compression=modality.compression,
        unit=modality.unit,
        values=modality.values,
        present=len(present),
        missing=len(places) - len(present),
        bytes=sum(place[1] for place in places if place is not None),
        raw_bytes=sum(_raw_bytes(modality, manifest.samples.space, number) for number in present),
    )


def _raw_bytes(modality: Modality, spaces: list[Space | None], number: int) -> int:
    space = spaces[number] if modality.kind == "volume" else None
    shape = modality.shape if space is None else (modality.shape[0], *space.shape)
    return math.prod(shape) * np.dtype(modality.dtype).itemsize


def _chunk(shard_set: ShardSet, name: str, modality: Modality) -> tuple[int, ...] | None:
    """As it is, where the manifest leaves it to the group."""
    if modality.kind != "volume" or modality.chunk is not None:
        return modality.chunk
    from distkd.data.zarr_layout import VolumeLayout, read_layout

    layout = read_layout(shard_set.folder / VOLUMES, name, modality, len(shard_set))
    assert isinstance(layout, VolumeLayout), name
    return layout.chunk


def _checksums(manifest: Manifest) -> list[str]:
    if manifest.container == "zarr":
        return ["SHA-256 of each file", "CRC-32C of each chunk"]
    return ["SHA-256 of each file", *(["CRC-32C of each value"] if manifest.samples.crc32c else [])]


def _combinations(manifest: Manifest) -> list[Combination]:
    """Most frequent first, then those with more modalities."""
    names = [name for name, modality in manifest.modalities.items() if modality.role != "aux"]
    has_SM = np.array([[place is not None for place in manifest.samples.bytes[name]] for name in names]).T
    rows, counts = np.unique(has_SM, axis=0, return_counts=True)
    found = [
        Combination([name for name, has in zip(names, row, strict=True) if has], int(count))
        for row, count in zip(rows.tolist(), counts, strict=True)
    ]
    return sorted(found, key=lambda combination: (-combination.samples, -len(combination.modalities)))


def _spaces(spaces: Iterable[Space | None]) -> list[SpaceSummary]:
    """Most frequent first; what float32 headers lose does not tell two spaces apart."""
    known = [space for space in spaces if space is not None]
    if not known:
        return []
    orientation = {space.affine: _orientation(space) for space in known}
    counts = Counter(
        (space.shape, space.spacing and tuple(round(mm, 4) for mm in space.spacing), orientation[space.affine])
        for space in known
    )
    return [
        SpaceSummary(shape, spacing, axes, count)  # pyright: ignore[reportArgumentType]
        for (shape, spacing, axes), count in sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    ]


def _orientation(space: Space) -> str | None:
    import nibabel

    if space.affine is None:
        return None
    return "".join(code or "?" for code in nibabel.aff2axcodes(np.array(space.affine)))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType, reportUnknownArgumentType]


def _classes(manifest: Manifest) -> list[ClassSummary]:
    labels = np.array(manifest.samples.label)
    patients = np.array(manifest.samples.patient)
    numbers = [*range(len(manifest.class_names)), *([UNLABELLED] if (labels == UNLABELLED).any() else [])]
    return [
        ClassSummary(
            name=None if label == UNLABELLED else manifest.class_names[label],
            samples=int((labels == label).sum()),
            patients=len(np.unique(patients[labels == label])),
        )
        for label in numbers
    ]


def _splits(manifest: Manifest) -> list[SplitSummary]:
    labels = np.array(manifest.samples.label)
    numbers = [*range(len(manifest.class_names)), UNLABELLED] if manifest.problem == "classification" else []
    found: list[SplitSummary] = []
    for number, fold in enumerate(manifest.folds):
        for split in SPLITS:
            of_split = labels[split_numbers(manifest, number, split)]
            counts = [int((of_split == label).sum()) for label in numbers]
            found.append(SplitSummary(number, split, len(fold.patients(split)), len(of_split), counts))
    return found
