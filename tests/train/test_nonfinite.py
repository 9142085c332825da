"""A loss that is no number: every rank stops at the same step, and the samples are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkd.base import Batch, StepOutput, World
from distkd.cli import USER, main
from distkd.data.dataset import Dataset
from distkd.errors import DistkdError
from distkd.metrics.jsonl import read_jsonl
from distkd.train import job as jobs
from distkd.train import loop
from distkd.train.loop import train
from tests.laws.common import settings_of
from tests.small import Small

STEP = 7
"""Three epochs of three steps, metrics every two steps: seen after step 8, long after it happened."""


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * float("inf")


def _spoiled(out: StepOutput, how: str) -> StepOutput:
    if how == "loss":
        return StepOutput(out.loss * float("nan"), out.parts, out.gauges, out.rows, out.step)
    if how == "value":  # its gradient stays what it was
        return StepOutput(out.loss + float("inf"), out.parts, out.gauges, out.rows, out.step)
    return StepOutput(_BadGradient.apply(out.loss), out.parts, out.gauges, out.rows, out.step)


def _train(world: World, config: dict[str, Any], how: str, rank: int) -> tuple[str, str, list[int]]:
    """Train until it fails; the type of the error, its message, and this rank's samples of the bad step."""
    samples: list[int] = []
    assemble, step, batch_of = loop.assemble, loop.train_step, Dataset.batch

    def assembled(*arguments: Any) -> jobs.Job:
        job = assemble(*arguments)
        method_step = job.method.step

        def spoiled(model: Any, batch: Batch, where: World) -> StepOutput:
            out = method_step(model, batch, where)
            return _spoiled(out, how) if batch.step == STEP and world.rank == rank and how != "input" else out

        job.method.step = spoiled  # type: ignore[method-assign]
        return job

    def stepped(job: jobs.Job, passes: Any, watch: Any) -> Any:
        if passes[0].step == STEP:
            samples.extend(int(sample) for batch in passes for sample in batch.sample_B)
        return step(job, passes, watch)

    def batch(self: Dataset, numbers: Any, **options: Any) -> Batch:
        made = batch_of(self, numbers, **options)
        if how == "input" and world.rank == rank and options["train"] and options["epoch"] == STEP // 3:
            plan = jobs.Plan(len(self.train_label_N), 8, self.seed, 3)
            victim = self.split_samples("train")[plan.local_positions(STEP, 0, 1, world)[1]]
            for view in made.views:
                view["slide"][made.sample_B == victim] = float("nan")
        return made

    loop.assemble, loop.train_step, Dataset.batch = assembled, stepped, batch  # type: ignore[method-assign]
    try:
        train(settings_of(config), world)
    except DistkdError as error:
        return type(error).__name__, str(error), samples
    finally:
        loop.assemble, loop.train_step, Dataset.batch = assemble, step, batch_of  # type: ignore[method-assign]
    return "", "", samples


def _keys(small: Small, samples: list[int]) -> list[str]:
    return [f"s-{sample:03d}" for sample in samples]


def _named(message: str) -> list[str]:
    return re.findall(r"s-\d{3}", message)


@pytest.mark.parametrize("how", ["input", "loss", "value", "gradient"])
@pytest.mark.parametrize("size, rank", [(1, 0), (2, 1), (2, 0)])
def test_all_ranks_stop_at_the_same_step_and_name_the_samples(
    ranks: Any, small: Small, tmp_path: Path, size: int, rank: int, how: str
):
    run = {"root": str(tmp_path), "name": "bad", "epochs": 3, "log_every": 2}
    config = small.config("picture", run=run)
    found = ranks(size).run(_train, config=config, how=how, rank=rank)
    assert len({(kind, message) for kind, message, _ in found}) == 1
    kind, message, _ = found[0]
    assert kind == "NonFiniteError"
    assert message.startswith(f"loss or gradient is not finite at step {STEP}: ")
    assert message.endswith("; the last checkpoint is from before")
    mine = _keys(small, found[rank][2])
    if how == "input":
        assert _named(message) == [mine[1]]
        assert f"rank {rank}, samples " in message
    elif how == "gradient":
        assert "in the gradient only, on no single rank" in message
    else:
        assert _named(message) == mine[:8]
        assert f"rank {rank}, samples " in message
    outcome = json.loads((tmp_path / "bad" / "outcome.json").read_text())
    assert outcome == {"state": "failed", "kind": "nonfinite", "step": 8, "attempt": 1, "message": message}
    assert max(line["step"] for line in read_jsonl(tmp_path / "bad" / "metrics.jsonl")) == 6
    latest = (tmp_path / "bad" / "checkpoints" / "latest").read_text()
    assert latest == "step-00000006\n"


def test_a_user_sees_one_message(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    original = loop.train_step

    def stepped(job: jobs.Job, passes: Any, watch: Any) -> Any:
        out, norm = original(job, passes, watch)
        return (_spoiled(out, "loss"), norm) if passes[0].step == 4 else (out, norm)

    path = small.write(tmp_path, "alone")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stepped)
        assert main(["train", str(path)]) == USER
    text = capsys.readouterr().err
    assert text.count("distkd: ") == 1
    assert "distkd: loss or gradient is not finite at step 4: rank 0, samples s-" in text
    assert "or lower optim.lr or set optim.clip and pass --allow-change" in text
    assert "Traceback" not in text
    # what the message advises works
    assert main(["train", str(path), "--optim.clip", "1"]) == USER
    assert main(["train", str(path), "--optim.clip", "1", "--allow-change"]) == 0
    outcome = json.loads((tmp_path / "runs" / "alone" / "outcome.json").read_text())
    assert (outcome["state"], outcome["attempt"]) == ("done", 2)
