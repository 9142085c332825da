"""Two runs of two ranks train at once under the real server: one well and to its end, one with all that can happen."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.launch.folders import metrics, outcome
from tests.launch.processes import Launched, environment, wait_for
from tests.launch.runs import write_config
from tests.laws.common import law_config
from tests.monitoring.server import Alert, Server

pytestmark = [pytest.mark.prometheus, pytest.mark.slow, pytest.mark.timeout(1200)]  # waits for four ranks in all

WELL, ILL = "study/well", "ill"
WAITS = {WELL: "0.3,0.3", ILL: "0.02,0.6"}
"""Seconds that the ranks wait in every forward: in the second run rank 1 is a straggler, also where the rest of a step
takes many times as long as it should; and in the first run none is, however unevenly it does.
"""
EPOCHS = {WELL: 14, ILL: 10_000}
"""Of 15 steps each."""


@dataclass(slots=True)
class Seen:
    """What the server said while the runs trained."""

    folder: Path
    """Of the run that went well."""
    together: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    """Runs and ranks that were scraped at the same time."""
    straggling: list[Alert] = field(default_factory=list[Alert])
    """Alerts about a straggler, once there was one."""
    stopped: list[Alert] = field(default_factory=list[Alert])
    """Alerts about a rank that is down, once one was stopped."""
    killed: dict[str, Alert] = field(default_factory=dict[str, Alert])
    """Alerts by name about the run whose ranks were all killed."""


def _config(name: str, shards: Path, root: Path) -> dict[str, Any]:
    config = law_config(
        "supervised",
        shards,
        root,
        run={"name": name, "epochs": EPOCHS[name], "log_every": 2, "eval_every": EPOCHS[name]},
        data={"threads": 0},
        engine={"precision": "fp32", "timeout_s": 240},
    )
    return config | {"metrics": {"export": "local"}}


def _start(name: str, shards: Path, root: Path) -> Launched:
    notes = root / f"notes of {name.replace('/', '-')}"
    notes.mkdir()
    path, _ = write_config(_config(name, shards, root), notes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tests/monitoring/slow_rank.py", str(path), "--run.root", str(root)]
    return Launched(command, notes / "log", environment(DISTKD_TEST_WAITS=WAITS[name]))


@pytest.fixture(scope="module")
def server(prometheus, tmp_path_factory) -> Server:
    root = tmp_path_factory.mktemp("trained")
    return prometheus(root / "prometheus", root / "study" / "prometheus")


@pytest.fixture(scope="module")
def seen(server: Server, shards: Path) -> Iterator[Seen]:
    """Both runs from their start until they are gone, in the order of the fields."""
    root = server.folders[0].parent
    seen = Seen(root / WELL)

    def firing(name: str) -> list[Alert]:
        return [alert for alert in server.alerts() if alert.name == name and alert.labels["run"] == ILL]

    def fires(name: str, alerts: list[Alert]) -> bool:
        alerts[:] = firing(name)  # kept as they were found: they may pass
        return bool(alerts)

    def found(n_ranks: int) -> bool:
        seen.together = {(one.labels["run"], one.labels["rank"]) for one in server.query("up == 1")}
        return len(seen.together) == n_ranks

    with ExitStack() as stack:
        ill = stack.enter_context(_start(ILL, shards, root))
        wait_for(lambda: found(2), ill, poll_s=0.5)  # first the one that does not end by itself
        well = stack.enter_context(_start(WELL, shards, root))
        wait_for(lambda: found(4), well, poll_s=0.5)
        wait_for(lambda: fires("DistkdStraggler", seen.straggling), ill, poll_s=0.5)

        os.kill(ill.ranks()[1], signal.SIGSTOP)
        wait_for(lambda: fires("DistkdRankDown", seen.stopped), ill, poll_s=0.5)

        ill.kill()
        server.until(lambda: firing("DistkdRunEndedEarly"), "alert for the run that was killed")
        seen.killed = {alert.name: alert for alert in server.alerts() if alert.labels["run"] == ILL}
        assert well.wait() == 0, well.said()
        own = f'{{run="{WELL}",__name__=~"up|distkd_.+"}}'
        server.until(lambda: not server.query(own), "end of the series of the run that went well")
        yield seen


def test_runs_that_train_at_once_are_found_those_of_a_study_too(seen):
    assert seen.together == {(run, rank) for run in (WELL, ILL) for rank in "01"}


def test_throughput_is_that_of_the_metrics_file(server, seen):
    lines = [line for line in metrics(seen.folder) if "samples" in line]
    times, samples = ([line[name] for line in lines] for name in ("time", "samples"))
    scraped = server.scrapes(f'distkd_samples_total{{run="{WELL}"}}', at=time.time())
    assert len(scraped) == 2
    assert sum(of_rank[-1][1] for of_rank in scraped) == samples[-1]
    # between the first and the last scrape while it trained; what is scraped is up to two seconds old, or older where
    # the disk is slow, which is little of the window
    during = [[time for time, _ in of_rank if times[0] < time < times[-1]] for of_rank in scraped]
    start, end = max(of_rank[0] for of_rank in during), min(of_rank[-1] for of_rank in during)
    window_s = int(end - start)
    assert window_s >= 40
    rate = server.value(f'sum by (run) (rate(distkd_samples_total{{run="{WELL}"}}[{window_s}s]))', at=end)
    before, after = np.interp([end - window_s, end], times, samples)
    assert rate == pytest.approx((after - before) / window_s, rel=0.1)


def test_a_straggler_is_named_and_no_other_rank(seen):
    assert [(alert.labels["rank"], alert.labels["severity"]) for alert in seen.straggling] == [("1", "warning")]
    assert "rank 1 of run ill" in seen.straggling[0].annotations["description"]


def test_a_rank_that_hangs_is_down_and_no_other(seen):
    assert [alert.labels["rank"] for alert in seen.stopped] == ["1"]


def test_a_run_that_is_killed_is_missed(seen):
    assert {"DistkdRankDown", "DistkdRunEndedEarly"} <= set(seen.killed)
    description = seen.killed["DistkdRunEndedEarly"].annotations["description"]
    assert re.search(r"it was at step [1-9]\d* when it was last seen", description)


def test_a_run_that_ends_well_raises_nothing_and_disappears(server, seen):
    assert outcome(seen.folder)["state"] == "done"
    assert list(seen.folder.parent.glob("prometheus/*")) == []
    assert server.fired(WELL) == set()
    assert server.value(f'last_over_time(distkd_run_finished{{run="{WELL}"}}[1h])') == 1


def test_what_rules_record_is_there(server, seen):
    """Each series that alerts and dashboards ask for, where a CPU can know it."""
    found = server.query(f'count by (__name__) (last_over_time({{run="{WELL}",__name__=~"(rank|run):.+"}}[1h]))')
    assert {one.labels["__name__"] for one in found} >= {
        "rank:distkd_data_wait:ratio5m",
        "rank:distkd_samples:rate1m",
        "rank:distkd_step_seconds:mean5m",
        "rank:distkd_step_wall_seconds:mean5m",
        "run:distkd_checkpoint_interval_seconds:mean",
        "run:distkd_samples:rate1m",
        "run:distkd_samples_per_step_second:mean5m",
        "run:distkd_step_wall_seconds:mean",
        "run:distkd_steps:rate1m",
    }
