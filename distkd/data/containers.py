"""Where the writer puts values: tars one after another, or the files of a zarr group."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from distkd.data.checksum import crc32c
from distkd.data.disk import told
from distkd.data.manifest import VOLUMES, Description, Samples, Shard
from distkd.files import digest, sync

__all__ = ["Container", "Placed", "TarContainer", "ZarrContainer", "count_samples"]

_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Placed:
    """Where a sample's values went."""

    shard: int
    offset: int
    bytes: dict[str, tuple[int, int] | None]
    crc32c: dict[str, int | None] = field(default_factory=dict[str, "int | None"])
    file: dict[str, int | None] = field(default_factory=dict[str, "int | None"])


class Container(Protocol):
    """Takes samples in order; what is finished stays so, also when the process dies."""

    def make_room(self, n_bytes: int) -> list[Shard]:
        """Before a sample: files that are now complete, which hold all samples before it, or none."""
        ...

    def put(self, key: str, about: Mapping[str, object], values: Mapping[str, bytes | np.ndarray]) -> Placed: ...

    def finish(self, samples: Samples) -> tuple[Samples, list[Shard]]:
        """After the last sample: the columns, completed, and the files not named before."""
        ...

    def drop(self) -> None:
        """Close what is open; it is not finished."""
        ...


class TarContainer:
    """WebDataset tars; a tar is complete when the next one begins."""

    def __init__(self, folder: Path, description: Description, shard_bytes: int, finished: int):
        self._folder, self._description, self._shard_bytes = folder, description, shard_bytes
        self._number = finished
        self._tar: _Tar | None = None

    def make_room(self, n_bytes: int) -> list[Shard]:
        tar = self._tar
        if tar is None or not tar.samples or tar.position + n_bytes <= self._shard_bytes:
            return []
        return [self._close(tar)]

    def put(self, key: str, about: Mapping[str, object], values: Mapping[str, bytes | np.ndarray]) -> Placed:
        with told(self._name, self._folder):
            if self._tar is None:
                self._tar = _Tar(self._folder / self._name)
            tar = self._tar
            offset = tar.position
            tar.add(f"{key}.json", json.dumps(about, sort_keys=True).encode())
            places: dict[str, tuple[int, int] | None] = {}
            sums: dict[str, int | None] = {}
            for name, modality in self._description.modalities.items():
                data = values.get(name)
                assert not isinstance(data, np.ndarray), name
                places[name] = None if data is None else tar.add(f"{key}.{name}.{modality.codec}", data)
                sums[name] = None if data is None else crc32c(data)
            tar.samples += 1
        return Placed(shard=self._number, offset=offset, bytes=places, crc32c=sums)

    def finish(self, samples: Samples) -> tuple[Samples, list[Shard]]:
        return samples, [] if self._tar is None else [self._close(self._tar)]

    def drop(self) -> None:
        if self._tar is not None:
            self._tar.drop()

    @property
    def _name(self) -> str:
        return f"{self._description.task}-{self._number:06d}.tar"

    def _close(self, tar: _Tar) -> Shard:
        with told(self._name, self._folder):
            shard = tar.close()
        self._tar = None
        self._number += 1
        return shard


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
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return Shard(file=self._path.name, samples=self.samples, bytes=self.position, sha256=self._hash.hexdigest())

    def drop(self) -> None:
        """Without what a full disk would not take."""
        try:
            self._file.close()
        except OSError:
            self._path.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.position += len(data)


class ZarrContainer:
    """One zarr group; a sample's volumes are complete when they are written, vectors at the end.

    Args:
        finished: files that are complete.
        number: of the sample to go on with; what a killed process left of later ones is no part of the set.
    """

    def __init__(self, folder: Path, description: Description, finished: int, number: int):
        from distkd.data.zarr import ZarrWriter

        self._folder, self._modalities = folder, description.modalities
        self._writer = ZarrWriter(folder / VOLUMES, description.modalities)
        self._n_files = finished
        self._complete: list[Shard] = []
        self._number = number
        self._writer.drop_from(number)

    def make_room(self, n_bytes: int) -> list[Shard]:
        del n_bytes
        complete, self._complete = self._complete, []
        return complete

    def put(self, key: str, about: Mapping[str, object], values: Mapping[str, bytes | np.ndarray]) -> Placed:
        del key, about  # the manifest has them; a zarr group has no place for them
        places: dict[str, tuple[int, int] | None] = dict.fromkeys(self._modalities)
        files: dict[str, int | None] = dict.fromkeys(self._modalities)
        first = self._n_files
        for name, modality in self._modalities.items():
            array = values.get(name)
            if array is None:
                continue
            assert isinstance(array, np.ndarray), name
            with told(f"{VOLUMES}/{name}", self._folder):
                path = self._writer.write(name, self._number, array)
                if modality.kind == "volume":
                    self._complete.append(self._shard(path))
                    places[name], files[name] = (0, self._complete[-1].bytes), self._n_files
                    self._n_files += 1
                else:
                    sync(path)
                    places[name], files[name] = (0, array.nbytes), 0
        self._number += 1
        return Placed(shard=first if self._n_files > first else 0, offset=0, bytes=places, file=files)

    def finish(self, samples: Samples) -> tuple[Samples, list[Shard]]:
        shards = self.make_room(0)
        with told(VOLUMES, self._folder):
            metadata = self._writer.finish(self._number)
            blocks = {
                name: self._vector_files(name, samples)
                for name, modality in self._modalities.items()
                if modality.kind == "vector"
            }
            files = dict(samples.file)
            for name, of_sample in blocks.items():
                number_of = {path: self._n_files + k for k, path in enumerate(dict.fromkeys(filter(None, of_sample)))}
                files[name] = [None if path is None else number_of[path] for path in of_sample]
                shards += [self._shard(path) for path in number_of]
                self._n_files += len(number_of)
            shards += [self._shard(path) for path in metadata]
        return samples.model_copy(update={"file": files}), shards

    def drop(self) -> None:
        pass

    def _vector_files(self, name: str, samples: Samples) -> list[Path | None]:
        return [
            None if place is None else self._writer.vector_file(name, number)
            for number, place in enumerate(samples.bytes[name])
        ]

    def _shard(self, path: Path) -> Shard:
        sync(path)
        file = path.relative_to(self._folder).as_posix()
        return Shard(file=file, samples=0, bytes=path.stat().st_size, sha256=digest(path))


def count_samples(samples: Samples, shards: list[Shard]) -> list[Shard]:
    """The files with how many samples begin in each."""
    counts = Counter(samples.shard)
    return [shard.model_copy(update={"samples": counts[number]}) for number, shard in enumerate(shards)]
