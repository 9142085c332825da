"""A copy of launch/ over a distkd that only does what a test tells it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# `end=CODE` ends every rank with that code, `raise=CODE` with a SystemExit, `die` by
# SIGKILL, `wait` until a signal asks for a stop
_STAND_IN = """
import os, signal, sys

def main(argv):
    rank = os.environ.get("RANK", "0")
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(rank + " " + " ".join(argv) + "\\n")
    words = dict(word.partition("=")[::2] for word in argv)
    if "raise" in words:
        raise SystemExit(int(words["raise"]))
    if "die" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "wait" in words:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
        os.write(1, b"ready\\n")  # in one piece: the ranks share the pipe
        number = signal.sigwait([signal.SIGTERM, signal.SIGUSR1])
        os.write(1, f"stopped by {signal.Signals(number).name}\\n".encode())
        return 3
    return int(words.get("end", "0"))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """The scripts, a place for their runs, and what the stand-in was called with."""

    folder: Path
    environ: dict[str, str]

    def command(self, script: str, *arguments: str) -> list[str]:
        return [str(self.folder / "launch" / script), *arguments]

    def run(self, script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(script, *arguments),
            cwd=self.folder,
            env=self.environ | environ,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def calls(self) -> list[str]:
        """`rank arguments` of every call, sorted."""
        path = Path(self.environ["CALLS"])
        return sorted(path.read_text().splitlines()) if path.exists() else []


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    stand_in = tmp_path / "stand_in" / "distkd"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "cli.py").write_text(_STAND_IN)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    mine = {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(stand_in.parent), "CALLS": str(tmp_path / "calls")}
    return Launch(tmp_path, kept | mine)
