"""What a recipe stores of a volume: its voxels, and the numbers that the reader wants beside them."""

# Shapes: C channels, X Y Z voxels

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from distkd.data.manifest import SHOWN, Modality
from distkd.data.volumes import STATISTICS, foreground_points, volume_statistics
from distkd.data.zarr import default_chunk
from distkd.errors import DataError
from distkd.ops.draws import fold_in, text_key

__all__ = ["Compression", "input_parts", "input_values", "target_parts", "target_values"]

Compression = Literal["zstd", "none"]
DType = Literal["uint8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64"]
Four = tuple[int, int, int, int]

N_POINTS = 256
"""Places kept of each label: enough that an epoch's crops differ, and some kilobytes a sample."""


def input_parts(name: str, dtype: DType, shape: Four, compression: Compression, unit: str) -> dict[str, Modality]:
    """Modalities of a volume of (channels, x, y, z): itself and its statistics."""
    return {
        name: Modality(
            kind="volume",
            dtype=dtype,
            shape=shape,
            codec="zarr",
            unit=unit,
            chunk=default_chunk(shape, dtype),
            compression=compression,
        ),
        f"{name}_stats": Modality(
            kind="vector",
            dtype="float64",
            shape=(len(STATISTICS),),
            codec="zarr",
            unit=unit,
            features=list(STATISTICS),
            role="aux",
        ),
    }


def target_parts(name: str, shape: Four, values: Sequence[int], compression: Compression) -> dict[str, Modality]:
    """Modalities of a label map: itself and places of its labels; `values` in the order of the class names."""
    return {
        name: Modality(
            kind="volume",
            dtype="uint8",
            shape=shape,
            codec="zarr",
            unit="label",
            role="target",
            values=list(values),
            chunk=default_chunk(shape, "uint8"),
            compression=compression,
        ),
        f"{name}_points": Modality(
            kind="vector",
            dtype="int32",
            shape=((len(values) - 1) * (1 + 3 * N_POINTS),),
            codec="zarr",
            unit="voxel",
            role="aux",
        ),
    }


def input_values(name: str, volume_CXYZ: np.ndarray) -> dict[str, np.ndarray]:
    """Values for `input_parts`."""
    return {name: volume_CXYZ, f"{name}_stats": volume_statistics(volume_CXYZ)}


def target_values(
    name: str, target_CXYZ: np.ndarray, values: Sequence[int], *, seed: int, sample: str
) -> dict[str, np.ndarray]:
    """Values for `target_parts`; the places, of all labels but the background, are drawn by (seed, sample).

    Raises:
        DataError: the map holds a value that is no class.
    """
    wrong = ~np.isin(target_CXYZ, list(values))
    if wrong.any():
        found, counts = np.unique(target_CXYZ[wrong], return_counts=True)
        some = ", ".join(f"{value:g} at {n} voxels" for value, n in zip(found[:SHOWN], counts, strict=False))
        more = f" and {len(found) - SHOWN} more values" if len(found) > SHOWN else ""
        raise DataError(
            f"the label map {name!r} of sample {sample!r} holds {some}{more}, expected {list(values)}: the values of "
            "its classes; mend the map or leave the sample out"
        )
    key = fold_in(torch.tensor(seed), text_key(sample))
    return {name: target_CXYZ, f"{name}_points": foreground_points(target_CXYZ, values[1:], N_POINTS, key)}
