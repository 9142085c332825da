"""The batch scripts where there is no job: they say what they are for, and what to type instead."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.jobs import SCRIPTS

NAMES = sorted(path.name for path in SCRIPTS.glob("*.sbatch"))
ARGUMENTS = ["my configs/a.yaml", "--run.name", "it's $HOME"]


def _bash(script: str, *arguments: str, folder: Path, sbatch: bool = False) -> subprocess.CompletedProcess[str]:
    """The script started by hand in a folder, on a machine with or without SLURM."""
    commands = folder / "bin"
    commands.mkdir()
    for name in ("bash", "dirname", "basename", "cat"):
        (commands / name).symlink_to(str(shutil.which(name)))
    if sbatch:
        (commands / "sbatch").symlink_to("/bin/false")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "DISTKD"))}
    command = [str(commands / "bash"), str(SCRIPTS / script), *arguments]
    return subprocess.run(
        command, env={**environ, "PATH": str(commands)}, cwd=folder, capture_output=True, text=True, timeout=240
    )


def test_there_are_five():
    assert NAMES == ["deepspeed.sbatch", "folds.sbatch", "report.sbatch", "stages.sbatch", "train.sbatch"]


@pytest.mark.parametrize("script", NAMES)
def test_help_says_how_it_is_submitted(script: str, tmp_path: Path):
    done = _bash(script, "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first = done.stdout.splitlines()[0]
    assert first.startswith("usage: ")
    assert "sbatch [" in first or "sbatch --" in first
    assert f"slurm/{script}" in first


@pytest.mark.parametrize("script", NAMES)
def test_nothing_to_do_is_answered_with_the_help(script: str, tmp_path: Path):
    done = _bash(script, folder=tmp_path, sbatch=True)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("script", NAMES)
def test_script_started_by_hand_tells_how_to_submit_it(script: str, tmp_path: Path):
    done = _bash(script, *ARGUMENTS, folder=tmp_path, sbatch=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"slurm/{script}: this is a job script; submit it:  sbatch ")
    first, other = (shlex.split(part) for part in done.stderr.partition("submit it:  ")[2].split("   or, "))
    assert first == ["sbatch", str(SCRIPTS / script), *ARGUMENTS]
    command = ["distkd", "report" if script == "report.sbatch" else "submit"]
    assert other[-len(ARGUMENTS) - 2 :] == [*command, *ARGUMENTS]


@pytest.mark.parametrize("script", NAMES)
def test_script_on_a_machine_without_slurm_tells_what_does_it_there(script: str, tmp_path: Path):
    done = _bash(script, *ARGUMENTS, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"slurm/{script}: there is no SLURM here (no sbatch); on this machine:  ")
    words = shlex.split(done.stderr.partition("on this machine:  ")[2].partition("   ")[0])
    command = ["distkd", "report"] if script == "report.sbatch" else ["launch/workstation.sh"]
    assert words == [*command, *ARGUMENTS]
