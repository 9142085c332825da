from __future__ import annotations

from pathlib import Path

import pytest

from distkd.data.shardset import ShardSet
from tests.data.toy import open_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Read-only: tests that change files write their own."""
    return open_toy(tmp_path_factory.mktemp("toy") / "shards")


@pytest.fixture
def toy_folder(tmp_path: Path) -> Path:
    """A set of one's own, to be damaged."""
    open_toy(tmp_path / "shards").close()
    return tmp_path / "shards"
