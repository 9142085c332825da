"""Everything that a run tells Prometheus, with a server that asks for it, against the same steps without.

Target: at most 1 % of a step of 5 ms. Whole steps scatter by more on a shared machine, so what is told is measured
around steps that cost nothing: their outputs and gradients are there already. One side has phases, ledger, readings
every ten steps, the exporter with its files and a scrape per second; the other has the training alone, its guard
against NaN included. All processor time counts, that of the exporter's threads too. Counted besides: collectives, and
scalars that are waited for, which is none of them between two readings. With two ranks:
torchrun --nproc-per-node 2 -m benchmarks.metrics_overhead
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import compare, report
from benchmarks.loop_overhead import settings
from distkd.base import Batch, World
from distkd.comm import world as comm
from distkd.data.loader import train_batches
from distkd.data.make import make_shards
from distkd.metrics.exporter import start_exporter
from distkd.metrics.settings import MetricsConfig
from distkd.train.finite import FiniteGuard
from distkd.train.job import Job, assemble
from distkd.train.loop import LOOK_EVERY, train, train_step
from distkd.train.observe import Observer
from distkd.train.signals import StopFlag
from distkd.train.tally import Tally

STEP_S = 0.005
"""The step that the cost is a share of."""
LOG_EVERY = 10


class NoWatch:
    """A stopwatch that looks at no clock."""

    def phase(self, _: str) -> nullcontext[None]:
        return nullcontext()


def empty_step(job: Job, batch: Batch) -> Job:
    """The job with a method and an engine that have done their work already."""
    out = job.method.step(job.forward, batch, job.world)
    out.loss.backward()
    out = replace(out, loss=out.loss.detach())
    norm = torch.ones(())
    method = SimpleNamespace(
        step=lambda *_: out, after_step=lambda *_: None, follows_weights=False, state=job.method.state
    )
    engine = copy(job.engine)
    engine.backward = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    engine.step = lambda *_: SimpleNamespace(norm=norm, applied=True)  # pyright: ignore[reportAttributeAccessIssue]
    return replace(job, method=method, engine=engine)  # pyright: ignore[reportArgumentType]


def told(job: Job, batch: Batch, folder: Path, steps: int) -> tuple[Callable[[], None], Observer]:
    """The body of `train.loop.fit` between two evaluations, with all that it tells."""
    observer = Observer(job, folder)
    observer.start(0, 1)
    tally = Tally(job, LOG_EVERY, observer.phases, observer.backlog)
    stop_flag, watch, done = StopFlag(), tally.watch, [0]

    def run() -> None:
        with comm.observed(watch.waiting):
            for _ in range(steps):
                with watch.phase("data"):
                    passes = [batch]
                out, update = train_step(job, passes, watch)
                tally.add(passes, out, update)
                done[0] += 1
                watch.lap()
                observer.step(done[0], len(batch))
                if done[0] % LOG_EVERY == 0:
                    look = done[0] % LOOK_EVERY < LOG_EVERY
                    observer.reading(done[0], tally.read(stop_flag, memories=look), 1e-3)

    return run, observer


def bare(job: Job, batch: Batch, steps: int) -> Callable[[], None]:
    """The same steps, watched by nobody."""
    guard, watch = FiniteGuard(job), NoWatch()

    def run() -> None:
        for number in range(steps):
            out, update = train_step(job, [batch], watch)  # pyright: ignore[reportArgumentType]
            guard.watch(number, out.loss, update.norm)
            if (number + 1) % LOG_EVERY == 0:
                guard.check(out.loss.item(), update.norm.item())

    return run


@contextmanager
def scraped(address: str, every_s: float) -> Iterator[None]:
    """Somebody asks, from a thread of this process: both ends of each scrape are paid for here."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(every_s):
            with urllib.request.urlopen(f"http://{address}/metrics") as answer:
                answer.read()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps of one turn")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--scrape-every", type=float, default=1.0, metavar="SECONDS")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world, steps = World.from_environment(), arguments.steps
    comm.init(world, device=torch.device("cpu"), timeout_s=120.0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(comm.broadcast_object(folder, world))
        if world.is_main:
            make_shards("synthetic", root / "shards" / "synthetic")
        comm.barrier(world)
        train(settings(root, "tiny", teacher=True), world)
        job = assemble(settings(root, "tiny", teacher=False), world)
        job.method.trainable.train()
        stream = train_batches(job.dataset, job.plan, world, 1)
        batch = next(stream)[1][0].to(job.device, job.dtype)
        stream.close()
        empty = empty_step(job, batch)
        (root / "run").mkdir(exist_ok=True)
        everything, observer = told(empty, batch, root / "run", steps)
        exporter = start_exporter(
            MetricsConfig(export="local"), root / "run", world, ledger=observer.ledger, labels={"run": "run"}, info={}
        )
        assert exporter is not None
        before = comm.counts.copy()
        everything()
        collectives: dict[str, Any] = {name: (n - before[name]) / steps for name, n in comm.counts.items()}
        with scraped(exporter.address, arguments.scrape_every):
            sides = compare(
                {"told": everything, "bare": bare(empty, batch, steps)}, repeats=arguments.repeats, warmup=2
            )
        exporter.close()
        comm.barrier(world)
    comm.shutdown()
    if not world.is_main:
        return
    more = {key: (sides["told"][key] - sides["bare"][key]) / steps for key in ("processor_s", "least_processor_s")}
    report(
        "metrics_overhead",
        sides,
        {
            "told / 1 % of 5 ms": more["least_processor_s"] / (0.01 * STEP_S),
            "median told / 1 % of 5 ms": more["processor_s"] / (0.01 * STEP_S),
        },
        added_us=round(more["least_processor_s"] * 1e6, 2),
        collectives_per_step=collectives,
        steps=steps,
        ranks=world.size,
    )


if __name__ == "__main__":
    main()
