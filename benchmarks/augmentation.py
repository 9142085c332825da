"""The AT+ card's changes of 512 px patches and a coarse copy of each: made on the host, or by batches on the device.

The same two batches of 32 by a dataset with `--threads`, until they are float32 where the network computes. `loading`
is what the host does before a batch is sent, which is all that is left to it where the device is a GPU; without one the
same processor then makes the images, too. Ratios of processor seconds, the least of the repeats; above 1 mean that
`data.transform_on: device` costs less.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import compare, report
from benchmarks.decoding import write
from distkd.data.dataset import DataConfig, Dataset
from distkd.data.shardset import ShardSet

BATCH, BATCHES = 32, 2
AUGMENT = {
    "hflip": 0.5, "rotation": 45, "scale": [0.95, 1.2], "shift": [0.05, 0], "affine_probability": 0.5,
    "warps": "successive", "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "jitter_probability": 0.5,
    "jitter_order": "random",
}  # fmt: skip
DEGRADED = {"coarse": {"of": "tile", "factor": 4}}


def batches(folder: Path, arguments: argparse.Namespace, *, on: str, cached: bool) -> Callable[[bool], None]:
    config = DataConfig.model_validate(
        {
            "threads": arguments.threads,
            "cache_mib": 1024 if cached else 0,
            "augment": AUGMENT,
            "degraded": DEGRADED,
            "transform_on": on,
        }
    )
    data = Dataset(ShardSet(folder), config, ["tile", "coarse"], seed=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(send: bool) -> None:
        for number in range(BATCHES):
            batch = data.batch(range(number * BATCH, (number + 1) * BATCH), epoch=0, train=True)
            if send:
                batch.to(device, torch.float32)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of the dataset")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sides: dict[str, Callable[[], Any]] = {}
    kinds = {"from memory": True, "from JPEG": False}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "shards"
        write(out)
        for kind, cached in kinds.items():
            host = batches(out, arguments, on="host", cached=cached)
            device = batches(out, arguments, on="device", cached=cached)
            sides[f"host, {kind}"] = lambda run=host: run(True)
            sides[f"device, {kind}"] = lambda run=device: run(True)
            sides[f"device, {kind}, loading"] = lambda run=device: run(False)
        found = compare(sides, repeats=arguments.repeats, warmup=1)
    ratios = {
        f"host / {side}": found[f"host, {kind}"]["least_processor_s"] / found[side]["least_processor_s"]
        for kind in kinds
        for side in (f"device, {kind}", f"device, {kind}, loading")
    }
    report("augmentation", found, ratios, samples=BATCH * BATCHES, threads=arguments.threads)


if __name__ == "__main__":
    main()
