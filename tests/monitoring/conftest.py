"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.monitoring.server import Server
from tests.require import require


@pytest.fixture(scope="session")
def prometheus_programs() -> None:
    """Skips, or fails where DISTKD_REQUIRE has `prometheus`, where its programs are missing."""
    require("prometheus", ["prometheus", "promtool"])


@pytest.fixture(scope="module")
def prometheus(prometheus_programs: None) -> Iterator[Callable[..., Server]]:
    """`prometheus(folder, ...)`: a server over these folders of target files, for the tests of a module."""
    with ExitStack() as stack:
        yield lambda *folders: stack.enter_context(Server(list[Path](folders)))
