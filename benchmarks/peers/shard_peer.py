"""One peer of `benchmarks/shard_reading.py`, in an environment of its own: writes its format, then reads on demand.

`python shard_peer.py LIBRARY FOLDER` reads one mode a line from standard input and answers with a line of JSON:
seconds of one epoch of batches of 64 as tensors, and how many samples came. It uses nothing of distkd.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

BATCH = 64

Mode = Callable[[], Iterable[Any]]


def batches_of(dataset: Any) -> Iterator[Any]:
    """Random access: every sample once, in an order drawn anew each time."""
    order = torch.randperm(len(dataset)).tolist()
    for start in range(0, len(order), BATCH):
        yield default_collate([dataset[number] for number in order[start : start + BATCH]])


def batched(samples: Iterable[Any]) -> Iterator[Any]:
    """In the order in which they come."""
    some: list[Any] = []
    for sample in samples:
        some.append(sample)
        if len(some) == BATCH:
            yield default_collate(some)
            some = []
    if some:
        yield default_collate(some)


def webdataset_modes(folder: Path, raw: dict[str, np.ndarray]) -> dict[str, Mode]:
    """Reads the very tars that we read: mtime 0, no PAX headers."""
    del raw
    import webdataset

    wds: Any = webdataset  # it fills its namespace when it is imported

    tars = sorted(map(str, (folder.parent / "distkd").glob("*.tar")))

    def label(about: dict[str, Any]) -> int:
        return int(about["label"])

    def pipeline() -> Any:
        return (
            wds.WebDataset(tars, shardshuffle=len(tars), workersplitter=wds.split_by_worker, seed=1)
            .shuffle(1000)
            .decode()
            .to_tuple("patch.npy", "omics.npy", "json")
            .map_tuple(torch.as_tensor, torch.as_tensor, label)
            .batched(BATCH, collation_fn=default_collate)
        )

    inside = pipeline()
    workers = wds.WebLoader(pipeline(), batch_size=None, num_workers=2, persistent_workers=True)
    return {"shuffled": lambda: inside, "workers": lambda: workers}


def litdata_modes(folder: Path, raw: dict[str, np.ndarray]) -> dict[str, Mode]:
    """Stored as bytes, which it gives out fastest; random access without its window of decoded neighbours."""
    from litdata import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]
    from litdata.streaming.writer import BinaryWriter  # pyright: ignore[reportMissingImports]

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
    shape = raw["patch"].shape[1:]
    for number in range(len(raw["label"])):
        label = int(raw["label"][number])
        writer[number] = {
            "patch": raw["patch"][number].tobytes(),
            "omics": raw["omics"][number].tobytes(),
            "label": label,
        }
    writer.done()
    writer.merge(1)

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> dict[str, Any]:
            stored = super().__getitem__(index)
            return {
                "patch": torch.frombuffer(stored["patch"], dtype=torch.uint8).view(shape),
                "omics": torch.frombuffer(stored["omics"], dtype=torch.float32),
                "label": stored["label"],
            }

    random_access = Decoded(str(folder), batch_decode=1)
    shuffled = Decoded(str(folder), shuffle=True, seed=1)
    workers = StreamingDataLoader(
        Decoded(str(folder), shuffle=True, seed=1), batch_size=BATCH, num_workers=2, persistent_workers=True
    )
    return {
        "random": lambda: batches_of(random_access),
        "shuffled": lambda: batched(shuffled),
        "workers": lambda: workers,
    }


def streaming_modes(folder: Path, raw: dict[str, np.ndarray]) -> dict[str, Mode]:
    from streaming import MDSWriter, StreamingDataset  # pyright: ignore[reportMissingImports]
    from streaming.base.util import clean_stale_shared_memory  # pyright: ignore[reportMissingImports]

    height, width, channels = raw["patch"].shape[1:]
    columns = {
        "patch": f"ndarray:uint8:{height},{width},{channels}",
        "omics": f"ndarray:float32:{raw['omics'].shape[1]}",
        "label": "int",
    }
    with MDSWriter(out=str(folder), columns=columns, size_limit=64 << 20) as writer:
        for number in range(len(raw["label"])):
            writer.write(
                {"patch": raw["patch"][number], "omics": raw["omics"][number], "label": int(raw["label"][number])}
            )
    clean_stale_shared_memory()
    inside = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=1, batch_size=BATCH)
    workers = DataLoader(inside, batch_size=BATCH, num_workers=2, persistent_workers=True)
    return {"random": lambda: batches_of(inside), "shuffled": lambda: batched(inside), "workers": lambda: workers}


LIBRARIES = {"webdataset": webdataset_modes, "litdata": litdata_modes, "streaming": streaming_modes}


def epoch(batches: Iterable[Any]) -> dict[str, Any]:
    """Seconds and samples of one epoch; the batches are made whole, and dropped."""
    start, samples, total = time.perf_counter(), 0, 0
    for batch in batches:
        patch = batch["patch"] if isinstance(batch, dict) else batch[0]
        assert isinstance(patch, torch.Tensor)
        samples += len(patch)
        total += patch.nbytes
    return {"seconds": time.perf_counter() - start, "samples": samples, "bytes": total}


def main() -> None:
    library, folder = sys.argv[1], Path(sys.argv[2])
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    torch.set_num_threads(1)
    with np.load(folder.parent / "raw.npz") as file:
        raw = {name: file[name] for name in file.files}
    modes = LIBRARIES[library](folder, raw)
    del raw
    print(json.dumps({"modes": sorted(modes)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(epoch(modes[line.strip()]())), file=answers, flush=True)


if __name__ == "__main__":
    main()
