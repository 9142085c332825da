"""Every metric that a run exports: the one table from which the exporter, the docs and the tests are made.

Nothing here imports torch: `distkd top` and scripts read names and buckets from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BUCKETS_S", "METRICS", "OWN_WORK", "PHASES", "Metric", "by_name", "markdown"]

PHASES = ("data", "forward", "backward", "collective", "optimizer", "checkpoint")
"""What a step is made of, in order; values of the label `phase`."""

OWN_WORK = ("data", "forward", "optimizer")
"""Those in which no rank waits for another where every rank has whole weights; other engines have fewer."""

BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms; steps of 5 ms and of 50 s both fall into the middle of some."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, in base units."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    of: Literal["rank", "run"]
    """Whose: exported by every rank for itself, or for all of them by the main rank alone."""
    help: str
    labels: tuple[str, ...] = ()
    """Beside those of the target; their values come from the code, never from data."""


METRICS = (
    # where the run is
    Metric("distkd_train_step", "gauge", "rank", "Optimizer steps of the run that lie behind this rank."),
    Metric("distkd_train_steps_planned", "gauge", "run", "Optimizer steps of the whole run."),
    Metric("distkd_train_epoch", "gauge", "run", "Epoch of the last step, from 0."),
    Metric("distkd_restarts", "gauge", "run", "Attempts of the run before this one."),
    Metric("distkd_evaluating", "gauge", "rank", "1 while a split is scored, when no step is due; else 0."),
    Metric("distkd_run_finished", "gauge", "run", "1 once the student is trained, exported and scored; else 0."),
    Metric("distkd_run_stopped", "gauge", "run", "1 once it was asked to stop and its checkpoint is written; else 0."),
    Metric(
        "distkd_last_step_timestamp_seconds", "gauge", "rank", "When the last step ended; the start before one has."
    ),
    # how fast
    Metric("distkd_steps_total", "counter", "rank", "Optimizer steps done, those done again after a restart included."),
    Metric(
        "distkd_samples_total",
        "counter",
        "rank",
        "Samples of this rank in these steps; the sum over ranks is the run's.",
    ),
    Metric(
        "distkd_step_seconds",
        "histogram",
        "rank",
        "Time of each step in a phase: host time, on CUDA device time.",
        ("phase",),
    ),
    Metric(
        "distkd_step_wall_seconds",
        "histogram",
        "rank",
        "Time of each step on the host from asking for data to its end, without evaluation.",
    ),
    Metric(
        "distkd_straggler_index",
        "gauge",
        "rank",
        "Time of a step at this rank's pace over that at the median's: (base + own - m) / base; own: its work without "
        "waiting for others, m: the median of own, base: a step without the wait for the slowest.",
    ),
    Metric(
        "distkd_loader_queue_depth",
        "gauge",
        "rank",
        "Steps whose data lies ready; 0 again and again means that steps wait for data.",
    ),
    Metric(
        "distkd_flops_total",
        "counter",
        "rank",
        "Floating-point operations of forward and backward, teachers included, where they could be counted.",
    ),
    Metric(
        "distkd_device_peak_flops_per_second",
        "gauge",
        "rank",
        "What the device could do at this precision, where known.",
    ),
    # between the ranks
    Metric(
        "distkd_collectives_total",
        "counter",
        "rank",
        "Collectives of the training loop by kind; gradients count once a step.",
        ("collective",),
    ),
    Metric(
        "distkd_collective_bytes_total",
        "counter",
        "rank",
        "Bytes that this rank handed to them; about, for weights under ZeRO stage 3.",
        ("collective",),
    ),
    # what is learned
    Metric(
        "distkd_loss",
        "gauge",
        "run",
        "Mean over ranks and steps since the last logging step: total is minimised, its parts are unweighted.",
        ("part",),
    ),
    Metric(
        "distkd_teacher_loss",
        "gauge",
        "run",
        "Loss of a frozen teacher on the same samples, to compare the student with.",
        ("part",),
    ),
    Metric(
        "distkd_grad_norm",
        "gauge",
        "run",
        "Norm of the gradient before clipping, mean over steps since the last logging step.",
    ),
    Metric("distkd_lr", "gauge", "run", "Learning rate of the last step."),
    Metric(
        "distkd_agreement_weight",
        "gauge",
        "run",
        "Weight that gradient agreement gives to a distillation loss.",
        ("loss",),
    ),
    Metric(
        "distkd_agreement_cosine",
        "gauge",
        "run",
        "Cosine of the gradients of two losses at the student's feature.",
        ("loss", "other"),
    ),
    Metric("distkd_method_value", "gauge", "run", "Other numbers of the method.", ("name",)),
    Metric(
        "distkd_eval_metric",
        "gauge",
        "run",
        "Last score of a split; names as in eval/<split>.json.",
        ("split", "metric"),
    ),
    # memory banks
    Metric(
        "distkd_bank_staleness_steps",
        "gauge",
        "run",
        "Mean age of the rows that were written at least once.",
        ("bank",),
    ),
    Metric(
        "distkd_bank_unwritten_ratio",
        "gauge",
        "run",
        "Share of rows that still are what the bank began with.",
        ("bank",),
    ),
    Metric("distkd_bank_norm_drift", "gauge", "run", "Mean distance of the rows' norms from 1.", ("bank",)),
    # what went wrong
    Metric(
        "distkd_skipped_steps_total",
        "counter",
        "run",
        "Steps whose update was left out, since a gradient was not finite.",
    ),
    Metric(
        "distkd_skipped_samples_total",
        "counter",
        "rank",
        "Samples of this rank that were replaced, since they could not be read.",
    ),
    Metric(
        "distkd_shard_errors_total",
        "counter",
        "rank",
        "Reads of shards that failed on this rank, repeated ones included.",
    ),
    # what is kept
    Metric(
        "distkd_checkpoint_age_seconds",
        "gauge",
        "run",
        "Time since the last whole checkpoint was begun, or since the start without one.",
    ),
    Metric(
        "distkd_checkpoint_write_seconds",
        "gauge",
        "run",
        "How long the last checkpoint took to write, most of it beside the steps.",
    ),
    Metric(
        "distkd_checkpoints_total", "counter", "run", "Checkpoints by how they ended: written or failed.", ("result",)
    ),
    Metric(
        "distkd_checkpoint_failures",
        "gauge",
        "run",
        "Checkpoints that have failed since the last whole one; told also while the run root takes no counters.",
    ),
    # the machine
    Metric(
        "distkd_gpu_memory_bytes",
        "gauge",
        "rank",
        "Memory of the CUDA allocator: allocated, reserved, and most allocated so far (peak).",
        ("kind",),
    ),
)
"""In the order of the docs. `distkd_rank_info` and the client library's `process_*` come in addition."""


def by_name() -> dict[str, Metric]:
    """The table, to look names up."""
    return {metric.name: metric for metric in METRICS}


def markdown() -> str:
    """The table as docs/monitoring.md has it."""
    lines = ["| metric | kind | of | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = "{" + ", ".join(metric.labels) + "}" if metric.labels else ""
        lines.append(f"| `{metric.name}{labels}` | {metric.kind} | {metric.of} | {metric.help} |")
    return "\n".join(lines) + "\n"
