from __future__ import annotations

from pathlib import Path

import pytest

from distkd.base import World
from distkd.data.make import make_shards
from distkd.train.loop import train
from tests.laws.common import law_config, settings_of


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default synthetic set: an image and a vector per sample, several regions a patient."""
    folder = tmp_path_factory.mktemp("laws") / "shards"
    make_shards("synthetic", folder)
    return folder


@pytest.fixture(scope="session")
def root(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root that holds a trained multi-modal teacher named `teacher`."""
    root = tmp_path_factory.mktemp("runs")
    config = law_config("supervised", shards, root, run={"name": "teacher", "epochs": 1})
    train(settings_of(config), World())
    return root
