"""A polite stop: a signal or a file asks, the ranks agree at a step boundary and write a checkpoint; exit code 3."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from distkd.base import World

__all__ = ["Pacing", "StopFlag", "stop_file"]

REACTION_S = 2.0
"""A rank that was asked to stop is heard by the others within so many seconds of steps, or at the next step."""

LOOK_S = 1.0
"""Seconds between two looks into the stop file, which lies on a file system that all nodes share."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def stop_file(world: World, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where a batch script says that the ranks should stop: `DISTKD_STOP_FILE`, on the main rank only.

    Signals of a batch system reach the shell that the job started with, and nobody else without harm: torchrun dies of
    some, and whatever the ranks have started of most.
    """
    path = environ.get("DISTKD_STOP_FILE")
    return Path(path) if path and world.is_main else None


class StopFlag:
    """Whether this process was asked to stop; a context manager that puts the old handlers back.

    Args:
        file: any content of it asks for a stop; it may be absent.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.received: str | None = None
        self._file = file
        self._looked = -LOOK_S
        self._pid = os.getpid()

    def is_set(self) -> bool:
        """Whether a signal came, or something stands in the stop file; looks into it once in `LOOK_S` at most."""
        if self.received is None and self._file is not None and time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            if _content(self._file):
                self.received = "stop file"
        return self.received is not None

    def __enter__(self) -> StopFlag:
        self._old = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # a forked child inherited the handler: it has no step to finish, it ends as if there were none
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        self.received = signal.Signals(number).name


def _content(file: Path) -> bytes:
    """Nothing where there is no file. It is opened and read: a network file system then asks its server, whereas it
    answers from memory whether a file exists.
    """
    try:
        return file.read_bytes()
    except OSError:
        return b""


class Pacing:
    """How many steps lie between two questions whether a rank was asked to stop; the same on every rank.

    Asking is a small collective: at every logging step it travels with the metrics, and in between only where steps are
    so long that a batch system would lose its patience.
    """

    def __init__(self, log_every: int):
        self.log_every = log_every
        self.every = 1  # until it is known how long a step takes

    def learn(self, step_s: float) -> None:
        """`step_s`: seconds of a step, as all ranks agree."""
        self.every = max(1, min(self.log_every, int(REACTION_S / max(step_s, 1e-9))))

    def is_due(self, step: int) -> bool:
        return step % self.every == 0
