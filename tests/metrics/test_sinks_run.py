"""A training with sinks: interrupted or not, TensorBoard shows what metrics.jsonl says, and the scores at the end."""

import pytest

from distkd.base import World
from distkd.errors import ConfigError
from distkd.metrics import sinks as sinks_module
from distkd.metrics.jsonl import read_jsonl
from distkd.train.loop import train
from tests.metrics.test_sinks import points
from tests.small import Small


def test_tensorboard_shows_the_training_and_its_last_scores(small: Small, tmp_path):
    settings = small.settings("alone", run={"root": str(tmp_path)}, metrics={"tensorboard": True})
    folder = train(settings, World())
    found = points(folder / "tensorboard")
    losses = [
        (line["step"], pytest.approx(line["loss"])) for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line
    ]
    assert [(step, value) for _, step, value in found["loss/total"]] == losses
    assert {"val/accuracy", "final/test/accuracy", "timings/forward"} <= found.keys()


def test_a_sink_without_its_package_is_refused_before_a_folder_is_made(small: Small, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'distkd\[wandb\]'"):
        train(small.settings("alone", run={"root": str(tmp_path)}, metrics={"wandb": "p"}), World())
    assert not list(tmp_path.iterdir())


def test_a_resumed_training_shows_each_step_once(small: Small, tmp_path, monkeypatch, seconds_apart):
    """The run dies after lines that its last checkpoint does not know of."""
    config = {"run": {"root": str(tmp_path)}, "metrics": {"tensorboard": True}}
    write = sinks_module.Sinks.write

    def dies(self, record):
        write(self, record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(sinks_module.Sinks, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        train(small.settings("alone", **config), World())
    monkeypatch.setattr(sinks_module.Sinks, "write", write)
    folder = train(small.settings("alone", **config), World())
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    found = points(folder / "tensorboard")["loss/total"]
    assert [(step, time) for time, step, _ in found] == [(line["step"], line["time"]) for line in lines]
    assert len(list((folder / "tensorboard").iterdir())) == 2
