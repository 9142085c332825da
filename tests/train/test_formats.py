"""Checkpoints and configs of older versions: a run that was begun with them goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from distkd.base import Batch, World
from distkd.metrics.meters import Stopwatch
from distkd.train import loop
from distkd.train.checkpoint import Tensors, complete, read_meta
from distkd.train.folder import check_config
from distkd.train.job import Job
from tests.laws.common import law_config, settings_of

FORMAT_1 = Path(__file__).parent / "format-1" / "step-00000015"
"""The middle of the run below, as version 0.1 wrote it."""


def _config(shards: Path, root: Path, name: str) -> dict[str, Any]:
    config = law_config("supervised", shards, root, run={"name": name, "epochs": 2}, eval={"select": "best"})
    encoder = {"path": {"name": "cnn", "widths": [4, 4]}}
    config["model"] = {
        "modalities": ["path"], "encoders": encoder, "feature_dim": 4, "dropout": 0.2, "norm": "sync",
    }  # fmt: skip
    return config


def test_a_checkpoint_of_format_1_goes_on(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With what it holds, to the last tensor; the order of samples is not part of it."""
    config = _config(shards, tmp_path, "old")
    folder = settings_of(config).folder
    shutil.copytree(FORMAT_1, folder / "checkpoints" / FORMAT_1.name)
    begun: dict[str, Tensor] = {}
    original = loop.train_step

    def watched(job: Job, passes: Sequence[Batch], watch: Stopwatch) -> Any:
        if not begun:
            begun.update({entry.name: entry.read().clone() for entry in job.engine.entries()})
        return original(job, passes, watch)

    monkeypatch.setattr(loop, "train_step", watched)
    loop.train(settings_of(config), World())
    stored = dict(Tensors(FORMAT_1))
    best = {name for name in stored if name.startswith("best/")}
    assert begun.keys() == stored.keys() - best
    assert any(name.startswith("optimizer/") for name in begun)
    for name, tensor in begun.items():
        assert torch.equal(tensor, stored[name]), name
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"] > 15
    end = complete(folder / "checkpoints")[-1]
    assert (read_meta(end)["step"], read_meta(end)["format"]) == (30, 2)
    assert best <= set(Tensors(end))


def test_keys_that_came_later_have_their_defaults_in_an_older_config(shards: Path, tmp_path: Path):
    settings = settings_of(_config(shards, tmp_path, "run"))
    written = settings.model_dump(mode="json")
    del written["run"]["nonfinite"], written["eval"]["level"]
    settings.folder.mkdir()
    (settings.folder / "config.yaml").write_text(yaml.safe_dump(written))
    check_config(settings)


def test_tensors_are_read_one_by_one(shards: Path):
    found = Tensors(FORMAT_1)
    assert {name.split("/")[0] for name in found} == {"trainable", "optimizer", "best"}
    assert found.under("best/").keys() == {name for name in found if name.startswith("best/")}
    assert isinstance(next(iter(found.values())), torch.Tensor)
