"""Tests that need programs which pip does not install: skipped with the reason, or failed where they have to run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import pytest

__all__ = ["program_path", "require"]


def require(name: str, programs: Sequence[str], install: str = "") -> None:
    """Skip the test, or fail it where the environment's `DISTKD_REQUIRE`, names with commas between, has `name`.

    Args:
        name: what the programs are together, such as `slurm` or `prometheus`.
        programs: what has to be found on `program_path()`.
        install: the command that installs them; without it that of Debian's package `name`.
    """
    missing = [program for program in programs if shutil.which(program, path=program_path()) is None]
    if not missing:
        return
    install = install or f"sudo apt-get install --no-install-recommends {name}"
    reason = f"{name} needs {', '.join(missing)}: {install}"
    if name in os.environ.get("DISTKD_REQUIRE", "").replace(" ", "").split(","):
        pytest.fail(f"{reason}; or take {name} out of DISTKD_REQUIRE to skip its tests", pytrace=False)
    pytest.skip(reason)


def program_path() -> str:
    """The PATH with the folders of daemons, which Debian does not put on everybody's."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
