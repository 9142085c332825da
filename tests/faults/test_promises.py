"""docs/reliability.md names a test for each promise; the names must not go stale."""

from __future__ import annotations

import re

import pytest

from tests.launch.processes import REPOSITORY

NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (REPOSITORY / "docs" / "reliability.md").read_text())))


@pytest.mark.parametrize("path, name", NAMED, ids=[name for _, name in NAMED])
def test_the_test_of_a_promise_exists(path: str, name: str):
    assert f"\ndef {name}(" in (REPOSITORY / path).read_text()


def test_promises_are_found():
    assert len(NAMED) > 15
