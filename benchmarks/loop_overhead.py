"""The loop, with metrics, banks, agreement, timings and the guards, against a DDP loop written by hand.

Target: at most 1.02 x and 0.1 ms a step. Both take the same steps of the same DC-Distill model on the same batches,
made beforehand; the hand-written side calls the method and torch's optimizer and nothing else. `--model tiny` shows the
loop itself, `--model resnet18` what it amounts to in a real step. Whole steps scatter by some per cent on a shared
machine, more than is looked for, so what the loop adds is measured around empty steps too. With two ranks:
torchrun --nproc-per-node 2 -m benchmarks.loop_overhead
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import compare, report
from distkd.base import Batch, World
from distkd.comm import world as comm
from distkd.config import settings_class
from distkd.data.loader import train_batches
from distkd.data.make import make_shards
from distkd.train.job import Job, assemble
from distkd.train.loop import train, train_step
from distkd.train.settings import Settings
from distkd.train.signals import StopFlag
from distkd.train.tally import Tally


def settings(root: Path, model: str, *, teacher: bool) -> Settings:
    """A run on the default synthetic set."""
    encoder = {"name": "cnn"} if model == "tiny" else {"name": "resnet18"}
    method: dict[str, Any] = {"name": "supervised"}
    if not teacher:
        method = {"name": "dc_distill", "positives": 40, "negatives": 120, "keep_negative": 80}
    return settings_class(method["name"]).model_validate(
        {
            "run": {"root": str(root), "name": "teacher" if teacher else "student", "epochs": 1 if teacher else 1000},
            "method": method,
            "model": {"modalities": ["path"], "encoders": {"path": encoder}, "norm": "group"},
            "teacher": {"export": None if teacher else "teacher"},
            "data": {"make": "synthetic"},
            "batch": {"global_batch": 32},
            "eval": {"select": "last"},
        }
    )


def by_hand(job: Job, batches: list[Batch]) -> None:
    """What a researcher would write: forward, backward, step, banks."""
    optimizer = job.engine.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    for batch in batches:
        out = job.method.step(job.forward, batch, job.world)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        job.method.after_step(out, job.world)


def by_loop(job: Job, batches: list[Batch], tally: Tally, log_every: int) -> None:
    """The body of `train.loop.fit` between two evaluations."""
    stop_flag = StopFlag()
    for number, batch in enumerate(batches):
        out, update = train_step(job, [batch], tally.watch)
        tally.add([batch], out, update)
        tally.watch.lap()
        if (number + 1) % log_every == 0:
            tally.read(stop_flag)
        else:
            tally.should_stop(number + 1, stop_flag)


def added(job: Job, batch: Batch) -> dict[str, Callable[[], None]]:
    """Both sides around a step that costs nothing: its outputs and gradients are there already.

    What is left is what the loop adds, free of the scatter of a whole step's time.
    """
    out = job.method.step(job.forward, batch, job.world)
    out.loss.backward()
    out = replace(out, loss=out.loss.detach())
    parameters = [p for p in job.method.trainable.parameters() if p.grad is not None]
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]

    def fill(_: Any = None) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    still = SimpleNamespace(step=lambda *_: out, after_step=lambda *_: None, follows_weights=False)
    engine = copy(job.engine)
    engine.backward = fill  # pyright: ignore[reportAttributeAccessIssue]
    empty = replace(job, method=still, engine=engine)  # pyright: ignore[reportArgumentType]
    optimizer = job.engine.optimizer  # pyright: ignore[reportAttributeAccessIssue]

    def by_hand_empty() -> None:
        for _ in range(10):
            fill()
            optimizer.step()
            optimizer.zero_grad()

    tally = Tally(empty, 10)
    return {"loop": lambda: by_loop(empty, [batch] * 10, tally, 10), "by_hand": by_hand_empty}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "resnet18"), default="tiny")
    parser.add_argument("--steps", type=int, default=10, help="steps of one turn")
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = World.from_environment()
    comm.init(world, device=torch.device("cpu"), timeout_s=120.0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(comm.broadcast_object(folder, world))
        if world.is_main:
            make_shards("synthetic", root / "shards" / "synthetic")
        comm.barrier(world)
        train(settings(root, arguments.model, teacher=True), world)
        job = assemble(settings(root, arguments.model, teacher=False), world)
        job.method.trainable.train()
        stream = train_batches(job.dataset, job.plan, world, 1)
        batches = [next(stream)[1][0].to(job.device, job.dtype) for _ in range(arguments.steps)]
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
        tally = Tally(job, 10)
        sides = compare(
            {"loop": lambda: by_loop(job, batches, tally, 10), "by_hand": lambda: by_hand(job, batches)},
            repeats=arguments.repeats,
        )
        empty = compare(added(job, batches[0]), repeats=200)
        comm.barrier(world)
    comm.shutdown()
    if not world.is_main:
        return
    loop, hand = (sides[name]["least_processor_s"] / arguments.steps for name in ("loop", "by_hand"))
    more = (empty["loop"]["least_processor_s"] - empty["by_hand"]["least_processor_s"]) / 10
    report(
        "loop_overhead",
        sides,
        {"loop / by_hand": loop / hand, "added / 0.1 ms": more / 1e-4, "added / step": more / hand},
        model=arguments.model,
        steps=arguments.steps,
        ranks=world.size,
    )


if __name__ == "__main__":
    main()
