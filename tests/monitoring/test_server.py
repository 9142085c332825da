"""The real server over ranks that only answer: what it finds, what its alerts say, and how they go."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.monitoring.fake import FakeRank
from tests.monitoring.server import Alert, Sample, Server

pytestmark = pytest.mark.prometheus

HEALTHY = {"distkd_straggler_index": 1.0, "distkd_checkpoint_age_seconds": 9.0, 'distkd_loss{part="total"}': 0.5}
ILL = {
    "distkd_step_wall_seconds_sum": 300.0,
    "distkd_step_wall_seconds_count": 600,
    "distkd_train_step": 600,
    "distkd_straggler_index": 1.5,  # of the last reading; no step has ended since
    "distkd_checkpoint_age_seconds": 20000,
    'distkd_loss{part="total"}': float("nan"),
    "distkd_run_finished": 0,
}
ILLNESSES = {"DistkdNoProgress", "DistkdStaleCheckpoint", "DistkdNotFinite"}
ENDED = {"distkd_run_finished": 1, "distkd_train_step": 9, "distkd_last_step_timestamp_seconds": time.time}
SLOW = {"distkd_straggler_index": 1.5, "distkd_step_wall_seconds_sum": time.monotonic}
"""All of its time goes by in steps."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server runs")


@pytest.fixture(scope="module")
def server(prometheus, root) -> Server:
    return prometheus(root / "prometheus", root / "study" / "prometheus")


@pytest.fixture(scope="module")
def ranks(root) -> Iterator[dict[str, FakeRank]]:
    """All at once: Prometheus takes targets up every five seconds only."""
    stands_still = {"distkd_last_step_timestamp_seconds": time.time() - 4000}
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(FakeRank(root / run, rank, **values))
            for name, run, rank, values in (
                ("found", "found", 0, HEALTHY | {"distkd_train_step": 3}),
                ("found, second", "found", 1, {"distkd_train_step": 5}),
                ("study", "study/fold-1", 0, HEALTHY),
                ("again", "again", 0, {"distkd_steps_total": 100}),
                ("ends", "ends", 0, HEALTHY | ENDED),
                ("slow", "slow", 0, SLOW),
                ("ill", "ill", 0, ILL | stands_still),
            )
        }


def _firing(server: Server, name: str, run: str) -> list[Alert]:
    return [alert for alert in server.alerts() if alert.name == name and alert.labels["run"] == run]


def test_ranks_carry_the_labels_of_their_targets_whatever_they_say_themselves(server, ranks):
    def both() -> list[Sample]:
        series = server.query('distkd_train_step{run="found"}')
        return series if len(series) == 2 else []  # a scrape that fails takes one away for a second

    found = {one.labels["rank"]: one for one in server.until(both, "two ranks")}
    assert (found["0"].value, found["1"].value) == (3, 5)
    labels = {"run": "found", "stage": "fake", "rank": "0", "node": "n1"}
    own = {"__name__": "distkd_train_step", "job": "distkd", "instance": "found/0"}
    assert found["0"].labels == labels | own
    ranks["found"].values = {'distkd_train_step{rank="1",run="other"}': 7}
    server.until(lambda: server.query('distkd_train_step{run="found",rank="0"} == 7'), "the new value")
    assert not server.query('distkd_train_step{run="other"}')


def test_runs_of_studies_are_found(server, ranks):
    server.until(lambda: server.query('up{run="fold-1"} == 1'), "the run of a study")


def test_a_rank_that_starts_again_goes_on_in_its_series(server, root, ranks):
    server.until(lambda: server.query('distkd_steps_total{run="again"} == 100'), "the first attempt")
    ranks["again"].vanish()
    with FakeRank(root / "again", distkd_steps_total=140):
        server.until(lambda: server.query('distkd_steps_total{run="again"} == 140'), "the second attempt")
        increases = server.query('increase(distkd_steps_total{run="again"}[1h])')
        assert len(increases) == 1
        assert server.value('resets(distkd_steps_total{run="again"}[1h])') == 0


def test_a_rank_that_ends_takes_its_target_along_and_raises_nothing(server, ranks):
    server.until(lambda: server.query('distkd_run_finished{run="ends"}'), "the rank")
    ranks["ends"].leave()
    server.until(lambda: not server.query('{run="ends",__name__!="ALERTS"}'), "end of its series")
    assert server.fired("ends") == set()


def test_alerts_are_written_out_with_their_values(server, ranks):
    def all_at_once() -> list[Alert]:
        alerts = server.alerts()
        there = {(alert.labels["run"], alert.name) for alert in alerts}
        wanted = {("slow", "DistkdStraggler"), *(("ill", name) for name in ILLNESSES)}
        return alerts if wanted <= there else []

    alerts = server.until(all_at_once, "alerts")
    [straggler] = [alert for alert in alerts if alert.labels["run"] == "slow" and alert.name == "DistkdStraggler"]
    found = {alert.name: alert for alert in alerts if alert.labels["run"] == "ill"}
    assert set(found) == ILLNESSES
    for alert in (straggler, *found.values()):
        assert "<" not in " ".join(alert.annotations.values())  # <no value>, <error expanding template: ...>
        assert alert.labels["run"] in alert.annotations["summary"]
    said = {name: alert.annotations["description"] for name, alert in found.items()}
    assert re.search(r"ended 1h \d+m \d+s ago", said["DistkdNoProgress"])
    pace = "At the pace of rank 0 of run slow on node n1 a step takes 1.50 times as long"
    assert pace in straggler.annotations["description"]
    assert "begun 5h 33m 20s ago" in said["DistkdStaleCheckpoint"]
    assert "100%" in said["DistkdNotFinite"]

    ranks["ill"].vanish()
    [alert] = server.until(lambda: _firing(server, "DistkdRankDown", "ill"), "a rank that is down")
    assert alert.annotations["summary"] == "rank 0 of ill on n1 does not answer"


def test_healthy_ranks_raise_nothing(server, ranks):
    server.until(lambda: server.query('up{run="fold-1"} == 1'), "the run of a study")
    assert server.fired("fold-1") | server.fired("found") == set()
