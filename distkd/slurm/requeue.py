"""Whether a job whose ranks have ended goes back to the queue, and why; called by the batch scripts.

It imports nothing heavy: between a warning and the end of a job there may be few seconds left.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distkd.files import read_json, write_json

__all__ = ["Ending", "Limits", "Past", "Verdict", "decide", "main", "position", "read_past"]

DONE, USER, INTERRUPTED = 0, 2, 3
MAX_IDLE = 3
"""Warned attempts in a row without a newer checkpoint after which more time is needed, not more attempts."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How this attempt of a job ended."""

    code: int
    """Of all ranks: 0 done, 2 user error, 3 interrupted with a complete checkpoint, 1 anything else."""
    warned: bool
    """Whether SLURM announced the end of the time, or a pre-emption."""
    killed: bool
    """Whether SLURM has begun to end the job."""
    position: str
    """Run and newest checkpoint; empty where no run has begun."""


@dataclass(frozen=True, slots=True)
class Past:
    """What earlier attempts of this job have left; requeues that SLURM made itself are not among them."""

    requeues: int = 0
    failures: int = 0
    """In a row, without a newer checkpoint in between."""
    idle: int = 0
    """Warned attempts in a row without a newer checkpoint."""
    position: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """How often a job may go back to the queue by itself."""

    failures: int = 3
    """After failures in a row without a newer checkpoint in between."""
    requeues: int = 100
    """In all."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens now."""

    again: bool
    why: str
    past: Past


def decide(end: Ending, past: Past, limits: Limits) -> Verdict:
    """The one place where it is decided; a job that SLURM ends by itself never goes back.

    A cancelled job would come back otherwise: whether it was cancelled, pre-empted or out of time can not be told then,
    and SLURM requeues what it has pre-empted, or lost a node of, without being asked.
    """
    moved = bool(end.position) and end.position != past.position
    now = replace(past, position=end.position or past.position)
    if end.code == DONE:
        return Verdict(False, "done", now)
    if end.code == USER:
        return Verdict(False, "the mistake is in config, data or arguments, and would be made again", now)
    if end.killed:
        return Verdict(False, "SLURM ends this job: cancelled, out of time, or pre-empted", now)
    if end.code == INTERRUPTED and not end.warned:
        return Verdict(False, "stopped as asked", now)
    if past.requeues >= limits.requeues:
        return Verdict(False, f"requeued {past.requeues} times already (DISTKD_MAX_REQUEUES)", now)
    again = replace(now, requeues=past.requeues + 1)
    idle = 0 if moved else past.idle + 1
    if end.warned and idle >= MAX_IDLE:
        why = f"{MAX_IDLE} attempts in a row were over before a newer checkpoint: allow more time (sbatch --time)"
        return Verdict(False, why, now)
    if end.warned:
        why = "SLURM has announced the end of this attempt, the run is not done"
        return Verdict(True, why, replace(again, idle=idle, failures=0 if moved else past.failures))
    failures = 1 if moved else past.failures + 1
    if failures > limits.failures:
        why = f"failed {failures} times in a row without a newer checkpoint (DISTKD_MAX_FAILURES={limits.failures})"
        return Verdict(False, why, now)
    return Verdict(True, f"failure {failures} since the newest checkpoint", replace(again, failures=failures, idle=0))


def position(notes: Path) -> str:
    """The run that the ranks have noted and its newest checkpoint; empty where they have noted none."""
    runs = [Path(path.read_text()) for path in sorted(notes.glob("**/run-*"))]
    if not runs:
        return ""
    newest = max((path.name for path in (runs[0] / "checkpoints").glob("step-*")), default="none")
    return f"{runs[0]} {newest}"


def read_past(path: Path) -> Past:
    """What `requeues.json` has; nothing where it is absent or was torn."""
    try:
        return Past(**read_json(path))
    except (OSError, ValueError, TypeError):
        return Past()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "exit code: 0 the job should be requeued, 1 it should not"
    parser.add_argument("--code", type=int, required=True, help="exit code of all ranks")
    parser.add_argument("--notes", type=Path, required=True, help="folder in which the ranks left their notes")
    parser.add_argument("--past", type=Path, required=True, help="file of the counters, one a job")
    parser.add_argument("--warned", action="store_true", help="SLURM announced the end of this attempt")
    parser.add_argument("--killed", action="store_true", help="SLURM has begun to end the job")
    parser.add_argument("--max-failures", type=int, default=Limits().failures)
    parser.add_argument("--max-requeues", type=int, default=Limits().requeues)
    return parser.parse_args()


def main() -> int:
    """Print the verdict; 0 for a requeue, 1 for none."""
    words = _arguments()
    end = Ending(words.code, words.warned, words.killed, position(words.notes))
    verdict = decide(end, read_past(words.past), Limits(words.max_failures, words.max_requeues))
    write_json(words.past, asdict(verdict.past))
    print(f"{'requeue' if verdict.again else 'no requeue'}: {verdict.why}")
    return 0 if verdict.again else 1


if __name__ == "__main__":
    sys.exit(main())
