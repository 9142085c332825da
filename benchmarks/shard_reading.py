"""Batches of 64 from shards: ours by offset against webdataset, litdata and streaming, checksums on and off.

Targets: `ours / best peer, in process` >= 1, `ours, 2 threads / best peer, 2 workers` >= 3, checksums cost <= 10 %.

A sample is a 24 kB patch of bytes, 80 floats and a label. Every side makes the same batches of tensors, in a shuffled
order, from files that lie in the page cache, and touches every byte. Peers run in an environment of their own, since
streaming forbids the numpy that distkd uses: it is made once in `--side`. Epochs of all sides are taken in turn:
medians of samples a second, and the best, since other users of a machine only ever take away. What checksums cost is
told by the least processor seconds of an epoch.
"""

from __future__ import annotations

import argparse
import json
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import report
from distkd.data.manifest import Description, Fold, Modality
from distkd.data.shardset import ShardSet
from distkd.data.write import ShardWriter

BATCH = 64
PEERS = {
    "webdataset": (("shuffled", "workers"),),
    "litdata": (("random", "shuffled", "workers"),),
    "streaming": (("random", "shuffled"), ("workers",)),  # its workers hang where it was read before they were forked
}
"""Modes of each, by process."""
PATIENCE_S = 120
"""How long a peer may take for an epoch."""
OURS_A_ROUND = 3
"""Epochs of ours for one of theirs, which take ten times as long."""
SHAPE = (90, 90, 3)
FEATURES = 80

PACKAGES = ["torch==2.13.0", "numpy==2.1.3", "webdataset==1.0.2"]
NEEDED = [
    *("lightning-utilities", "requests", "tqdm", "boto3", "tifffile", "obstore", "filelock==3.16.1"),
    *("Brotli", "google-cloud-storage<3.3", "matplotlib<4", "paramiko<4", "python-snappy<1", "transformers<5"),
    *("xxhash<4", "zstd<2", "oci<3", "azure-storage-blob<13", "azure-storage-file-datalake<13", "azure-identity"),
    "catalogue<3",
]
"""What litdata and streaming import; newer file locks refuse to be inherited by streaming's workers."""
ALONE = ["litdata==0.2.76", "mosaicml-streaming==0.13.0"]
"""Without what they declare: torchvision does not load beside a torch for CPUs."""
STUB = {
    "__init__.py": "__version__ = '0'\n",
    "datasets.py": "class VisionDataset: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "def to_tensor(x): raise NotImplementedError\n",
}
"""A torchvision of which streaming uses nothing here."""

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Reader = Callable[[np.ndarray], Batch]


def write(folder: Path, n_samples: int) -> None:
    """The raw arrays for the peers, and our tars."""
    draws = np.random.default_rng(0)
    raw = {
        "patch": draws.integers(0, 256, (n_samples, *SHAPE), dtype=np.uint8),
        "omics": draws.normal(size=(n_samples, FEATURES)).astype(np.float32),
        "label": draws.integers(0, 3, n_samples),
    }
    np.savez(folder / "raw.npz", **raw)
    description = Description(
        task="bench",
        class_names=["a", "b", "c"],
        modalities={
            "patch": Modality(kind="image", dtype="uint8", shape=SHAPE, codec="npy"),
            "omics": Modality(kind="vector", dtype="float32", shape=(FEATURES,), codec="npy"),
        },
        source="drawn",
        licence="none",
    )
    with ShardWriter(folder / "distkd", description, shard_bytes=n_samples * 26_000 // 8) as writer:
        for number in range(n_samples):
            arrays = {name: raw[name][number] for name in ("patch", "omics")}
            writer.add(f"s-{number}", arrays, patient=f"p{number}", label=int(raw["label"][number]))
        everybody = [f"p{number}" for number in range(n_samples)]
        writer.split([Fold(train=everybody, val=[], test=[])], rule="all train", seed=0)


def reader_of(shard_set: ShardSet) -> Reader:
    label_S = torch.as_tensor(shard_set.manifest.samples.label)

    def read(sample_B: np.ndarray) -> Batch:
        patch_BHWC = torch.empty((len(sample_B), *SHAPE), dtype=torch.uint8)
        omics_BF = torch.empty((len(sample_B), FEATURES))
        shard_set.read_rows("patch", sample_B, patch_BHWC.numpy())
        shard_set.read_rows("omics", sample_B, omics_BF.numpy())
        return patch_BHWC, omics_BF, label_S[torch.as_tensor(sample_B)]

    return read


def in_process(read: Reader, n_samples: int) -> Iterator[Batch]:
    order = torch.randperm(n_samples).numpy()
    for start in range(0, n_samples, BATCH):
        yield read(order[start : start + BATCH])


def in_threads(read: Reader, n_samples: int, threads: int) -> Iterator[Batch]:
    """Whole batches a thread, two ahead."""
    order = torch.randperm(n_samples).numpy()
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Future[Batch]] = []
        for start in range(0, n_samples, BATCH):
            ahead.append(pool.submit(read, order[start : start + BATCH]))
            if len(ahead) > 2 * threads:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def epoch(batches: Iterator[Batch]) -> float:
    """Samples a second."""
    start, samples = time.perf_counter(), 0
    for patch_BHWC, _, _ in batches:
        samples += len(patch_BHWC)
    return samples / (time.perf_counter() - start)


def our_sides(folder: Path, n_samples: int) -> dict[str, Callable[[], float]]:
    warm = ShardSet(folder / "distkd", check="first")
    first, always, off = (reader_of(warm.checking(check)) for check in ("first", "always", "never"))
    return {
        "process": lambda: epoch(in_process(first, n_samples)),
        "process, first epoch": lambda: epoch(in_process(reader_of(warm.checking("first")), n_samples)),
        "process, every read checked": lambda: epoch(in_process(always, n_samples)),
        "process, unchecked": lambda: epoch(in_process(off, n_samples)),
        "2 threads": lambda: epoch(in_threads(first, n_samples, 2)),
    }


def first_batch_s(folder: Path, share: float, n_samples: int) -> float:
    """From a closed set to the batch at that share of an epoch: open, plan, read."""
    start = time.perf_counter()
    read = reader_of(ShardSet(folder / "distkd"))
    order = np.random.default_rng(0).permutation(n_samples)
    at = int(n_samples * share)
    read(order[at : at + BATCH])
    return time.perf_counter() - start


def make_side(side: Path) -> Path:
    """The interpreter of the peers' environment.

    Raises:
        RuntimeError: it cannot be made; the message says why.
    """
    python, done = side / "bin" / "python", side / ".complete"
    if done.exists():
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(side)],
        [*pip, *PACKAGES],
        [*pip, "numpy==2.1.3", *NEEDED],
        [*pip, "--no-deps", *ALONE],
    ]
    for step in steps:
        ran = subprocess.run(step, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{' '.join(step[:6])} ...: {ran.stderr.strip().splitlines()[-1:]}")
    packages = next(side.glob("lib/python*/site-packages"))
    for name, text in STUB.items():
        path = packages / "torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done.touch()
    return python


class Peer:
    """A peer in its process; it reads an epoch when it is asked to."""

    def __init__(self, python: Path, library: str, folder: Path, name: str):
        script = Path(__file__).parent / "peers" / "shard_peer.py"
        self._log = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [str(python), str(script), library, str(folder / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._answer()  # it has written its format

    def epoch(self, mode: str) -> float:
        """Samples a second."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{mode}\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["samples"] / answer["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        is_there = select.select([self._process.stdout], [], [], PATIENCE_S)[0]
        line = self._process.stdout.readline() if is_there else ""
        if not line:
            self._process.kill()
            if not is_there:
                raise RuntimeError(f"no answer within {PATIENCE_S} s")
            self._log.seek(0)
            raise RuntimeError((self._log.read().strip().splitlines() or ["it ended"])[-1])
        return json.loads(line)


def peer_sides(side: Path, folder: Path) -> tuple[dict[str, Callable[[], float]], list[Peer], dict[str, str]]:
    """What there is of peers, and why the others are missing."""
    try:
        python = make_side(side)
    except (RuntimeError, OSError) as error:
        return {}, [], dict.fromkeys(PEERS, f"no side environment: {error}")
    sides: dict[str, Callable[[], float]] = {}
    peers: list[Peer] = []
    why: dict[str, str] = {}
    for library, modes in ((library, modes) for library, groups in PEERS.items() for modes in groups):
        try:
            peer = Peer(python, library, folder, f"{library}-{modes[0]}")
            peers.append(peer)
            for mode in modes:
                peer.epoch(mode)  # the first one starts workers and fills caches
                sides[f"{library}, {mode}"] = lambda peer=peer, mode=mode: peer.epoch(mode)
        except (RuntimeError, BrokenPipeError) as error:
            why[f"{library}, {' '.join(modes)}"] = str(error)
    return sides, peers, why


def ratios_of(sides: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of the best epochs, of which others take the least away."""
    best = {name: figures["best_per_s"] for name, figures in sides.items()}
    cost = {name: figures["least_processor_s"] for name, figures in sides.items() if "least_processor_s" in figures}
    unchecked = cost["process, unchecked"]
    found = {
        "checked at first read / unchecked, processor": cost["process"] / unchecked,
        "checked at first read / unchecked, processor, first epoch": cost["process, first epoch"] / unchecked,
        "checked at every read / unchecked, processor": cost["process, every read checked"] / unchecked,
        "2 threads / 1": best["2 threads"] / best["process"],
    }
    inside = {name: rate for name, rate in best.items() if name.endswith((", random", ", shuffled"))}
    workers = {name: rate for name, rate in best.items() if name.endswith(", workers")}
    if "litdata, random" in best:
        found["ours / litdata, random access in process"] = best["process"] / best["litdata, random"]
    if inside:
        found["ours / best peer, in process"] = best["process"] / max(inside.values())
    if workers:
        found["ours, 2 threads / best peer, 2 workers"] = best["2 threads"] / max(workers.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each side")
    parser.add_argument("--profile", choices=["patch"], default="patch", help="what a sample is made of")
    cache = Path.home() / ".cache" / "distkd" / "peers"
    parser.add_argument("--side", type=Path, default=cache, help="environment of the peers, made if it is not there")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write(folder, arguments.samples)
        ours = our_sides(folder, arguments.samples)
        theirs, peers, why = peer_sides(arguments.side, folder)
        rates: dict[str, list[float]] = {side: [] for side in (*ours, *theirs)}
        processor: dict[str, list[float]] = {side: [] for side in ours}
        for number in range(-1, arguments.rounds):
            for side, run in [*list(ours.items()) * OURS_A_ROUND, *theirs.items()]:
                if number < 0 and side in theirs:
                    continue  # they are warm
                start = time.process_time()
                rate = run()
                if number >= 0:
                    rates[side].append(rate)
                    processor.get(side, []).append(time.process_time() - start)
        resume = {share: first_batch_s(folder, share, arguments.samples) for share in (0.0, 0.9, 0.0, 0.9)}
        for peer in peers:
            peer.close()
    sides = {
        side: {"samples_per_s": statistics.median(found), "best_per_s": max(found)} for side, found in rates.items()
    }
    for side, found in processor.items():
        sides[side]["least_processor_s"] = min(found)
    report(
        "shard_reading",
        sides,
        ratios_of(sides),
        profile=arguments.profile,
        samples=arguments.samples,
        first_batch_s={f"at {share:.0%} of an epoch": round(seconds, 4) for share, seconds in resume.items()},
        **({"missing": dict.fromkeys(why), "why": why} if why else {}),
    )


if __name__ == "__main__":
    main()
