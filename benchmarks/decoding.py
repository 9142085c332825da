"""Decoding and augmenting 512 px JPEGs: threads in the process against worker processes.

The same 128 samples to the same batches of 8, read from the page cache, nothing kept in memory: by the dataset with no
thread and with `--workers`, and by a DataLoader with as many worker processes around it, after one epoch of each.
Ratios above 1 mean that `--workers` threads are faster than the side named.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.common import compare, report
from distkd.data.dataset import DataConfig, Dataset
from distkd.data.manifest import Description, Fold, Modality
from distkd.data.shardset import ShardSet
from distkd.data.write import Encoded, ShardWriter

N, BATCH, SIDE = 128, 8, 512
AUGMENT = {"crop": 0.9, "hflip": 0.5, "brightness": 0.1}


def write(out: Path) -> None:
    """Smooth noise with some grain, so that a JPEG has about the bytes of tissue."""
    modality = Modality(kind="image", dtype="uint8", shape=(SIDE, SIDE, 3), codec="jpg")
    description = Description(
        task="decoding", class_names=["a", "b"], modalities={"tile": modality}, source="made", licence="CC0"
    )
    patients = [f"p{number}" for number in range(N)]
    with ShardWriter(out, description) as writer:
        for number, patient in enumerate(patients):
            draws = np.random.default_rng(number)
            coarse = Image.fromarray(draws.integers(60, 220, (64, 64, 3), dtype=np.uint8)).resize((SIDE, SIDE))
            grain = draws.normal(scale=6, size=(SIDE, SIDE, 1))
            file = io.BytesIO()
            Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
            writer.add(f"s{number}", {"tile": Encoded(file.getvalue())}, patient=patient, label=number % 2)
        writer.split([Fold(train=patients, val=[], test=[])], rule="all", seed=None)


def dataset(folder: Path, threads: int) -> Dataset:
    config = DataConfig.model_validate({"threads": threads, "cache_mib": 0, "augment": AUGMENT})
    return Dataset(ShardSet(folder), config, ["tile"], seed=0)


class Batches(torch.utils.data.Dataset[torch.Tensor]):
    """What a worker process makes: whole batches, as in the process."""

    def __init__(self, folder: Path):
        self.data = dataset(folder, threads=0)

    def __len__(self) -> int:
        return N // BATCH

    def __getitem__(self, number: int) -> torch.Tensor:
        return _batch(self.data, number)


def _batch(data: Dataset, number: int) -> torch.Tensor:
    return data.batch(range(number * BATCH, (number + 1) * BATCH), epoch=0, train=True).inputs["tile"]


def in_process(folder: Path, threads: int) -> Callable[[], Any]:
    data = dataset(folder, threads)
    return lambda: [_batch(data, number) for number in range(N // BATCH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="threads, and processes")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "shards"
        write(out)
        workers = DataLoader(Batches(out), batch_size=None, num_workers=arguments.workers, persistent_workers=True)
        sides = compare(
            {
                "no thread": in_process(out, 0),
                "threads": in_process(out, arguments.workers),
                "processes": lambda: list(workers),
            },
            repeats=arguments.repeats,
            warmup=1,
        )
    ratios = {
        f"{name} / threads, wall": sides[name]["wall_s"] / sides["threads"]["wall_s"]
        for name in ("no thread", "processes")
    }
    report("decoding", sides, ratios, workers=arguments.workers, samples=N)


if __name__ == "__main__":
    main()
