"""The dashboard over two ranks that really distil: what a user sees in it, panel by panel."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch.monitoring.dashboard import FILE, Server, Window, lines_of, panels_of, rows_of, substituted, window_of
from tests.launch.folders import metrics
from tests.launch.processes import Launched, environment
from tests.launch.runs import law_run, write_config
from tests.monitoring import server as real

pytestmark = [pytest.mark.prometheus, pytest.mark.slow, pytest.mark.timeout(900)]  # the first one trains

PANELS = {panel.title: panel for panel in panels_of(json.loads(FILE.read_text())) if panel.kind != "row"}
EMPTY = {
    "GPU memory": "it trains on the CPU",
    "Other numbers of the method": "dc_distill has none",
}
PARTLY_EMPTY = {"FLOP/s and MFU": "nobody knows a CPU's peak"}
EITHER = {"Alerts": "on a busy machine a rank may be slow for a moment"}


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that has ended, and the server that watched it."""

    folder: Path
    server: Server
    window: Window
    """Up to its end."""
    at_work: Window
    """Up to a moment at which both ranks made steps: at the end one is gone before the other, and neither makes any."""


@pytest.fixture(scope="module")
def trained(prometheus, shards: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("distilled")
    (place / "teacher").symlink_to(root / "teacher")
    config = law_run(
        "dc_distill",
        shards,
        place,
        run={"name": "run", "epochs": 8, "log_every": 5, "eval_every": 2, "checkpoint_every": 50},
    )
    path, folder = write_config({**config, "metrics": {"export": "local"}}, place)
    server: real.Server = prometheus(place / "prometheus")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tests/monitoring/slow_rank.py", str(path)]
    with Launched(command, place / "log", environment(DISTKD_TEST_WAITS="0.05,0.05")) as run:
        assert run.wait(800) == 0, run.said()
    asked = Server(server.url)
    window = window_of(asked, "run", 30, time.time())
    steps = substituted('count(rate(distkd_steps_total{run="$run"}[$__rate_interval]) > 0) == 2', "run", window)
    [both] = asked.over(steps, window)
    return Trained(folder, asked, window, replace(window, end=float(both["values"][-1][0])))


@pytest.mark.parametrize("title", [title for title in PANELS if title not in EITHER])
def test_every_panel_shows_the_run(trained, title):
    for target in PANELS[title].targets:
        expr = substituted(target["expr"], "run", trained.window)
        if target.get("instant"):
            found = [{**one, "values": [one["value"]]} for one in trained.server.instant(expr, trained.at_work.end)]
        else:
            found = trained.server.over(expr, trained.window)
        numbers = [float(text) for one in found for _, text in one["values"]]
        has_numbers = any(map(math.isfinite, numbers))
        may_be_empty = title in EMPTY or (title in PARTLY_EMPTY and target["refId"] != "A")
        assert has_numbers != may_be_empty, expr


def test_progress_ends_at_the_last_step(trained):
    [progress] = lines_of(trained.server, PANELS["Progress"], "run", trained.window)
    assert progress.values[-1] == 1


def test_losses_are_those_of_the_metrics_file(trained):
    last = [line for line in metrics(trained.folder) if "loss" in line][-1]
    shown = {line.name: line.values[-1] for line in lines_of(trained.server, PANELS["Loss"], "run", trained.window)}
    assert shown == pytest.approx({"total": last["loss"], **last["parts"]})


def test_both_ranks_have_a_row_in_the_table(trained):
    rows = rows_of(trained.server, PANELS["Ranks"], "run", trained.at_work)
    assert {row["rank"] for row in rows} == {"0", "1"}
    assert len({tuple(row) for row in rows}) == 1
