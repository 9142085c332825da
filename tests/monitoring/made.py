"""A run that nobody trained: every metric of the table with all its labels, in a Prometheus, without waiting for it."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Iterator

from distkd.metrics.table import BUCKETS_S, METRICS, PHASES, Metric
from tests.launch.processes import PATIENCE_S
from tests.monitoring.server import Server

__all__ = ["MINUTES", "RANKS", "RUN", "MadeServer"]

RUN, STAGE = "fold.1+(b)", "dc_distill"
RANKS = 2
MINUTES = 20
SCRAPE_S = 5
_STEPS_PER_S = 8.0
_PLANNED = 16_000

LABELS = {
    "phase": PHASES,
    "collective": ("all_reduce", "all_gather"),
    "part": ("total", "task", "crd", "kl"),
    "loss": ("crd", "kl"),
    "other": ("task",),
    "name": ("temperature",),
    "split": ("val",),
    "metric": ("accuracy", "auc_macro"),
    "bank": ("path", "omic"),
    "result": ("written", "failed"),
    "kind": ("allocated", "reserved", "peak"),
}


class MadeServer(Server):
    """The real server, that remembers `MINUTES` of the run up to now."""

    def _configure(self) -> None:
        super()._configure()
        text = self._place / "run.om"
        with text.open("w") as out:
            out.writelines(line + "\n" for line in (*_lines(time.time(), 60 * MINUTES), "# EOF"))
        command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", text, self._place / "data"]
        made = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert made.returncode == 0, made.stderr


def _lines(end: float, length: float) -> Iterator[str]:
    """Samples in the text form of OpenMetrics, series after series."""
    times = [end - length + SCRAPE_S * place for place in range(int(length / SCRAPE_S) + 1)]
    for rank in range(RANKS):
        target = {"run": RUN, "stage": STAGE, "rank": str(rank), "node": f"n{rank}", "slurm_job": ""}
        for metric in METRICS:
            if metric.of == "rank" or rank == 0:
                for labels in _label_sets(metric):
                    for at in times:
                        yield from _samples(metric, target | labels, at, at - times[0], rank)
        for at in times:
            yield _line("up", target, 1, at)
            yield _line("process_resident_memory_bytes", target, 2e9 + 1e8 * rank, at)
            if rank == 1 and at > times[len(times) // 2]:
                firing = {"alertname": "DistkdStraggler", "alertstate": "firing", "severity": "warning"}
                yield _line("ALERTS", target | firing, 1, at)


def _label_sets(metric: Metric) -> list[dict[str, str]]:
    sets: list[dict[str, str]] = [{}]
    for label in metric.labels:
        sets = [one | {label: value} for one in sets for value in LABELS[label]]
    return sets


def _samples(metric: Metric, labels: dict[str, str], at: float, age: float, rank: int) -> Iterator[str]:
    kind = len(labels.get("phase", "")) + len(labels.get("part", "")) + len(labels.get("metric", ""))
    steps = math.floor(age * _STEPS_PER_S)
    seconds = (1 + kind % 5) / 10 / _STEPS_PER_S * (1 + rank / 2)
    if metric.kind == "histogram":
        for bound in (*BUCKETS_S, math.inf):
            share = 0.0 if bound < seconds / 2 else 1.0 if bound > 2 * seconds else 0.6
            le = {"le": "+Inf" if bound == math.inf else repr(bound)}
            yield _line(f"{metric.name}_bucket", labels | le, steps * share, at)
        yield _line(f"{metric.name}_count", labels, steps, at)
        yield _line(f"{metric.name}_sum", labels, steps * seconds, at)
        return
    match metric.name:
        case "distkd_train_step" | "distkd_steps_total":
            value = steps
        case "distkd_train_steps_planned":
            value = _PLANNED
        case "distkd_last_step_timestamp_seconds":
            value = at
        case "distkd_samples_total":
            value = 16 * steps
        case "distkd_flops_total":
            value = 3e9 * steps
        case "distkd_device_peak_flops_per_second":
            value = 1e11
        case "distkd_straggler_index":
            value = 1 + 0.45 * rank
        case _ if metric.kind == "counter":
            value = steps * (1e5 if metric.name.endswith("bytes_total") else 1)
        case _:
            value = 0.1 * kind + math.exp(-age / 600) * (1 + 0.1 * math.sin(age / 30 + kind))
    yield _line(metric.name, labels, value, at)


def _line(name: str, labels: dict[str, str], value: float, at: float) -> str:
    inner = ",".join(f'{key}="{text}"' for key, text in labels.items() if text)
    return f"{name}{{{inner}}} {float(value)!r} {at:.3f}"
