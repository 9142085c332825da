"""A real Prometheus for tests, on loopback, with the configuration and the rules of launch/monitoring.

Their expressions are as they are; only durations are shorter, so that an alert that takes minutes takes seconds.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import yaml

from tests.launch.processes import PATIENCE_S, REPOSITORY

__all__ = ["MONITORING", "Alert", "Sample", "Server", "shortened"]

MONITORING = REPOSITORY / "launch" / "monitoring"
FACTOR = 30
"""By how much durations are divided."""
_LEAST_S = 4
"""Shortest range: a rate over it has to find two scrapes also on a machine that has other things to do."""
_LEAST_WAIT_S = 8
"""Shortest `for`."""
_LEAST_DOWN_S = 25
"""Shortest `for` of an alert on ranks that do not answer: Prometheus takes targets down every five seconds, so that a
rank which has ended may miss scrapes, and a busy machine may take as long to let one answer."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_POLL_S = 0.2
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Sample:
    """One series of an answer."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert that fires."""

    name: str
    labels: dict[str, str]
    annotations: dict[str, str]


def shortened(rules: dict[str, Any]) -> dict[str, Any]:
    """The content of a rules file with shorter ranges, offsets and waits, otherwise the same."""
    groups = []
    for group in rules["groups"]:
        found = []
        for rule in group["rules"]:
            expr = re.sub(r"\[(\w+)\]", lambda match: f"[{_shorter(match[1], _LEAST_S)}]", rule["expr"])
            expr = re.sub(r"\boffset (\w+)", lambda match: f"offset {_shorter(match[1], _LEAST_S)}", expr)
            least_s = _LEAST_DOWN_S if re.search(r"\bup\b", expr) else _LEAST_WAIT_S
            waits = {"for": _shorter(rule["for"], least_s)} if "for" in rule else {}
            found.append({**rule, "expr": expr, **waits})
        groups.append({**group, "rules": found})
    return {"groups": groups}


def _shorter(duration: str, least_s: int) -> str:
    match = re.fullmatch(r"(\d+)([smhd])", duration)
    assert match is not None, duration
    return f"{max(least_s, int(match[1]) * _SECONDS[match[2]] // FACTOR)}s"


class Server:
    """Prometheus over some run roots; it scrapes and evaluates once a second.

    Args:
        folders: those with target files, `RUN_ROOT/prometheus` and one for each folder of studies.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    # ---- what it says

    def query(self, expr: str, at: float | None = None) -> list[Sample]:
        """Value of each series, now or at a time in seconds since 1970."""
        words = {"query": expr} if at is None else {"query": expr, "time": f"{at:.3f}"}
        found = self._get("query", **words)
        assert found["resultType"] == "vector", found["resultType"]
        return [Sample(one["metric"], float(one["value"][1])) for one in found["result"]]

    def value(self, expr: str, at: float | None = None) -> float | None:
        """Of the only series; None where there is none."""
        found = self.query(expr, at)
        assert len(found) < 2, f"{expr} has {len(found)} series"
        return found[0].value if found else None

    def scrapes(self, series: str, at: float) -> list[list[tuple[float, float]]]:
        """Time and value of what each series was found to be in the hour before, oldest first."""
        found = self._get("query", query=f"{series}[1h]", time=f"{at:.3f}")
        assert found["resultType"] == "matrix", found["resultType"]
        return [[(time, float(value)) for time, value in one["values"]] for one in found["result"]]

    def alerts(self) -> list[Alert]:
        """Those that fire now."""
        found = [alert for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"]
        return [Alert(one["labels"]["alertname"], one["labels"], one["annotations"]) for one in found]

    def fired(self, run: str) -> set[str]:
        """Names of the alerts that fired for a run at any time."""
        series = self.query(f'count_over_time(ALERTS{{alertstate="firing",run="{run}"}}[1h])')
        return {one.labels["alertname"] for one in series}

    def targets(self) -> list[dict[str, Any]]:
        """Those that are scraped now, with `labels`, `health` and `lastError`."""
        return self._get("targets", state="active")["activeTargets"]

    def until(self, condition: Callable[[], _Value], what: str) -> _Value:
        """Poll until the condition holds; its value.

        Raises:
            AssertionError: it does not, with what the server says.
        """
        end = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < end, f"no {what}\n{self.report()}"
            time.sleep(_POLL_S)  # polling other processes, not waiting for luck
        return value

    def report(self) -> str:
        """What somebody needs who looks for the reason of a failed test."""
        targets = [(one["labels"], one["health"], one["lastError"]) for one in self.targets()]
        return "\n".join(map(str, [*targets, *self.alerts(), self._said()[-4000:]]))

    def _get(self, what: str, **words: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(words)}", timeout=60) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    # ---- begin and end

    def __enter__(self) -> Self:
        self._place = Path(tempfile.mkdtemp(prefix="distkd-prometheus-"))
        try:
            self._configure()
            self._boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _configure(self) -> None:
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        [discovery] = config["scrape_configs"][0]["file_sd_configs"]
        pattern = Path(discovery["files"][0]).name
        discovery |= {"files": [str(folder / pattern) for folder in self.folders], "refresh_interval": "1s"}
        for name in config["rule_files"]:
            path = self._place / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml.safe_dump(shortened(yaml.safe_load((MONITORING / name).read_text()))))
        (self._place / "prometheus.yml").write_text(yaml.safe_dump(config))

    def _boot(self) -> None:
        with (self._place / "log").open("wb") as out:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    "--config.file=prometheus.yml",
                    "--storage.tsdb.path=data",
                    "--web.listen-address=127.0.0.1:0",  # it says in its log which one it was given
                ],
                cwd=self._place,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a signal to the tests' group is none to the server
            )
        end = time.monotonic() + PATIENCE_S
        while not self._ready():
            assert self._process.poll() is None, f"prometheus ended at once:\n{self._said()}"
            assert time.monotonic() < end, f"prometheus is not ready:\n{self._said()}"
            time.sleep(0.05)  # polling another process, not waiting for luck

    def _ready(self) -> bool:
        match = re.search(r'msg="Listening on" address=(127\.0\.0\.1:\d+)', self._said())
        if match is None:
            return False
        self.url = f"http://{match[1]}"
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=60) as answer:
                return answer.status == 200
        except OSError:  # 503 while it reads its data
            return False

    def _said(self) -> str:
        return (self._place / "log").read_text(errors="replace")

    def _end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._place)
