"""Fixtures that every folder of tests may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from distkd.base import World
from distkd.data.make import make_shards
from distkd.train.loop import train
from tests.launch.runs import Finish, finisher
from tests.laws.common import law_config, settings_of
from tests.pool import JOB_TIMEOUT_S, SIZES, Pool, Ranks
from tests.small import Small, make_small

# hypothesis asserts times by default; shared machines do not keep them
settings.register_profile("distkd", deadline=None)
settings.load_profile("distkd")


_CLUSTER = "pytest.mark.slurm"
"""In every file whose tests share the cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a cluster go first: they wait for SLURM more than they compute, and others compute meanwhile.

    Then come files with slow tests, so that no process begins with one when the others have nothing left to do.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not item.get_closest_marker("slurm"), item.path not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes share the tests out, a file stays together, and one of them has the cluster."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def scope(file: str) -> str:
        return _CLUSTER if _CLUSTER in (config.rootpath / file).read_text(encoding="utf-8") else file

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid.partition("::")[0])

    return ByFile(config, log)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()
    pool.folder.cleanup()


@pytest.fixture(scope="session")
def finish(rank_pool: Pool) -> Finish:
    """`finish(config, root, ranks)` trains the run below the root to its end, without a launcher; its folder."""
    return finisher(rank_pool)


@pytest.fixture
def ranks(rank_pool: Pool) -> Callable[..., Ranks]:
    """`ranks(size).run(function, **kwargs)`: a module-level `function(world, **kwargs)` on 1, 2 or 4 gloo ranks."""

    def of_size(size: int, *, timeout_s: float = JOB_TIMEOUT_S) -> Ranks:
        assert size in SIZES, f"the pool has {SIZES} ranks, not {size}"
        return Ranks(rank_pool, size, timeout_s)

    return of_size


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default synthetic set: an image and a vector per sample, several regions a patient."""
    folder = tmp_path_factory.mktemp("laws") / "shards"
    make_shards("synthetic", folder)
    return folder


@pytest.fixture(scope="session")
def root(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root that holds a trained multi-modal teacher named `teacher`, which hands out a map of its image."""
    root = tmp_path_factory.mktemp("runs")
    encoders = {"path": {"name": "cnn", "widths": [8, 16], "head": "pooled"}}
    config = law_config("supervised", shards, root, run={"name": "teacher", "epochs": 1}, model={"encoders": encoders})
    train(settings_of(config), World())
    return root


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Tiny shards and a finished run of each kind, in a second."""
    return make_small(tmp_path_factory.mktemp("small"))
