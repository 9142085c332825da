"""Ranks that outlive their launcher: a later attempt has their run, and they leave it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distkd.base import World
from distkd.errors import TakenOverError
from distkd.files import read_json, write_json
from distkd.metrics.jsonl import MetricsWriter, read_jsonl
from distkd.train.loop import train
from tests.laws.common import before_steps
from tests.small import Small


def test_attempt_that_was_overtaken_says_nothing_of_the_run_and_exports_nothing(small: Small, tmp_path: Path):
    """Here it meets no checkpoint between that and its end, which would tell it."""
    settings = small.settings("alone", run={"root": str(tmp_path), "checkpoint_every": 4, "save": "sync"})
    about = settings.folder / "environment.json"

    def overtake(step: int, _: Any) -> None:
        if step == 5:
            write_json(about, {**read_json(about), "token": "of a later attempt"})

    with before_steps(overtake), pytest.raises(TakenOverError, match="taken over"):
        train(settings, World())
    assert not (settings.folder / "outcome.json").exists()
    assert not (settings.folder / "export").exists()
    assert [path.name for path in (settings.folder / "checkpoints").glob("step-*")] == ["step-00000004"]


def test_lines_of_an_attempt_that_was_overtaken_are_lost(tmp_path: Path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as old, MetricsWriter(tmp_path / "metrics.jsonl") as new:
        old.write({"step": 3})
        new.truncate_after(3)
        old.write({"step": 4, "loss": 1.0})
        new.write({"step": 4, "loss": 2.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 3}, {"step": 4, "loss": 2.0}]
