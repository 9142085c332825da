"""Fixtures that every folder of tests may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.pool import JOB_TIMEOUT_S, SIZES, Pool, Ranks


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()
    pool.folder.cleanup()


@pytest.fixture
def ranks(rank_pool: Pool) -> Callable[..., Ranks]:
    """`ranks(size).run(function, **kwargs)`: a module-level `function(world, **kwargs)` on 1, 2 or 4 gloo ranks."""

    def of_size(size: int, *, timeout_s: float = JOB_TIMEOUT_S) -> Ranks:
        assert size in SIZES, f"the pool has {SIZES} ranks, not {size}"
        return Ranks(rank_pool, size, timeout_s)

    return of_size
