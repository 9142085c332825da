"""How the ranks of a torchrun really ended, as an exit code: torchrun itself makes 1 of everything but success.

Ranks leave notes in a folder: the run that they work on, and in the end their exit code. The truth is `outcome.json` of
that run; where a run ended before it had a folder, or was killed, the codes. 0 done, 2 user error, 3 interrupted with
a complete checkpoint, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

__all__ = ["exit_code", "noted_codes", "noted_outcome"]

OURS = ("lost_rank", "diverged", "disk", "internal")
"""Kinds of failure that are no fault of config, data or arguments."""


def noted_outcome(notes: Path) -> dict[str, str] | None:
    """How the run ended that the ranks have noted; None where there is none, or it could not say."""
    runs = [Path(path.read_text()) for path in sorted(notes.glob("**/run-*"))]
    found = [run / "outcome.json" for run in runs if (run / "outcome.json").is_file()]
    return json.loads(found[0].read_text()) if found else None


def noted_codes(notes: Path) -> set[int]:
    """The exit codes that the ranks wrote down, or the launchers of several nodes for theirs."""
    return {int(path.read_text()) for path in notes.glob("code-*")}


def exit_code(torchrun: int, outcome: dict[str, str] | None, codes: set[int]) -> int:
    """The one code of all ranks.

    The launcher is not believed: one that ends with its node may report a success, one that has lost a node and gone on
    without it a failure. Those that restart ranks leave codes of earlier ones behind.
    """
    state = outcome["state"] if outcome else None
    if 0 in codes and 2 not in codes and (state == "done" or (state is None and torchrun == 0)):
        return 0
    if outcome is not None and state == "failed":
        return 1 if outcome.get("kind") in OURS else 2
    if 2 in codes:
        return 2  # refused before it had a folder; ranks that were told to stop because of it have noted 3
    return 3 if state == "interrupted" or 3 in codes else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchrun", type=int, required=True, help="exit code of torchrun")
    parser.add_argument("--notes", type=Path, required=True, help="folder in which the ranks left their notes")
    return parser.parse_args()


def _main() -> int:
    arguments = _arguments()
    return exit_code(arguments.torchrun, noted_outcome(arguments.notes), noted_codes(arguments.notes))


if __name__ == "__main__":
    sys.exit(_main())
