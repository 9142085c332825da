"""launch/monitoring/start.sh with a copy of the configuration that names files which lie beside it."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from pathlib import Path

import pytest

from tests.launch.processes import Launched, environment, wait_for
from tests.monitoring.server import MONITORING
from tests.monitoring.test_start import START, free_port, start

pytestmark = [pytest.mark.prometheus, pytest.mark.usefixtures("prometheus_programs")]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "my & own"
    shutil.copytree(MONITORING / "rules", folder / "rules", ignore=shutil.ignore_patterns("*_test.yml"))
    shutil.copy(MONITORING / "prometheus.yml", folder)
    (tmp_path / "runs").mkdir()
    return folder


def test_rules_that_are_named_in_another_way_are_loaded_and_checked(copy: Path):
    config = copy / "prometheus.yml"
    text = config.read_text().replace("  - rules/recording.yml\n", "").replace("- rules/alerts.yml", '- "rules/*.yml"')
    config.write_text(text)
    done = start("--check", "--config", config, copy.parent / "runs")
    assert (done.returncode, done.stderr) == (0, "")
    (copy / "rules" / "mine.yml").write_text("groups: [{name: mine, rules: [{record: a, expr: 'sum('}]}]\n")
    done = start("--check", "--config", config, copy.parent / "runs")
    assert done.returncode == 2
    assert "rules/mine.yml" in done.stderr


def test_targets_that_lie_beside_it_are_found(copy: Path, tmp_path: Path):
    config, port = copy / "prometheus.yml", free_port()
    (copy / "more").mkdir()
    (copy / "more" / "others.json").write_text('[{"targets": ["127.0.0.1:1"], "labels": {"run": "beside"}}]')
    more = "\n  - job_name: distkd-more\n    file_sd_configs:\n      - files: [more/*.json]\n"
    config.write_text(config.read_text() + more)
    command = [START, "--port", port, "--data", tmp_path / "data", "--config", config, tmp_path / "runs"]

    def runs() -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/targets?state=active", timeout=60) as answer:
            found = json.load(answer)["data"]["activeTargets"]
        return {target["labels"]["run"] for target in found}

    with Launched([str(word) for word in command], tmp_path / "log", environment()) as server:
        wait_for(lambda: "Ctrl-C ends it" in server.said(), server)
        wait_for(lambda: runs() == {"beside"}, server, poll_s=0.2)
        os.kill(server.process.pid, 15)
        assert server.wait() == 0, server.said()
    assert (copy / "more" / "others.json").exists()  # links are removed, not what they lead to
