"""What checkpoints cost a run: the stall of a save beside training against one that waits, and the way back.

Targets: `stall async / sync` <= 0.05, at most 2 s from the start of a resumed attempt to its first batch.

A ResNet-18 student trains; now and then a checkpoint of its weights, Adam's moments and banks is taken, by both sides
in turn. The stall is what the training loop itself waits: in `save`, and before the update that follows. Then the run
is resumed from that checkpoint in this process, whose packages are loaded, as a restarted rank's are after start-up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.loop_overhead import settings
from distkd.base import World
from distkd.data.loader import train_batches
from distkd.data.make import make_shards
from distkd.metrics.meters import Stopwatch
from distkd.train import loop
from distkd.train.folder import Events
from distkd.train.job import Job, assemble
from distkd.train.loop import train, train_step
from distkd.train.run import Run


def stalls(root: Path, way: str, saves: int, between: int) -> tuple[list[float], list[float]]:
    """Seconds that the loop stood still for each save, and seconds of a step without one."""
    run = _run(root, way)
    batches = train_batches(run.job.dataset, run.job.plan, run.job.world, 1)
    run.job.method.trainable.train()
    stood: list[float] = []
    steps: list[float] = []
    for number in range(saves + 1):
        for _ in range(between):
            start = time.perf_counter()
            train_step(run.job, next(batches)[1], Stopwatch())
            steps.append(time.perf_counter() - start)
            run.step += 1
        run.saver.wait()  # what is measured is one save; a loop saves less often
        watch = Stopwatch()
        with watch.phase("checkpoint"):
            loop.save(run)
        train_step(run.job, next(batches)[1], watch)
        run.step += 1
        if number:  # the first one makes its buffers
            watch.lap()
            stood.append(watch.read().seconds["checkpoint"])
    run.saver.wait()
    batches.close()
    run.close(None)
    return stood, steps


def _run(root: Path, way: str) -> Run:
    changes = {"name": f"student-{way}", "save": way}
    config = settings(root, "resnet18", teacher=False)
    config = config.model_copy(update={"run": config.run.model_copy(update=changes)})
    job = assemble(config, World())
    run = Run(job, Events(config.folder, World()))
    run.open()
    return run


class _FirstBatch(Exception):
    pass


def resume_s(root: Path) -> float:
    """From the start of `train` on a folder with a checkpoint to the first batch in the hands of the method."""
    config = settings(root, "resnet18", teacher=False)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": "student-sync"})})
    (config.folder / "outcome.json").unlink(missing_ok=True)
    original = loop.train_step
    first: list[float] = []

    def stop(job: Job, passes: Any, watch: Stopwatch) -> Any:
        assert passes[0].step > 0, "the run did not resume"
        first.append(time.perf_counter())
        raise _FirstBatch

    loop.train_step = stop
    start = time.perf_counter()
    try:
        train(config, World())
    except _FirstBatch:
        return first[0] - start
    finally:
        loop.train_step = original
    raise AssertionError("there was nothing to train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5, help="checkpoints of each side")
    parser.add_argument("--between", type=int, default=3, help="steps between two of them")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        make_shards("synthetic", root / "shards" / "synthetic")
        train(settings(root, "resnet18", teacher=True), World())
        sides: dict[str, dict[str, float]] = {}
        for way in ("sync", "async"):
            stood, steps = stalls(root, way, arguments.saves, arguments.between)
            sides[way] = {"stall_s": statistics.median(stood), "step_s": statistics.median(steps)}
        checkpoint = max((root / "student-sync" / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        again = statistics.median(resume_s(root) for _ in range(3))
    ratios = {
        "stall async / sync": sides["async"]["stall_s"] / sides["sync"]["stall_s"],
        "resume / 2 s": again / 2.0,
    }
    report("resume", sides, ratios, resume_to_first_batch_s=round(again, 3), checkpoint_bytes=size)


if __name__ == "__main__":
    main()
