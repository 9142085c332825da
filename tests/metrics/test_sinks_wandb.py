"""W&B is given every record, from its own thread, whatever it does; the real package runs offline where it is there."""

import json
import logging
import math
import os
import subprocess
import sys
import threading
import types
from importlib.util import find_spec

import pytest

from distkd.metrics import wandb as module
from distkd.metrics.jsonl import read_jsonl
from distkd.metrics.scalars import Scalars
from distkd.metrics.settings import MetricsConfig
from distkd.metrics.sinks import open_sinks

SETTINGS = {"run": {"name": "r", "seed": 1}, "metrics": {"password_file": "/home/me/secret"}}


class FakeRun:
    """As much of a W&B run as is used."""

    offline = True

    def __init__(self):
        self.lines, self.summary, self.ends, self.axes = [], {}, [], []

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, line):
        self.lines.append(line)

    def mark_preempting(self):
        self.ends.append("preempting")

    def finish(self, exit_code):
        self.ends.append(exit_code)


class FakeWandb(types.ModuleType):
    """As much of the package as is used; `began` holds the arguments of each start."""

    def __init__(self):
        super().__init__("wandb")
        self.began, self.run, self.may_begin, self.error = [], FakeRun(), threading.Event(), None
        self.may_begin.set()
        self.Settings = lambda **values: values

    def init(self, **options):
        self.may_begin.wait()
        self.began.append(options)
        if self.error is not None:
            raise self.error
        return self.run


@pytest.fixture
def fake(monkeypatch):
    package = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def opened(folder, step=0, project="p"):
    folder.mkdir(exist_ok=True)
    config = MetricsConfig(wandb=project)
    return open_sinks(config, folder, step=step, run="r", method="logit_kd", settings=SETTINGS)


def records_of(small):
    return read_jsonl(small.root / "student" / "metrics.jsonl")


def line(step):
    return {"step": step, "epoch": 0, "time": 1000.0 + step, "loss": 1.0, "grad_norm": math.nan}


def test_every_record_arrives_in_order_on_its_own_step(fake, small, tmp_path):
    sinks = opened(tmp_path / "r")
    records = records_of(small)
    for record in records:
        sinks.write(record)
    sinks.close("done")
    scalars = Scalars()
    assert fake.run.axes == [("step", None), ("*", "step")]
    assert fake.run.lines == [
        {
            **{name: record[name] for name in ("step", "epoch", "samples") if name in record},
            "_timestamp": record["time"],
            **scalars.of(record),
        }
        for record in records
    ]
    assert fake.run.ends == [0]


def test_a_run_is_described_by_its_config_and_by_nothing_of_the_machine(fake, tmp_path):
    opened(tmp_path / "r").close("done")
    (about,) = fake.began
    assert about["config"] == {"run": {"name": "r", "seed": 1}}
    assert [about[name] for name in ("project", "name", "group", "job_type")] == ["p", "r", tmp_path.name, "logit_kd"]
    assert about["dir"] == str(tmp_path / "r")
    assert "mode" not in about  # WANDB_MODE decides
    assert about["settings"]["disable_git"]
    assert about["settings"]["x_disable_meta"]


def test_attempts_of_a_run_are_one_run_there_and_another_project_has_another(fake, tmp_path):
    for step, project in ((0, "p"), (4, "p"), (8, "q")):
        opened(tmp_path / "r", step, project).close("done")
    first, second, other = (about["id"] for about in fake.began)
    assert first == second != other
    assert all(about["resume"] == "allow" for about in fake.began)


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"project": "p"}'])
def test_a_torn_note_of_the_run_makes_a_new_one(torn, fake, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "wandb.json").write_text(torn)
    opened(tmp_path / "r").close("done")
    assert json.loads((tmp_path / "r" / "wandb.json").read_text()) == {"project": "p", "id": fake.began[0]["id"]}


@pytest.mark.parametrize("state, ends", [("done", [0]), ("failed", [1]), ("interrupted", ["preempting", 1])])
def test_how_the_run_ended_is_shown(state, ends, fake, tmp_path):
    opened(tmp_path / "r").close(state)
    assert fake.run.ends == ends


def test_what_the_student_reached_is_in_the_summary(fake, tmp_path):
    sinks = opened(tmp_path / "r")
    sinks.score(9, "test", {"accuracy": 0.5, "auc_macro": None})
    sinks.close("done")
    assert fake.run.summary == {"final/test/accuracy": 0.5}


def test_training_goes_on_while_it_begins(fake, tmp_path):
    fake.may_begin.clear()
    sinks = opened(tmp_path / "r")
    for step in range(1, 50):
        sinks.write(line(step))
    assert not fake.began
    fake.may_begin.set()
    sinks.close("done")
    assert [sent["step"] for sent in fake.run.lines] == list(range(1, 50))


def test_one_that_does_not_begin_is_left_out_with_one_warning(fake, tmp_path, caplog):
    fake.error = ConnectionError("no route to host")
    before = threading.enumerate()
    sinks = opened(tmp_path / "r")
    for thread in threading.enumerate():
        if thread.name == "wandb" and thread not in before:
            thread.join()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            sinks.write(line(step))
        sinks.close("done")
    assert [record.getMessage() for record in caplog.records] == [
        "W&B gets no more records: no route to host (ConnectionError); the run and its metrics.jsonl go on"
    ]
    assert [record["step"] for record in read_jsonl(tmp_path / "r" / "metrics.jsonl")] == [1, 2]


def test_one_that_takes_no_records_is_left_out_before_they_fill_the_memory(fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_WAITING", 3)
    fake.may_begin.clear()
    sinks = opened(tmp_path / "r")
    for step in range(1, 9):
        sinks.write(line(step))
    sinks.close("done")
    fake.may_begin.set()
    assert len(caplog.records) == 1
    assert "W&B gets no more records: it has not taken the last 3 records (TimeoutError); the run " in caplog.text


def test_one_that_does_not_end_does_not_hold_up_the_end(fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_FINISH_S", -5)
    fake.may_begin.clear()
    opened(tmp_path / "r").close("done")
    fake.may_begin.set()
    assert "it does not come to an end (TimeoutError)" in caplog.text


def test_a_package_that_does_not_import_is_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sinks = opened(tmp_path / "r")
    sinks.write(line(1))
    sinks.close("done")
    assert len(caplog.records) == 1
    assert "W&B gets no more records: " in caplog.text


OFFLINE = """
import json, sys
from pathlib import Path
from distkd.metrics.settings import MetricsConfig
from distkd.metrics.sinks import check_sinks, open_sinks
config, folder = MetricsConfig(wandb="p"), Path(sys.argv[1])
check_sinks(config)
for step, state in ((0, "failed"), (2, "done")):
    sinks = open_sinks(config, folder, step=step, run="r", method="m", settings={"run": {"seed": 1}})
    for number in range(step + 1, step + 4):
        sinks.write({"step": number, "epoch": 0, "time": 1000.0 + number, "loss": float("nan"), "parts": {"a": 1.0}})
    sinks.score(5, "test", {"accuracy": 0.5})
    sinks.close(state)
"""


@pytest.mark.skipif(find_spec("wandb") is None, reason="W&B is not installed: pip install 'distkd[wandb]'")
def test_the_real_package_writes_an_offline_run_and_nothing_secret(tmp_path):
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_API_KEY": "k" * 40, "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "r")], env=environ, capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    run_id = json.loads((tmp_path / "r" / "wandb.json").read_text())["id"]
    logs = list((tmp_path / "r" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(logs) >= 1
    assert b"final/test/accuracy" in b"".join(path.read_bytes() for path in logs)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or path.is_symlink() or b"k" * 40 not in path.read_bytes(), path
