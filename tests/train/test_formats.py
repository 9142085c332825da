"""Checkpoints and configs of older versions: a run that was begun with them goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from distkd.base import World
from distkd.train.checkpoint import Tensors, complete, read_meta
from distkd.train.folder import check_config
from distkd.train.loop import train
from tests.laws.common import equal_up_to, law_config, settings_of

FORMAT_1 = Path(__file__).parent / "format-1" / "step-00000015"
"""The middle of the run below, as version 0.1 wrote it."""


def _config(shards: Path, root: Path, name: str) -> dict[str, Any]:
    config = law_config("supervised", shards, root, run={"name": name, "epochs": 2}, eval={"select": "best"})
    encoder = {"path": {"name": "cnn", "widths": [4, 4]}}
    config["model"] = {
        "modalities": ["path"], "encoders": encoder, "feature_dim": 4, "dropout": 0.2, "norm": "sync",
    }  # fmt: skip
    return config


def test_a_checkpoint_of_format_1_goes_on(shards: Path, tmp_path: Path):
    whole, old = (_config(shards, tmp_path, name) for name in ("whole", "old"))
    train(settings_of(whole), World())
    folder = settings_of(old).folder
    shutil.copytree(FORMAT_1, folder / "checkpoints" / FORMAT_1.name)
    train(settings_of(old), World())
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"] > 15
    ends = [complete(settings_of(config).folder / "checkpoints")[-1] for config in (whole, old)]
    assert [read_meta(end)["format"] for end in ends] == [2, 2]
    expected, found = (dict(Tensors(end)) for end in ends)
    equal_up_to(found, expected, 1e-9)
    assert any(name.startswith("optimizer/") for name in expected)
    assert any(name.startswith("best/") for name in expected)


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
