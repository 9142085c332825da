"""The parts of a manifest against each other, and the law that no patient is in two splits of a fold."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.manifest import SHOWN, SPLITS, Manifest, Modality, some
from distkd.errors import DataError

__all__ = ["check_consistency", "check_patient_law", "places_of"]


def check_patient_law(manifest: Manifest) -> None:
    """No patient is in two splits of a fold.

    Raises:
        DataError: naming the fold, the patients and their splits.
    """
    for number, fold in enumerate(manifest.folds):
        columns = [fold.patients(split) for split in SPLITS]
        if len(set[str]().union(*columns)) == sum(map(len, columns)):
            continue
        splits_of: defaultdict[str, list[str]] = defaultdict(list)
        for split, patients in zip(SPLITS, columns, strict=True):
            for patient in patients:
                splits_of[patient].append(split)
        twice = [f"{patient!r} ({' and '.join(splits)})" for patient, splits in splits_of.items() if len(splits) > 1]
        raise DataError(
            f"patient in two splits of fold {number}: {some(twice)}; a patient's samples must stay in one split: "
            "build the shard set again with folds by patient"
        )


def places_of(column: Sequence[tuple[int, int] | None], absent: tuple[int, int]) -> np.ndarray:
    """(S, 2) int64: offset and bytes of each sample's values."""
    flat = chain.from_iterable([absent if place is None else place for place in column])
    return np.fromiter(flat, dtype=np.int64, count=2 * len(column)).reshape(-1, 2)


def check_consistency(manifest: Manifest, where: str) -> None:
    """The manifest agrees with itself; `where` starts the message.

    Raises:
        DataError: with all the faults found, the first few in words.
    """
    faults = list(_faults(manifest))
    if faults:
        raise DataError(f"{where} contradicts itself: {some(faults, '; ')}; build the shard set again")
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
    yield from _key_faults(manifest)
    yield from (
        f"class name {name!r} occurs {count} times"
        for name, count in Counter(manifest.class_names).items()
        if count > 1
    )
    yield from _label_faults(manifest)
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
        if not all(known.issuperset(fold.patients(split)) for split in SPLITS):
            strangers = [repr(p) for split in SPLITS for p in fold.patients(split) if p not in known]
            yield f"fold {number} names patients without samples: {some(strangers)}"


def _key_faults(manifest: Manifest) -> Iterable[str]:
    samples, shards = manifest.samples, manifest.shards
    if len(set(samples.key)) == manifest.n_samples:
        return
    numbers_of: defaultdict[str, list[int]] = defaultdict(list)
    for number, key in enumerate(samples.key):
        numbers_of[key].append(number)
    for key, numbers in numbers_of.items():
        if len(numbers) > 1:
            files = dict.fromkeys(samples.shard[number] for number in numbers)
            names = [repr(shards[file].file) for file in files if file < len(shards)]
            yield f"key {key!r} occurs {len(numbers)} times, in {some(names) or 'no shard'}"


def _label_faults(manifest: Manifest) -> Iterable[str]:
    samples, highest = manifest.samples, len(manifest.class_names) - 1
    wrong = sorted(label for label in set(samples.label) if not UNLABELLED <= label <= highest)
    if wrong:
        yield (
            f"labels [{some(list(map(str, wrong)))}] are outside {UNLABELLED}..{highest} "
            f"({len(manifest.class_names)} class names): sample {samples.key[samples.label.index(wrong[0])]!r} has "
            f"{wrong[0]}"
        )


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
    shape_S3 = np.array([(0, 0, 0) if space is None else space.shape for space in manifest.samples.space])
    for name, modality in volumes.items():
        has_S = places_of(manifest.samples.bytes[name], (-1, -1))[:, 0] >= 0
        if len(modality.shape) != 4:  # which is told already
            continue
        fits_S = (shape_S3 > 0).all(axis=1) & (shape_S3 <= np.array(modality.shape[1:])).all(axis=1)
        for number in np.flatnonzero(has_S & ~fits_S).tolist():
            space = manifest.samples.space[number]
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
        yield f"samples name shards [{some(list(map(str, outside)))}], there are {len(shards)}"
        return
    for number, shard in enumerate(shards):
        if counts[number] != shard.samples:
            yield f"shard {shard.file!r} has {shard.samples} samples, the columns list {counts[number]}"
    size_of = np.array([shard.bytes for shard in shards], dtype=np.int64)
    shard_S = np.array(samples.shard, dtype=np.int64)
    for name, column in samples.bytes.items():
        places = places_of(column, (0, 0))
        files_S = shard_S
        if name in samples.file:
            files = samples.file[name]
            files_S = np.array([0 if number is None else number for number in files], dtype=np.int64)
            strangers = np.unique(files_S[files_S >= len(shards)])
            if len(strangers):
                yield f"samples.file.{name} names shards {strangers[:SHOWN].tolist()}, there are {len(shards)}"
                continue
            unequal = [key for key, a, b in zip(samples.key, column, files, strict=True) if (a is None) != (b is None)]
            if unequal:
                yield f"{name!r} of {some(unequal)} has bytes without a file, or a file without bytes"
        beyond = np.flatnonzero(places.sum(axis=1) > size_of[files_S])
        if len(beyond):
            yield f"{name!r} of sample {samples.key[beyond[0]]!r} ends after its shard"
        yield from _size_faults(manifest, name, places)


def _size_faults(manifest: Manifest, name: str, places: np.ndarray) -> Iterable[str]:
    """A shape that no file can have would ask for as much memory."""
    modality = manifest.modalities[name]
    if modality.codec != "npy":
        return
    n_bytes = math.prod(modality.shape) * np.dtype(modality.dtype).itemsize
    short = np.flatnonzero((places[:, 1] > 0) & (places[:, 1] < n_bytes))
    if len(short):
        yield (
            f"{name!r} of sample {manifest.samples.key[short[0]]!r} has {places[short[0], 1]} bytes, values of shape "
            f"{modality.shape} take {n_bytes} (so {len(short)} samples)"
        )
