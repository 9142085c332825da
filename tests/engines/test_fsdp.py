"""The sharded engine against DDP and against torch written out: the same steps, weights that are really spread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkd import methods
from distkd.base import World
from distkd.comm import world as comm
from distkd.data.loader import train_batches
from distkd.engines import fsdp
from distkd.metrics.meters import Stopwatch
from distkd.train.job import Job, assemble
from distkd.train.loop import train_step
from tests.laws.common import equal_up_to, law_config, settings_of

UNIT = 100
"""Parameters of a unit in these tests, so that small models have several."""


@dataclass(slots=True)
class Trace:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    backwards: int
    units: int


def _steps(world: World, config: dict[str, Any], steps: int) -> Trace:
    """The first steps of a run, whatever its engine."""
    fsdp.UNIT = UNIT
    job = assemble(settings_of(config), world)
    job.method.trainable.train()
    trace = Trace([], [], {}, {}, 0, len(getattr(job.engine, "units", [])))
    first = next(p for p in job.method.student.parameters() if p.dim() > 1)

    def count(_: Tensor) -> None:
        trace.backwards += 1

    first.register_post_accumulate_grad_hook(count)
    batches = train_batches(job.dataset, job.plan, world, job.passes, 0)
    for _ in range(steps):
        out, update = train_step(job, next(batches)[1], Stopwatch())
        trace.losses.append((comm.all_reduce_sum(out.loss.detach().clone().double(), world) / world.size).item())
        trace.norms.append(update.norm.item())
    batches.close()
    trace.weights = _whole_weights(job)
    trace.state = {name: tensor.clone() for name, tensor in job.method.state.state_dict().items()}
    return trace


def _whole_weights(job: Job) -> dict[str, Tensor]:
    with job.engine.whole():
        return {name: tensor.clone() for name, tensor in job.method.trainable.state_dict().items()}


@pytest.mark.parametrize("method", methods.available())
def test_the_steps_are_those_of_ddp(ranks: Any, shards: Path, root: Path, method: str):
    plain, sharded = (
        ranks(2).run(_steps, config=law_config(method, shards, root, engine={"name": name}), steps=10)
        for name in ("ddp", "fsdp")
    )
    assert sharded[0].units > 1
    for trace in sharded:
        assert trace.losses == pytest.approx(plain[0].losses, abs=1e-9)
        assert trace.norms == pytest.approx(plain[0].norms, abs=1e-9)
        assert trace.backwards == plain[0].backwards == 10
        equal_up_to(trace.weights, plain[0].weights, 1e-9)
        equal_up_to(trace.state, plain[0].state, 1e-9)
