"""The torchrun target: one rank of `distkd train`. Start it with the scripts beside it, or with torchrun yourself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Train, and leave the exit code where the launching script asks for it."""
    _end_with_torchrun()
    folder = os.environ.get("DISTKD_NOTES")
    if folder is None:
        return _train()
    if _refused_before(Path(folder)):
        return 2
    note = Path(folder) / f"code-{os.environ.get('RANK', '0')}"
    note.unlink(missing_ok=True)
    code = _train()
    aside = note.with_name(f".{note.name}")
    aside.write_text(str(code))
    aside.replace(note)  # others read while ranks write
    return code


def _end_with_torchrun() -> None:
    """Have the kernel ask this rank to stop when its torchrun is killed.

    Otherwise it trains on without anybody who watches it, beside the ranks of the next start.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _train() -> int:
    from distkd.cli import main as distkd

    try:
        return distkd(["train", *sys.argv[1:]])
    except SystemExit as end:  # argparse leaves this way: --help, or an argument that it does not know
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _refused_before(folder: Path) -> bool:
    """A restart after a user's error: it would fail and complain in the same way."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    return any(path.read_text() == "2" for path in folder.glob("code-*"))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # after a lost rank, threads may hang in a collective: the outcome is on disk
