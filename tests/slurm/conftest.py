"""One SLURM cluster for all tests of this folder that ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import INSTALL, Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of 4 CPUs and 2 GPUs by name. After each test its jobs are cancelled and lost nodes come back."""
    if missing := missing_programs():
        reason = f"a SLURM cluster needs {', '.join(missing)}: {INSTALL}"
        if "slurm" in os.environ.get("DISTKD_REQUIRE", "").split(","):
            pytest.fail(f"{reason}; or take slurm out of DISTKD_REQUIRE to skip its tests", pytrace=False)
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    cluster = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if cluster is not None:
        cluster.tidy()
