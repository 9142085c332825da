"""Volumes to look at: brains with a lesion, and arrays that no file places in a patient; and lines as words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distkd.data.manifest import Description, Fold, Modality, Space
from distkd.data.shardset import ShardSet
from distkd.data.write import ShardWriter

SHAPE = (14, 12, 10)


def volume(name: str, number: int) -> np.ndarray:
    return np.random.default_rng((len(name), number)).integers(1, 900, size=SHAPE).astype(np.int16)


def lesion(number: int) -> np.ndarray:
    """Largest in axial slice 7, coronal 4, sagittal 9; values 2 within 1, and one 9, which is no class."""
    target = np.zeros(SHAPE, np.uint8)
    target[7:11, 3:6, 5:9] = 1
    target[9, 2:8, 5:9] = 1
    target[7:12, 4, 4:9] = 1
    target[5:12, 2:7, 7] = 1
    target[9, 4, 7] = 2
    if number == 1:
        target[0, 0, 7] = 9
    return target


def space_of(affine: np.ndarray, shape: Sequence[int]) -> Space:
    spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    rows = tuple(map(tuple, affine.tolist()))
    return Space.model_validate({"shape": tuple(shape), "affine": rows, "spacing": tuple(spacing)})


def placeless(folder: Path) -> ShardSet:
    """Two volumes and a vector that no file places in a patient."""
    description = Description(
        task="arrays",
        container="zarr",
        class_names=["a", "b"],
        modalities={
            "ct": Modality(kind="volume", dtype="int16", shape=(1, *SHAPE), codec="zarr", chunk=(1, 7, 6, 5)),
            "age": Modality(kind="vector", dtype="float32", shape=(4000,), codec="zarr"),
        },
        source="made by the tests",
        licence="none",
    )
    with ShardWriter(folder, description) as writer:
        for number in range(2):
            arrays = {"ct": volume("ct", number)[None], "age": np.zeros(4000, np.float32)}
            writer.add(f"c{number}", arrays, patient=f"p{number}", label=number, space=Space(shape=SHAPE))
        writer.split([Fold(train=["p0"], val=[], test=["p1"])], rule="by hand", seed=None)
    return ShardSet(folder)


def words(lines: str) -> list[list[str]]:
    return [line.split() for line in lines.splitlines()]
