"""launch/venv.sh: what it says when something is missing, and that a failed installation never looks finished."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# stands in for a system's python3: OLD makes it 3.9, NO_ENSUREPIP is Debian without python3-venv, and the environment
# that it makes has a pip that always fails
_PYTHON = f"""#!/bin/sh
case "$*" in
    *"sys.version_info < (3, 11)"*) [ -z "$OLD" ] ;;
    --version) echo "Python 3.9.2" ;;
    *ensurepip*) [ -z "$NO_ENSUREPIP" ] ;;
    "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "the index is gone" >&2; exit 1 ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the script, and a bin/ that has the few tools which it needs."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "venv.sh", tmp_path / "launch")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "dirname", "rm", "mkdir", "cp", "touch", "cat", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def _run(clone: Path, *arguments: str, python: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    if python:
        path = clone / "bin" / "python3"
        path.write_text(_PYTHON)
        path.chmod(0o755)
    return subprocess.run(
        [str(clone / "launch" / "venv.sh"), *arguments],
        env={"PATH": str(clone / "bin")} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_machine_without_python_is_told_the_packages(clone):
    done = _run(clone, python=False)
    assert done.returncode == 2
    assert "no Python 3.11 or newer: python3 is not installed" in done.stderr
    assert "sudo apt-get install python3 python3-venv" in done.stderr


def test_an_old_python_is_named_with_its_version(clone):
    done = _run(clone, OLD="1")
    assert done.returncode == 2
    assert "no Python 3.11 or newer: python3 is Python 3.9.2" in done.stderr
    assert "PYTHON=/path/to/python3.11" in done.stderr


def test_debians_python_without_venv_is_told_the_package_of_its_version(clone):
    done = _run(clone, NO_ENSUREPIP="1")
    assert done.returncode == 2
    assert "its modules venv or ensurepip are missing" in done.stderr
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    assert f"sudo apt-get install {version}" in done.stderr
    assert not (clone / ".venv").exists()


def test_an_installation_that_fails_leaves_no_stamp_not_even_an_old_one(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".complete").touch()
    done = _run(clone)
    assert done.returncode == 1
    assert "the index is gone" in done.stderr
    assert (clone / ".venv" / "bin" / "python").exists()
    assert not (clone / ".venv" / ".complete").exists()


def test_an_unknown_argument_is_refused(clone):
    done = _run(clone, "--fast")
    assert (done.returncode, done.stderr) == (2, "venv.sh: unknown argument '--fast'; see launch/venv.sh --help\n")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "help"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    for target in ("venv", "demo", "test", "check", "format"):
        assert f"  {target} " in done.stdout
