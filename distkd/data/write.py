"""Arrays to a shard set: plain WebDataset tars and a manifest, equal bytes for equal input, all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.codec import encode
from distkd.data.manifest import (
    Description,
    Fold,
    Manifest,
    Modality,
    Samples,
    Shard,
    check_consistency,
    check_modality,
    write_manifest,
)
from distkd.errors import DataError

__all__ = ["ShardWriter"]

_BLOCK_BYTES = 512
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


class ShardWriter:
    """Writes samples in the order of `add`; the folder appears when the `with` block ends well, and not otherwise.

    Each sample is `<key>.json` (label, patient, group: what other WebDataset readers need) and `<key>.<modality>.<ext>`
    per modality that it has.
    """

    def __init__(self, out: Path, description: Description, *, shard_bytes: int = 64 << 20):
        self.out = out
        self.manifest: Manifest | None = None
        self._description = description
        self._shard_bytes = shard_bytes
        self._aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
        self._samples = Samples(
            key=[],
            patient=[],
            group=[],
            label=[],
            shard=[],
            offset=[],
            bytes={name: [] for name in description.modalities},
        )
        self._seen: set[str] = set()
        self._shards: list[Shard] = []
        self._tar: _Tar | None = None
        self._folds: tuple[list[Fold], str, int | None] | None = None

    def __enter__(self) -> Self:
        if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
            raise DataError(f"output {str(self.out)!r} exists already; remove it or name another folder with --out")
        shutil.rmtree(self._aside, ignore_errors=True)
        try:
            self._aside.mkdir(parents=True)
        except OSError as error:
            raise DataError(
                f"cannot make the output folder beside {str(self.out)!r}: {error}; choose another --out"
            ) from error
        return self

    def add(
        self,
        key: str,
        arrays: Mapping[str, np.ndarray],
        *,
        patient: str,
        label: int | None,
        group: str | None = None,
    ) -> None:
        """One sample; a modality that it lacks is left out of `arrays`.

        NaN in a vector is a missing value; the transform fills it.

        Raises:
            DataError: the sample does not fit the description, holds infinities, or its key was seen before.
        """
        if not _KEY.fullmatch(key):
            raise DataError(f"sample key {key!r} is not usable; expected 1 to 80 letters, digits, '-' or '_'")
        if key in self._seen:
            raise DataError(f"sample key {key!r} occurs twice; keys must be unique in a shard set")
        n_classes = len(self._description.class_names)
        if label is not None and label != UNLABELLED and not 0 <= label < n_classes:
            raise DataError(
                f"sample {key!r} has label {label}, expected 0..{n_classes - 1}, or None where it is unknown"
            )
        if not arrays:
            raise DataError(f"sample {key!r} has no modality at all; leave it out")
        encoded = {
            name: encode(
                _checked(array, check_modality(self._description, name), name, key), self._description.modalities[name]
            )
            for name, array in arrays.items()
        }
        label = UNLABELLED if label is None else label
        about = {"group": group, "label": label, "patient": patient}
        tar = self._tar_for(sum(len(data) for data in encoded.values()))
        samples = self._samples
        samples.shard.append(len(self._shards))
        samples.offset.append(tar.position)
        tar.add(f"{key}.json", json.dumps(about, sort_keys=True).encode())
        for name, modality in self._description.modalities.items():
            place = tar.add(f"{key}.{name}.{modality.codec}", encoded[name]) if name in encoded else None
            samples.bytes[name].append(place)
        tar.samples += 1
        samples.key.append(key)
        samples.patient.append(patient)
        samples.group.append(group)
        samples.label.append(label)
        self._seen.add(key)

    def split(self, folds: Sequence[Fold], *, rule: str, seed: int | None) -> None:
        """Who is in which split, and the rule in words; once, at any time before the end."""
        self._folds = (list(folds), rule, seed)

    @property
    def patients(self) -> list[str]:
        """Of the samples added so far, in order."""
        return list(self._samples.patient)

    @property
    def labels(self) -> list[int]:
        """Of the samples added so far, in order."""
        return list(self._samples.label)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._tar is not None:
                self._finish_tar(self._tar)
            if error is None:
                self._finish()
        finally:
            shutil.rmtree(self._aside, ignore_errors=True)

    def _finish(self) -> None:
        if not self._samples.key:
            raise DataError(f"no sample for {str(self.out)!r}: every one was skipped; check --raw")
        assert self._folds is not None, "split() was not called"
        folds, rule, seed = self._folds
        fields = {name: getattr(self._description, name) for name in Description.model_fields}
        manifest = Manifest(
            **fields, shards=self._shards, samples=self._samples, folds=folds, split_rule=rule, split_seed=seed
        )
        check_consistency(manifest, f"the new shard set {str(self.out)!r}")
        write_manifest(manifest, self._aside)
        try:
            self._aside.rename(self.out)
        except OSError as error:
            raise DataError(
                f"cannot move the finished shards to {str(self.out)!r}: {error}; choose another --out"
            ) from error
        self.manifest = manifest

    def _tar_for(self, n_bytes: int) -> _Tar:
        if self._tar is not None and self._tar.samples and self._tar.position + n_bytes > self._shard_bytes:
            self._finish_tar(self._tar)
        if self._tar is None:
            self._tar = _Tar(self._aside / f"{self._description.task}-{len(self._shards):06d}.tar")
        return self._tar

    def _finish_tar(self, tar: _Tar) -> None:
        self._tar = None
        self._shards.append(tar.close())


class _Tar:
    """A tar whose bytes depend on its members only, hashed while it is written."""

    def __init__(self, path: Path):
        self.samples = 0
        self.position = 0
        self._path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Offset and size of the data."""
        member = tarfile.TarInfo(name)  # mtime, owner and group are zero, mode 0644: nothing of this machine
        member.size = len(data)
        # USTAR: a PAX header per member costs every reader some 40 %
        self._write(member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        place = (self.position, len(data))
        self._write(data + bytes(-len(data) % _BLOCK_BYTES))
        return place

    def close(self) -> Shard:
        self._write(bytes(-(self.position + 2 * _BLOCK_BYTES) % tarfile.RECORDSIZE + 2 * _BLOCK_BYTES))
        self._file.close()
        return Shard(file=self._path.name, samples=self.samples, bytes=self.position, sha256=self._hash.hexdigest())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.position += len(data)


def _checked(array: np.ndarray, modality: Modality, name: str, key: str) -> np.ndarray:
    if array.shape != modality.shape:
        raise DataError(f"{name!r} of sample {key!r} has shape {array.shape}, expected {modality.shape}")
    if not np.can_cast(array.dtype, modality.dtype, "same_kind"):
        raise DataError(f"{name!r} of sample {key!r} is {array.dtype}, which does not fit {modality.dtype}")
    # an overflow in the cast becomes an infinity and is refused as one
    with np.errstate(over="ignore"):
        array = array.astype(modality.dtype, copy=False)
    if array.dtype.kind == "f":
        infinite = np.flatnonzero(np.isinf(array))
        if len(infinite):
            first = int(infinite[0])
            column = modality.features[first] if modality.features else str(first)
            raise DataError(
                f"{name!r} of sample {key!r} is infinite in column {column} ({len(infinite)} such values); "
                "mend the raw file, or leave the value blank if it is missing"
            )
        if modality.kind != "vector" and np.isnan(array).any():
            raise DataError(
                f"{name!r} of sample {key!r} holds NaN, which only a vector may (missing values); mend the raw file"
            )
    return array
