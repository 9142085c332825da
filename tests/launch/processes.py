"""Real processes for tests: runs under torchrun or alone, their ranks by number, and an end without leftovers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.slurm.members import since

__all__ = ["PATIENCE_S", "REPOSITORY", "Launched", "environment", "ranks_command", "wait_for"]

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 240.0
"""How long anything may take before a test gives up; far more than it needs, machines are shared."""
_MARK = "DISTKD_TEST_START"
"""Variable that all processes of one start carry, also ranks whose torchrun is gone."""


def ranks_command(*arguments: str | Path, ranks: int, max_restarts: int = 0) -> list[str]:
    """`launch/train.py` on its own or under a plain torchrun; `launch/workstation.sh` where it has to restart ranks."""
    if max_restarts > 0:
        script = str(REPOSITORY / "launch" / "workstation.sh")
        return [script, "--nproc", str(ranks), "--max-restarts", str(max_restarts), *map(str, arguments)]
    train = [sys.executable, "launch/train.py", *map(str, arguments)]
    if ranks == 1:
        return train
    return [train[0], "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *train[1:]]


def environment(**more: str) -> dict[str, str]:
    """This process's, for CPU ranks with one thread each that import the distkd of this repository."""
    launcher = ("TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    mine = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    return {**inherited, **mine, "VIRTUAL_ENV": sys.prefix, **more}


class Launched:
    """One start of a command and everything that it started in turn; what is left at the end of the block is killed."""

    def __init__(self, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None):
        self.log = log
        self.mark = uuid.uuid4().hex
        with log.open("wb") as out:  # a file: a pipe that nobody empties stops the ranks
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**(environ or environment()), _MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def members(self) -> dict[int, dict[str, str]]:
        """Living processes of this start and their environments, oldest first."""
        found: dict[int, dict[str, str]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                environ = dict(word.split("=", 1) for word in words if "=" in word)
                if environ.get(_MARK) == self.mark:
                    found[int(folder.name)] = environ
        return dict(sorted(found.items(), key=lambda member: since(member[0])))

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that live, by rank."""
        found: dict[int, int] = {}
        for pid, environ in self.members().items():
            if "RANK" in environ:
                found.setdefault(int(environ["RANK"]), pid)  # a rank is older than what it starts
        return found or ({0: self.process.pid} if self.process.poll() is None else {})

    def kill(self, pids: Sequence[int] | None = None) -> None:
        """SIGKILL, by default to all: the launcher first, so that it starts nobody again."""
        for pid in [self.process.pid, *self.members()] if pids is None else pids:
            if pid != self.process.pid or self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Its exit code."""
        return self.process.wait(patience_s)

    def wait_until_gone(self) -> None:
        """Until the last process of this start has ended, also ranks whose launcher is gone."""
        end = time.monotonic() + PATIENCE_S
        while members := self.members():
            assert time.monotonic() < end, f"still there: {sorted(members)}\n{self.said()}"
            time.sleep(0.05)  # polling: they are nobody's children any more

    def said(self) -> str:
        """Standard output and error of all its processes so far."""
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic() + PATIENCE_S
        while (members := self.members()) and time.monotonic() < end:
            self.kill([self.process.pid, *members])
            self.process.poll()
            time.sleep(0.01)  # polling: killed processes leave when the kernel is done with them
        self.process.wait()


def wait_for(condition: Callable[[], Any], run: Launched, *, poll_s: float = 0.01) -> None:
    """Poll until the condition holds; the run has to live until then.

    Raises:
        AssertionError: the run ended, or did not get there, with what it said.
    """
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if run.process.poll() is not None and not condition():
            raise AssertionError(f"the run ended early with {run.process.returncode}:\n{run.said()}")
        assert time.monotonic() < end, f"the run did not get there:\n{run.said()}"
        time.sleep(poll_s)  # polling other processes, not waiting for luck
