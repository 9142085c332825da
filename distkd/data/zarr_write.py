"""Writing a zarr v3 group: the zarr library makes the bytes of each sample's file, in memory, and we write the file.

So a file is the business of one `write`, the number of samples may stay open until `finish`, and a later process goes
on in the folder that a killed one has left.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from distkd.data.checksum import crc32c
from distkd.data.disk import told
from distkd.data.manifest import Modality
from distkd.data.zarr_layout import CRC_BYTES, METADATA, BlockLayout, VolumeLayout, check_modality_layout
from distkd.errors import DataError
from distkd.files import write_text

__all__ = ["ZarrWriter"]

_ZSTD_LEVEL = 3


class ZarrWriter:
    """The arrays of a set, one per modality; made or opened again.

    What was written is in its files when `write` returns. A file of one sample depends on that sample's values only, a
    block of vectors on those of its samples, so equal input gives equal bytes.
    """

    def __init__(self, folder: Path, modalities: Mapping[str, Modality]):
        self.folder = folder
        self._layouts = {name: check_modality_layout(name, modality) for name, modality in modalities.items()}
        self._encoders: dict[str, _Encoder] = {}
        self._blocks: dict[str, _Block] = {}

    def write(self, name: str, number: int, array: np.ndarray) -> Path:
        """Values of one sample: the file that holds them, for a volume its own.

        Args:
            array: (channels, x, y, z), where x, y, z may be smaller than the modality's; (features,) of a vector.

        Raises:
            DataError: shape or dtype are not the modality's, or the file cannot be written.
        """
        layout = self._layouts[name]
        _check_array(name, number, array, layout)
        if isinstance(layout, BlockLayout):
            path = self.vector_file(name, number)
            with self._told(path):
                self._write_row(name, layout, number, array)
            return path
        path = self.folder / layout.file(name, number)
        if name not in self._encoders:
            self._encoders[name] = _Encoder(layout)
        data = self._encoders[name].encode(array)
        with self._told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.write_bytes(data)
            except OSError:
                path.unlink(missing_ok=True)  # a part of a file is of no use, and in the way where a disk is full
                raise
        return path

    def drop_from(self, number: int) -> None:
        """Remove what an earlier process left of that sample and of later ones, and of metadata half written."""
        for path in (*self.folder.glob(f".{METADATA}.*"), *self.folder.glob(f"*/.{METADATA}.*")):
            with self._told(path):
                path.unlink()
        for name, layout in self._layouts.items():
            rows = layout.rows if isinstance(layout, BlockLayout) else 1
            for path in (self.folder / name / "c").glob("[0-9]*"):
                if path.name.isdecimal() and int(path.name) * rows >= number:
                    with self._told(path):
                        shutil.rmtree(path)
            self._blocks.pop(name, None)
            if isinstance(layout, BlockLayout) and number % rows and self.vector_file(name, number).exists():
                path = self.vector_file(name, number)
                with self._told(path):
                    block = _Block(path, number // rows, layout)
                    block.cut(number % rows)
                self._blocks[name] = block

    def finish(self, n_samples: int) -> list[Path]:
        """Write what describes the arrays, now that the number of samples is known: the metadata files.

        Raises:
            DataError: a file cannot be written.
        """
        self.drop_from(n_samples)
        texts = {"": _group_text(), **{name: _array_text(v, n_samples) for name, v in self._layouts.items()}}
        paths: list[Path] = []
        for name, text in texts.items():
            path = self.folder / name / METADATA
            with self._told(path):
                write_text(path, text)
            paths.append(path)
        return paths

    def vector_file(self, name: str, number: int) -> Path:
        """The file of the block that a sample's vector is in; its bytes are final after `finish`."""
        layout = self._layouts[name]
        assert isinstance(layout, BlockLayout), name
        return self.folder / layout.file(name, number)

    def _told(self, path: Path) -> AbstractContextManager[None]:
        return told(path.relative_to(self.folder.parent).as_posix(), self.folder.parent)

    def _write_row(self, name: str, layout: BlockLayout, number: int, array: np.ndarray) -> None:
        block = self._blocks.get(name)
        if block is None or block.number != number // layout.rows:
            block = self._blocks[name] = _Block(self.vector_file(name, number), number // layout.rows, layout)
        block.put(number % layout.rows, array)


class _Block:
    """Vectors of some samples in their file; a row is written in its place, so that others survive whatever comes."""

    def __init__(self, path: Path, number: int, layout: BlockLayout):
        self.path, self.number, self._layout = path, number, layout
        self._values = np.zeros((layout.rows, layout.features), dtype=layout.dtype)
        if path.exists():
            # the checksum may be older than the last row: a process was killed between them
            found = np.frombuffer(path.read_bytes(), dtype=np.uint8)[: self._values.nbytes]
            self._values.reshape(-1).view(np.uint8)[: len(found)] = found
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def put(self, row: int, values: np.ndarray) -> None:
        self._values[row] = values
        self._store(row, row + 1)

    def cut(self, row: int) -> None:
        """Zero that row and the later ones."""
        self._values[row:] = 0
        self._store(row, self._layout.rows)

    def _store(self, first: int, last: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(self._layout.file_bytes)
            file.seek(first * self._layout.row_bytes)
            file.write(self._values[first:last].tobytes())
            file.seek(self._layout.file_bytes - CRC_BYTES)
            file.write(_crc32c(self._values))


class _Encoder:
    """One array of one sample in memory, whose file's bytes are those of a sample's file in the group."""

    def __init__(self, layout: VolumeLayout):
        self._layout = layout
        self._files: dict[str, Any] = {}
        self._array = _create(layout, 1, self._files)

    def encode(self, volume: np.ndarray) -> bytes:
        _, x, y, z = volume.shape
        self._array[0, :, :x, :y, :z] = volume
        stored = self._files.pop("c/0/0/0/0/0", None)
        if stored is not None:
            return stored.to_bytes()
        # zarr stores no chunk of zeros, and no file without chunks; here the file says that the sample is there
        index = np.full(2 * self._layout.n_chunks, 2**64 - 1, dtype="<u8")
        return index.tobytes() + _crc32c(index)


def _create(layout: VolumeLayout | BlockLayout, n_samples: int, files: dict[str, Any]) -> Any:
    """An array of the zarr library whose store is the dict."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
    from zarr.storage import MemoryStore

    plain = BytesCodec() if layout.dtype.itemsize == 1 else BytesCodec(endian="little")
    if isinstance(layout, BlockLayout):
        shape, chunk = (n_samples, layout.features), (layout.rows, layout.features)
        serializer, outer = plain, [Crc32cCodec()]
        names = ["sample", "feature"]
    else:
        shape, chunk = (n_samples, *layout.shape), (1, *layout.shard)
        packed = [ZstdCodec(level=_ZSTD_LEVEL)] if layout.is_zstd else []
        serializer, outer = (
            ShardingCodec(
                chunk_shape=(1, *layout.chunk),
                codecs=[plain, *packed, Crc32cCodec()],
                index_codecs=[BytesCodec(endian="little"), Crc32cCodec()],
                index_location="end",
            ),
            None,
        )
        names = ["sample", "channel", "x", "y", "z"]
    return zarr.create_array(  # pyright: ignore[reportUnknownMemberType]
        MemoryStore(files),
        shape=shape,
        chunks=chunk,
        dtype=layout.dtype,
        serializer=serializer,
        compressors=outer,
        filters=None,
        fill_value=0,
        zarr_format=3,
        dimension_names=names,
        # a chunk of zeros is not stored; said here since a user's zarr configuration may say otherwise
        config={"write_empty_chunks": False},
    )


def _array_text(layout: VolumeLayout | BlockLayout, n_samples: int) -> str:
    files: dict[str, Any] = {}
    _create(layout, n_samples, files)
    return _text(files[METADATA])


def _group_text() -> str:
    import zarr
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    zarr.create_group(MemoryStore(files), zarr_format=3)  # pyright: ignore[reportUnknownMemberType]
    return _text(files[METADATA])


def _text(metadata: Any) -> str:
    return metadata.to_bytes().decode() + "\n"


def _crc32c(values: np.ndarray) -> bytes:
    return crc32c(values.tobytes()).to_bytes(CRC_BYTES, "little")


def _check_array(name: str, number: int, array: np.ndarray, layout: VolumeLayout | BlockLayout) -> None:
    largest = (layout.features,) if isinstance(layout, BlockLayout) else layout.shape
    fits = len(array.shape) == len(largest) and array.shape[0] == largest[0]
    if (
        not fits
        or array.dtype != layout.dtype
        or any(not 0 < n <= of for n, of in zip(array.shape, largest, strict=True))
    ):
        beyond = "" if isinstance(layout, BlockLayout) else " at most along x, y, z"
        raise DataError(
            f"{name!r} of sample {number} is {array.dtype} of shape {array.shape}, expected {layout.dtype} of "
            f"{largest}{beyond}; mend the recipe or its modalities"
        )
