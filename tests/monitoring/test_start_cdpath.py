"""launch/monitoring/start.sh where CDPATH is exported, by which `cd` goes elsewhere and says where."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch.processes import REPOSITORY, environment

pytestmark = [pytest.mark.prometheus, pytest.mark.usefixtures("prometheus_programs")]


@pytest.mark.parametrize("cdpath", [f".:{REPOSITORY.parent}", f"{REPOSITORY}"])
def test_an_exported_cdpath_changes_nothing(tmp_path: Path, cdpath: str):
    (tmp_path / "elsewhere" / "runs").mkdir(parents=True)
    (tmp_path / "here" / "runs").mkdir(parents=True)
    script = os.path.relpath(REPOSITORY / "launch" / "monitoring" / "start.sh", REPOSITORY)
    for folder, command, root in (
        (REPOSITORY, script, tmp_path / "here" / "runs"),
        (tmp_path / "here", REPOSITORY / script, "runs"),
    ):
        done = subprocess.run(
            [command, "--check", root],
            cwd=folder,
            env=environment(CDPATH=f"{tmp_path / 'elsewhere'}:{cdpath}"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout) == (0, "configuration and rules are well\n"), done.stderr
