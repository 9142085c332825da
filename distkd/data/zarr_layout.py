"""How arrays lie in the files of a zarr v3 group: pure numbers, and `zarr.json` checked against what the manifest says.

Volumes: one file per sample, cut into inner chunks, each with its CRC-32C behind it, an index of the chunks at the end.
Vectors: blocks of samples, uncompressed, the block's CRC-32C behind it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from distkd.data.manifest import Modality
from distkd.errors import DataError
from distkd.files import raise_disk_fault

__all__ = [
    "CRC_BYTES",
    "METADATA",
    "REBUILD",
    "VECTOR_BLOCK",
    "BlockLayout",
    "Piece",
    "VolumeLayout",
    "check_modality_layout",
    "default_chunk",
    "read_layout",
    "touched",
]

METADATA = "zarr.json"
VECTOR_BLOCK = 256
"""Samples in a file of vectors."""
CRC_BYTES = 4
REBUILD = "copy it again or build it again; `distkd shards verify` checks every byte"

_WHOLE_BYTES = 4 << 20
_CHUNK_BYTES = 128 << 10

Four = tuple[int, int, int, int]
Three = tuple[int, int, int]


def default_chunk(shape: tuple[int, ...], dtype: str) -> Four:
    """Inner chunk of a (channels, x, y, z) volume: what is read, checked and decoded as one.

    A volume of at most 4 MiB is one chunk: it is wanted whole, and a whole chunk is read straight into the batch. A
    larger one is cut along x, y, z into even parts of about 128 KiB together, all channels in each. A crop reads about
    one chunk more along each axis than it needs, which speaks for small chunks; each chunk costs some microseconds
    whatever its size, which speaks against them. Crops of 160 x 160 x 80 from 240 x 240 x 155 int16 are fastest, within
    the noise of a measurement, with chunks from 40 x 40 x 39 (this choice) to 60 x 60 x 52; parts of 25 or 80 voxels
    cost half as much again or more. `benchmarks/volume_reading.py --chunk` shows it.
    """
    channels, *axes = shape
    item_bytes = np.dtype(dtype).itemsize
    if math.prod(shape) * item_bytes <= _WHOLE_BYTES:
        return (channels, axes[0], axes[1], axes[2])
    edge = max((_CHUNK_BYTES / (channels * item_bytes)) ** (1 / 3), 1.0)
    x, y, z = (math.ceil(n / math.ceil(n / edge)) for n in axes)
    return (channels, x, y, z)


@dataclass(frozen=True, eq=False)  # equal if it is the same: hashing all fields would cost more than a small read
class VolumeLayout:
    """One array of volumes; all four axes are (channel, x, y, z), the axis of samples is left out."""

    shape: Four
    chunk: Four
    dtype: np.dtype[Any]
    is_zstd: bool

    @cached_property
    def voxels(self) -> Three:
        """Along x, y, z."""
        return self.shape[1:]

    @cached_property
    def grid(self) -> Four:
        """Chunks along each axis."""
        c, x, y, z = (math.ceil(n / chunk) for n, chunk in zip(self.shape, self.chunk, strict=True))
        return (c, x, y, z)

    @cached_property
    def shard(self) -> Four:
        """Shape that the chunks of a file cover; may go beyond the volume."""
        c, x, y, z = (n * chunk for n, chunk in zip(self.grid, self.chunk, strict=True))
        return (c, x, y, z)

    @cached_property
    def n_chunks(self) -> int:
        return math.prod(self.grid)

    @cached_property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @cached_property
    def index_bytes(self) -> int:
        return 16 * self.n_chunks + CRC_BYTES

    def chunk_name(self, number: int) -> str:
        """Its place in the grid, for messages."""
        return str(tuple(int(i) for i in np.unravel_index(number, self.grid)))

    @staticmethod
    def file(name: str, number: int) -> str:
        """Of a sample, below the group: zarr's default key, nothing that depends on content."""
        return f"{name}/c/{number}/0/0/0/0"


@dataclass(frozen=True)
class BlockLayout:
    """One array of vectors."""

    features: int
    rows: int
    """Samples of one file."""
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        return self.features * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        return self.rows * self.row_bytes + CRC_BYTES

    def file(self, name: str, number: int) -> str:
        """Of a sample's block, below the group."""
        return f"{name}/c/{number // self.rows}/0"


class Piece(NamedTuple):
    """One chunk's part in a crop."""

    chunk: int
    """Place in the shard's index."""
    in_crop: tuple[slice, slice, slice, slice]
    in_chunk: tuple[slice, slice, slice, slice]
    is_whole: bool
    """The crop takes all of the chunk."""


@lru_cache(maxsize=64)
def touched(layout: VolumeLayout, start: Three, size: Three) -> tuple[np.ndarray, list[Piece]]:
    """The chunks that a crop of all channels needs, and only those: their places in the index, and how they are cut."""
    c, x, y, z = (list(_along(*axis)) for axis in zip((0, *start), (layout.shape[0], *size), layout.chunk, strict=True))
    _, n_x, n_y, n_z = layout.grid
    pieces = [
        Piece(
            ((a.number * n_x + i.number) * n_y + j.number) * n_z + k.number,
            (a.in_crop, i.in_crop, j.in_crop, k.in_crop),
            (a.in_chunk, i.in_chunk, j.in_chunk, k.in_chunk),
            a.is_whole and i.is_whole and j.is_whole and k.is_whole,
        )
        for a, i, j, k in itertools.product(c, x, y, z)
    ]
    return np.array([piece.chunk for piece in pieces], dtype=np.int64), pieces


class _Part(NamedTuple):
    number: int
    in_crop: slice
    in_chunk: slice
    is_whole: bool


def _along(start: int, size: int, chunk: int) -> Iterator[_Part]:
    for number in range(start // chunk, (start + size - 1) // chunk + 1):
        low, high = max(start, number * chunk), min(start + size, (number + 1) * chunk)
        yield _Part(
            number, slice(low - start, high - start), slice(low - number * chunk, high - number * chunk),
            high - low == chunk,
        )  # fmt: skip


def check_modality_layout(name: str, modality: Modality) -> VolumeLayout | BlockLayout:
    """The layout that a modality asks for.

    Raises:
        DataError: a zarr group cannot hold it.
    """
    dtype = np.dtype(modality.dtype).newbyteorder("<")
    if modality.kind == "vector" and len(modality.shape) == 1 and modality.compression == "none":
        return BlockLayout(modality.shape[0], VECTOR_BLOCK, dtype)
    if modality.kind != "volume" or len(modality.shape) != 4:
        raise DataError(
            f"modality {name!r} is a {modality.kind} of shape {modality.shape}, compression {modality.compression}; a "
            "zarr group holds (channels, x, y, z) volumes and uncompressed vectors: use container 'wds' for the others"
        )
    chunk = modality.chunk or default_chunk(modality.shape, modality.dtype)
    if len(chunk) != 4 or any(n > of for n, of in zip(chunk, modality.shape, strict=True)):
        raise DataError(
            f"modality {name!r} has chunk {chunk} for volumes of {modality.shape}, expected four numbers, none above "
            "the volume's; leave `chunk` out for a good default"
        )
    return VolumeLayout(_four(modality.shape), _four(chunk), dtype, modality.compression == "zstd")


def _four(shape: tuple[int, ...]) -> Four:
    c, x, y, z = shape
    return (c, x, y, z)


def read_layout(folder: Path, name: str, modality: Modality, n_samples: int) -> VolumeLayout | BlockLayout:
    """The layout of an array that is there; everything that reading relies on is checked.

    Raises:
        DataError: `zarr.json` is missing or damaged, or it disagrees with the manifest.
    """
    where = f"'{folder.name}/{name}/{METADATA}'"
    meta = _read_json(folder / name / METADATA, where)
    wanted = check_modality_layout(name, modality)
    if isinstance(wanted, VolumeLayout) and modality.chunk is None:
        # what a builder chose without being told; what the index says must still fit the sizes of the files
        chunk = _get(meta, "codecs", 0, "configuration", "chunk_shape")
        if _is_numbers(chunk, 5) and chunk[0] == 1 and all(0 < n <= of for n, of in zip(chunk[1:], wanted.shape)):  # noqa: B905
            wanted = VolumeLayout(wanted.shape, _four(tuple(chunk[1:])), wanted.dtype, wanted.is_zstd)
    endian = {} if wanted.dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
    as_bytes: list[Any] = [{"name": "bytes", **endian}]
    if isinstance(wanted, BlockLayout):
        rows = _get(meta, "chunk_grid", "configuration", "chunk_shape", 0)
        if isinstance(rows, int) and rows > 0:
            wanted = BlockLayout(wanted.features, rows, wanted.dtype)
        shape, outer = [n_samples, wanted.features], [wanted.rows, wanted.features]
        codecs = [*as_bytes, {"name": "crc32c"}]
    else:
        shape, outer = [n_samples, *wanted.shape], [1, *wanted.shard]
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *wanted.chunk],
                    "codecs": [*as_bytes, *([{"name": "zstd"}] if wanted.is_zstd else []), {"name": "crc32c"}],
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ]
    expected: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": modality.dtype,
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
        "storage_transformers": [],
    }
    found = _plain(meta)
    for field, value in expected.items():
        if found.get(field) != value:
            raise DataError(
                f"{where} has {field} {json.dumps(found.get(field))}, expected {json.dumps(value)} by the manifest; "
                f"the group is of another set, or another program wrote it: {REBUILD}"
            )
    return wanted


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise_disk_fault(where, error)
        raise DataError(f"cannot read {where}: {error.strerror or error}, expected a zarr array; {REBUILD}") from error
    except ValueError as error:
        raise DataError(f"{where} is not readable JSON ({error}); {REBUILD}") from error
    if not isinstance(meta, dict):
        raise DataError(f"{where} holds {type(meta).__name__}, expected a JSON object; {REBUILD}")
    return meta  # pyright: ignore[reportUnknownVariableType]


def _get(value: Any, *path: str | int) -> Any:
    """What lies there, or None."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _is_numbers(value: Any, n: int) -> bool:
    return type(value) is list and [type(item) for item in cast("list[Any]", value)] == [int] * n


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """The same metadata in one spelling: without what changes nothing about how bytes are read."""
    plain: dict[str, Any] = {"storage_transformers": [], **meta}
    if _get(plain, "chunk_key_encoding") == {"name": "default"}:
        plain["chunk_key_encoding"] = {"name": "default", "configuration": {"separator": "/"}}
    plain["codecs"] = _plain_codecs(plain.get("codecs"), plain.get("data_type"))
    return plain


def _plain_codecs(codecs: Any, dtype: Any) -> Any:
    return [_plain_codec(codec, dtype) for codec in cast("list[Any]", codecs)] if type(codecs) is list else codecs


def _plain_codec(codec: Any, dtype: Any) -> Any:
    name, configuration = _get(codec, "name"), _get(codec, "configuration")
    if name == "sharding_indexed" and type(configuration) is dict:
        inner: dict[str, Any] = {"index_location": "end", **configuration}
        inner["codecs"] = _plain_codecs(inner.get("codecs"), dtype)
        inner["index_codecs"] = _plain_codecs(inner.get("index_codecs"), "uint64")
        return {"name": name, "configuration": inner}
    if name == "zstd" or configuration in (None, {}) or (name == "bytes" and dtype == "uint8"):
        return {"name": name}  # a level is the writer's business, and single bytes have no order
    return codec
