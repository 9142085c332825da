"""A polite stop: a signal sets a flag, the ranks agree on it at a step boundary and write a checkpoint; exit code 3."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["Pacing", "StopFlag"]

REACTION_S = 2.0
"""A rank that was asked to stop is heard by the others within so many seconds of steps, or at the next step."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Whether this process was asked to stop; a context manager that puts the old handlers back."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._pid = os.getpid()

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
