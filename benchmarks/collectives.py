"""Collectives and bytes of one step of DC-Distill: gradient buckets, one Gram matrix, one gather of bank rows.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.collectives

Counts, not seconds. The bytes of the gather are W x B x (8 + 4 banks x D x 4), whatever the size of the banks.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.loop_overhead import settings
from distkd.base import World
from distkd.comm import world as comm
from distkd.data.loader import train_batches
from distkd.data.make import make_shards
from distkd.metrics.meters import Stopwatch
from distkd.train.job import assemble
from distkd.train.loop import train, train_step

STEPS = 5


def main() -> None:
    world = World.from_environment()
    comm.init(world, device=torch.device("cpu"), timeout_s=120)
    with tempfile.TemporaryDirectory() as own:
        root = Path(comm.broadcast_object(own, world))
        if world.is_main:
            make_shards("synthetic", root / "shards" / "synthetic")
            train(settings(root, "tiny", teacher=True), World())
        comm.barrier(world)
        job = assemble(settings(root, "tiny", teacher=False), world)
        buckets = _count_buckets(job.engine.wrapped)  # pyright: ignore[reportAttributeAccessIssue]
        sizes = _count_bytes()
        job.method.trainable.train()
        stream = train_batches(job.dataset, job.plan, world, job.passes)
        train_step(job, next(stream)[1], Stopwatch())  # DDP arranges its buckets, the banks measure their normalisers
        buckets.clear()
        sizes.clear()
        before = comm.counts.copy()
        for _ in range(STEPS):
            train_step(job, next(stream)[1], Stopwatch())
        per_step = {name: count / STEPS for name, count in (comm.counts - before).items()}
        comm.barrier(world)
        if world.is_main:
            line = {
                "benchmark": "collectives",
                "ranks": world.size,
                "per_step": {"gradient_buckets": buckets["calls"] / STEPS, **per_step},
                "bytes_per_step": {name: size / STEPS for name, size in sizes.items()},
            }
            print(json.dumps(line), flush=True)
    comm.shutdown()


def _count_buckets(model: Any) -> Counter[str]:
    counts: Counter[str] = Counter()
    if isinstance(model, DistributedDataParallel):

        def hook(_, bucket):  # without annotations: DDP checks them and cannot read them as text
            counts["calls"] += 1
            return allreduce_hook(cast(dist.ProcessGroup, dist.group.WORLD), bucket)

        model.register_comm_hook(None, hook)
    return counts


def _count_bytes() -> Counter[str]:
    """Bytes that a rank ends up with, by collective, seen at torch.distributed itself."""
    sizes: Counter[str] = Counter()

    def watched(name: str) -> None:
        original = getattr(dist, name)

        def call(out: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes[name] += out.numel() * out.element_size()
            return original(out, *args, **kwargs)

        setattr(dist, name, call)

    for name in ("all_reduce", "all_gather_single"):
        watched(name)
    return sizes


if __name__ == "__main__":
    main()
