"""Writing checkpoints: a copy of the run at one step boundary, written aside, made visible at once.

Every writing rank copies its share of the tensors and may go on training; a thread writes the copy. No collective runs
in a thread: ranks tell the main rank by small files that their part is on disk, and it renames the folder when all are.
What a thread met with is agreed on by all ranks when the next checkpoint is due.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distkd.base import World
from distkd.comm.world import gather_objects
from distkd.engines import Entry
from distkd.errors import DiskError, TakenOverError
from distkd.files import digest, sync, write_json, write_text
from distkd.train.checkpoint import BEST, FORMAT, META, Best, complete

__all__ = ["Fate", "Saver", "owners"]

log = logging.getLogger(__name__)

SHARE_BYTES = 64 * 2**20
"""A rank more is asked to write for every so many bytes."""
_TAKEN_OVER = "another attempt of this run has taken over"
FAILURES = 3
"""Checkpoints that may fail one after the other before the run stops."""
_POLL_S = 0.01
_LAST_WORDS_S = 30.0
"""How long a run that ends with an error lets its last checkpoint be written."""


def owners(entries: Sequence[Entry], writers: int) -> dict[str, int]:
    """Which rank writes which tensor that all ranks have: the largest first, each to the rank that has least."""
    load = [0] * writers
    owner: dict[str, int] = {}
    shared = [entry for entry in entries if not entry.local]
    for entry in sorted(shared, key=lambda entry: (-entry.nbytes, entry.name)):
        rank = load.index(min(load))
        load[rank] += entry.nbytes
        owner[entry.name] = rank
    return owner


def _writers(entries: Sequence[Entry], size: int) -> int:
    """How many ranks write; the same on every rank."""
    if any(entry.local for entry in entries):
        return size
    return max(1, min(size, sum(entry.nbytes for entry in entries) // SHARE_BYTES))


@dataclass(slots=True)
class _Copy:
    """What one rank writes of one checkpoint."""

    step: int
    tensors: dict[str, Tensor]
    later: list[tuple[Tensor, Tensor]]
    """Copies and their sources, which stay as they are until the next update: not filled yet."""
    writers: int
    meta: dict[str, Any]
    best_step: int
    ready: Callable[[], None]
    """Waits until the device has filled what it was asked to copy."""
    filled: threading.Event = field(default_factory=threading.Event)

    def fill(self) -> None:
        """Take the rest of the copy."""
        try:
            for buffer, source in self.later:
                buffer.copy_(source)
        finally:
            self.filled.set()


@dataclass(slots=True)
class Fate:
    """How the writing of a checkpoint ended on this rank."""

    step: int
    seconds: float = 0.0
    error: str | None = None


@dataclass(slots=True)
class Saver:
    """One checkpoint at a time; the next one waits for it.

    Memory: one copy of this rank's share on the host, reused from checkpoint to checkpoint.
    """

    checkpoints: Path
    world: World
    device: torch.device
    background: bool
    keep_last: int
    keep_best: bool
    patience_s: float
    """How long the main rank waits for the others' parts."""
    report: Callable[[Fate], None]
    """Called on every rank when the fate of a checkpoint is agreed on."""
    attempt: str
    """Name of this attempt, the same on every rank."""
    is_current: Callable[[], bool]
    """Whether no later attempt has taken the run over: ranks may outlive their launcher."""
    seconds: float = 0.0
    """Spent in writing since somebody last set it to zero, beside the training or not."""
    begun: float = field(default_factory=time.time)
    """When the newest whole checkpoint was begun, as the main rank knows; the start without one."""
    newest_s: float | None = None
    """How long it took to write."""
    n_written: int = 0
    n_failed: int = 0
    """Of this attempt, as this rank knows; on the main rank whole checkpoints, before the others are told."""
    failures: int = 0
    _buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _thread: threading.Thread | None = None
    _fate: Fate | None = None
    _abandoned: threading.Event = field(default_factory=threading.Event)
    _copying: threading.Event | None = None
    """Set when the copy is filled; None when there is nothing to wait for."""

    def save(self, step: int, entries: Sequence[Entry], best: Best, meta: Mapping[str, Any]) -> None:
        """Copy the run as it stands after `step` steps and have it written; every rank calls this at the same step.

        Collectives: two of `wait`, and those of the entries.

        Raises:
            DiskError: on all ranks, when several checkpoints in a row could not be written.
            TakenOverError: on all ranks, when another attempt trains in the same folder.
        """
        self.wait()
        copy = self._copy(step, entries, best, dict(meta))
        if not self.background:
            self._write(copy)
            self.wait()
            return
        self._copying = copy.filled
        self._thread = threading.Thread(target=self._write, args=(copy,), name="distkd-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is on disk or has failed, and all ranks know which.

        Collectives: one gather where a checkpoint was under way.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fate, self._fate = self._fate, None
        if fate is None:
            return
        errors = gather_objects(fate.error, self.world)
        fate.error = next((error for error in errors if error is not None), None)
        self.failures = 0 if fate.error is None else self.failures + 1
        self.seconds += fate.seconds
        self.report(fate)
        if fate.error is not None:
            if self.world.is_main:
                shutil.rmtree(self._partial(fate.step), ignore_errors=True)
            if fate.error == _TAKEN_OVER:
                raise TakenOverError(
                    f"{_TAKEN_OVER} in {self.checkpoints.parent}: two jobs or terminals train it; this one ends, the "
                    "other goes on"
                )
            text = "checkpoint of step %d could not be written to %s: %s; training goes on"
            log.warning(text, fate.step, self.checkpoints, fate.error)
        if self.failures >= FAILURES:
            raise DiskError(
                f"{self.failures} checkpoints in a row could not be written to {self.checkpoints}: {fate.error}; "
                "make room or choose another --run.root, then start again to resume from the last whole one"
            )

    def before_update(self) -> None:
        """Called before the weights change: the rest of the copy must have been taken."""
        if self._copying is not None:
            self._copying.wait()
            self._copying = None

    def abandon(self) -> None:
        """The run ends with an error: a checkpoint that can still be finished is finished, without the other ranks."""
        if self._thread is not None:
            self._thread.join(_LAST_WORDS_S)
            self._abandoned.set()

    def _copy(self, step: int, entries: Sequence[Entry], best: Best, meta: dict[str, Any]) -> _Copy:
        writers = _writers(entries, self.world.size)
        owner = owners(entries, writers)
        tensors: dict[str, Tensor] = {}
        later: list[tuple[Tensor, Tensor]] = []
        for entry in entries:
            tensor = entry.read().detach()  # a collective in some engines: also where another rank writes it
            if not entry.local and owner[entry.name] != self.world.rank:
                continue
            buffer = tensors[entry.name] = self._buffer(entry.name, tensor)
            if entry.steady and not tensor.is_cuda:
                later.append((buffer, tensor))  # while the next forward and backward run
            else:
                buffer.copy_(tensor, non_blocking=True)
        ready = _copies_done(self.device)
        if self.world.is_main:
            # the best weights are replaced and never changed: no copy
            tensors |= {f"{BEST}{name}": tensor for name, tensor in best.weights.items()}
            meta["best"] = {"step": best.step, "value": best.value} if best.weights else None
        return _Copy(step, tensors, later, writers, meta, best.step, ready)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return buffer

    def _partial(self, step: int) -> Path:
        return self.checkpoints / f".step-{step:08d}.{self.attempt}.partial"

    def _write(self, copy: _Copy) -> None:
        """This rank's part, and on the main rank the rest; never raises."""
        start, begun = time.perf_counter(), time.time()
        fate = Fate(copy.step)
        try:
            copy.fill()
            if self.world.rank < copy.writers:
                copy.ready()
                self._write_part(copy)
            if self.world.is_main:
                self._commit(copy)
                self.begun, self.newest_s = begun, time.perf_counter() - start
        except (OSError, SafetensorError) as error:
            fate.error = getattr(error, "strerror", None) or str(error)
        except Exception as error:  # noqa: BLE001 - it is raised where the fate is agreed on
            fate.error = f"{type(error).__name__}: {error}"
        self.n_written += fate.error is None
        self.n_failed += fate.error is not None
        fate.seconds = time.perf_counter() - start
        self._fate = fate

    def _write_part(self, copy: _Copy) -> None:
        partial, rank = self._partial(copy.step), self.world.rank
        partial.mkdir(parents=True, exist_ok=True)
        # the note has its place on the disk before the disk is full
        note = partial / f"rank-{rank:05d}.note"
        note.write_text(" " * 512)
        path = partial / f"rank-{rank:05d}.safetensors"
        try:
            save_file(copy.tensors, path)
            sync(path)
            note.write_text(json.dumps({"sha256": digest(path)}))
        except Exception as error:
            with suppress(OSError):  # a piece of no use, whose room others of this run need
                path.unlink(missing_ok=True)
            with suppress(OSError):
                note.write_text(json.dumps({"error": str(error)[:400]}))
            raise

    def _commit(self, copy: _Copy) -> None:
        partial = self._partial(copy.step)
        files = {f"rank-{rank:05d}.safetensors": self._digest_of(rank, copy) for rank in range(copy.writers)}
        for note in partial.glob("rank-*.note"):
            note.unlink()
        write_json(partial / META, {"format": FORMAT, "step": copy.step, **copy.meta, "files": files})
        sync(partial)
        if not self.is_current():
            raise OSError(_TAKEN_OVER)
        target = self.checkpoints / f"step-{copy.step:08d}"
        if target.exists():  # a damaged one, which was passed over
            _remove(target)
        partial.rename(target)
        sync(self.checkpoints)
        write_text(self.checkpoints / "latest", target.name + "\n")
        spared = f"step-{copy.best_step:08d}" if self.keep_best else None
        for old in complete(self.checkpoints)[: -self.keep_last]:
            if old.name != spared:
                _remove(old)

    def _digest_of(self, rank: int, copy: _Copy) -> str:
        """What a rank says of its part, once it is on disk."""
        note = self._partial(copy.step) / f"rank-{rank:05d}.note"
        end = time.monotonic() + self.patience_s
        while True:
            with suppress(FileNotFoundError, json.JSONDecodeError):
                found = json.loads(note.read_text())
                if "error" in found:
                    raise OSError(found["error"])
                return found["sha256"]
            if self._abandoned.is_set() or time.monotonic() > end:
                raise OSError(f"rank {rank} has not written its part within {self.patience_s:g} s")
            time.sleep(_POLL_S)


def _remove(checkpoint: Path) -> None:
    """A kill in the middle leaves nothing that looks like a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _copies_done(device: torch.device) -> Callable[[], None]:
    """Waits for the copies that the device was asked for so far; what it is asked for later is not waited for."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
