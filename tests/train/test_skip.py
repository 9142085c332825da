"""`run.nonfinite=skip`: a step whose gradient is no number is left out on all ranks, as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkd.base import Batch, World
from distkd.data.loader import train_batches
from distkd.data.plan import Plan
from distkd.errors import NonFiniteError
from distkd.metrics.jsonl import read_jsonl
from distkd.metrics.meters import Stopwatch
from distkd.train.job import assemble
from distkd.train.loop import train, train_step
from tests.laws.common import Crash, before_steps, law_config, settings_of


def _config(shards: Path, root: Path, name: str, **overrides: Any) -> dict[str, Any]:
    run = {"name": name, "epochs": 1, "nonfinite": "skip", **overrides.pop("run", {})}
    return law_config("dc_distill", shards, root, run=run, **overrides)


def _spoil(batch: Batch) -> Batch:
    """One sample becomes NaN, in all its views: its batch statistics, losses and gradients follow."""
    for view in batch.views:
        view["path"][1] = float("nan")
    return batch


def _two_ways(world: World, config: dict[str, Any], bad_rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three good steps, with and without a bad one after the first two, which only one rank sees at its source."""
    found: list[dict[str, Tensor]] = []
    for spoiled in (False, True):
        job = assemble(settings_of(config), world)
        job.method.trainable.train()
        batches = train_batches(job.dataset, job.plan, world, job.passes, 0)
        steps = [next(batches)[1] for _ in range(4)]
        batches.close()
        for number in (0, 1, 2, 3):
            if number == 2:
                if not spoiled:
                    continue
                if world.rank == bad_rank:
                    _spoil(steps[2][0])
            _, update = train_step(job, steps[number], Stopwatch())
            assert update.applied == (number != 2)
        trained = {entry.name: entry.read().detach().clone() for entry in job.engine.entries()}
        found.append({**trained, **job.method.state.state_dict()})
    return found[0], found[1]


ENGINES = [
    {},
    {"name": "deepspeed", "zero_stage": 0, "precision": "fp32"},
    {"name": "deepspeed", "zero_stage": 2, "precision": "fp32"},
    {"name": "deepspeed", "zero_stage": 3, "precision": "fp32"},
    {"name": "fsdp"},
]


@pytest.mark.parametrize(
    "size, bad_rank, engine",
    [(1, 0, ENGINES[0]), *((2, 1, engine) for engine in ENGINES)],
    ids=["alone", "ddp", "zero-0", "zero-2", "zero-3", "fsdp"],
)
def test_a_step_that_is_left_out_leaves_nothing_behind(
    ranks: Any, shards: Path, root: Path, size: int, bad_rank: int, engine: dict[str, Any]
):
    """Not in weights, nor moments, nor batch statistics, nor the mean teacher, nor the banks."""
    config = _config(shards, root, "skip", engine=engine)
    for without, with_bad in ranks(size).run(_two_ways, config=config, bad_rank=bad_rank):
        assert without.keys() == with_bad.keys()
        for name, tensor in without.items():
            assert torch.equal(tensor, with_bad[name]), name


def _train(world: World, config: dict[str, Any], bad: list[int], bad_rank: int, crash_at: int | None = None) -> str:
    def hook(step: int, passes: Sequence[Batch]) -> None:
        if step == crash_at:
            raise Crash
        if step in bad and world.rank == bad_rank:
            for batch in passes:
                _spoil(batch)

    try:
        with before_steps(hook):
            train(settings_of(config), world)
    except NonFiniteError as error:
        return str(error)
    except Crash:
        return "crash"
    return ""


@pytest.mark.filterwarnings("ignore")
def test_skipped_steps_are_counted_and_their_samples_named(ranks: Any, shards: Path, root: Path):
    config = _config(shards, root, "counted")
    assert ranks(2).run(_train, config=config, bad=[3, 4, 9], bad_rank=1) == ["", ""]
    folder = settings_of(config).folder
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "skipped" in line]
    assert [line["skipped"] for line in lines] == [{2: 0, 4: 1, 6: 2, 8: 2}.get(line["step"], 3) for line in lines]
    assert all(line["loss"] is not None for line in lines)
    events = [json.loads(line) for line in (folder / "events" / "rank-00000.jsonl").read_text().splitlines()]
    messages = [event["message"] for event in events if event["event"] == "skipped"]
    assert len(messages) == 3
    assert messages[0].startswith("step 3 is left out, its loss or gradient is not finite: rank 1, samples ")


@pytest.mark.filterwarnings("ignore")
def test_the_count_goes_on_after_a_restart(ranks: Any, shards: Path, root: Path):
    config = _config(shards, root, "resumed", run={"checkpoint_every": 4})
    assert ranks(1).run(_train, config=config, bad=[1, 6], bad_rank=0, crash_at=10) == ["crash"]
    assert ranks(1).run(_train, config=config, bad=[1, 6], bad_rank=0) == [""]
    lines = [line for line in read_jsonl(settings_of(config).folder / "metrics.jsonl") if "skipped" in line]
    assert lines[-1]["skipped"] == 2


@pytest.mark.filterwarnings("ignore")
def test_ten_in_a_row_end_the_run(ranks: Any, shards: Path, root: Path):
    config = _config(shards, root, "endless")
    first, second = ranks(2).run(_train, config=config, bad=list(range(2, 99)), bad_rank=0)
    assert first == second
    assert first.startswith(
        "loss or gradient was not finite in 10 steps in a row, the last at step 11: rank 0, samples "
    )


def test_an_epoch_without_a_single_good_step_still_has_metrics(shards: Path, root: Path):
    config = _config(shards, root, "none", run={"log_every": 1})
    plan = Plan(240, 16, 3, 1)
    assert plan.n_steps > 5
    assert _train(World(), config, [4], 0) == ""
    lines = read_jsonl(settings_of(config).folder / "metrics.jsonl")
    assert next(line for line in lines if line["step"] == 5)["loss"] is None
