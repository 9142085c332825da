"""Asking for a stop: heard within seconds however long steps are, and not held up by an evaluation."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distkd.base import Batch, World
from distkd.comm.world import barrier
from distkd.errors import DiskError, Interrupted, NonFiniteError
from distkd.metrics.jsonl import read_jsonl
from distkd.train import saver, signals
from distkd.train.checkpoint import Tensors, complete, read_meta
from distkd.train.loop import train
from distkd.train.signals import LOOK_S, REACTION_S, Pacing, StopFlag, stop_file
from tests.laws.common import before_steps, law_config, settings_of


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_forked_worker_ends_as_if_there_were_no_handler(number: signal.Signals):
    """A data worker has no step to finish; its signal is not the run's."""
    with StopFlag() as stop_flag:
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), number)
            os._exit(0)  # not reached where the signal ends the worker
        _, status = os.waitpid(worker, 0)
        assert stop_flag.received is None
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == number


@given(log_every=st.integers(1, 1000), step_s=st.floats(0, 1e6))
def test_ranks_ask_each_other_at_least_every_two_seconds_of_steps(log_every: int, step_s: float):
    pacing = Pacing(log_every)
    assert pacing.is_due(1)  # before anything is known, every step
    pacing.learn(step_s)
    assert 1 <= pacing.every <= log_every
    assert pacing.every == 1 or pacing.every * step_s <= REACTION_S


def test_a_stop_whose_checkpoint_finds_no_room_is_no_success(shards: Path, root: Path, monkeypatch: pytest.MonkeyPatch):
    """Exit code 3 promises a complete checkpoint."""

    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver, "save_file", full_disk)
    config = law_config("supervised", shards, root, run={"name": "full", "epochs": 1})
    with pytest.raises(DiskError, match=r"stopped as asked after step 4 of 15, but its checkpoint could not be"):
        _train(World(), config, stop_in=3)
    outcome = json.loads((settings_of(config).folder / "outcome.json").read_text())
    assert (outcome["state"], outcome["kind"]) == ("failed", "disk")


def _train(world: World, config: dict[str, Any], stop_in: int | None) -> str:
    """Train; the last rank gets a signal inside step `stop_in`."""

    def hook(step: int, _: Any) -> None:
        if step == stop_in and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with before_steps(hook):
            train(settings_of(config), world)
    except Interrupted as stop:
        barrier(world)
        return str(stop)
    return ""


def test_long_steps_are_stopped_between_two_logging_steps(ranks: Any, shards: Path, root: Path):
    """In the first steps, while it is not known how long they take."""
    config = law_config("supervised", shards, root, run={"name": "long", "epochs": 1, "log_every": 1000})
    said = ranks(2).run(_train, config=config, stop_in=3)
    assert said == ["stopped as asked after step 4 of 15; start again to go on"] * 2
    [path] = complete(settings_of(config).folder / "checkpoints")
    assert read_meta(path)["step"] == 4


@pytest.mark.parametrize("size", [1, 2])
def test_a_stop_at_the_end_of_an_epoch_leaves_its_evaluation_to_the_next_start(
    ranks: Any, shards: Path, root: Path, size: int
):
    whole, broken = (
        law_config("dc_teacher", shards, root, run={"name": f"{name}-{size}", "epochs": 2}, eval={"select": "best"})
        for name in ("whole", "broken")
    )
    assert ranks(size).run(_train, config=whole, stop_in=None) == [""] * size
    said = ranks(size).run(_train, config=broken, stop_in=14)
    assert said[0].startswith("stopped as asked after step 15 of 30")
    folders = [settings_of(config).folder for config in (whole, broken)]
    assert not [line for line in read_jsonl(folders[1] / "metrics.jsonl") if "val" in line]
    assert json.loads((folders[1] / "outcome.json").read_text())["state"] == "interrupted"
    assert ranks(size).run(_train, config=broken, stop_in=None) == [""] * size
    expected, found = (dict(Tensors(complete(folder / "checkpoints")[-1])) for folder in folders)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    lines = [
        [{**line, "timings": None, "time": None} for line in read_jsonl(folder / "metrics.jsonl")] for folder in folders
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("sizes", [(2, 2), (2, 1), (1, 2)])
def test_a_stop_between_two_lines_of_metrics_loses_none(ranks: Any, shards: Path, root: Path, sizes: tuple[int, int]):
    whole, broken = (
        law_config("supervised", shards, root, run={"name": f"{name}-{sizes}", "epochs": 1, "log_every": 5})
        for name in ("lines", "torn")
    )
    first, second = sizes
    ranks(first).run(_train, config=whole, stop_in=None)
    said = ranks(first).run(_train, config=broken, stop_in=2)
    assert said == ["stopped as asked after step 3 of 15; start again to go on"] * first
    ranks(second).run(_train, config=broken, stop_in=None)
    lines = [
        [line for line in read_jsonl(settings_of(config).folder / "metrics.jsonl") if "loss" in line]
        for config in (whole, broken)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [5, 10, 15]
    for one, other in zip(*lines, strict=True):
        if first == second:
            assert {**one, "timings": None, "time": None} == {**other, "timings": None, "time": None}
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-9)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-9)


def test_a_stop_right_after_a_bad_step_writes_no_checkpoint(ranks: Any, shards: Path, root: Path):
    config = law_config("supervised", shards, root, run={"name": "bad-stop", "epochs": 1, "log_every": 1000})
    said = ranks(2).run(_bad_then_stop, config=config)
    assert said[0].startswith("loss or gradient is not finite at step 2")
    assert said[0] == said[1]
    assert not complete(settings_of(config).folder / "checkpoints")


def _bad_then_stop(world: World, config: dict[str, Any]) -> str:
    def hook(step: int, passes: Sequence[Batch]) -> None:
        if step == 2 and world.is_main:
            passes[0].views[0]["path"][0] = float("nan")
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with before_steps(hook):
            train(settings_of(config), world)
    except NonFiniteError as error:
        return str(error)
    return ""


def test_the_stop_file_is_for_the_main_rank_alone(tmp_path: Path):
    environ = {"DISTKD_STOP_FILE": str(tmp_path / "stop.0")}
    assert stop_file(World(rank=0, size=2), environ) == tmp_path / "stop.0"
    assert stop_file(World(rank=1, size=2), environ) is None
    assert stop_file(World(), {}) is None


@pytest.mark.parametrize("before", [None, b""])
def test_whatever_stands_in_the_stop_file_asks_for_a_stop(
    tmp_path: Path, before: bytes | None, monkeypatch: pytest.MonkeyPatch
):
    """It may be absent or empty for as long as nobody asks; it is looked at once a second, however often is asked."""
    path, now = tmp_path / "stop", [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    if before is not None:
        path.write_bytes(before)
    flag = StopFlag(path)
    assert not flag.is_set()
    path.write_text("the end of the time is near\n")
    assert not flag.is_set()
    now[0] += LOOK_S
    assert flag.is_set()
    path.unlink()
    now[0] += LOOK_S
    assert flag.is_set()


def test_two_ranks_stop_at_one_step_when_the_file_says_so(ranks: Any, shards: Path, root: Path, tmp_path: Path):
    config = law_config("supervised", shards, root, run={"name": "file", "epochs": 1, "log_every": 1000})
    said = ranks(2).run(_train_until_the_file, config=config, path=tmp_path / "stop")
    assert said == ["stopped as asked after step 4 of 15; start again to go on"] * 2
    [path] = complete(settings_of(config).folder / "checkpoints")
    assert read_meta(path)["step"] == 4


def _train_until_the_file(world: World, config: dict[str, Any], path: Path) -> str:
    """Train; something is written into the stop file inside step 3."""

    def hook(step: int, _: Any) -> None:
        if step == 3 and world.is_main:
            path.write_text("stop")

    with pytest.MonkeyPatch.context() as patch, before_steps(hook):
        patch.setenv("DISTKD_STOP_FILE", str(path))
        patch.setattr(signals, "LOOK_S", 0.0)
        try:
            train(settings_of(config), world)
        except Interrupted as stop:
            barrier(world)
            return str(stop)
    return ""
