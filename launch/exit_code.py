"""How the ranks of a torchrun really ended, as an exit code: torchrun itself makes 1 of everything but success.

The truth is the youngest `outcome.json` below the run root; where a run ended before it had a folder, the codes that
`train.py` noted for its ranks. 0 done, 2 user error, 3 interrupted with a complete checkpoint, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

__all__ = ["exit_code", "noted_codes", "youngest_outcome"]

OURS = ("lost_rank", "diverged", "disk", "internal")
"""Kinds of failure that are no fault of config, data or arguments."""


def youngest_outcome(run_root: Path, since: float) -> dict[str, str] | None:
    """The `outcome.json` below `run_root` that was written last and not before `since`; None where there is none."""
    paths = [path for pattern in ("*/outcome.json", "*/*/outcome.json") for path in run_root.glob(pattern)]
    young = [(path.stat().st_mtime, path) for path in paths if path.stat().st_mtime >= since]
    return json.loads(max(young)[1].read_text()) if young else None


def noted_codes(notes: Path) -> set[int]:
    """The exit codes that the ranks of this node wrote down."""
    return {int(path.read_text()) for path in notes.glob("rank-*")}


def exit_code(torchrun: int, outcome: dict[str, str] | None, codes: set[int]) -> int:
    """The one code of all ranks."""
    if torchrun == 0:
        return 0
    state = outcome["state"] if outcome else None
    if outcome is not None and state == "failed":
        return 1 if outcome.get("kind") in OURS else 2
    if 2 in codes:
        return 2  # refused before it had a folder; ranks that were told to stop because of it have noted 3
    return 3 if state == "interrupted" or 3 in codes else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchrun", type=int, required=True, help="exit code of torchrun")
    parser.add_argument("--run-root", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--notes",
        type=Path,
        required=True,
        help="folder of the ranks' codes; its file 'started' is as old as this attempt",
    )
    return parser.parse_args()


def _main() -> int:
    arguments = _arguments()
    since = (arguments.notes / "started").stat().st_mtime
    return exit_code(arguments.torchrun, youngest_outcome(arguments.run_root, since), noted_codes(arguments.notes))


if __name__ == "__main__":
    sys.exit(_main())
