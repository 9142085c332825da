"""The alerts as docs/monitoring.md tells of them, from launch/monitoring/rules/alerts.yml."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.monitoring.server import MONITORING

__all__ = ["WHEN", "alerts", "in_docs", "markdown"]

WHEN = {
    "DistkdNoProgress": "no step for 10 minutes, or for 10 usual steps where these are longer (30 minutes before the "
    "first), while ranks answer; not in an evaluation and the 10 minutes after it, nor once the run has finished or "
    "was stopped as asked",
    "DistkdEvaluationHangs": "a run evaluates for more than 2 hours",
    "DistkdThroughputDrop": "samples per second of step time below half of the median of two hours, for 10 minutes; "
    "from half an hour after the start",
    "DistkdStraggler": "at a rank's pace steps take more than 1.3 times as long as at the median's, for 5 minutes, of "
    "which at least half go by in steps and not in an evaluation",
    "DistkdWaitsForData": "over all ranks, steps wait for data more than half of their time, for 10 minutes",
    "DistkdNotFinite": "more than 1 % of the steps of 15 minutes left out, over ten minutes and more, or a loss that "
    "is NaN or infinite",
    "DistkdStaleCheckpoint": "older than an hour and than three times the interval kept so far; without any, 4 hours",
    "DistkdCheckpointsFail": "a checkpoint could not be written, in the last 30 minutes or since the last whole one",
    "DistkdShardErrors": "more than two reads of shards failed on a node, in 15 minutes",
    "DistkdSamplesReplaced": "a sample could not be read and another took its place, in the last 15 minutes",
    "DistkdRankDown": "a rank has not answered for 2 minutes and has not taken its leave",
    "DistkdRunEndedEarly": "no rank of a run is left for 10 minutes, it had not finished, and did not say that it was "
    "asked to stop; forgotten after 2 hours",
}
"""In words, what the expressions say."""


def alerts() -> dict[str, dict[str, Any]]:
    """Rules by the name of their alert, in the order of the file."""
    groups = yaml.safe_load((MONITORING / "rules" / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def markdown() -> str:
    """The table for the docs."""
    lines = ["| alert | severity | when | what to do |", "|---|---|---|---|"]
    for name, rule in alerts().items():
        lines.append(f"| `{name}` | {rule['labels']['severity']} | {WHEN[name]} | {rule['annotations']['action']} |")
    return "\n".join(lines) + "\n"


def in_docs(text: str) -> set[str]:
    """Names of the alerts that a text speaks of."""
    return set(re.findall(r"\bDistkd[A-Z]\w+", text))


if __name__ == "__main__":
    print(markdown(), end="")
