from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def real() -> Callable[[str], Path]:
    """The folder of a real data set; the test is skipped where it is absent."""

    def folder(name: str) -> Path:
        raw = Path(os.environ.get("DISTKD_RAW", ROOT.parent / "shared" / "data"))
        if not (raw / name).is_dir():
            pytest.skip(f"no real data set {name!r} in {raw}; name the folder of the sets with DISTKD_RAW")
        return raw / name

    return folder
