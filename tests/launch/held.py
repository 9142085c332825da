"""Ranks that hold themselves: whatever is to happen in the middle of a run does happen there, on any machine.

A rank that is held (SIGSTOP) is to everybody else one whose step lasts long; waiting costs no time of a core.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tests.launch.processes import REPOSITORY, Launched, wait_for
from tests.slurm.members import send, state_of

__all__ = ["Hold", "go_on", "held", "is_pending"]

_HOOK = Path(__file__).parent / "hook"


class Hold:
    """Moments at which all ranks of a run are held, in order, over all attempts of the run.

    Args:
        folder: a new one, for files that tell who is held.
        moments: steps that a rank has taken since its process began to train, or `start`, before it does anything.
        ranks: of the run. Ranks of a world of another size wait until torchrun ends them, as long as a moment is left.
    """

    def __init__(self, folder: Path, *moments: int | Literal["start"], ranks: int):
        folder.mkdir()
        self._folder, self.ranks = folder, ranks
        words = {"folder": str(folder), "ranks": ranks, "moments": moments}
        self.environ = {"DISTKD_TEST_HOLD": json.dumps(words), "PYTHONPATH": f"{_HOOK}:{REPOSITORY}"}
        """For the processes of the run."""

    def pids(self, number: int = 0) -> dict[int, int]:
        """Process ids by rank of those held at the moment of this number, once all of them are; empty before."""
        files = {rank: self._folder / f"{number}-{rank}" for rank in range(self.ranks)}
        if not all(file.exists() for file in files.values()):
            return {}
        pids = {rank: int(file.read_text()) for rank, file in files.items()}
        # who went on before it stopped would stop for ever
        return pids if all(state_of(pid) == "T" for pid in pids.values()) else {}


def held(hold: Hold, run: Launched, number: int = 0) -> dict[int, int]:
    """Wait until all ranks are held at the moment of this number; their process ids by rank.

    Raises:
        AssertionError: the run ended, or did not get there, with what it said.
    """
    wait_for(lambda: hold.pids(number), run)
    return hold.pids(number)


def go_on(pids: Iterable[int]) -> None:
    """Those that are held and live train on."""
    send(pids, signal.SIGCONT)


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether this signal waits for a held process to go on; False of one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
