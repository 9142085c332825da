"""A small run of every method for the law tests: float64, every source of randomness on, batch statistics shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distkd import methods
from distkd.base import Batch, World
from distkd.comm import world as comm
from distkd.config import settings_class
from distkd.data.loader import train_batches
from distkd.metrics.meters import Stopwatch
from distkd.train import loop
from distkd.train.checkpoint import Tensors, complete
from distkd.train.job import Job, assemble
from distkd.train.loop import train_step
from distkd.train.settings import Settings

__all__ = [
    "Crash",
    "Trace",
    "before_steps",
    "ending",
    "equal_up_to",
    "law_config",
    "run_steps",
    "settings_of",
    "train_until",
]

# what a method needs to be small, by name; a method that is not here is taken with its defaults
SMALL: dict[str, dict[str, Any]] = {
    "dc_distill": {"embedding_dim": 8, "positives": 12, "negatives": 20, "keep_positive": 4, "keep_negative": 12},
    "crd": {"embedding_dim": 8, "negatives": 30},
    "dc_teacher": {"l1": {"omic": 1e-4}},
    "prototype_kd": {"embedding_dim": 8, "per_class": 2},
    "rrd": {"embedding_dim": 8, "queue_length": 40},
}


def law_config(method: str, shards: Path, root: Path, **overrides: Any) -> dict[str, Any]:
    """The config of a method's law run; `overrides` replace whole sections' fields."""
    kind = methods.config_class(method)
    head = "pooled" if kind.needs_maps else "projected"
    student = {"modalities": ["path"], "encoders": {"path": {"name": "cnn", "widths": [8, 16], "head": head}}}
    both = {**student, "modalities": ["path", "omic"], "fusion": "gated_bilinear"}
    config: dict[str, Any] = {
        "run": {"root": str(root), "name": method, "epochs": 4, "seed": 3, "log_every": 2},
        "method": {"name": method, **SMALL.get(method, {})},
        "model": {**(student if kind.needs_teacher else both), "feature_dim": 12, "dropout": 0.2, "norm": "sync"},
        "teacher": {"export": "teacher" if kind.needs_teacher else None},
        "data": {
            "shards": str(shards),
            "augment": {"hflip": 0.5, "vflip": 0.5, "brightness": 0.2, "vector_noise": 0.05},
        },
        "batch": {"global_batch": 16},
        "optim": {"lr": 3e-3, "weight_decay": 1e-3, "clip": 5.0},
        "engine": {"precision": "fp64", "device": "cpu"},
        "eval": {"select": "last"},
    }
    for section, values in overrides.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def settings_of(config: dict[str, Any]) -> Settings:
    return settings_class(config["method"]["name"]).model_validate(config)


@dataclass(slots=True)
class Trace:
    """What a rank saw and ended with; tensors that must be equal on all ranks and at all world sizes."""

    losses: list[float]
    parts: list[dict[str, float]]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    samples: list[list[int]]
    counts: list[dict[str, int]]
    backwards: list[int]


class Crash(Exception):
    """A process that dies: nothing after it runs."""


@contextmanager
def before_steps(hook: Callable[[int, Sequence[Batch]], None]) -> Iterator[None]:
    """Call `hook(step, batches of its passes)` before every step of a run; what it raises ends the run."""
    original = loop.train_step

    def watched(job: Job, passes: Sequence[Batch], watch: Stopwatch) -> Any:
        hook(passes[0].step, passes)
        return original(job, passes, watch)

    loop.train_step = watched
    try:
        yield
    finally:
        loop.train_step = original


def train_until(world: World, config: dict[str, Any], crash_at: int | None = None) -> None:
    """Train to the end of the run, or die before a step."""

    def hook(step: int, _: Any) -> None:
        if step == crash_at:
            raise Crash

    try:
        with before_steps(hook):
            loop.train(settings_of(config), world)
    except Crash:
        comm.barrier(world)


def ending(config: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint."""
    return dict(Tensors(complete(settings_of(config).folder / "checkpoints")[-1]))


def run_steps(world: World, *, config: dict[str, Any], steps: int) -> Trace:
    """Take the first steps of a run without its folder, watching collectives and backward passes."""
    job = assemble(settings_of(config), world)
    job.method.trainable.train()
    trace = Trace([], [], {}, {}, [], [], [])
    arrivals = _count_backwards(job)
    batches = train_batches(job.dataset, job.plan, world, job.passes, 0)
    for _ in range(steps):
        _, passes = next(batches)
        before, arrived = comm.counts.copy(), arrivals[0]
        out, _ = train_step(job, passes, Stopwatch())
        trace.counts.append(dict(comm.counts - before))
        trace.backwards.append(arrivals[0] - arrived)
        mean = comm.all_reduce_sum(out.loss.detach().clone().double(), world) / world.size
        trace.losses.append(mean.item())
        trace.parts.append({name: value.item() for name, value in out.parts.items()})
        trace.samples.append([int(sample) for batch in passes for sample in batch.sample_B])
    batches.close()
    # read by every rank, in order: a collective where weights are spread over the ranks
    entries = [(entry.name, entry.read().detach().clone()) for entry in job.engine.entries()]
    trace.weights = {name.removeprefix("trainable/"): t for name, t in entries if name.startswith("trainable/")}
    trace.state = {name: tensor.clone() for name, tensor in job.method.state.state_dict().items()}
    return trace


def _count_backwards(job: Job) -> list[int]:
    """How often a gradient arrives at the first weight of the student's trunk: once per traversal."""
    first = next(p for p in job.method.student.parameters() if p.dim() > 1)
    arrivals = [0]

    def count(_: Tensor) -> None:
        arrivals[0] += 1

    first.register_post_accumulate_grad_hook(count)
    return arrivals


def equal_up_to(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(
            tensor, b[name], atol=tolerance, rtol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
