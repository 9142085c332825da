"""What a run tells whoever watches: its ledger, step by step and at readings, and `ranks.json` for all ranks.

Nothing here waits for the device or for another rank. Prometheus sees the ledger, `distkd top` the file.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from distkd.comm import world as comm
from distkd.data.loader import Backlog
from distkd.errors import Interrupted, NonFiniteError, TakenOverError
from distkd.metrics.ledger import Ledger
from distkd.train.flops import Flops
from distkd.train.job import Job
from distkd.train.saver import Saver
from distkd.train.tally import RankShare, Reading, gpu_memory

__all__ = ["RANKS", "Observer"]

log = logging.getLogger(__name__)

RANKS = "ranks.json"
"""In the run folder: what every rank did since the last reading, for people."""
_EVERY_S = 2.0
"""Between two versions of that file, and two looks at what other threads count."""

_BANK = {
    "staleness_steps": "distkd_bank_staleness_steps",
    "unwritten_ratio": "distkd_bank_unwritten_ratio",
    "norm_drift": "distkd_bank_norm_drift",
}


class Observer:
    """Keeps the ledger of one rank.

    Args:
        job: what is watched.
        folder: of the run, for `ranks.json`.
    """

    def __init__(self, job: Job, folder: Path):
        self.ledger = Ledger()
        self.backlog = Backlog()
        self.flops = Flops(job)
        self._job = job
        self._path = folder / RANKS
        self._written, self._warned = -math.inf, False
        self._last: tuple[int, list[RankShare]] | None = None
        """A reading that `ranks.json` does not have yet."""
        self._began = self._counted = time.perf_counter()
        self._saver: Saver | None = None
        self._whole = 0, 0
        """Whole checkpoints of this attempt, and those that had failed when the last of them was whole."""
        self._traffic = job.engine.traffic(job.passes, follows=job.method.follows_weights)
        self._calls, self._bytes = comm.counts.copy(), comm.moved_bytes.copy()
        self.ledger.live("distkd_loader_queue_depth", self.backlog)

    def start(self, step: int, attempt: int) -> None:
        """Where the run begins or goes on."""
        ledger = self.ledger
        ledger.set("distkd_train_step", step)
        ledger.set("distkd_last_step_timestamp_seconds", time.time())
        ledger.set("distkd_evaluating", 0)
        for name in ("distkd_steps_total", "distkd_samples_total", "distkd_shard_errors_total",
                     "distkd_skipped_samples_total"):  # fmt: skip
            ledger.add(name, 0)  # a counter that begins at 0 shows its first rise
        if not self._job.world.is_main:
            return
        ledger.set("distkd_train_steps_planned", self._job.plan.n_steps)
        ledger.set("distkd_train_epoch", self._job.plan.epoch_of(step) if step < self._job.plan.n_steps else None)
        ledger.set("distkd_restarts", attempt - 1)
        ledger.set("distkd_run_finished", 0)
        ledger.set("distkd_run_stopped", 0)
        ledger.add("distkd_skipped_steps_total", 0)
        for result in ("written", "failed"):
            ledger.add("distkd_checkpoints_total", 0, result)
        ledger.set("distkd_checkpoint_failures", 0)

    def watch_saver(self, saver: Saver) -> None:
        """On the main rank, which alone knows when a checkpoint is whole."""
        self._saver = saver
        self.ledger.live("distkd_checkpoint_age_seconds", lambda: time.time() - saver.begun)
        self.ledger.live("distkd_checkpoint_write_seconds", lambda: saver.newest_s)

    def begin(self) -> None:
        """The first step is about to start."""
        self._began = time.perf_counter()

    def end(self, error: BaseException | None) -> None:
        """The run is done, or ends with an error."""
        self._count_failures()
        if not self._job.world.is_main:
            return
        self.ledger.set("distkd_checkpoint_failures", None)  # a textfile would go on saying so for ever
        self.ledger.set("distkd_run_finished", float(error is None))
        self.ledger.set("distkd_run_stopped", float(isinstance(error, Interrupted)))
        if isinstance(error, NonFiniteError):
            self.ledger.set("distkd_loss", math.nan, "total")
        if self._last is not None and not isinstance(error, TakenOverError):
            self._write_ranks(*self._last)

    def phases(self, seconds: Mapping[str, float]) -> None:
        """A step's seconds by phase, once they are known."""
        for phase, passed in seconds.items():
            self.ledger.observe("distkd_step_seconds", passed, phase)

    def step(self, step: int, n_samples: int) -> None:
        """A step lies behind this rank."""
        ledger, now = self.ledger, time.perf_counter()
        wall_s, self._began = now - self._began, now
        ledger.set("distkd_train_step", step)
        ledger.add("distkd_steps_total", 1)
        ledger.add("distkd_samples_total", n_samples)
        ledger.observe("distkd_step_wall_seconds", wall_s)
        ledger.set("distkd_last_step_timestamp_seconds", time.time())
        if self.flops.per_step:
            ledger.add("distkd_flops_total", self.flops.per_step)
        if now - self._counted > _EVERY_S:
            self._counted = now
            self._count_failures()

    def reading(self, step: int, reading: Reading, lr: float) -> None:
        """What all ranks know at a logging step."""
        job, ledger = self._job, self.ledger
        share = reading.ranks[job.world.rank]
        self._count_collectives(share.steps)
        ledger.set("distkd_straggler_index", share.index)
        self._count_failures()
        ledger.set("distkd_device_peak_flops_per_second", self.flops.peak if self.flops.per_step else None)
        for kind, value in gpu_memory(job.device).items():
            ledger.set("distkd_gpu_memory_bytes", value, kind)
        if not job.world.is_main:
            return
        loss = {} if reading.loss is None else {"total": reading.loss}
        ledger.replace("distkd_loss", loss | reading.parts)
        ledger.set("distkd_grad_norm", reading.grad_norm)
        ledger.set("distkd_lr", lr)
        ledger.set("distkd_train_epoch", job.plan.epoch_of(max(0, step - 1)))
        self._gauges(reading.gauges)
        self._last = step, reading.ranks
        if time.monotonic() - self._written >= _EVERY_S:
            self._write_ranks(*self._last)

    def skipped(self) -> None:
        """The update of a step was left out, on all ranks."""
        if self._job.world.is_main:
            self.ledger.add("distkd_skipped_steps_total", 1)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around the scoring of a split."""
        start = time.perf_counter()
        self.ledger.set("distkd_evaluating", 1)
        try:
            yield
        finally:
            self.ledger.set("distkd_evaluating", 0)
            self._began += time.perf_counter() - start  # it is no part of a step

    def scored(self, split: str, metrics: Mapping[str, float | None]) -> None:
        """A split was scored."""
        if self._job.world.is_main:
            for name, value in metrics.items():
                self.ledger.set("distkd_eval_metric", value, split, name)

    def _count_collectives(self, steps: int) -> None:
        now, bytes_now = comm.counts.copy(), comm.moved_bytes.copy()
        calls = {name: count - self._calls[name] for name, count in now.items()}
        moved = {name: count - self._bytes[name] for name, count in bytes_now.items()}
        self._calls, self._bytes = now, bytes_now
        for name, size in self._traffic.items():
            calls[name], moved[name] = steps, steps * size
        for name, count in calls.items():
            if count:
                self.ledger.add("distkd_collectives_total", count, name)
                if name in moved:  # objects are pickled on the way, by torch
                    self.ledger.add("distkd_collective_bytes_total", moved[name], name)

    def _count_failures(self) -> None:
        """What went wrong without an end: noticed by other threads, told with the next step."""
        dataset, ledger = self._job.dataset, self.ledger
        ledger.set_counter("distkd_shard_errors_total", dataset.failures)
        ledger.set_counter("distkd_skipped_samples_total", dataset.unreadable.replaced)
        if self._saver is not None:
            written, failed = self._saver.n_written, self._saver.n_failed
            ledger.set_counter("distkd_checkpoints_total", written, "written")
            ledger.set_counter("distkd_checkpoints_total", failed, "failed")
            if written != self._whole[0]:
                self._whole = written, failed
            # a run root that is full takes no counters either, which then stand still: a gauge goes on
            ledger.set("distkd_checkpoint_failures", failed - self._whole[1])

    def _gauges(self, gauges: Mapping[str, float]) -> None:
        weights: dict[str, float] = {}
        cosines: dict[tuple[str, ...], float] = {}
        teacher: dict[str, float] = {}
        banks: dict[str, dict[str, float]] = {name: {} for name in _BANK.values()}
        others: dict[str, float] = {}
        for name, value in gauges.items():
            group, _, rest = name.partition("/")
            bank, _, what = rest.rpartition("/")
            if group == "weight":
                weights[rest] = value
            elif group == "cosine":
                loss, _, other = rest.partition("|")
                cosines[loss, other] = value
            elif group == "teacher":
                teacher[rest] = value
            elif group == "bank" and what in _BANK:
                banks[_BANK[what]][bank] = value
            else:
                others[name] = value
        self.ledger.replace("distkd_agreement_weight", weights)
        self.ledger.replace("distkd_agreement_cosine", cosines)
        self.ledger.replace("distkd_teacher_loss", teacher)
        self.ledger.replace("distkd_method_value", others)
        for metric, values in banks.items():
            if any(banks.values()):  # else nobody has looked since
                self.ledger.replace(metric, values)

    def _write_ranks(self, step: int, ranks: list[RankShare]) -> None:
        """For people who look: not flushed to disk, and not often enough to be felt."""
        self._last, self._written = None, time.monotonic()
        about = {"step": step, "time": round(time.time(), 3), "own_work": self._job.engine.own_work}
        text = json.dumps({**about, "ranks": [share.row() for share in ranks]})
        aside = self._path.with_name(f".{RANKS}.{os.getpid()}")
        try:
            aside.write_text(text + "\n")
            aside.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            if not self._warned:
                self._warned = True
                log.warning("%s cannot be written: %s", self._path, error.strerror)
