"""A rank's numbers over HTTP: announced, continued over restarts, and gone with the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distkd.base import World
from distkd.comm import world as comm
from distkd.errors import Interrupted
from distkd.files import read_json
from distkd.metrics import keeper as keeping
from distkd.metrics import targets
from distkd.metrics.exporter import (
    Exporter,
    MetricsConfig,
    device_labels,
    node_address,
    node_labels,
    start_exporter,
)
from distkd.metrics.jsonl import read_jsonl
from distkd.metrics.keeper import counters_file
from distkd.metrics.ledger import Ledger
from distkd.train import run as running
from distkd.train.loop import train
from tests.launch.processes import REPOSITORY, environment
from tests.laws.common import before_steps, settings_of
from tests.metrics.exporters import (
    LABELS,
    LOCAL,
    be_patient,
    exporter_of,
    free_port,
    nothing_is_announced,
    small_ledger,
)
from tests.metrics.scraping import left_for_good, scrape, target
from tests.small import Small


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert left_for_good() == []


def _train(world: World, config: dict[str, Any], at: int) -> dict[str, Any]:
    """Train, and scrape both ranks' targets before step `at`; what a rank saw."""
    folder, seen = settings_of(config).folder, {}
    started: list[Exporter] = []

    def start(*given: Any, **options: Any) -> Exporter | None:
        exporter = start_exporter(*given, **options)
        assert exporter is not None
        started.append(exporter)
        return exporter

    def hook(step: int, _: Any) -> None:
        if step == at:
            started[0]._keeper.refresh()
            comm.barrier(world)  # the other rank has, too
            found = [target(folder, rank) for rank in range(world.size)]
            seen["labels"] = [labels for _, labels in found]
            seen["values"] = [scrape(address) for address, _ in found]
            comm.barrier(world)

    comm.counts.clear()
    with before_steps(hook), pytest.MonkeyPatch.context() as patch:
        be_patient(patch)
        if at >= 0:
            patch.setattr(running, "start_exporter", start)
        train(settings_of(config), world)
    return {**seen, "collectives": dict(comm.counts), "left": left_for_good()}


def test_both_ranks_of_a_run_serve_what_metrics_jsonl_says(ranks: Any, small: Small, tmp_path: Path):
    run = {"root": str(tmp_path), "name": "study", "epochs": 2, "log_every": 2}
    config = small.config("student", run=run, metrics={"export": "local", "linger_s": 0})
    found = ranks(2).run(_train, config=config, at=4)
    line = next(line for line in read_jsonl(tmp_path / "study" / "metrics.jsonl") if line["step"] == 4)
    for seen in found:
        for rank, (labels, values) in enumerate(zip(seen["labels"], seen["values"], strict=True)):
            about = {name: value for name, value in labels.items() if not name.startswith("__meta_")}
            assert about.pop("node") == socket.gethostname()
            assert about == {"run": "study", "stage": "logit_kd", "rank": str(rank), "slurm_job": ""}
            assert values["gauge distkd_train_step"] == values["counter distkd_steps_total"] == 4
            assert values["counter distkd_samples_total"] == line["samples"] / 2  # its own
            assert values["histogram distkd_step_wall_seconds_count"] == 4
            of_run = {"gauge distkd_loss total": line["loss"], "gauge distkd_lr": line["lr"]}
            of_run |= {f"gauge distkd_loss {part}": value for part, value in line["parts"].items()}
            of_run["gauge distkd_grad_norm"] = line["grad_norm"]
            assert {name: values.get(name) for name in of_run} == pytest.approx(
                of_run if rank == 0 else dict.fromkeys(of_run)
            )
    assert nothing_is_announced(tmp_path)
    assert [seen["left"] for seen in found] == [[], []]


def test_exporting_adds_no_collective(ranks: Any, small: Small, tmp_path: Path):
    counted = []
    for export in ("off", "local"):
        run = {"root": str(tmp_path), "name": export, "epochs": 1}
        config = small.config("alone", run=run, metrics={"export": export})
        counted.append([seen["collectives"] for seen in ranks(2).run(_train, config=config, at=-1)])
    assert counted[0] == counted[1]
    assert counted[0][0]


@pytest.mark.parametrize("ending", ["sigterm", "ctrl_c", "failed"])
def test_a_target_is_gone_however_the_run_ends_and_counters_go_on(small: Small, tmp_path: Path, ending: str):
    run = {"root": str(tmp_path), "name": "run", "epochs": 3, "checkpoint_every": 1, "save": "sync"}
    settings = small.settings("alone", run=run, metrics={"export": "local", "linger_s": 0})
    seen: list[dict[str, float]] = []

    def end(step: int, _: Any) -> None:
        assert not nothing_is_announced(tmp_path)
        if step == 2:
            if ending != "sigterm":
                raise KeyboardInterrupt if ending == "ctrl_c" else ZeroDivisionError("a mistake of ours")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises((Interrupted, KeyboardInterrupt, ZeroDivisionError)), before_steps(end):
        train(settings, World())
    assert nothing_is_announced(tmp_path)
    assert left_for_good() == []

    with before_steps(lambda *_: seen.append(scrape(target(settings.folder)[0]))):
        train(settings, World())
    at = 3 if ending == "sigterm" else 2  # a stop that was asked for finishes its step
    assert seen[0]["gauge distkd_train_step"] == at
    assert seen[0]["counter distkd_steps_total"] == at
    assert seen[0]["counter distkd_samples_total"] == at * 8
    assert seen[0]["gauge distkd_restarts"] == 1
    assert nothing_is_announced(tmp_path)


def test_a_killed_run_leaves_a_stale_target_that_its_next_attempt_removes(small: Small, tmp_path: Path):
    config = small.config("alone", run={"root": str(tmp_path), "name": "run"}, metrics={"export": "local"})
    program = f"""
import os, signal
from distkd.base import World
from distkd.train import run as running
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
    assert nothing_is_announced(tmp_path)
    assert counters_file(folder, 0).exists()  # for an attempt that exports again


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


def test_a_run_may_be_resumed_with_and_without_metrics(small: Small, tmp_path: Path):
    run = {"root": str(tmp_path), "name": "run", "epochs": 1}
    folder = train(small.settings("alone", run=run), World())
    outcome = json.loads((folder / "outcome.json").read_text())
    (folder / "outcome.json").unlink()
    metrics = {"export": "local", "port": 0, "linger_s": 1, "textfile": str(tmp_path)}
    train(small.settings("alone", run=run, metrics=metrics), World())
    assert read_json(folder / "outcome.json") == {**outcome, "attempt": 2}
    assert (tmp_path / "distkd-run.rank-00000.prom").exists()


def test_a_textfile_needs_no_server(small: Small, tmp_path: Path):
    run = {"root": str(tmp_path), "name": "run", "epochs": 1}
    train(small.settings("alone", run=run, metrics={"textfile": str(tmp_path)}), World())
    text = (tmp_path / "distkd-run.rank-00000.prom").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("distkd_run_finished{")]
    assert line.endswith(" 1.0")
    assert nothing_is_announced(tmp_path)


def test_a_disk_that_takes_no_target_costs_the_metrics_only(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "prometheus").write_text("in the way")
    assert start_exporter(LOCAL, tmp_path, World(rank=3), ledger=small_ledger(), labels=LABELS, info={}) is None
    assert "rank 3 trains on without metrics.export=local: File exists\n" in caplog.text


def test_nothing_is_served_to_everybody_where_a_guard_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = MetricsConfig(export="local", password_file=tmp_path / "absent")
    assert start_exporter(config, tmp_path, World(), ledger=small_ledger(), labels=LABELS, info={}) is None
    assert caplog.text.count("trains on without metrics.export=local: metrics.password_file=") == 1
    config = MetricsConfig(export="local", tls_cert=tmp_path / "absent")
    assert start_exporter(config, tmp_path, World(), ledger=small_ledger(), labels=LABELS, info={}) is None
    assert not (tmp_path / "prometheus").exists()


def test_where_the_server_fails_a_textfile_still_gets_its_values(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = MetricsConfig(export="local", tls_cert=tmp_path / "absent", textfile=tmp_path)
    ledger = small_ledger()
    with exporter_of(tmp_path / "run", config, ledger=ledger) as exporter:
        ledger.add("distkd_steps_total", 1)
        exporter._keeper.refresh()
        assert (
            'distkd_steps_total{rank="0",run="r",stage="s"} 1.0' in (tmp_path / "distkd-r.rank-00000.prom").read_text()
        )
    assert caplog.text.count("trains on without") == 1
    again = Ledger()
    with exporter_of(tmp_path / "run", config, ledger=again):
        assert again.counters() == ledger.counters()  # once, although the server failed first


def test_ranks_of_a_machine_take_ports_in_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    port = free_port()
    world = World(rank=5, size=8, local_rank=1, local_size=4)
    with exporter_of(tmp_path, MetricsConfig(export="local", port=port - 1), world=world) as exporter:
        assert exporter.address == f"127.0.0.1:{port}"
        assert target(tmp_path, 5)[0] == exporter.address
    last = MetricsConfig(export="local", port=65535)
    assert start_exporter(last, tmp_path, world, ledger=small_ledger(), labels=LABELS, info={}) is None
    assert "port must be 0-65535" in caplog.text


def test_local_listens_on_loopback_and_network_on_one_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def listens_on(exporter: Exporter) -> str:
        assert exporter._server is not None
        return str(exporter._server.server_address[0])

    with exporter_of(tmp_path) as exporter:
        assert exporter.address.startswith("127.0.0.1:")
        assert listens_on(exporter) == "127.0.0.1"
    monkeypatch.setattr(socket, "gethostname", lambda: "node-a")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.2" if name == "node-a" else name)
    monkeypatch.setenv("LOCAL_ADDR", "0.0.0.0")  # stands for the one address that every machine has beside loopback
    with exporter_of(tmp_path, MetricsConfig(export="network")) as exporter:
        assert listens_on(exporter) == "0.0.0.0"


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


def test_a_target_says_how_it_is_called_and_nothing_secret(tmp_path: Path, certificate: tuple[Path, Path]):
    password = tmp_path / "password"
    password.write_text("prometheus:secret-word\n")
    password.chmod(0o600)
    config = MetricsConfig(export="local", tls_cert=certificate[0], tls_key=certificate[1], password_file=password)
    run = tmp_path / "run"
    with exporter_of(run, config, attempt=3) as exporter:
        address, labels = target(run)
        assert labels["__scheme__"] == "https"
        assert labels["__meta_distkd_attempt"] == "3"
        assert {name: value for name, value in labels.items() if not name.startswith("__")} == {**LABELS, "rank": "0"}
        assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("rank-*") if path.is_file())
        exporter._keeper.refresh()
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        known = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        known.add_password(None, f"https://{address}", "prometheus", "secret-word")
        handlers = urllib.request.HTTPSHandler(context=trusting), urllib.request.HTTPBasicAuthHandler(known)
        with urllib.request.build_opener(*handlers).open(f"https://{address}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    assert "distkd_train_step 7.0\n" in text
    assert 'distkd_rank_info{engine="ddp"} 1.0\n' in text
    with exporter_of(run):
        assert "__scheme__" not in target(run)[1]


def test_a_scrape_while_the_trainer_works_sees_whole_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeping, "_INTERVAL_S", 0.001)
    ledger, done = small_ledger(), threading.Event()

    def work() -> None:
        while not done.is_set():
            ledger.observe("distkd_step_wall_seconds", 0.25)
            ledger.add("distkd_samples_total", 8)

    trainer, before = threading.Thread(target=work), 0.0
    with exporter_of(tmp_path, ledger=ledger) as exporter:
        trainer.start()
        try:
            for _ in range(50):
                seen = scrape(exporter.address)
                name = "histogram distkd_step_wall_seconds"
                count = seen.get(f"{name}_count", 0.0)
                assert seen.get(f"{name}_bucket +Inf", 0.0) == seen.get(f"{name}_bucket 0.5", 0.0) == count
                assert abs(seen.get(f"{name}_sum", 0.0) - 0.25 * count) <= 0.25
                assert count >= before
                before = count
        finally:
            done.set()
            trainer.join()


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
