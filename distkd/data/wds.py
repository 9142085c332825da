"""A shard set opened for reading: any sample by its number, one `pread` per modality, from any thread or process."""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from distkd.data.codec import DecodeError, decode
from distkd.data.manifest import MANIFEST, Manifest, Modality, check_modality, read_manifest
from distkd.errors import DataError

__all__ = ["ShardSet"]

_MAX_OPEN = 512
"""Descriptors kept open; of a set with more shards each read opens its own."""

_VERIFY = "copy it again or build it again; `distkd shards verify` checks every byte"


class ShardSet:
    """A folder of tars with its manifest. Opening checks that every shard is there and has its size.

    Raises:
        DataError: manifest or shards are missing, damaged or do not agree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}
        self._process = os.getpid()
        _raise_all([fault for shard in self.manifest.shards if (fault := self._size_fault(shard.file, shard.bytes))])

    def __len__(self) -> int:
        return self.manifest.n_samples

    def read(self, sample: int, modalities: Iterable[str]) -> dict[str, np.ndarray]:
        """Decoded values of one sample, read-only; a modality that it lacks is absent.

        Raises:
            DataError: no such sample or modality, or its bytes are damaged.
        """
        if not 0 <= sample < len(self):
            raise DataError(
                f"sample {sample} is not in shard set {str(self.folder)!r}, which has samples 0..{len(self) - 1}"
            )
        arrays: dict[str, np.ndarray] = {}
        for name in modalities:
            modality = check_modality(self.manifest, name)
            place = self.manifest.samples.bytes[name][sample]
            if place is not None:
                arrays[name] = self._decode(sample, name, modality, *place)
        return arrays

    def has(self, modality: str) -> np.ndarray:
        """(samples,) bool: which samples have the modality."""
        check_modality(self.manifest, modality)
        return np.array([place is not None for place in self.manifest.samples.bytes[modality]])

    def verify(self, progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names) -> None:
        """Hash every byte, walk every tar, decode every sample.

        Args:
            progress: wraps the names of the shards, to show how far it is.

        Raises:
            DataError: with all that was found wrong, the first few in words.
        """
        faults: list[str] = []
        of_shard: list[list[int]] = [[] for _ in self.manifest.shards]
        for sample, number in enumerate(self.manifest.samples.shard):
            of_shard[number].append(sample)
        number_of = {shard.file: number for number, shard in enumerate(self.manifest.shards)}
        for name in progress(list(number_of)):
            faults += self._shard_faults(number_of[name], of_shard[number_of[name]])
        listed = {MANIFEST, *number_of}
        extra = sorted(path.name for path in self.folder.glob("*.tar") if path.name not in listed)
        faults += [f"{name!r} is in the folder, but not in the manifest; remove it" for name in extra]
        _raise_all(faults)

    def close(self) -> None:
        """Give the descriptors back; reading opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._descriptors = {}
        self._process = os.getpid()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors") and self._process == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)

    def _decode(self, sample: int, name: str, modality: Modality, offset: int, size: int) -> np.ndarray:
        number = self.manifest.samples.shard[sample]
        where = (
            f"{name!r} of sample {self.manifest.samples.key[sample]!r} in shard {self.manifest.shards[number].file!r}"
        )
        try:
            data = self._pread(number, offset, size)
        except OSError as error:
            raise DataError(f"cannot read {where}: {error}; {_VERIFY}") from error
        if len(data) != size:
            raise DataError(f"{where} is cut off: {len(data)} bytes, expected {size}; {_VERIFY}")
        try:
            return decode(data, modality)
        except DecodeError as error:
            raise DataError(f"{where} {error}; {_VERIFY}") from error

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        path = self.folder / self.manifest.shards[number].file
        if len(self.manifest.shards) > _MAX_OPEN:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        if self._process != os.getpid():
            # a fork: the parent owns the inherited descriptors, and a thread that is gone may have held its lock
            self._lock, self._descriptors, self._process = threading.Lock(), {}, os.getpid()
        descriptor = self._descriptors.get(number)
        if descriptor is None:
            with self._lock:
                if number not in self._descriptors:
                    self._descriptors[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                descriptor = self._descriptors[number]
        return os.pread(descriptor, size, offset)

    def _size_fault(self, file: str, expected: int) -> str:
        try:
            found = (self.folder / file).stat().st_size
        except OSError:
            return f"shard {file!r} is missing from {str(self.folder)!r}"
        if found < expected:
            return f"shard {file!r} is truncated: {found} bytes, manifest says {expected}"
        return f"shard {file!r} has {found} bytes, manifest says {expected}" if found > expected else ""

    def _shard_faults(self, number: int, samples: list[int]) -> list[str]:
        shard, path = self.manifest.shards[number], self.folder / self.manifest.shards[number].file
        fault = self._size_fault(shard.file, shard.bytes)
        if fault:
            return [fault]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        faults = (
            []
            if found == shard.sha256
            else [f"shard {shard.file!r} has SHA-256 {found[:12]}..., manifest says {shard.sha256[:12]}..."]
        )
        faults += self._member_faults(path, samples)
        for sample in samples:
            try:
                self.read(sample, self.manifest.modalities)
            except DataError as error:
                faults.append(str(error).removesuffix(f"; {_VERIFY}"))
        return faults

    def _member_faults(self, path: Path, samples: list[int]) -> list[str]:
        columns, modalities = self.manifest.samples, self.manifest.modalities
        expected = {
            f"{columns.key[sample]}.{name}.{modality.codec}": columns.bytes[name][sample]
            for sample in samples
            for name, modality in modalities.items()
            if columns.bytes[name][sample] is not None
        }
        try:
            with tarfile.open(path, "r:") as tar:
                members = {member.name: (member.offset_data, member.size) for member in tar}
        except (tarfile.TarError, OSError) as error:
            return [f"shard {path.name!r} is not a readable tar ({error})"]
        keys = {name.partition(".")[0] for name in members}
        faults = [
            f"{name!r} of shard {path.name!r} lies at {members.get(name, 'no place')}, manifest says {place}"
            for name, place in expected.items()
            if members.get(name) != place
        ]
        if len(keys) != len(samples):
            faults.append(f"shard {path.name!r} has {len(keys)} samples, manifest says {len(samples)}")
        return faults


def _raise_all(faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError("; ".join(faults[:5]) + f"{more}; {_VERIFY}")
