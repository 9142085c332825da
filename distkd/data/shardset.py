"""A shard set opened for reading: any sample by its number, from any thread or process.

Values lie in tars or in one zarr group; the manifest says where. What is read is checked on the way: its length, its
header, and its CRC-32C when that is due. `verify` checks the rest.
"""

# Shapes: S samples of the set, B rows of a batch

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from distkd.data.checksum import crc32c
from distkd.data.codec import DecodeError, decode, npy_header
from distkd.data.consistency import places_of
from distkd.data.manifest import VOLUMES, Manifest, Modality, check_modality
from distkd.data.manifest_file import read_manifest
from distkd.data.wds import TarFiles
from distkd.errors import DataError, SampleError
from distkd.files import raise_disk_fault

if TYPE_CHECKING:
    from distkd.data.verify import Verified
    from distkd.data.zarr import ZarrArrays

__all__ = ["Check", "ShardSet"]

Three = tuple[int, int, int]
Check = Literal["first", "always", "never"]

REMEDY = "copy it again or build it again; `distkd shards verify` checks every byte"

_SHOWN = 5
"""How many of many faults a message names."""


class ShardSet:
    """A folder of shards with its manifest. Opening checks that every file is there and has its size.

    Args:
        check: when to compare the CRC-32C of what is read with the manifest: at the first time that this process reads
            it, always, or never. Sets of format 1 have none.

    Raises:
        DataError: manifest or shards are missing, damaged or do not agree.
        DiskError: the file system cannot give them. Reading raises it, too, rather than call a sample damaged.
    """

    def __init__(self, folder: Path, *, check: Check = "first"):
        self.folder = folder
        self.check: Check = check
        self.manifest: Manifest = read_manifest(folder)
        raise_all([fault for shard in self.manifest.shards if (fault := size_fault(folder, shard.file, shard.bytes))])
        self._start()

    def __len__(self) -> int:
        return self.manifest.n_samples

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return str(self.folder)

    @property
    def failures(self) -> int:
        """Transfers of shards that failed in this process; none where they lie on a disk."""
        return 0

    def read(self, sample: int, modalities: Iterable[str]) -> dict[str, np.ndarray]:
        """Decoded values of one sample, read-only; a modality that it lacks is absent.

        Raises:
            SampleError: its bytes are damaged.
            DataError: no such sample or modality.
        """
        self._check_sample(sample)
        arrays: dict[str, np.ndarray] = {}
        for name in modalities:
            modality = check_modality(self.manifest, name)
            if self._column(name).has_S[sample]:
                arrays[name] = self._read(sample, name, modality)
        return arrays

    def read_rows(
        self,
        name: str,
        samples: Sequence[int] | np.ndarray,
        out: np.ndarray,
        *,
        pool: Executor | None = None,
        parts: int = 2,
    ) -> None:
        """Stored values of samples that all have the modality, into the rows of `out`.

        Args:
            out: (B, *shape) of the stored type, C-contiguous.
            pool: threads that take `parts` of the rows each; worth it where values are decoded or the disk is slow,
                not for values that lie in the page cache as they are.

        Raises:
            DataError: no such sample or modality, a sample lacks it, or its bytes are damaged.
        """
        modality = check_modality(self.manifest, name)
        sample_B = np.asarray(samples, dtype=np.int64)
        assert out.shape == (len(sample_B), *modality.shape), (out.shape, len(sample_B), modality.shape)
        assert (out.dtype, out.flags.c_contiguous) == (modality.dtype, True), (out.dtype, out.strides)
        if len(sample_B) == 0:
            return
        self._check_has(name, sample_B)
        work = self._rows_as_stored if self._column(name).header else self._rows_decoded
        if pool is None or parts < 2 or len(sample_B) < parts:
            work(name, modality, sample_B, out)
            return
        cuts = [len(sample_B) * part // parts for part in range(parts + 1)]

        def part(start: int, stop: int) -> None:
            work(name, modality, sample_B[start:stop], out[start:stop])

        for _ in pool.map(part, cuts[:-1], cuts[1:]):
            pass

    def crop(self, sample: int, name: str, start: Three, size: Three) -> np.ndarray:
        """(channels, *size) voxels of a volume from `start` on; only the chunks that they touch are read.

        Raises:
            DataError: no such volume, the sample lacks it or is smaller, or its bytes are damaged.
        """
        self._check_sample(sample)
        modality = check_modality(self.manifest, name)
        if modality.kind != "volume":
            raise DataError(f"{name!r} is a {modality.kind}, only a volume is read in crops; read it whole")
        self._check_has(name, np.array([sample]))
        whole = self._space_shape(sample)
        if any(a < 0 or n < 1 or a + n > most for a, n, most in zip(start, size, whole, strict=True)):
            raise DataError(
                f"crop {size} at {start} of {self.where(sample, name)} is not inside {whole}; "
                "use a smaller crop, or pad the volume"
            )
        return self._read_box(sample, name, start, size)

    def has(self, modality: str) -> np.ndarray:
        """(S,) bool: which samples have the modality."""
        check_modality(self.manifest, modality)
        return self._column(modality).has_S.copy()

    def block(self, sample: int, name: str) -> int:
        """Number of what a checksum covers: several samples of a zarr group's vectors, else the sample alone."""
        return int(self._column(name).block_S[sample])

    def checking(self, check: Check) -> ShardSet:
        """The same set with another rule for checksums, none of them compared yet."""
        other = copy(self)
        other.check = check
        return other

    def verify(
        self, progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names, threads: int | None = None
    ) -> Verified:
        """Check every byte; see `distkd.data.verify`."""
        from distkd.data.verify import verify

        return verify(self, progress, threads)

    def close(self) -> None:
        """Give the descriptors back; reading opens them again."""
        self._tars.close()
        if self._zarr is not None:
            self._zarr.close()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "manifest": self.manifest, "check": self.check}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        shards = self.manifest.shards
        self._tars = TarFiles(self.folder, [shard.file for shard in shards], [shard.bytes for shard in shards])
        self._shard_S = np.array(self.manifest.samples.shard, dtype=np.int64)
        self._columns: dict[str, _Column] = {}
        self._zarr: ZarrArrays | None = None
        if self.manifest.container == "zarr":
            from distkd.data.zarr import ZarrArrays

            self._zarr = ZarrArrays(self.folder / VOLUMES, self.manifest.modalities, len(self))

    def _column(self, name: str) -> _Column:
        column = self._columns.get(name)
        if column is None:  # two threads that meet make the same one
            column = self._columns[name] = _make_column(self.manifest, name)
        return column

    def _read(self, sample: int, name: str, modality: Modality) -> np.ndarray:
        if modality.codec != "zarr":
            return self._read_member(sample, name, modality)
        return self._read_box(sample, name, (0, 0, 0), self._space_shape(sample) if modality.kind == "volume" else None)

    def _read_member(self, sample: int, name: str, modality: Modality) -> np.ndarray:
        column = self._column(name)
        offset, size = int(column.offset_S[sample]), int(column.size_S[sample])
        where = self.where(sample, name)
        try:
            data = self._tars.read(int(self._shard_S[sample]), offset, size)
        except OSError as error:
            raise_disk_fault(where, error)
            raise SampleError(f"cannot read {where}: {error}; {REMEDY}", sample) from error
        if len(data) != size:
            raise SampleError(f"{where} is cut off: {len(data)} bytes, expected {size}; {REMEDY}", sample)
        if column.due(self.check, np.array([sample])) is not None:
            found, expected = crc32c(data), int(column.crc_S[sample])
            if found != expected:
                words = f"{where} has CRC-32C {found:08x}, manifest says {expected:08x}; {REMEDY}"
                raise SampleError(words, sample)
            column.seen_S[sample] = True
        try:
            return decode(data, modality)
        except DecodeError as error:
            raise SampleError(f"{where} {error}; {REMEDY}", sample) from error

    def _read_box(
        self, sample: int, name: str, start: Three, size: Three | None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """From the zarr group: a volume's voxels, or a vector where there is no size."""
        assert self._zarr is not None
        seen = self._column(name).chunks_seen(sample, start, size)
        check = self.check == "always" or (self.check == "first" and not seen.all())
        try:
            array = self._zarr.read(name, sample, start=start, size=size, out=out, check=check)
        except DataError as error:
            raise SampleError(f"cannot read {self.where(sample, name)}: {error}", sample) from error
        if check:
            seen[...] = True
        if out is None:
            array.flags.writeable = False
        return array

    def _rows_as_stored(self, name: str, modality: Modality, sample_B: np.ndarray, out: np.ndarray) -> None:
        column = self._column(name)
        due_B = column.due(self.check, sample_B)
        rows = list(out.reshape(len(sample_B), -1).view(np.uint8))
        odd = self._tars.read_rows(
            self._shard_S[sample_B].tolist(),
            column.offset_S[sample_B].tolist(),
            column.header,
            rows,
            None if due_B is None else np.where(due_B, column.crc_S[sample_B], -1).tolist(),
        )
        odd += np.flatnonzero(~column.plain_S[sample_B]).tolist() if not column.all_plain else []
        if due_B is not None:
            sound_B = due_B.copy()
            sound_B[odd] = False
            column.seen_S[sample_B[sound_B]] = True
        for place in odd:  # one by one: it names what is wrong, or reads what another writer's header describes
            out[place] = self._read_member(int(sample_B[place]), name, modality)

    def _rows_decoded(self, name: str, modality: Modality, sample_B: np.ndarray, out: np.ndarray) -> None:
        for place, sample in enumerate(sample_B.tolist()):
            if modality.codec != "zarr":
                out[place] = self._read_member(sample, name, modality)
                continue
            size = self._space_shape(sample) if modality.kind == "volume" else None
            if size is not None and size != modality.shape[1:]:
                raise DataError(
                    f"{self.where(sample, name)} has {size} voxels, a batch of whole volumes needs "
                    f"{modality.shape[1:]} of each; read crops"
                )
            self._read_box(sample, name, (0, 0, 0), size, out[place])

    def _check_sample(self, sample: int) -> None:
        if not 0 <= sample < len(self):
            raise DataError(
                f"sample {sample} is not in shard set {str(self.folder)!r}, which has samples 0..{len(self) - 1}"
            )

    def _check_has(self, name: str, sample_B: np.ndarray) -> None:
        if not 0 <= sample_B.min() <= sample_B.max() < len(self):
            self._check_sample(int(sample_B[(sample_B < 0) | (sample_B >= len(self))][0]))
        has_B = self._column(name).has_S[sample_B]
        if not has_B.all():
            sample = int(sample_B[~has_B][0])
            raise DataError(
                f"sample {self.manifest.samples.key[sample]!r} has no {name!r} ({np.count_nonzero(~has_B)} of "
                f"{len(sample_B)} samples lack it); ask `has` before"
            )

    def _space_shape(self, sample: int) -> tuple[int, int, int]:
        space = self.manifest.samples.space[sample]
        assert space is not None, sample  # the manifest was checked
        return space.shape

    def where(self, sample: int, name: str) -> str:
        """What and where a value is, for people."""
        columns = self.manifest.samples
        number = columns.file[name][sample] if name in columns.file else columns.shard[sample]
        assert number is not None, (name, sample)
        return f"{name!r} of sample {columns.key[sample]!r} in shard {self.manifest.shards[number].file!r}"


@dataclass(slots=True)
class _Column:
    """Where one modality's values lie: the manifest's lists as arrays, made once."""

    has_S: np.ndarray
    offset_S: np.ndarray
    size_S: np.ndarray
    crc_S: np.ndarray
    """int64, -1 where there is none."""
    seen_S: np.ndarray
    """bool: nothing is left to compare at a first read. zarr: by block, (blocks, *chunks of a volume)."""
    plain_S: np.ndarray
    """bool: as long as `header` and one row."""
    all_plain: bool
    header: bytes
    """What an npy file of this modality begins with; empty for other codecs."""
    block_S: np.ndarray
    """zarr: what `seen_S` counts; a volume is a block of its own, vectors share one."""
    chunk: Three
    """zarr: voxels of a volume's chunk."""

    def due(self, check: Check, sample_B: np.ndarray) -> np.ndarray | None:
        """(B,) bool: whose CRC-32C is to be compared; None: nobody's."""
        if check == "never":
            return None
        due_B = ~self.seen_S[sample_B] if check == "first" else self.crc_S[sample_B] >= 0
        return due_B if due_B.any() else None

    def chunks_seen(self, sample: int, start: Three, size: Three | None) -> np.ndarray:
        """View of `seen_S`: what a read from a zarr group touches."""
        block = int(self.block_S[sample])
        if size is None:
            return self.seen_S[block : block + 1]
        box = tuple(slice(a // c, -(-(a + n) // c)) for a, n, c in zip(start, size, self.chunk, strict=True))
        return self.seen_S[(block, *box)]


def _make_column(manifest: Manifest, name: str) -> _Column:
    samples, modality = manifest.samples, manifest.modalities[name]
    places = places_of(samples.bytes[name], (-1, -1))
    sums = samples.crc32c.get(name) or [None] * manifest.n_samples
    crc_S = np.array([-1 if crc is None else crc for crc in sums], dtype=np.int64)
    header = npy_header(modality.dtype, modality.shape) if modality.codec == "npy" else b""
    plain_S = places[:, 1] == len(header) + math.prod(modality.shape) * np.dtype(modality.dtype).itemsize
    column = _Column(
        has_S=places[:, 0] >= 0,
        offset_S=np.ascontiguousarray(places[:, 0]),
        size_S=np.ascontiguousarray(places[:, 1]),
        crc_S=crc_S,
        seen_S=crc_S < 0,
        plain_S=plain_S,
        all_plain=bool(plain_S[places[:, 0] >= 0].all()),
        header=header,
        block_S=np.arange(manifest.n_samples),
        chunk=(1, 1, 1),
    )
    if modality.codec == "zarr":
        _set_blocks(column, manifest, name)
    return column


def _set_blocks(column: _Column, manifest: Manifest, name: str) -> None:
    from distkd.data.zarr_layout import VolumeLayout, check_modality_layout

    layout = check_modality_layout(name, manifest.modalities[name])
    if isinstance(layout, VolumeLayout):
        column.chunk = layout.chunk[1:]
        column.seen_S = np.zeros((manifest.n_samples, *layout.grid[1:]), dtype=bool)
    else:
        column.block_S = column.block_S // layout.rows
        column.seen_S = np.zeros(manifest.n_samples // layout.rows + 1, dtype=bool)


def size_fault(folder: Path, file: str, expected: int) -> str:
    """In words, or empty.

    Raises:
        DiskError: the file system cannot say.
    """
    try:
        found = os.stat(f"{folder}/{file}").st_size
    except OSError as error:
        raise_disk_fault(f"shard {file!r} of {str(folder)!r}", error)
        return f"shard {file!r} is missing from {str(folder)!r}"
    if found < expected:
        return f"shard {file!r} is truncated: {found} bytes, manifest says {expected}"
    return f"shard {file!r} has {found} bytes, manifest says {expected}" if found > expected else ""


def raise_all(faults: Sequence[str]) -> None:
    """One error for all of them, the first few in words."""
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError("; ".join(faults[:_SHOWN]) + f"{more}; {REMEDY}")
