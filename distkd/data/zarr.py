"""Volumes and vectors of a zarr v3 group, read chunk by chunk: what a crop touches and nothing else.

The zarr library is not on this path: it costs a millisecond an access, and reads a shard's index at each. Which samples
have which modality is the manifest's business; here an absent file is an error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from distkd.data.checksum import crc32c
from distkd.data.descriptors import OpenFile, Recent
from distkd.data.manifest import Modality
from distkd.data.zarr_layout import (
    CRC_BYTES,
    REBUILD,
    BlockLayout,
    Piece,
    Three,
    VolumeLayout,
    default_chunk,
    read_layout,
    touched,
)
from distkd.data.zarr_write import ZarrWriter
from distkd.errors import DataError
from distkd.files import raise_disk_fault

__all__ = ["ZarrArrays", "ZarrWriter", "default_chunk"]

_MAX_OPEN = 256
"""Descriptors kept open."""
_INDEX_BYTES = 64 << 20
"""Of indexes kept; they outlive their descriptors, since many files and few bytes are what a set of volumes has."""
_OBJECT_BYTES = 400
"""About what an array and its place in a dict take, whatever is in it."""
_RUN_BYTES = 1 << 20
"""Neighbouring chunks are fetched together up to this, so that they are still in the cache when they are copied."""

_NO_CHUNK = 2**64 - 1


class ZarrArrays:
    """A group opened for reading, from any thread or process.

    Raises:
        DataError: a `zarr.json` is missing, damaged, or disagrees with the manifest.
    """

    def __init__(self, folder: Path, modalities: Mapping[str, Modality], n_samples: int):
        self.folder = folder
        self.n_samples = n_samples
        self._layouts = {name: read_layout(folder, name, modality, n_samples) for name, modality in modalities.items()}
        self._begin()

    def read(
        self,
        name: str,
        number: int,
        *,
        shape: Three | None = None,
        start: Three = (0, 0, 0),
        size: Three | None = None,
        out: np.ndarray | None = None,
        check: bool = True,
    ) -> np.ndarray:
        """Values of one sample: (channels, *size) of a volume, (features,) of a vector.

        Args:
            shape: the sample's own x, y, z; without it the largest of the set.
            start: first voxel of a crop.
            size: voxels of a crop; without it the rest of the volume.
            out: array of the result's shape and dtype that takes the values; chunks that fill a contiguous part of it
                are read straight into it.
            check: compare each chunk's CRC-32C. Sizes and the index are always checked.

        Raises:
            DataError: no such array or sample, a crop beyond the volume, a file that is absent, cut off or damaged.
        """
        layout = self._layouts.get(name)
        if layout is None or not 0 <= number < self.n_samples:
            raise DataError(
                f"no sample {number} of array {name!r} in {str(self.folder)!r}, which has samples "
                f"0..{self.n_samples - 1} of {', '.join(self._layouts)}"
            )
        if isinstance(layout, BlockLayout):
            return self._read_vector(name, layout, number, out, check)
        begin, voxels = _crop(f"{name!r} of sample {number}", layout, shape, start, size)
        if out is None:
            out = np.empty((layout.shape[0], *voxels), dtype=layout.dtype)
        assert out.shape == (layout.shape[0], *voxels), (out.shape, layout.shape[0], voxels)
        assert out.dtype == layout.dtype, (out.dtype, layout.dtype)
        n_bytes = _Fetch(self._file(name, layout, number), layout, out, check).run(*touched(layout, begin, voxels))
        with self._guard():
            self.bytes_read += n_bytes
        return out

    def close(self) -> None:
        """Give the descriptors back; reading opens them again."""
        with self._guard():
            self._files.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "n_samples": self.n_samples, "_layouts": self._layouts}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self.bytes_read = 0
        """Of chunks and blocks as they are stored, since the set was opened in this process; without indexes."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: Recent[tuple[str, int], _File] = Recent(_MAX_OPEN)
        largest = max((v.index_bytes for v in self._layouts.values() if isinstance(v, VolumeLayout)), default=1)
        n_indexes = max(_MAX_OPEN, _INDEX_BYTES // (largest + _OBJECT_BYTES))
        self._indexes: Recent[tuple[str, int], np.ndarray] = Recent(n_indexes)

    def _guard(self) -> threading.Lock:
        if self._process != os.getpid():
            # a fork: its copies of descriptors are its own to close, but a thread that is gone may hold the lock
            self._lock, self._process = threading.Lock(), os.getpid()
        return self._lock

    def _file(self, name: str, layout: VolumeLayout, number: int) -> _File:
        """The sample's open file; whoever holds it keeps it open, also when others have pushed it out of the cache."""
        key = (name, number)
        with self._guard():
            file = self._files.get(key)
            index = self._indexes.get(key)
        if file is None:
            file = _File(self.folder, layout.file(name, number), layout, index)
            with self._guard():
                self._files.put(key, file)
                self._indexes.put(key, file.index)
        return file

    def _read_vector(
        self, name: str, layout: BlockLayout, number: int, out: np.ndarray | None, check: bool
    ) -> np.ndarray:
        """A row alone, or with its block where that has to be checked."""
        file = layout.file(name, number)
        where = f"'{self.folder.name}/{file}'"
        row = number % layout.rows
        first, n_bytes = (0, layout.file_bytes) if check else (row * layout.row_bytes, layout.row_bytes)
        try:
            with (self.folder / file).open("rb", buffering=0) as opened:
                found = os.fstat(opened.fileno()).st_size
                data = np.frombuffer(os.pread(opened.fileno(), n_bytes, first), dtype=np.uint8)
        except OSError as error:
            raise_disk_fault(f"{where} with {name!r} of sample {number}", error)
            raise DataError(
                f"cannot read {where} with {name!r} of sample {number}: {error.strerror or error}; {REBUILD}"
            ) from error
        if found != layout.file_bytes or len(data) != n_bytes:
            raise DataError(f"{where} has {found} bytes, expected {layout.file_bytes}; {REBUILD}")
        with self._guard():
            self.bytes_read += n_bytes
        if check:
            _check_crc(data, where)
            data = data[row * layout.row_bytes :][: layout.row_bytes]
        values = data.view(layout.dtype)
        if out is None:
            return values.copy()
        assert (out.shape, out.dtype) == (values.shape, values.dtype), (out.shape, out.dtype, layout)
        out[...] = values
        return out


class _File(OpenFile):
    """One sample's open file and where its chunks lie."""

    def __init__(self, folder: Path, file: str, layout: VolumeLayout, index: np.ndarray | None):
        self.where = f"'{folder.name}/{file}'"
        try:
            super().__init__(folder / file)
            self.index = self._read_index(layout) if index is None else index
        except OSError as error:
            raise_disk_fault(self.where, error)
            raise DataError(f"cannot read {self.where}: {error.strerror or error}; {REBUILD}") from error

    def _read_index(self, layout: VolumeLayout) -> np.ndarray:
        """(chunks, 2) int64: offset and bytes as stored; 0 bytes where a chunk is zeros and not stored."""
        end = os.fstat(self.descriptor).st_size - layout.index_bytes
        data = np.frombuffer(os.pread(self.descriptor, layout.index_bytes, max(end, 0)), dtype=np.uint8)
        if end < 0 or len(data) != layout.index_bytes:
            raise DataError(
                f"{self.where} is cut off: {end + layout.index_bytes} bytes, its index alone takes "
                f"{layout.index_bytes}; {REBUILD}"
            )
        _check_crc(data, f"the index of {self.where}")
        places = data[:-CRC_BYTES].view("<u8").reshape(-1, 2)
        is_absent = (places == _NO_CHUNK).all(axis=1)
        offset, n_bytes = np.where(is_absent[:, None], 0, places).T
        most = layout.chunk_bytes + CRC_BYTES if not layout.is_zstd else end
        least = most if not layout.is_zstd else CRC_BYTES + 1
        # each on its own: a sum of two such numbers may wrap around
        is_outside = (offset > end) | (n_bytes > end) | (offset + n_bytes > end)
        wrong = np.flatnonzero(~is_absent & (is_outside | (n_bytes < least) | (n_bytes > most)))
        if len(wrong):
            chunk = int(wrong[0])
            raise DataError(
                f"the index of {self.where} puts chunk {layout.chunk_name(chunk)} at {offset[chunk]} with "
                f"{n_bytes[chunk]} bytes, expected {least}{'' if least == most else f' to {most}'} bytes that end by "
                f"{end}; {REBUILD}"
            )
        return np.stack([offset, n_bytes], axis=1).astype(np.int64)


class _Fetch:
    """One crop on its way from one file into one array."""

    def __init__(self, file: _File, layout: VolumeLayout, out_CXYZ: np.ndarray, check: bool):
        self.file, self.layout, self.out_CXYZ, self.check = file, layout, out_CXYZ, check

    def run(self, chunks_P: np.ndarray, pieces: list[Piece]) -> int:
        """Fetch all pieces in the order of the file, neighbours together: bytes read."""
        if len(pieces) == 1 and pieces[0].is_whole and not self.layout.is_zstd and self.out_CXYZ.flags.c_contiguous:
            offset, n_bytes = self.file.index[pieces[0].chunk].tolist()
            if n_bytes:
                self._straight(offset, self.out_CXYZ, pieces[0])
                return n_bytes
        places_P2 = self.file.index[chunks_P]
        places: list[tuple[int, int]] = places_P2.tolist()
        order: list[int] = places_P2[:, 0].argsort(kind="stable").tolist()
        run: list[tuple[int, int, Piece]] = []
        run_start = run_end = total = 0
        for p in order:
            (offset, n_bytes), piece = places[p], pieces[p]
            if n_bytes == 0:
                self.out_CXYZ[piece.in_crop] = 0
                continue
            total += n_bytes
            if piece.is_whole and not self.layout.is_zstd:
                part = self.out_CXYZ[piece.in_crop]
                if part.flags.c_contiguous:
                    self._straight(offset, part, piece)
                    continue
            if run and (offset != run_end or offset + n_bytes - run_start > _RUN_BYTES):
                self._together(run_start, run_end, run)
                run = []
            if not run:
                run_start = offset
            run.append((offset - run_start, n_bytes, piece))
            run_end = offset + n_bytes
        if run:
            self._together(run_start, run_end, run)
        return total

    def _straight(self, offset: int, part: np.ndarray, piece: Piece) -> None:
        """Into its place; the checksum lands beside it."""
        stored = bytearray(CRC_BYTES)
        self._fill([part, stored], offset, self.layout.chunk_bytes + CRC_BYTES)
        if self.check and (found := crc32c(part)) != (said := int.from_bytes(stored, "little")):
            raise DataError(_crc_fault(self._chunk(piece), found, said))

    def _together(self, start: int, end: int, run: list[tuple[int, int, Piece]]) -> None:
        layout, out_CXYZ = self.layout, self.out_CXYZ
        stored = _scratch("stored", end - start)
        self._fill([stored], start, end - start)
        for offset, n_bytes, piece in run:
            last = offset + n_bytes - CRC_BYTES
            data = stored[offset:last]
            if self.check and (found := crc32c(data)) != (said := int.from_bytes(stored[last : last + 4], "little")):
                raise DataError(_crc_fault(self._chunk(piece), found, said))
            if layout.is_zstd:
                data = self._unpacked(data, piece)
            chunk_CXYZ: np.ndarray = np.ndarray(layout.chunk, layout.dtype, data)
            out_CXYZ[piece.in_crop] = chunk_CXYZ[piece.in_chunk]

    def _fill(self, buffers: list[Any], offset: int, n_bytes: int) -> None:
        try:
            found = os.preadv(self.file.descriptor, buffers, offset)
        except OSError as error:
            raise_disk_fault(self.file.where, error)
            raise DataError(f"cannot read {self.file.where}: {error.strerror or error}; {REBUILD}") from error
        if found != n_bytes:
            raise DataError(f"{self.file.where} is cut off: {found} bytes at {offset}, expected {n_bytes}; {REBUILD}")

    def _unpacked(self, data: np.ndarray, piece: Piece) -> np.ndarray:
        expected = self.layout.chunk_bytes
        if (found := _frame_bytes(data[:18].tobytes())) != expected:
            raise DataError(f"{self._chunk(piece)} decodes to {found} bytes, expected {expected}; {REBUILD}")
        unpacked = _scratch("unpacked", expected)
        try:
            _decompress()(data, unpacked)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{self._chunk(piece)} is not readable zstd ({error}); {REBUILD}") from error
        return unpacked

    def _chunk(self, piece: Piece) -> str:
        return f"chunk {self.layout.chunk_name(piece.chunk)} of {self.file.where}"


_buffers = threading.local()


def _scratch(name: str, n_bytes: int) -> np.ndarray:
    """This thread's buffer of that name: fresh memory for each chunk would cost more than reading it."""
    buffer: np.ndarray | None = getattr(_buffers, name, None)
    if buffer is None or len(buffer) < n_bytes:
        buffer = np.empty(max(n_bytes, _RUN_BYTES), dtype=np.uint8)
        setattr(_buffers, name, buffer)
    return buffer[:n_bytes]


@cache
def _decompress() -> Callable[[np.ndarray, np.ndarray], object]:
    """numcodecs is heavy, and not every set needs it."""
    from numcodecs.zstd import decompress  # pyright: ignore[reportUnknownVariableType]

    return decompress  # pyright: ignore[reportUnknownVariableType]


def _check_crc(data: np.ndarray, where: str) -> None:
    found, said = crc32c(data[:-CRC_BYTES]), int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
    if found != said:
        raise DataError(_crc_fault(where, found, said))


def _crc_fault(where: str, found: int, said: int) -> str:
    return f"{where} is damaged: CRC-32C {found:08x}, stored with it {said:08x}; {REBUILD}"


def _frame_bytes(head: bytes) -> int:
    """Size that a zstd frame's header promises, -1 where it promises none (RFC 8878, 3.1.1.1)."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    is_single, code = head[4] >> 5 & 1, head[4] >> 6
    first = 5 + (1 - is_single) + (0, 1, 2, 4)[head[4] & 3]
    width = (is_single, 2, 4, 8)[code]
    return int.from_bytes(head[first : first + width], "little") + (256 if code == 1 else 0) if width else -1


def _crop(
    what: str, layout: VolumeLayout, shape: Three | None, start: Three, size: Three | None
) -> tuple[Three, Three]:
    """Where the crop begins and how many voxels it has, checked."""
    largest = layout.voxels
    if size is None and start == (0, 0, 0) and (shape is None or shape == largest):
        return (0, 0, 0), largest
    own = largest if shape is None else shape
    voxels = tuple(n - at for n, at in zip(own, start, strict=True)) if size is None else size
    if any(not 0 < n <= of for n, of in zip(own, largest, strict=True)):
        raise DataError(f"{what} is said to have {own} voxels, expected at most {largest}; {REBUILD}")
    if any(at < 0 or n < 1 or at + n > of for at, n, of in zip(start, voxels, own, strict=True)):
        raise DataError(
            f"crop of {voxels} voxels from {start} does not lie in {what}, which has {own}; choose a crop that "
            "fits, or pad what is read"
        )
    (x, y, z), (n_x, n_y, n_z) = start, voxels
    return (x, y, z), (n_x, n_y, n_z)
