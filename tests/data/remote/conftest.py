"""A toy set on a server of its own, an empty cache, and processes that end with their test."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from distkd.data.manifest import Manifest
from tests.data.remote.serve import Server
from tests.data.toy import write_toy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("remote") / "set"
    return folder, write_toy(folder, shard_bytes=12_000)


@pytest.fixture
def source(made: tuple[Path, Manifest], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "set"))


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server(source) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def in_child() -> Iterator[Callable[[Callable[[], object]], int]]:
    """Starts a process that does some work and leaves with 0, or 1 where it fails; none outlives the test."""
    children: list[int] = []

    def start(work: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
        return child

    yield start
    for child in children:
        with suppress(ChildProcessError):  # whose end was waited for
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
