"""SLURM's commands as stand-ins which keep what they were told, and a user who calls `distkd submit` among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import distkd
from distkd.cli import USER, main
from distkd.train.folder import write_outcome
from tests.small import Small

__all__ = ["FIRST", "HOME", "Capture", "Slurm", "options_of", "refusal", "told"]

HOME = Path(distkd.__file__).parent.parent
FIRST = 17
"""Id of the first job."""

SBATCH = f"""\
#!/bin/bash
PATH=/usr/bin:/bin
here=$(dirname "$0")
id=$(({FIRST} + $(ls "$here" | grep -c ^call-)))
printf '%s\\0' "$@" >"$here/call-$id"
env -0 >"$here/environ-$id"
[[ ! -e $here/sbatch-does ]] || . "$here/sbatch-does"
[[ ! -e $here/refuse-$id ]] || {{ echo 'sbatch: error: invalid partition specified: gup' >&2; exit 1; }}
echo "$id"
"""
SQUEUE = """\
#!/bin/bash
while read -r line; do echo "$line"; done <"${0%/*}/queue"
"""
SCANCEL = """\
#!/bin/bash
echo "$@" >>"${0%/*}/cancelled"
"""

Capture = pytest.CaptureFixture[str]


SCONTROL = """\
#!/bin/bash
[[ ! -e ${0%/*}/scontrol-says ]] || echo "$(<"${0%/*}/scontrol-says")"
"""


class Slurm:
    """Commands in a folder, and a folder with spaces to call `distkd submit` in."""

    def __init__(self, folder: Path, here: Path, small: Small):
        self.folder, self.here, self.small = folder, here, small
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "queue").touch()
        for name in ("bash", "env"):  # of the site file's reader
            (folder / name).symlink_to(f"/usr/bin/{name}")

    def write(self, path: str, kind: str, *, name: str | None = None, teacher: str | None = None, **more: Any) -> Path:
        """A config below the folder of the command, whose runs are below `my runs`."""
        config = self.small.config(kind, **more)
        config["run"] = {**config["run"], "root": "my runs", "name": name}
        if name is None:
            del config["run"]["name"]
        config["teacher"] = {"export": teacher}
        (self.here / path).parent.mkdir(parents=True, exist_ok=True)
        (self.here / path).write_text(yaml.safe_dump(config))
        return Path(path)

    def pair(self) -> list[str]:
        """Configs of a teacher and its student, whose runs are named after their files."""
        self.write("my study/teacher.yaml", "teacher")
        self.write("my study/student.yaml", "student", teacher="my study-teacher")
        return ["my study/student.yaml", "my study/teacher.yaml"]

    def calls(self) -> list[list[str]]:
        """What sbatch was told, call by call."""
        return [path.read_text().split("\0")[:-1] for path in sorted(self.folder.glob("call-*"))]

    def environ(self, job: int = FIRST) -> dict[str, str]:
        lines = (self.folder / f"environ-{job}").read_text().split("\0")
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().splitlines() if path.exists() else []

    def end(self, name: str, **changes: Any) -> None:
        """The run is done."""
        folder = self.here / "my runs" / name
        folder.mkdir(parents=True)
        write_outcome(folder, state="done", step=9, attempt=1)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.here)) for path in self.here.rglob("*"))


def options_of(call: list[str]) -> list[str]:
    return call[: next(number for number, word in enumerate(call) if word.endswith(".sbatch"))]


def told(call: list[str]) -> list[str]:
    """The script and its arguments."""
    return call[len(options_of(call)) :]


def refusal(words: list[str], capsys: Capture) -> str:
    assert main(["submit", *words]) == USER
    return capsys.readouterr().err
