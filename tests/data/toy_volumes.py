"""A small set of volumes with what real ones have: other sizes, missing sequences, a sample without a label map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from distkd.data.manifest import Description, Fold, Modality, Space
from distkd.data.raw.volume_parts import input_parts, input_values, target_parts, target_values
from distkd.data.shardset import ShardSet
from distkd.data.write import Sample, ShardWriter

VALUES = [0, 1, 4]
LARGEST = (12, 10, 8)
N_SAMPLES = 12


def toy_volume(number: int) -> tuple[tuple[int, int, int], dict[str, np.ndarray]]:
    """Shape and values of sample `number`: a tumour whose brightness is its label, every fourth without `t1`."""
    draws = np.random.default_rng((11, number))
    shape = LARGEST if number % 2 else (9, 10, 7)
    seg = np.zeros(shape, dtype=np.uint8)
    seg[3:7, 3:7, 2:5] = 1
    seg[4:6, 4:6, 3] = 4
    volumes = {name: (draws.integers(1, 400, size=shape) + 100 * seg).astype(np.int16) for name in ("flair", "t1")}
    for volume in volumes.values():
        volume[:2] = 0
    if number % 4 == 3:
        del volumes["t1"]
    return shape, volumes if number == 5 else {**volumes, "seg": seg}


def write_volumes(
    out: Path, before: Callable[[int], object] = lambda number: None, chunk: tuple[int, ...] | None = None
) -> None:
    """The set; `before` is told of each sample before it is made."""
    largest = (1, *LARGEST)
    modalities: dict[str, Modality] = {}
    for name in ("flair", "t1"):
        modalities |= input_parts(name, "int16", largest, "zstd", "")
    modalities |= target_parts("seg", largest, VALUES, "zstd")
    modalities["age"] = Modality(kind="vector", dtype="float32", shape=(1,), codec="zarr", features=["years"])
    if chunk is not None:
        cut = {name: m.model_copy(update={"chunk": chunk}) for name, m in modalities.items() if m.kind == "volume"}
        modalities |= cut
    description = Description(
        task="toy_tumour",
        problem="segmentation",
        container="zarr",
        class_names=["background", "core", "enhancing"],
        modalities=modalities,
        source="made by the tests",
        licence="none",
    )

    def load(number: int) -> Sample:
        before(number)
        shape, volumes = toy_volume(number)
        arrays = {"age": np.array([40 + number], dtype=np.float32)}
        for name, volume in volumes.items():
            if name == "seg":
                arrays |= target_values(name, volume[None], VALUES, seed=0, sample=str(number))
            else:
                arrays |= input_values(name, volume[None])
        affine = ((1.0, 0.0, 0.0, -number), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0))
        space = Space(shape=shape, affine=affine, spacing=(1.0, 1.0, 2.0))
        return Sample(arrays, patient=f"p{number}", label=None, space=space)

    with ShardWriter(out, description) as writer:
        writer.add_all((f"case-{number:02d}", lambda number=number: load(number)) for number in range(N_SAMPLES))
        patients = writer.patients
        writer.split([Fold(train=patients[:8], val=patients[8:10], test=patients[10:])], rule="in order", seed=None)


def open_volumes(out: Path) -> ShardSet:
    write_volumes(out)
    return ShardSet(out)
