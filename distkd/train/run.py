"""A run on its way: its folder, where it stands, and how it ends."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distkd import __version__
from distkd.allocation import Allocation, note_job
from distkd.base import UNLABELLED
from distkd.comm.world import broadcast_object
from distkd.data.plan import Plan
from distkd.data.remote.transport import is_url, masked
from distkd.errors import ConfigError, DataError, DiskError, Interrupted, NonFiniteError
from distkd.files import DISK_FAULTS, read_json, write_json
from distkd.metrics import targets
from distkd.metrics.exporter import Exporter, device_labels, node_labels, start_exporter
from distkd.metrics.sinks import Ending, Sinks, open_sinks
from distkd.train import checkpoint
from distkd.train.checkpoint import Best
from distkd.train.folder import (
    Events,
    changes,
    check_selected,
    environment,
    leave_note,
    write_config,
    write_outcome,
)
from distkd.train.job import Job
from distkd.train.observe import Observer
from distkd.train.progress import Progress
from distkd.train.saver import Fate, Saver
from distkd.train.settings import Settings

__all__ = ["Run", "met_alone", "samples_per_pass"]

_LAST_WORDS_S = 5.0
"""How long the main rank of a run that ends early may wait for a scrape: who stops it may be waiting, too."""


@dataclass(slots=True)
class Run:
    """A job on its way: the position, the best student so far, and where its news goes."""

    job: Job
    events: Events
    step: int = 0
    best: Best = field(default_factory=Best)
    attempt: int = 1
    token: str = ""
    """Tells this attempt from any other, for the ranks of one that have outlived their launcher."""
    skipped: int = 0
    """Steps whose update was left out."""
    owes_validation: bool = False
    """Whether the checkpoint was written in a hurry, before the epoch that had just ended was scored."""
    carried: list[list[dict[str, float]]] = field(default_factory=list[list[dict[str, float]]])
    """Metrics of the steps between the last line and the checkpoint, by rank and step."""
    observer: Observer = field(init=False)
    """What whoever watches gets to see."""
    saver: Saver = field(init=False)
    sinks: Sinks | None = None
    progress: Progress | None = None
    exporter: Exporter | None = None
    """Serves this rank's numbers to Prometheus, where `metrics.export` asks for it."""

    def __post_init__(self) -> None:
        self.observer = Observer(self.job, self.folder)

    @property
    def folder(self) -> Path:
        return self.job.settings.folder

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def open(self) -> None:
        """Make the folder, or go on from its newest checkpoint; what is refused leaves it as it was."""
        job, settings = self.job, self.job.settings
        # as the main rank counts: a rank that was not there in an attempt has missed a number
        mine = f"{time.time_ns():x}-{os.getpid()}", self.events.attempt()
        self.token, self.attempt = broadcast_object(mine, job.world)
        changed: dict[str, tuple[Any, Any]] = {}
        found = checkpoint.find_latest(self.checkpoints, job.world)
        if found is not None:
            self._check_resumable(found)
            self.best = checkpoint.load(found, engine=job.engine, state=job.method.state, world=job.world)
            meta = checkpoint.read_meta(found)
            changed = changes(meta["config"], settings)
            self.step = meta["step"]
            self.skipped, self.owes_validation = meta.get("skipped", 0), meta.get("owes_validation", False)
            self.carried = meta.get("carried", [])
            job.dataset.unreadable.everywhere.update(meta.get("unreadable", []))
        failure = broadcast_object(self._make_folder() if job.world.is_main else None, job.world)
        if failure is not None:
            raise failure
        leave_note(self.folder, job.world)
        self.saver = self._make_saver()
        job.before_update = self.saver.before_update
        if job.world.is_main:
            self.sinks = open_sinks(
                settings.metrics,
                self.folder,
                step=self.step,
                run=settings.run.name,
                method=settings.method.name,
                settings=_without_secrets(settings),
            )
            self.progress = Progress(settings.run.name, job.plan.n_steps, self.step, _plan_in_words(job))
        self.events.add("start", attempt=self.attempt, step=self.step, world_size=job.world.size)
        if changed:
            self.events.add("changed", step=self.step, keys=changed)
        self.observer.start(self.step, self.attempt)
        if job.world.is_main:
            self.observer.watch_saver(self.saver)
        self.exporter = self._start_exporter()

    def _start_exporter(self) -> Exporter | None:
        job, settings = self.job, self.job.settings
        return start_exporter(
            settings.metrics,
            self.folder,
            job.world,
            ledger=self.observer.ledger,
            attempt=self.attempt,
            labels={"run": settings.run.name, "stage": settings.method.name, **node_labels()},
            info={
                "version": __version__,
                "engine": settings.engine.name,
                "world_size": str(job.world.size),
                **device_labels(job.device),
            },
        )

    def _make_saver(self) -> Saver:
        job, config = self.job, self.job.settings.run
        return Saver(
            self.checkpoints,
            job.world,
            job.device,
            background=config.save == "async",
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            patience_s=job.settings.engine.timeout_s,
            report=self._saved,
            attempt=self.token,
            is_current=self.is_current,
        )

    def is_current(self) -> bool:
        """Whether the folder is still this attempt's: the ranks of one may outlive their launcher.

        Also where nobody can tell: what is written then fails by itself, or is right.
        """
        try:
            return read_json(self.folder / "environment.json")["token"] == self.token
        except (OSError, ValueError, KeyError):
            return True

    def _saved(self, fate: Fate) -> None:
        if fate.error is None:
            self.events.add("checkpoint", step=fate.step, seconds=round(fate.seconds, 4))
        else:
            self.events.add("checkpoint_failed", step=fate.step, reason=fate.error)

    def _make_folder(self) -> ConfigError | DiskError | None:
        job = self.job
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            targets.remove(self.folder)  # of attempts that were killed; this one's ranks announce themselves later
            write_config(job.settings)
            allocation = Allocation.from_environment()
            about = environment(
                job.settings,
                job.world,
                token=self.token,
                data=job.dataset.provenance(),
                n_steps=job.plan.n_steps,
                started=round(time.time(), 3),
                job=None if allocation is None else allocation.job,
                process=targets.identity(),
            )
            write_json(self.folder / "environment.json", about)
            if allocation is not None:
                note_job(self.folder, "started", **asdict(allocation), attempt=self.attempt)
            (self.folder / "outcome.json").unlink(missing_ok=True)
        except OSError as error:
            # a job must not give up for good where another node, or a later hour, would do
            kind = DiskError if error.errno in DISK_FAULTS else ConfigError
            return kind(f"cannot write run folder {self.folder}: {error.strerror or error}; choose another --run.root")
        return None

    def _check_resumable(self, found: Path) -> None:
        job, meta = self.job, checkpoint.read_meta(found)
        together = samples_per_pass(job)
        if meta["samples_per_pass"] != together:
            raise ConfigError(
                f"checkpoint {found.name} was trained with {meta['samples_per_pass']} samples per pass over all ranks, "
                f"now there are {together}; batch statistics and agreement would change: set --batch.micro_batch "
                f"{max(1, meta['samples_per_pass'] // job.world.size)} or leave it out"
            )
        if meta["split_digest"] != job.split_digest:
            raise ConfigError(
                f"checkpoint {found.name} was trained on other samples than {job.dataset.shard_set.place} holds now; "
                "use another --run.name"
            )
        if meta.get("data_digest", job.data_digest) != job.data_digest:  # older checkpoints have none
            raise ConfigError(
                f"checkpoint {found.name} was trained on another shard set than {job.dataset.shard_set.place} is now: "
                "labels, order or values may differ; put that one back, or use another --run.name"
            )
        check_selected(changes(meta["config"], job.settings), found.name)
        if meta["teacher"] != (None if job.teacher is None else job.teacher.card["sha256"]):
            raise ConfigError(
                f"checkpoint {found.name} was trained with another teacher than {job.settings.teacher.export} is now; "
                "put that one back, or use another --run.name"
            )

    def record(self, **values: Any) -> None:
        if self.sinks is not None:
            epoch = self.job.plan.epoch_of(max(0, self.step - 1))
            self.sinks.write({"step": self.step, "epoch": epoch, "time": round(time.time(), 3), **values})

    def stopped(self) -> Interrupted | DiskError:
        """What a stop that was asked for ends with, once its checkpoint is on disk or is known not to be."""
        self.saver.wait()
        where = f"stopped as asked after step {self.step} of {self.job.plan.n_steps}"
        if self.saver.failures:
            return DiskError(
                f"{where}, but its checkpoint could not be written to {self.checkpoints}; make room, then start again "
                "to go on from the last whole one"
            )
        return Interrupted(f"{where}; start again to go on")

    def note_unreadable(self) -> None:
        """Samples that this rank could not read and goes on without, to its events; once each."""
        dataset = self.job.dataset
        for sample, why in dataset.unreadable.news():
            self.events.add("unreadable", step=self.step, sample=dataset.describe(sample)["key"], message=why)

    def close(self, error: BaseException | None, hurry: Callable[[], bool] = lambda: False) -> None:
        """Say how this attempt ended; every rank to its events, the main rank to `outcome.json`.

        Args:
            error: what ended it; None where the run is done.
            hurry: whether somebody waits for this process to be gone, so that it stops waiting for a last scrape.
        """
        self.observer.end(error)
        linger_s = self._linger_s(error)
        if self.exporter is not None and not linger_s:  # first: whoever is slow to end may be killed on the way
            self.exporter.withdraw()
        self.saver.abandon()
        self.note_unreadable()
        state, kind = _ending(error)
        self.events.add(state, step=self.step, kind=kind, message=str(error or ""))
        if self.progress is not None:
            self.progress.close()
        if self.job.world.is_main and self.is_current():
            message = str(error or "")
            write_outcome(self.folder, state=state, step=self.step, attempt=self.attempt, kind=kind, message=message)
        if self.sinks is not None:  # W&B may take seconds for its last uploads
            self.sinks.close(state)
        if self.exporter is not None:
            self.exporter.close(linger_s=linger_s, until=hurry)

    def _linger_s(self, error: BaseException | None) -> float:
        """How long to wait for a scrape, so that a server knows how the run ended, and not only that it is gone."""
        asked = self.job.settings.metrics.linger_s
        if error is None:
            return asked
        if self.job.world.is_main and isinstance(error, Interrupted | NonFiniteError):
            return min(asked, _LAST_WORDS_S)  # these end all ranks together, and the others wait for the main one
        return 0.0


def _without_secrets(settings: Settings) -> dict[str, Any]:
    """The config as it may leave this machine: a URL or a command of shards may hold a token."""
    config = settings.model_dump(mode="json")
    if isinstance(config["data"]["shards"], str) and is_url(config["data"]["shards"]):
        config["data"]["shards"] = masked(config["data"]["shards"])
    return config


def _ending(error: BaseException | None) -> tuple[Ending, str | None]:
    if error is None:
        return "done", None
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted", None
    return "failed", getattr(error, "kind", "internal")


def met_alone(error: BaseException, folder: Path) -> BaseException:
    """An error as the user should see it, where only this rank ran into it and the others notice that it is gone."""
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        first = "make room, then " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        error = DiskError(f"cannot write to {folder}: {error.strerror}; {first}start again to resume")
        error.local = True
    if isinstance(error, DataError) and not error.shared:
        error.local = True  # a sample that only this rank reads
    return error


def _plan_in_words(job: Job) -> str:
    """What is about to happen; a global batch that is too large for the data shows here."""
    plan, balance = job.plan, job.settings.data.balance
    known = int((job.dataset.train_label_N != UNLABELLED).sum())
    samples = f"{plan.n_samples} training samples"
    if 0 < known < plan.n_samples:
        samples += f", {known} with a label"
    if isinstance(plan, Plan) and balance == "oversample":
        samples += f", oversampled to a list of {plan.n_entries}"
    rest = plan.n_samples - plan.steps_per_epoch * plan.global_batch
    left = f", {rest} left out in each epoch" if rest and balance == "none" else ""
    maps = f"; maps: {job.maps}" if job.maps else ""
    return (
        f"{samples}, {plan.steps_per_epoch} steps of {plan.global_batch} an epoch{left}; "
        f"{job.settings.run.epochs} epochs, {job.world.size} x {job.device.type}{maps}"
    )


def samples_per_pass(job: Job) -> int:
    """Samples whose gradients are added in one backward, over all ranks."""
    return job.settings.batch.per_rank(job.world) * job.world.size
