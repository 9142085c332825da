"""A zarr group with arrays of every kind: chunked, packed and whole, a smaller sample, a missing one, one of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distkd.data.manifest import Modality
from distkd.data.zarr import ZarrWriter

SHAPE = (10, 11, 7)
N = 6
MODALITIES = {
    "flair": Modality(kind="volume", dtype="int16", shape=(1, *SHAPE), codec="zarr", chunk=(1, 4, 5, 3)),
    "both": Modality(
        kind="volume", dtype="float32", shape=(2, *SHAPE), codec="zarr", chunk=(1, 10, 4, 7), compression="zstd"
    ),
    "mask": Modality(kind="volume", dtype="uint8", shape=(1, *SHAPE), codec="zarr", compression="zstd"),
    "whole": Modality(kind="volume", dtype="float16", shape=(2, *SHAPE), codec="zarr"),
    "gene": Modality(kind="vector", dtype="float32", shape=(5,), codec="zarr"),
}
VOLUMES = [name for name, modality in MODALITIES.items() if modality.kind == "volume"]


def own_shape(sample: int) -> tuple[int, int, int]:
    return (9, 11, 5) if sample == 1 else SHAPE


def values(sample: int, modalities: Mapping[str, Modality] = MODALITIES) -> dict[str, np.ndarray]:
    """Sample 2 lacks `both` and `gene`, sample 3 is all zeros, sample 1 smaller."""
    arrays: dict[str, np.ndarray] = {}
    for place, (name, modality) in enumerate(modalities.items()):
        rng = np.random.default_rng((sample, place))
        size = modality.shape if modality.kind == "vector" else (modality.shape[0], *own_shape(sample))
        array = rng.integers(0, 250, size).astype(modality.dtype)
        if modality.kind == "volume":
            array[:, :4, :5] = 0  # chunks of zeros, which are not stored
        arrays[name] = array * 0 if sample == 3 else array
    return {name: array for name, array in arrays.items() if sample != 2 or name not in ("both", "gene")}


def write(folder: Path, samples: range = range(N), finish: bool = True) -> Path:
    writer = ZarrWriter(folder, MODALITIES)
    for sample in samples:
        for name, array in values(sample).items():
            writer.write(name, sample, array)
    if finish:
        writer.finish(N)
    return folder


def n_chunks(name: str) -> int:
    shape, chunk = MODALITIES[name].shape, MODALITIES[name].chunk or MODALITIES[name].shape
    return int(np.prod([-(-n // c) for n, c in zip(shape, chunk, strict=True)]))
