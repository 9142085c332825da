"""One SLURM cluster for all tests of this folder that ask for it, and stand-ins of its commands for the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.require import require
from tests.slurm.cluster import PROGRAMS, Cluster
from tests.slurm.stand_ins import Slurm
from tests.small import Small


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of 4 CPUs and 2 GPUs by name. After each test its jobs are cancelled and lost nodes come back."""
    require("slurm", PROGRAMS, install="sudo apt-get install --no-install-recommends slurmctld slurmd slurm-client")
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    cluster = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if cluster is not None:
        cluster.tidy()


@pytest.fixture
def fake_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes `squeue` answer with these lines; each is `id|state|reason|time left|nodes`."""

    def answer(lines: str) -> None:
        program = tmp_path / "bin" / "squeue"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return answer


@pytest.fixture
def no_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def slurm(tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder, here = tmp_path / "bin", tmp_path / "my work"
    folder.mkdir()
    here.mkdir()
    for name in [name for name in os.environ if name.startswith(("DISTKD_", "SLURM", "SRUN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DISTKD_SITE", str(folder / "site.env"))  # not the one of who runs the tests
    (folder / "site.env").touch()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(here)
    return Slurm(folder, here, small)
