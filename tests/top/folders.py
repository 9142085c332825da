"""Run folders made by hand: a training of four ranks or more that is under way, every number known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["NOW", "append", "line_of", "made", "ranks_of", "write_ranks"]

NOW = 1_800_000_000.0
START = NOW - 602.0
CONFIG = """run: {name: kd, seed: 3, epochs: 20, log_every: 10}
method: {name: dc_distill}
data: {fold: 1}
eval: {metric: auc_macro}
"""
PHASES = {"data": 0.002, "forward": 0.05, "backward": 0.03, "collective": 0.01, "optimizer": 0.008}


def line_of(step: int, time: float, **values: Any) -> dict[str, Any]:
    """A line as `metrics.jsonl` has it: ten steps of 64 samples in a second, losses that fall."""
    return {
        "step": step,
        "epoch": step // 50,
        "time": time,
        "samples": 64 * step,
        "loss": 10.0 / step,
        "parts": {"task": 6.0 / step, "kl_teacher": 4.0 / step, "nce": 2.0},
        "gauges": {
            "weight/kl_teacher": 1.5,
            "weight/nce": 0.25,
            "cosine/kl_teacher|task": 0.5,
            "cosine/nce|task": -0.125,
            "cosine/kl_teacher|nce": -0.25,
            "teacher/task": 0.0625,
            "bank/gene/staleness_steps": 12.5,
            "bank/gene/unwritten_ratio": 0.1,
            "bank/gene/norm_drift": 0.001,
            "selected/easy": 0.75,
        },
        "lr": 1e-3,
        "grad_norm": 2.5,
        "skipped": 0,
        "timings": {phase: 10 * seconds for phase, seconds in PHASES.items()},
        **values,
    }


def made(folder: Path, *, n_lines: int = 60, n_ranks: int = 4, age_s: float = 2.0, **environment: Any) -> Path:
    """A run whose newest line is `age_s` old at `NOW`; without lines it has just begun."""
    (folder / "events").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    about = {"world_size": n_ranks, "device": "cpu", "n_steps": 1000, "started": START, "job": None}
    (folder / "environment.json").write_text(json.dumps(about | environment))
    append(folder / "events" / "rank-00000.jsonl", {"event": "start", "time": START, "attempt": 2, "step": 0})
    newest = NOW - age_s
    for i in range(1, n_lines + 1):
        append(folder / "metrics.jsonl", line_of(10 * i, newest - (n_lines - i)))
    if n_lines:
        score = {"auc_macro": 0.75, "accuracy": 0.5}
        append(folder / "metrics.jsonl", {"step": 10 * n_lines, "epoch": 1, "time": newest, "val": score})
    return folder


def append(path: Path, value: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def ranks_of(n_ranks: int, *, slow: int | None = None, phase: str = "data", times: float = 1.8) -> list[dict[str, Any]]:
    """What each rank says of its steps, as `ranks.json` has it; at the pace of one a step takes `times` as long."""
    busy_s = sum(PHASES[name] for name in ("data", "forward", "optimizer"))
    ranks: list[dict[str, Any]] = []
    for rank in range(n_ranks):
        index = times if rank == slow else 1.0
        phases = PHASES | ({phase: PHASES[phase] + (times - 1) * busy_s} if rank == slow else {})
        own = {"busy_s": index * busy_s, "wall_s": 1.0, "straggler_index": index, "phases": phases}
        ranks.append({"rank": rank, **own, "queue": 2, "gpu_memory_bytes": 2**30})
    return ranks


def write_ranks(
    folder: Path, ranks: list[dict[str, Any]], *, age_s: float = 2.0, step: int = 600, own_work: list[str] | None = None
) -> None:
    """Also the lines up to then name the slowest rank."""
    said = {} if own_work is None else {"own_work": own_work}
    slowest = max(ranks, key=lambda each: each["straggler_index"])
    named = {"straggler_rank": slowest["rank"], "straggler_index": slowest["straggler_index"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "timings" in line and line["time"] <= NOW - age_s:
            line["timings"] |= named
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "ranks.json").write_text(json.dumps({"step": step, "time": NOW - age_s, **said, "ranks": ranks}))
