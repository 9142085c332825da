"""A rank's numbers over HTTP: true, continued over restarts, gone with the run, and free where nobody logs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from distkd.base import World
from distkd.comm import world as comm
from distkd.config import load
from distkd.errors import ConfigError, Interrupted
from distkd.files import read_json
from distkd.metrics import targets
from distkd.metrics.exporter import (
    EXPORTED,
    Exporter,
    MetricsConfig,
    device_labels,
    node_address,
    node_labels,
    start_exporter,
)
from distkd.metrics.jsonl import read_jsonl
from distkd.train.loop import train
from tests.launch.processes import REPOSITORY, environment
from tests.laws.common import before_steps, settings_of
from tests.small import Small

LABELS = {"run": "r", "stage": "s", "attempt": "1"}
LOCAL = MetricsConfig(export="local")


def _target(run: Path, rank: int = 0) -> tuple[str, dict[str, str]]:
    [group] = read_json(run / "prometheus" / f"rank-{rank:05d}.json")
    [address] = group["targets"]
    return address, group["labels"]


def _scrape(address: str) -> dict[str, float]:
    """What Prometheus would see, with the kind of each metric: `counter distkd_steps_total`."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            " ".join([family.type, sample.name, *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
            if sample.name != "distkd_rank_info"
        }


def _left_over() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "metrics"]


@contextmanager
def _exporter(run: Path, config: MetricsConfig = LOCAL, **options: Any) -> Iterator[Exporter]:
    given = {"labels": LABELS, "info": {"engine": "ddp"}, "values": {"distkd_train_step": 7}, **options}
    exporter = start_exporter(config, run, given.pop("world", World()), **given)
    assert exporter is not None
    try:
        yield exporter
    finally:
        exporter.close()


def _train(world: World, config: dict[str, Any], at: int) -> dict[str, Any]:
    """Train, and scrape both ranks' targets before step `at`; what a rank saw."""
    folder, seen = settings_of(config).folder, {}

    def hook(step: int, _: Any) -> None:
        if step == at:
            comm.barrier(world)  # the other rank has published, too
            found = [_target(folder, rank) for rank in range(world.size)]
            seen.update(labels=[labels for _, labels in found], values=[_scrape(address) for address, _ in found])
            comm.barrier(world)

    comm.counts.clear()
    with before_steps(hook):
        train(settings_of(config), world)
    return {**seen, "collectives": dict(comm.counts), "left": _left_over()}


def test_both_ranks_of_a_run_serve_what_metrics_jsonl_says(ranks: Any, small: Small, tmp_path: Path):
    run = {"root": str(tmp_path), "name": "study", "epochs": 2, "log_every": 2}
    config = small.config("student", run=run, metrics={"export": "local"})
    found = ranks(2).run(_train, config=config, at=4)
    line = next(line for line in read_jsonl(tmp_path / "study" / "metrics.jsonl") if line["step"] == 4)
    for seen in found:
        for rank, (labels, values) in enumerate(zip(seen["labels"], seen["values"], strict=True)):
            about = {name: value for name, value in labels.items() if not name.startswith("__meta_")}
            assert about.pop("node") == socket.gethostname()
            assert about == {
                "run": "study", "stage": "logit_kd", "rank": str(rank), "attempt": "1", "slurm_job": "",
            }  # fmt: skip
            assert values.pop("gauge distkd_last_step_timestamp_seconds") > 1.6e9
            assert values == pytest.approx({
                "gauge distkd_train_step": 4,
                "counter distkd_steps_total": 4,
                "counter distkd_samples_total": line["samples"],
                "gauge distkd_loss total": line["loss"],
                **{f"gauge distkd_loss {part}": value for part, value in line["parts"].items()},
                "gauge distkd_grad_norm": line["grad_norm"],
                "gauge distkd_lr": line["lr"],
                "gauge distkd_restarts": 0,
            })  # fmt: skip
    assert not list(tmp_path.rglob("rank-*.json")) + list(tmp_path.glob("prometheus/*"))
    assert [seen["left"] for seen in found] == [[], []]


def test_exporting_adds_no_collective(ranks: Any, small: Small, tmp_path: Path):
    counted = []
    for export in ("off", "local"):
        run = {"root": str(tmp_path), "name": export, "epochs": 1}
        config = small.config("alone", run=run, metrics={"export": export})
        counted.append([seen["collectives"] for seen in ranks(2).run(_train, config=config, at=-1)])
    assert counted[0] == counted[1]
    assert counted[0][0]


def test_a_step_that_is_not_logged_costs_nothing(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    updates: list[Any] = []
    original = Exporter.update

    def counted(self: Exporter, values: Any) -> None:
        assert all(not isinstance(value, torch.Tensor) for value in values.values())
        updates.append(values["distkd_train_step"])
        original(self, values)

    monkeypatch.setattr(Exporter, "update", counted)
    run = {"root": str(tmp_path), "name": "run", "log_every": 2, "epochs": 2}
    folder = train(small.settings("alone", run=run, metrics={"export": "local"}), World())
    logged = [line["step"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert updates == logged
    assert len(logged) < logged[-1]


@pytest.mark.parametrize("ending", ["sigterm", "ctrl_c", "failed"])
def test_a_target_is_gone_however_the_run_ends_and_counters_go_on(small: Small, tmp_path: Path, ending: str):
    run = {"root": str(tmp_path), "name": "run", "epochs": 3, "checkpoint_every": 1, "save": "sync"}
    settings = small.settings("alone", run=run, metrics={"export": "local"})
    seen: list[dict[str, float]] = []

    def end(step: int, _: Any) -> None:
        assert (settings.folder / "prometheus" / "rank-00000.json").exists()
        if step == 2:
            if ending != "sigterm":
                raise KeyboardInterrupt if ending == "ctrl_c" else ZeroDivisionError("a mistake of ours")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises((Interrupted, KeyboardInterrupt, ZeroDivisionError)), before_steps(end):
        train(settings, World())
    assert not list(tmp_path.rglob("rank-*.json")) + list(tmp_path.glob("prometheus/*"))
    assert _left_over() == []

    with before_steps(lambda *_: seen.append(_scrape(_target(settings.folder)[0]))):
        train(settings, World())
    at = 3 if ending == "sigterm" else 2  # a stop that was asked for finishes its step
    assert seen[0] == {
        "gauge distkd_train_step": at,
        "counter distkd_steps_total": at,
        "counter distkd_samples_total": at * 8,
        "gauge distkd_restarts": 1,
    }
    assert not list(tmp_path.rglob("rank-*.json")) + list(tmp_path.glob("prometheus/*"))


def test_a_killed_run_leaves_a_stale_target_that_its_next_attempt_removes(small: Small, tmp_path: Path):
    config = small.config("alone", run={"root": str(tmp_path), "name": "run"}, metrics={"export": "local"})
    program = f"""
import os, signal
from distkd.base import World
from distkd.train.loop import train
from tests.laws.common import before_steps, settings_of
with before_steps(lambda step, _: step == 2 and os.kill(os.getpid(), signal.SIGKILL)):
    train(settings_of({config!r}), World())
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=environment(), timeout=240)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "run"
    left = folder / "prometheus" / "rank-00000.json"
    assert targets.stale(folder, ended=False, running_jobs=None) == [left]
    assert (tmp_path / "prometheus" / "run.rank-00000.json").exists()
    left.with_name("rank-00007.json").write_text(left.read_text())  # of an attempt with more ranks
    train(settings_of({**config, "metrics": {"export": "off"}}), World())
    assert not list(left.parent.iterdir()) + list(tmp_path.glob("prometheus/*"))


def test_a_taken_port_is_said_once_and_training_goes_on(small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = {"root": str(tmp_path), "name": "run", "epochs": 1}
        folder = train(small.settings("alone", run=run, metrics={"export": "local", "port": port}), World())
    assert read_json(folder / "outcome.json")["state"] == "done"
    assert not (folder / "prometheus").exists()
    said = [record.getMessage() for record in caplog.records if "metrics" in record.getMessage()]
    expected = f"rank 0 trains on without metrics.export=local: Address already in use (port {port}); "
    assert said == [expected + "--metrics.port 0 takes a free one"]


def test_a_disk_that_takes_no_target_costs_the_metrics_only(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "prometheus").write_text("in the way")
    assert start_exporter(LOCAL, tmp_path, World(rank=3), labels=LABELS, info={}, values={}) is None
    assert "rank 3 trains on without metrics.export=local: File exists\n" in caplog.text
    assert _left_over() == []


def test_ranks_of_a_machine_take_ports_in_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = World(rank=5, size=8, local_rank=1, local_size=4)
    with _exporter(tmp_path, MetricsConfig(export="local", port=port - 1), world=world) as exporter:
        assert exporter.address == f"127.0.0.1:{port}"
        assert _target(tmp_path, 5)[0] == exporter.address
    last = MetricsConfig(export="local", port=65535)
    assert start_exporter(last, tmp_path, world, labels=LABELS, info={}, values={}) is None
    assert "port must be 0-65535" in caplog.text


def test_local_listens_on_loopback_and_network_on_one_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with _exporter(tmp_path) as exporter:
        assert exporter.address.startswith("127.0.0.1:")
        assert exporter._server.server_address[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "gethostname", lambda: "node-a")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.2" if name == "node-a" else name)
    monkeypatch.setenv("LOCAL_ADDR", "0.0.0.0")  # stands for the one address that every machine has beside loopback
    with _exporter(tmp_path, MetricsConfig(export="network")) as exporter:
        assert exporter._server.server_address[0] == "0.0.0.0"


@pytest.mark.parametrize(
    "host, environ, expected",
    [
        ("10.1.2.3", {}, ("10.1.2.3", "10.1.2.3")),
        ("10.1.2.3", {"LOCAL_ADDR": "10.9.9.9", "MASTER_ADDR": "127.0.0.1"}, ("10.9.9.9", "10.9.9.9")),
        ("127.0.1.1", {}, ("0.0.0.0", "node-a")),  # as Debian writes it into /etc/hosts
        ("127.0.1.1", {"MASTER_ADDR": "127.0.0.1"}, ("0.0.0.0", "node-a")),
        (None, {}, ("0.0.0.0", "node-a")),
    ],
)
def test_the_address_is_the_one_that_others_know(
    monkeypatch: pytest.MonkeyPatch, host: str | None, environ: dict[str, str], expected: tuple[str, str]
):
    def resolve(name: str) -> str:
        if name == "node-a" and host is None:
            raise socket.gaierror(-2, "Name or service not known")
        return host if name == "node-a" and host else name

    monkeypatch.setattr(socket, "gethostname", lambda: "node-a")
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    assert node_address(environ) == expected


def test_a_scraper_that_says_nothing_holds_nobody_up(tmp_path: Path):
    with _exporter(tmp_path) as exporter:
        host, port = exporter.address.split(":")
        with socket.create_connection((host, int(port))):
            assert _scrape(exporter.address) == {"gauge distkd_train_step": 7}
            exporter.close()
            assert _left_over() == []
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, int(port)))
            exporter.close = lambda: None  # it is


def test_a_value_that_is_not_known_is_not_served(tmp_path: Path):
    with _exporter(tmp_path) as exporter:
        exporter.update({"distkd_loss": {"total": 1.5, "kl": 0.5}, "distkd_lr": 1e-3})
        assert _scrape(exporter.address).keys() == {
            "gauge distkd_loss total", "gauge distkd_loss kl", "gauge distkd_lr",
        }  # fmt: skip
        exporter.update({"distkd_loss": None, "distkd_lr": 1e-3})  # every step since the last line was left out
        assert _scrape(exporter.address).keys() == {"gauge distkd_lr"}
        with urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    assert 'distkd_rank_info{engine="ddp"} 1.0' in text
    assert "_created" not in text


def test_node_and_job_are_those_of_slurm_where_there_is_one():
    assert node_labels({}) == {"node": socket.gethostname(), "slurm_job": ""}
    job = {"SLURM_JOB_ID": "20", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3", "SLURMD_NODENAME": "n1"}
    assert node_labels(job) == {"node": "n1", "slurm_job": "17_3"}


def test_device_labels_of_a_cpu():
    assert device_labels(torch.device("cpu")) == {"device": "cpu", "gpu_uuid": ""}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_labels_name_the_gpu_as_the_driver_does():
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    labels = device_labels(torch.device("cuda", torch.cuda.current_device()))
    assert f"UUID: {labels['gpu_uuid']}" in said
    assert labels["device"] in said


def test_names_keep_the_rules_of_prometheus():
    for metric in EXPORTED:
        assert re.fullmatch(r"distkd(_[a-z]+)+", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not {"gauge", "counter", "ms", "milliseconds", "mib", "gib", "count"} & set(metric.name.split("_"))
        assert metric.help.endswith(".")
        assert metric.label is None or metric.label not in {*LABELS, "rank", "node", "job", "slurm_job", "instance"}
    assert len({metric.name for metric in EXPORTED}) == len(EXPORTED)


def test_the_page_lists_what_is_exported():
    page = (REPOSITORY / "docs" / "monitoring.md").read_text()
    for metric in EXPORTED:
        name = f"{metric.name}{{{metric.label}}}" if metric.label else metric.name
        assert f"| `{name}` | {metric.kind} | {metric.help} |" in page


def _written(small: Small, folder: Path, **metrics: Any) -> Callable[..., Any]:
    path = small.write(folder, "alone")
    path.write_text(path.read_text() + yaml.safe_dump({"metrics": metrics}).replace("'off'", "off"))
    return lambda **overrides: load(path, {name.replace("__", "."): value for name, value in overrides.items()})


def test_off_may_be_written_without_quotes(small: Small, tmp_path: Path):
    read = _written(small, tmp_path, export="off")
    assert "export: off\n" in (tmp_path / "alone.yaml").read_text()
    assert read().metrics == MetricsConfig(export="off", port=0)
    assert read(metrics__export=False).metrics.export == "off"  # `--metrics.export off`, as YAML reads it
    with pytest.raises(ConfigError, match=r"metrics.export: input should be 'off', 'local' or 'network', found True"):
        read(metrics__export=True)
    with pytest.raises(ConfigError, match=r"metrics.port: input should be less than or equal to 65535"):
        read(metrics__port=65536)


def test_a_run_may_be_resumed_with_and_without_metrics(small: Small, tmp_path: Path):
    run = {"root": str(tmp_path), "name": "run", "epochs": 1}
    folder = train(small.settings("alone", run=run), World())
    outcome = json.loads((folder / "outcome.json").read_text())
    (folder / "outcome.json").unlink()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    train(small.settings("alone", run=run, metrics={"export": "local", "port": port}), World())
    assert read_json(folder / "outcome.json") == {**outcome, "attempt": 2}
