"""What the dashboard's queries find in a real server, over a run that has every metric, and how answers are read."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from launch.monitoring.dashboard import (
    FILE,
    DashboardError,
    Server,
    Window,
    alert_spans,
    known_runs,
    legend,
    lines_of,
    panels_of,
    rows_of,
    substituted,
    window_of,
)
from tests.monitoring.made import MINUTES, RANKS, RUN, MadeServer

DASHBOARD = json.loads(FILE.read_text())
PANELS = {panel.title: panel for panel in panels_of(DASHBOARD) if panel.kind != "row"}
WINDOW = Window(start=0.0, end=600.0, step=5.0, rate=20.0)


@pytest.fixture(scope="module")
def made(prometheus_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with MadeServer([tmp_path_factory.mktemp("no targets")]) as server:
        yield Server(server.url)


@pytest.fixture(scope="module")
def window(made: Server) -> Window:
    return window_of(made, RUN, MINUTES + 1, time.time())


class Answers:
    """A server that gives the same answer to everything."""

    def __init__(self, status: int, body: bytes, kind: str = "application/json"):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                answers.asked.append((self.path, self.headers.get("Authorization")))
                length = int(self.headers["Content-Length"])
                self.rfile.read(length)
                needs_login = answers.password and not self.headers.get("Authorization")
                self.send_response(401 if needs_login else status)
                if needs_login:
                    self.send_header("WWW-Authenticate", 'Basic realm="prometheus"')
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Nobody reads it."""

        answers = self
        self.password = False
        self.asked: list[tuple[str, str | None]] = []
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Answers:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


# ---- every panel, over a real server


@pytest.mark.prometheus
@pytest.mark.parametrize("title", PANELS)
def test_every_query_of_a_panel_finds_numbers(made, window, title):
    panel = PANELS[title]
    for target in panel.targets:
        expr = substituted(target["expr"], RUN, window)
        found = made.instant(expr, window.end) if target.get("instant") else made.over(expr, window)
        values = [float(text) for one in found for _, text in one.get("values", [one.get("value")])]
        assert any(map(math.isfinite, values)), expr


@pytest.mark.prometheus
@pytest.mark.parametrize("variable", DASHBOARD["templating"]["list"][1:], ids=lambda variable: variable["name"])
def test_a_variable_finds_values(made, window, variable):
    selector, label = variable["query"]["query"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
    where = {"match[]": substituted(selector, RUN, window), "start": window.start, "end": window.end}
    assert all(series[label] for series in made.ask("series", **where))
    assert len(made.ask("series", **where)) == RANKS


@pytest.mark.prometheus
def test_a_window_is_as_long_as_the_run_and_its_rates_take_four_scrapes(made, window):
    assert window.end - window.start == pytest.approx(60 * MINUTES, abs=1)
    assert (window.rate, window.step) == (20.0, 5.0)
    n_steps = (window.end - window.start) / window.step
    assert n_steps == pytest.approx(round(n_steps), abs=1e-6)  # so that the last scrape is among them
    shorter = window_of(made, RUN, 2, time.time())
    assert shorter.end == window.end
    assert 110 < shorter.end - shorter.start <= 120


@pytest.mark.prometheus
def test_a_run_that_nobody_knows_is_answered_with_those_that_are_known(made):
    assert known_runs(made, time.time()) == [RUN]
    with pytest.raises(DashboardError, match=r"knows no run 'fold'; runs it knows: fold\.1\+\(b\)$"):
        window_of(made, "fold", 10, time.time())


@pytest.mark.prometheus
def test_the_table_of_ranks_has_a_row_for_each_the_slowest_first(made, window):
    rows = rows_of(made, PANELS["Ranks"], RUN, window)
    assert [row["rank"] for row in rows] == ["1", "0"]
    assert [row["node"] for row in rows] == ["n1", "n0"]
    assert list(rows[0])[3:9] == ["index", "data", "forward", "backward", "collective", "optimizer"]
    assert all(isinstance(value, float) for value in list(rows[0].values())[3:])
    assert rows[0]["data"] == pytest.approx(1.5 * float(rows[1]["data"]), rel=1e-3)


@pytest.mark.prometheus
def test_the_slowest_rank_is_named_and_the_sum_is_that_of_the_ranks(made, window):
    [slowest] = lines_of(made, PANELS["Slowest rank"], RUN, window)
    assert (slowest.name, slowest.values) == ("rank 1", [pytest.approx(1.45)])
    samples = lines_of(made, PANELS["Samples per second by rank"], RUN, window)
    assert [line.name for line in samples] == ["all", "rank 0", "rank 1"]
    assert samples[0].values[-1] == pytest.approx(samples[1].values[-1] + samples[2].values[-1])
    assert samples[0].values[-1] == pytest.approx(256, rel=0.01)


@pytest.mark.prometheus
def test_stacked_phases_are_the_mean_step_of_a_rank(made, window):
    phases = lines_of(made, PANELS["Step time by phase"], RUN, window)
    ranks = rows_of(made, PANELS["Ranks"], RUN, window)
    for line in phases:
        if line.name != "checkpoint":
            assert line.values[-1] == pytest.approx(sum(float(row[line.name]) for row in ranks) / RANKS, rel=1e-3)


@pytest.mark.prometheus
def test_alerts_are_shown_while_they_fire(made, window):
    assert [row["alert"] for row in rows_of(made, PANELS["Alerts"], RUN, window)] == ["DistkdStraggler"]
    [(start, end)] = alert_spans(made, DASHBOARD, RUN, window)
    assert end - start == pytest.approx(30 * MINUTES, abs=3 * window.step)


@pytest.mark.prometheus
def test_the_server_says_what_is_wrong_with_a_query(made):
    with pytest.raises(DashboardError, match=r"answers 400 to query: .*parse error"):
        made.instant("sum(", 0.0)


# ---- what needs none


def test_a_run_of_any_name_is_asked_for_by_that_name():
    name = 'a.b+c(1)[x]|"y"\\z'
    assert substituted('x{run=~"$run"}', name, WINDOW) == (
        'x{run=~"a\\\\.b\\\\+c\\\\(1\\\\)\\\\[x\\\\]\\\\|\\"y\\"\\\\\\\\z"}'
    )


def test_variables_become_the_window_and_all_ranks():
    assert substituted('rate(x{rank=~"$rank"}[$__rate_interval])', "a", WINDOW) == 'rate(x{rank=~".*"}[20s])'
    with pytest.raises(DashboardError, match=r"asks for \$interval, known are \$run, "):
        substituted("rate(x[$interval])", "a", WINDOW)


@pytest.mark.parametrize(
    "form, text", [("{{part}} {{run}}", "task a"), ("p50 {{ run }}", "p50 a"), ("{{gone}}", ""), ("", "")]
)
def test_a_legend_takes_labels(form, text):
    assert legend(form, {"part": "task", "run": "a"}) == text


@pytest.mark.parametrize("url", ["127.0.0.1:9090", "ftp://host", "http://", ""])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(DashboardError, match="is no address, expected for example http://127"):
        Server(url)


def test_a_server_that_is_not_there_is_said_to_be_missing():
    with Answers(200, b"") as gone:
        host = gone.host
    with pytest.raises(DashboardError, match=rf"no Prometheus answers at http://{host} \(.*refused\); start one, or"):
        Server(f"http://{host}/").instant("up", 0.0)


@pytest.mark.parametrize(
    "status, body, words",
    [
        (200, b"<html>", "answers, but not as a Prometheus does"),
        (200, b"[]", r"answers query with \[\], expected status success"),
        (404, b"<html>", "answers 404 to query: Not Found"),
        (422, b'{"status":"error","error":"too much"}', "answers 422 to query: too much"),
    ],
)
def test_another_server_is_told_from_a_prometheus(status, body, words):
    with Answers(status, body) as other, pytest.raises(DashboardError, match=words):
        Server(f"http://{other.host}").instant("up", 0.0)


def test_a_password_goes_to_the_server_and_into_no_message():
    with Answers(200, b'{"status":"success","data":{"result":[]}}') as locked:
        locked.password = True
        server = Server(f"http://me:se%40cret@{locked.host}/prefix/")
        assert server.instant("up", 0.0) == []
        assert locked.asked[-1] == ("/prefix/api/v1/query", "Basic bWU6c2VAY3JldA==")
        assert server.url == f"http://{locked.host}/prefix"
