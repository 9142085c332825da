"""The run folder's own files, and what a person sees meanwhile."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from distkd import __version__
from distkd.base import World
from distkd.config import load
from distkd.data.manifest import Split
from distkd.errors import ConfigError
from distkd.files import read_json
from distkd.methods import dc_distill
from distkd.metrics.jsonl import read_jsonl
from distkd.train import loop, progress
from distkd.train.checkpoint import find_latest
from distkd.train.folder import FIXED, FREE, Events, environment, flatten, read_outcome, write_outcome
from distkd.train.job import Job, assemble
from distkd.train.progress import Progress
from distkd.train.run import Run
from distkd.train.settings import Settings
from distkd.train.signals import StopFlag
from tests.small import Small


def test_a_run_folder_has_what_is_promised(small: Small):
    folder = small.root / "student"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "outcome.json", "metrics.jsonl", "ranks.json", "events", "checkpoints",
        "export", "eval",
    }  # fmt: skip
    assert read_outcome(folder) == {"state": "done", "kind": None, "step": 6, "attempt": 1, "message": ""}
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000006\n"
    assert [line["event"] for line in read_jsonl(folder / "events" / "rank-00000.jsonl")] == [
        "start", "checkpoint", "checkpoint", "done",
    ]  # fmt: skip
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_metrics_have_a_line_for_every_logged_step(small: Small):
    lines = read_jsonl(small.root / "student" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps] == [0, 0, 0, 1, 1, 1]
    assert [line["samples"] for line in steps] == [8, 16, 24, 32, 40, 48]
    for line in steps:
        assert line["parts"].keys() == {"task", "kl_teacher"}
        assert line["loss"] == pytest.approx(sum(line["parts"].values()))
        assert line["grad_norm"] > 0
        assert {"data", "forward", "backward", "optimizer"} <= line["timings"].keys()
    assert [line["lr"] for line in steps] == pytest.approx([5e-4 * 2 / 3] * 3 + [5e-4 / 3] * 3)
    assert [line["step"] for line in lines if "val" in line] == [3, 6]


def test_the_best_weights_are_those_of_the_best_validation(small: Small):
    folder = small.root / "picture"
    values = {line["step"]: line["val"]["auc_macro"] for line in read_jsonl(folder / "metrics.jsonl") if "val" in line}
    selection = read_json(folder / "export" / "model.json")["selection"]
    assert selection == {
        "selected": "best",
        "step": min(values, key=lambda step: (-values[step], step)),  # the first of equals
        "select_metric": "auc_macro",
    }
    assert read_json(folder / "eval" / "test.json")["selection"] == selection


@pytest.mark.parametrize("min_gain, selected", [(0.0, 4), (0.125, 3), (0.5, 1)])
def test_a_later_student_is_selected_where_it_gains_enough(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_gain: float, selected: int
):
    """Against the best so far, not the epoch before; the first is taken whatever it is."""
    values, original = iter([0.25, 0.375, 0.5, 0.5625, 0.125]), loop.score

    def score(job: Job, split: Split) -> Any:
        found = original(job, split)
        value = next(values, None) if split == "val" else None
        return found if value is None else SimpleNamespace(metrics={"auc_macro": value})

    monkeypatch.setattr(loop, "score", score)
    settings = small.settings("alone", run={"root": str(tmp_path), "epochs": 5}, eval={"min_gain": min_gain})
    loop.train(settings, World())
    assert read_json(settings.folder / "export" / "model.json")["selection"]["step"] == 3 * selected


def test_a_gain_below_zero_is_refused(small: Small):
    with pytest.raises(ConfigError, match=r"eval\.min_gain: input should be greater than or equal to 0, found -0\.01"):
        load(small.root / "alone" / "config.yaml", {"eval.min_gain": -0.01})


def test_free_keys_exist(small: Small):
    """A key that is renamed must not stay free by its old name."""
    keys = flatten(small.settings("student").model_dump(mode="json")).keys()
    assert keys | flatten({"method": dc_distill.Config().model_dump(mode="json")}).keys() >= FREE


def test_fixed_keys_exist(small: Small):
    keys = flatten(small.settings("student").model_dump(mode="json")).keys()
    assert keys >= set(FIXED)
    assert not FREE & set(FIXED)


def test_flatten_keeps_empty_sections():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


def test_attempts_are_counted_by_their_starts(tmp_path: Path):
    events = Events(tmp_path, World(3, 4))
    assert events.attempt() == 1
    events.add("start", attempt=1)
    events.add("failed", message='said "event": "start"')
    assert events.attempt() == 2
    events.add("start", attempt=2)
    assert events.attempt() == 3
    lines = [json.loads(line) for line in (tmp_path / "events" / "rank-00003.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "failed", "start"]
    assert all(line["time"] > 0 for line in lines)


def test_the_environment_explains_a_number(small: Small):
    about = environment(small.settings("alone"), World(0, 4), data={"fold": 0})
    assert about["distkd"] == __version__
    assert about["packages"]["torch"] == torch.__version__
    assert (about["world_size"], about["data"]) == (4, {"fold": 0})
    written = read_json(small.root / "alone" / "environment.json")
    assert written["data"]["samples"] == {"train": 28, "val": 8, "test": 18}


def test_an_outcome_is_read_back(tmp_path: Path):
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, state="failed", step=3, attempt=2, kind="data", message="gone")
    assert read_outcome(tmp_path) == {"state": "failed", "kind": "data", "step": 3, "attempt": 2, "message": "gone"}


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path):
    half = tmp_path / ".step-00000003.a1b2.partial"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"half")
    assert find_latest(tmp_path, World()) is None
    assert not half.exists()


def test_settings_travel_as_yaml(small: Small):
    settings = load(small.root / "teacher" / "config.yaml")
    assert isinstance(settings, Settings)
    assert settings.folder == small.root / "teacher"


# progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]):
    shown = Progress("run[a]", 100, 0)
    for step in range(1, 100):
        clock[0] += 1.0
        shown.update(step, loss=step / 7)
    shown.validated("auc_macro", 0.75)
    clock[0] += 11.0
    shown.update(100, loss=0.5)
    shown.scored("test", {"accuracy": 0.5, "f1_micro": 0.25, "kappa_quadratic": 0.125}, "kappa_quadratic")
    shown.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "run[a]  step 11/100  loss 1.5714  "
    assert lines[-2] == "run[a]  step 100/100  loss 0.5000  val auc_macro 0.7500"
    assert lines[-1] == "run[a]  test: accuracy 0.5000  kappa_quadratic 0.1250"
    assert len(lines) == 11


@pytest.mark.parametrize(
    "data, words",
    [
        ({}, "28 training samples, 3 steps of 8 an epoch, 4 left out in each epoch; 2 epochs, 1 x cpu"),
        ({"labelled": 6}, "28 training samples, 6 with a label, 3 steps of 8 an epoch, 4 left out in each epoch;"),
        ({"balance": "weighted"}, "28 training samples, 3 steps of 8 an epoch; 2"),
        (
            {"balance": "oversample", "labelled": 5},
            "28 training samples, 5 with a label, oversampled to a list of 30, 3",
        ),
    ],
)
def test_a_run_says_what_it_is_about_to_do(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: dict[str, Any], words: str
):
    settings = small.settings("picture", run={"root": str(tmp_path)}, data=data)
    run = Run(assemble(settings, World()), Events(settings.folder, World()))
    run.open()
    run.close(None)
    assert capsys.readouterr().err.startswith(f"picture  {words}")


def test_a_resumed_run_says_where_it_goes_on(capsys: pytest.CaptureFixture[str]):
    Progress("run", 10, 4).close()
    assert capsys.readouterr().err == "run  resumed after step 4 of 10\n"


def test_a_terminal_gets_a_live_bar(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    shown = Progress("run[a]", 10, 0)
    shown.validated("auc_macro", None)
    shown.update(7, loss=0.25)
    assert shown.bar is not None
    shown.bar.refresh()
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "run[a]" in text
    assert "7/10" in text
    assert "loss 0.2500  val auc_macro undefined" in text


# signals


def test_a_signal_is_noted_and_the_old_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopFlag() as flag:
        assert flag.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.received == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher may ask twice: the step is still finished
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
