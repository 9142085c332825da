"""Law 2: a run that was stopped anywhere and started again ends where the uninterrupted run ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distkd import methods
from distkd.base import World
from distkd.comm.world import barrier
from distkd.errors import ConfigError, Interrupted
from distkd.metrics.jsonl import read_jsonl
from distkd.train.loop import train
from tests.laws.common import Crash, before_steps, equal_up_to, law_config, settings_of


def _train(world: World, config: dict[str, Any], *, crash_at: int | None = None, stop_at: int | None = None) -> None:
    """Train to the end, or die before step `crash_at`, or be asked by a signal to one rank after `stop_at`."""

    def hook(step: int, _: Any) -> None:
        if step == crash_at:
            raise Crash
        if step == stop_at and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    try:
        with before_steps(hook):
            train(settings_of(config), world)
    except (Crash, Interrupted):
        barrier(world)


def _ending(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"))
    found = {f"{path.name}/{name}": t for path in newest.glob("*.safetensors") for name, t in load_file(path).items()}
    assert found
    return found


def _config(method: str, shards: Path, root: Path, name: str, **overrides: Any) -> dict[str, Any]:
    run = {"name": f"{method}-{name}", "epochs": 2, "checkpoint_every": 4}
    return law_config(method, shards, root, run=run, **{"eval": {"select": "best"}, **overrides})


@pytest.mark.parametrize(
    "method, size",
    # with more than two ranks the order of a sum depends on where a gradient lies in its bucket
    [*((method, 2) for method in methods.available()), ("dc_distill", 1), ("supervised", 1), ("dc_distill", 4)],
)
def test_a_run_that_died_ends_bit_equal(ranks, shards: Path, root: Path, method: str, size: int):
    whole, broken = (_config(method, shards, root, f"{name}{size}", engine={"precision": "fp32"}) for name in "ab")
    ranks(size).run(_train, config=whole)
    ranks(size).run(_train, config=broken, crash_at=7)  # inside the first epoch, three steps after a checkpoint
    ranks(size).run(_train, config=broken, crash_at=13)
    ranks(size).run(_train, config=broken)
    folders = [settings_of(config).folder for config in (whole, broken)]
    expected, found = _ending(folders[0]), _ending(folders[1])
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    lines = [[_timeless(line) for line in read_jsonl(folder / "metrics.jsonl")] for folder in folders]
    assert lines[0] == lines[1]
    reports = [json.loads((folder / "eval" / "test.json").read_text())["metrics"] for folder in folders]
    assert reports[0] == reports[1]
    outcome = json.loads((folders[1] / "outcome.json").read_text())
    assert (outcome["state"], outcome["attempt"]) == ("done", 3)


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("timings", "time")}


@pytest.mark.parametrize("method", ["dc_distill", "dc_teacher"])
def test_a_run_goes_on_with_half_and_with_double_the_ranks(ranks, shards: Path, root: Path, method: str):
    whole, broken = (_config(method, shards, root, f"{name}-worlds") for name in "ab")
    ranks(2).run(_train, config=whole)
    ranks(2).run(_train, config=broken, crash_at=5)
    ranks(1).run(_train, config=broken, crash_at=10)
    ranks(4).run(_train, config=broken)
    equal_up_to(_ending(settings_of(broken).folder), _ending(settings_of(whole).folder), 1e-9)


def test_a_signal_to_one_rank_stops_all_with_a_complete_checkpoint(ranks, shards: Path, root: Path):
    whole, broken = (_config("dc_distill", shards, root, f"{name}-signal") for name in "ab")
    ranks(2).run(_train, config=whole)
    ranks(2).run(_train, config=broken, stop_at=5)
    folder = settings_of(broken).folder
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["state"] == "interrupted"
    assert outcome["step"] == 6  # the next step at which ranks speak: log_every is 2
    assert (folder / "checkpoints" / "step-00000006" / "meta.json").exists()
    ranks(2).run(_train, config=broken)
    for name, tensor in _ending(settings_of(whole).folder).items():
        assert torch.equal(_ending(folder)[name], tensor), name


def test_a_finished_run_is_left_alone(shards: Path, root: Path):
    config = _config("supervised", shards, root, "finished")
    train(settings_of(config), World())
    folder = settings_of(config).folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    train(settings_of(config), World())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over_for_the_older_one(shards: Path, root: Path):
    whole, broken = (_config("supervised", shards, root, f"{name}-damaged") for name in "ab")
    _train(World(), whole)
    _train(World(), broken, crash_at=9)
    newest = max((settings_of(broken).folder / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000008"
    weights = newest / "rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    _train(World(), broken)
    for name, tensor in _ending(settings_of(whole).folder).items():
        assert torch.equal(_ending(settings_of(broken).folder)[name], tensor), name


def test_another_number_of_samples_per_pass_is_refused(shards: Path, root: Path):
    config = _config("dc_distill", shards, root, "passes")
    _train(World(), config, crash_at=5)
    config["batch"] = {"global_batch": 16, "micro_batch": 4}
    with pytest.raises(ConfigError, match=r"16 samples per pass .* now there are 4.*--batch\.micro_batch 16"):
        train(settings_of(config), World())
