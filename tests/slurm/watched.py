"""Run folders as jobs leave them at a given time, for tests of what `distkd status` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distkd.slurm.queue import EndedJob, QueuedJob
from distkd.slurm.status import Row, look

__all__ = [
    "CONFIG", "NOW", "Lines", "begun", "ended", "lines_of", "only", "queue_of", "submitted",
]  # fmt: skip

NOW = 1_800_000_000.0
CONFIG = "run: {name: x}\neval: {metric: auc_macro}\n"

Lines = list[dict[str, Any]]


def lines_of(path: Path, lines: Lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def submitted(folder: Path, job: str, **values: Any) -> Path:
    """A run that a job has been submitted for, on top of what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "event": "submitted",
        "time": NOW - 9000,
        "job": job,
        "script": "folds.sbatch",
        "log": "a.out",
        "after": [],
    }
    with (folder / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(about | values) + "\n")
    return folder


def begun(
    folder: Path,
    *,
    job: str | None = None,
    age_s: float = 5.0,
    step: int = 60,
    every_s: float = 20.0,
    started_s: float = 1000.0,
    restart: int = 0,
    n_steps: int | None = 100,
    process: str | None = None,
) -> Path:
    """A run whose newest line has an age: a line every ten steps of 32 samples, a validation with each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    about = {"n_steps": n_steps, "started": NOW - started_s, "job": job, "process": process}
    (folder / "environment.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    lines_of(folder / "events" / "rank-00000.jsonl", [{"event": "start", "time": NOW - started_s, "step": 0}])
    newest = NOW - age_s
    lines: Lines = []
    for at in range(10, step + 1, 10):
        time = newest - (step - at) / 10 * every_s
        lines.append({"step": at, "epoch": 0, "time": time - 1, "samples": 32 * at, "loss": 1.0})
        lines.append({"step": at, "epoch": 0, "time": time, "val": {"auc_macro": at / 100}})
    lines_of(folder / "metrics.jsonl", lines)
    if job is not None:
        with (folder / "jobs.jsonl").open("a") as file:
            file.write(json.dumps({"event": "started", "time": NOW - started_s, "job": job, "restart": restart}) + "\n")
    return folder


def ended(folder: Path, state: str, *, age_s: float = 5.0, message: str = "", **values: Any) -> Path:
    begun(folder, age_s=age_s, **values)
    outcome = {"state": state, "kind": "data", "step": 60, "attempt": 1, "message": message}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    with (folder / "events" / "rank-00000.jsonl").open("a") as file:
        file.write(json.dumps({"event": state, "time": NOW - age_s, "step": 60}) + "\n")
    return folder


def queue_of(*jobs: tuple[str, str, str]) -> dict[str, QueuedJob]:
    return {job: QueuedJob(job, state, reason, 3600, "n1") for job, state, reason in jobs}


def only(root: Path, queue: dict[str, QueuedJob] | None = None, *ends: EndedJob) -> Row:
    [row] = look([root], queue, NOW, ended=lambda ids: {end.job: end for end in ends if end.job in ids})
    return row
