"""Which sample comes when: what a step's positions cost among 1e9 samples, and how well streaming shuffles.

    python -m benchmarks.plan

- `indexed`, `streaming`: the positions of a step of 4096 among 1e9 samples, the latter in 1e5 shards with 64 lanes: the
  first step of a run, one more, one at 90 % of the epoch, as one process for all ranks; the memory is the peak of what
  Python and NumPy held meanwhile. `rank`: the same for one rank of 64.
- `order`: all places of a permutation of 1e8, in the blocks that a plan makes, against NumPy's and torch's, which hold
  800 MB; processor nanoseconds a sample, once each.
- `quality/LANESxBUFFER`: two epochs of 1e6 samples in 500 shards, batches of 256, against one shuffle of everything,
  for which all is 1 but the number of shards in a batch. `webdataset` is that library's own shuffle in each of 8
  readers with a buffer of 4096 samples, shards dealt to readers anew each epoch, batches from one reader after another.

Targets: no array of all samples; a jump costs what a step costs; a permutation of 1e8 lazily, or in 2 s.
"""

from __future__ import annotations

import argparse
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch
from webdataset.filters import shuffle

from benchmarks.common import report
from distkd.base import World
from distkd.data.plan import Plan, shuffled
from distkd.data.stream_plan import StreamPlan, shuffle_quality

GLOBAL_BATCH, LANES, BUFFER = 4096, 64, 4096
SHARD, SHARDS, BATCH, READERS = 2000, 500, 256, 8
SETTINGS = ((1, 4096), (8, 512), (8, 4096), (8, 16384), (32, 2048), (32, 4096), (64, 512), (64, 4096), (256, 4096))


def cost(make: Callable[[], Any], ask: Callable[[Any, int], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of a new plan's first step, its next, and a jump; peak bytes of all of that."""
    wall: dict[str, list[float]] = {"plan_ms": [], "first_ms": [], "next_ms": [], "jump_ms": [], "after_jump_ms": []}
    for seed in range(repeats):
        start = time.perf_counter()
        plan = make()
        wall["plan_ms"].append(time.perf_counter() - start)
        jump = plan.steps_per_epoch * 9 // 10 + seed
        for name, step in (("first_ms", seed), ("next_ms", seed + 1), ("jump_ms", jump), ("after_jump_ms", jump + 1)):
            start = time.perf_counter()
            ask(plan, step)
            wall[name].append(time.perf_counter() - start)
    tracemalloc.start()
    plan = make()
    for step in (0, plan.steps_per_epoch * 9 // 10):
        ask(plan, step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {name: 1e3 * median(seconds) for name, seconds in wall.items()} | {"peak_mib": peak / 2**20}


def costs(n: int, shards: int, repeats: int) -> dict[str, dict[str, float]]:
    seeds = iter(range(1 << 30))
    count_S = np.full(shards, n // shards)
    rank = World(5, 64)

    def indexed() -> Plan:
        return Plan(n, GLOBAL_BATCH, seed=next(seeds), epochs=3)

    def streaming() -> StreamPlan:
        return StreamPlan(count_S, GLOBAL_BATCH, seed=next(seeds), epochs=3, lanes=LANES, buffer=BUFFER)

    return {
        "indexed": cost(indexed, lambda plan, step: plan.global_positions(step), repeats),
        "indexed/rank": cost(indexed, lambda plan, step: plan.local_positions(step, 0, 1, rank), repeats),
        "streaming": cost(streaming, lambda plan, step: plan.global_places(step), repeats),
        "streaming/rank": cost(streaming, lambda plan, step: plan.local_places(step, 0, 1, rank), repeats),
    }


def orders(n: int, block: int = 1 << 14) -> dict[str, dict[str, float]]:
    def ours() -> None:
        for first in range(0, n, block):
            shuffled(np.arange(first, min(first + block, n)), n, 1)

    sides: dict[str, Callable[[], Any]] = {
        "order/ours": ours,
        "order/numpy": lambda: np.random.default_rng(0).permutation(n),
        "order/torch": lambda: torch.randperm(n, generator=torch.Generator().manual_seed(0)),
    }
    figures: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        start, start_wall = time.process_time(), time.perf_counter()
        side()
        figures[name] = {
            "processor_ns": 1e9 * (time.process_time() - start) / n,
            "wall_s": time.perf_counter() - start_wall,
        }
    return figures


def streamed(epoch: int, lanes: int, buffer: int) -> np.ndarray:
    plan = StreamPlan([SHARD] * SHARDS, BATCH, seed=0, epochs=2, lanes=lanes, buffer=buffer)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    places = [plan.global_places(step) for step in steps]
    return np.concatenate([shard * SHARD + inside for shard, inside in places])


def webdataset(epoch: int, buffer: int) -> np.ndarray:
    shards = np.random.default_rng(epoch).permutation(SHARDS)

    def batches(reader: int) -> Iterator[list[int]]:
        samples = (shard * SHARD + k for shard in shards[reader::READERS].tolist() for k in range(SHARD))
        shuffle_stream: Any = shuffle(buffer, rng=random.Random(1000 * epoch + reader))
        stream = iter(shuffle_stream(samples))
        # a reader's last samples fill no batch
        while len(batch := [sample for _, sample in zip(range(BATCH), stream, strict=False)]) == BATCH:
            yield batch

    rows = [row for rows in zip(*map(batches, range(READERS)), strict=False) for row in rows]
    return np.concatenate([np.array(row) for row in rows])


def qualities() -> dict[str, dict[str, float]]:
    counts = [SHARD] * SHARDS
    rng = np.random.default_rng(0)
    n = SHARD * SHARDS
    full = shuffle_quality((rng.permutation(n), rng.permutation(n)), counts, BATCH)
    peer = shuffle_quality((webdataset(0, BUFFER), webdataset(1, BUFFER)), counts, BATCH)
    table = {"quality/full": asdict(full), "quality/webdataset": asdict(peer)}
    for lanes, buffer in SETTINGS:
        epochs = (streamed(0, lanes, buffer), streamed(1, lanes, buffer))
        table[f"quality/{lanes}x{buffer}"] = asdict(shuffle_quality(epochs, counts, BATCH))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=1e9)
    parser.add_argument("--shards", type=int, default=10**5)
    parser.add_argument("--order", type=float, default=1e8, help="size of the permutation made whole")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    of_steps = costs(int(arguments.samples), arguments.shards, arguments.repeats)
    of_order = orders(int(arguments.order))
    of_quality = qualities()
    ours = of_order["order/ours"]["processor_ns"]
    ratios = {
        "numpy_permutation": of_order["order/numpy"]["processor_ns"] / ours,
        "torch_randperm": of_order["order/torch"]["processor_ns"] / ours,
        "jump/first, indexed": of_steps["indexed"]["jump_ms"] / of_steps["indexed"]["first_ms"],
        "jump/next, streaming": of_steps["streaming"]["jump_ms"] / of_steps["streaming"]["next_ms"],
    }
    report(
        "plan",
        of_steps | of_order | of_quality,
        ratios,
        samples=int(arguments.samples),
        shards=arguments.shards,
        order=int(arguments.order),
        global_batch=GLOBAL_BATCH,
    )


if __name__ == "__main__":
    main()
