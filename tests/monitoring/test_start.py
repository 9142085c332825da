"""launch/monitoring/start.sh: what it watches, what it refuses, and that it leaves nothing running."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.launch.processes import Launched, environment, wait_for
from tests.metrics.exporters import free_port
from tests.monitoring.fake import FakeRank
from tests.monitoring.server import MONITORING

START = MONITORING / "start.sh"
ROOT_NAME = "it's a [root]"

needs_prometheus = pytest.mark.usefixtures("prometheus_programs")
pytestmark = pytest.mark.prometheus


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / ROOT_NAME
    root.mkdir()
    return root


def start(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(START), *map(str, arguments)],
        env=environment(**environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_help_says_how_it_is_called():
    done = start("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: launch/monitoring/start.sh ")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    assert subprocess.run(["shellcheck", "-x", START], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run root given; for example: launch/monitoring/start.sh runs"),
        (["nowhere"], "no folder 'nowhere'; make it first if runs are to come"),
        (["--port", "web", "."], "--port is 'web', expected 1 to 65535"),
        (["--port=70000", "."], "--port is '70000', expected 1 to 65535"),
        (["--keep", "long", "."], "--keep is 'long', expected a time such as 30d"),
        (["--config", "nowhere.yml", "."], "no file 'nowhere.yml' for --config"),
        ([".", "--data"], "--data needs a value; see launch/monitoring/start.sh --help"),
        (["--ports", "."], "unknown option '--ports'; see launch/monitoring/start.sh --help"),
    ],
)
def test_it_refuses_with_one_message(arguments, message):
    done = start(*arguments)
    assert (done.returncode, done.stderr) == (2, f"start.sh: {message}\n")


def test_a_star_in_a_root_is_refused(tmp_path):
    (tmp_path / "a*b").mkdir()
    done = start(tmp_path / "a*b")
    assert done.returncode == 2
    assert "has a * or a line break in its name" in done.stderr


def test_missing_programs_are_named_with_where_to_get_them(tmp_path, root):
    for program in ("bash", "dirname", "cat"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / program).symlink_to(found)
    done = start(root, PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no prometheus in PATH" in done.stderr
    assert "apt-get install prometheus" in done.stderr


@needs_prometheus
def test_a_broken_rule_is_refused_and_its_file_named(tmp_path, root):
    shutil.copytree(MONITORING, tmp_path / "mine")
    rules = tmp_path / "mine" / "rules" / "alerts.yml"
    rules.write_text(rules.read_text().replace("clamp_min(", "clamp_min"))
    done = start("--check", "--config", tmp_path / "mine" / "prometheus.yml", root)
    assert done.returncode == 2
    assert "alerts.yml is refused:" in done.stderr
    assert "could not parse expression" in done.stderr


@needs_prometheus
def test_a_configuration_without_a_place_for_roots_is_refused(tmp_path, root):
    (tmp_path / "mine.yml").write_text("scrape_configs: []\n")
    done = start("--check", "--config", tmp_path / "mine.yml", root)
    assert done.returncode == 2
    assert "has no job with a line that ends with '# start.sh puts its run roots here'" in done.stderr


@needs_prometheus
def test_a_taken_port_is_said(tmp_path, root):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        done = start("--port", str(port), "--data", tmp_path / "data", root)
    assert done.returncode == 1
    assert done.stderr == f"start.sh: port {port} is taken, perhaps by another Prometheus; --port takes another one\n"


@needs_prometheus
def test_it_watches_roots_and_later_studies_each_in_a_job_of_its_own_and_ends_with_a_signal(tmp_path, root):
    other = tmp_path / "other"
    other.mkdir()
    port, data = free_port(), tmp_path / "data"
    command = [str(START), "--port", str(port), "--data", str(data), str(root), str(other)]
    notes = tmp_path / "notes"
    notes.mkdir()
    environ = environment(TMPDIR=str(notes), DISTKD_LOOK_EVERY_S="0.5")

    def runs() -> set[tuple[str, str]]:
        url = f"http://127.0.0.1:{port}/api/v1/targets?state=active"
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = [target["labels"] for target in json.load(answer)["data"]["activeTargets"]]
        return {(labels["job"], labels["run"]) for labels in found}

    with (
        FakeRank(root / "first", distkd_train_step=1),
        FakeRank(other / "first", distkd_train_step=1),
        Launched(command, tmp_path / "log", environ) as server,
    ):
        wait_for(lambda: "Ctrl-C ends it" in server.said(), server)
        assert f"http://127.0.0.1:{port}/alerts" in server.said()
        with (
            FakeRank(root / "a" / "fold-1", distkd_train_step=1),
            FakeRank(root / "it's b" / "fold-1", distkd_train_step=1),
        ):
            same = {("distkd", "first"), ("distkd-2", "first"), ("distkd/a", "fold-1"), ("distkd/it's b", "fold-1")}
            wait_for(lambda: runs() == same, server, poll_s=0.2)
        os.kill(server.process.pid, 15)
        assert server.wait() == 0, server.said()
        server.wait_until_gone()
    assert list(notes.iterdir()) == []
    assert any(data.iterdir())
