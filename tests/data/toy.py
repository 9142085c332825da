"""A small shard set with everything that a real one has: gaps, missing modalities, regions, unlabelled samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distkd.data.manifest import Description, Manifest, Modality
from distkd.data.shardset import ShardSet
from distkd.data.splits import patient_folds
from distkd.data.write import ShardWriter

DESCRIPTION = Description(
    task="toy",
    class_names=["low", "high"],
    modalities={
        "gene": Modality(kind="vector", dtype="float32", shape=(5,), codec="npy", features=["a", "b", "c", "d", "e"]),
        "slide": Modality(kind="image", dtype="uint8", shape=(12, 10, 3), codec="png"),
        "coarse": Modality(kind="image", dtype="uint8", shape=(6, 5, 1), codec="png"),
    },
    excluded={"outcome": "it is known only after the label"},
    source="made by the tests",
    licence="none",
)


def toy_arrays(number: int) -> dict[str, np.ndarray]:
    """What sample `number` holds: a gap in every fifth vector, every third sample without a vector."""
    draws = np.random.default_rng((7, number))
    gene = draws.normal(loc=[0, 5, -3, 100, 2], scale=[1, 2, 0.1, 30, 0], size=5).astype(np.float32)
    if number % 5 == 0:
        gene[1] = np.nan
    slide = draws.integers(0, 256, size=(12, 10, 3), dtype=np.uint8)
    coarse = draws.integers(0, 256, size=(6, 5, 1), dtype=np.uint8)
    arrays = {"slide": slide, "coarse": coarse}
    return arrays if number % 3 == 2 else {"gene": gene, **arrays}


def write_toy(out: Path, *, n_samples: int = 48, shard_bytes: int = 60_000, unlabelled: bool = False) -> Manifest:
    """Two samples a patient; with `unlabelled` every sixth patient has no label."""
    with ShardWriter(out, DESCRIPTION, shard_bytes=shard_bytes) as writer:
        for number in range(n_samples):
            patient = number // 2
            label = None if unlabelled and patient % 6 == 5 else patient % 2
            writer.add(
                f"s-{number:03d}",
                toy_arrays(number),
                patient=f"p{patient}",
                group=f"p{patient}-r0" if number % 4 == 0 else None,
                label=label,
            )
        writer.split(
            patient_folds(writer.patients, writer.labels, n_folds=3, val_share=0.25, seed=1), rule="by patient", seed=1
        )
    assert writer.manifest is not None
    return writer.manifest


def open_toy(out: Path, **options: bool | int) -> ShardSet:
    write_toy(out, **options)  # pyright: ignore[reportArgumentType]
    return ShardSet(out)
