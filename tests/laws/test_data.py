"""Laws 1 to 3 for what data may be: streams, balanced draws, damaged samples, coarse copies, images made late."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from distkd.base import World
from distkd.data.loader import train_batches
from distkd.data.remote.stream import StreamReader
from distkd.data.shardset import ShardSet
from distkd.errors import ConfigError, DataError
from distkd.metrics.meters import Stopwatch
from distkd.train.job import assemble
from distkd.train.loop import train, train_step
from tests.data.test_unreadable import damage
from tests.data.toy import write_toy
from tests.laws.common import ending, equal_up_to, law_config, run_steps, settings_of, train_until
from tests.laws.test_one_backward import Asked

DAMAGED = {"s-005", "s-040", "s-041", "s-077"}
STREAM = {"lanes": 4, "buffer": 12}
VARIED: dict[str, Any] = {
    "hflip": 0.5, "crop": 8, "rotation": 30, "scale": [0.9, 1.1], "shift": [0.1, 0], "affine_probability": 0.5,
    "warps": "successive", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "jitter_order": "random",
    "jitter_probability": 0.5,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "folder in a stream": {"access": "stream", "stream": STREAM},
    "url": {"access": "stream", "stream": STREAM},
    "oversample": {"balance": "oversample"},
    "damaged": {"on_error": "skip", "max_skipped": 0.1},
    "warped": {"augment": {"rotation": 30, "scale": [0.9, 1.1], "affine_probability": 0.5, "jitter_order": "random"}},
    "on the device": {"transform_on": "device", "augment": VARIED},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("law") / "shards"
    write_toy(folder, n_samples=96, shard_bytes=12_000)
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("law") / "damaged"
    write_toy(folder, n_samples=96, shard_bytes=12_000)
    for key in DAMAGED:
        damage(folder, key)
    return folder


def config_of(kind: str, toy: Path, damaged: Path, root: Path, **run: Any) -> dict[str, Any]:
    """A student of a coarse copy, which is made of the same image as its teacher's."""
    place = f"file://{toy}" if kind == "url" else str(damaged if kind == "damaged" else toy)
    config = law_config("supervised", toy, root, run={"epochs": 4, "log_every": 2, "checkpoint_every": 4, **run})
    config["model"] = {
        "modalities": ["gene", "coarser"],
        "encoders": {"coarser": {"name": "cnn", "widths": [4, 6]}},
        "feature_dim": 6,
        "norm": "sync",
    }
    degraded = {"coarser": {"of": "slide", "factor": 2, "restore": False}}
    data = {"augment": {"hflip": 0.5}, **KINDS[kind], "shards": place, "degraded": degraded}
    cache = {"cache": str(root / "cache"), "cache_gib": 0.01}
    config["data"] = data | ({"stream": {**STREAM, **cache}} if kind == "url" else {})
    config["batch"] = {"global_batch": 8}
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_one_two_and_four_ranks_take_the_same_steps(ranks: Any, toy: Path, damaged: Path, tmp_path: Path, kind: str):
    config = config_of(kind, toy, damaged, tmp_path)
    (one,) = ranks(1).run(run_steps, config=config, steps=20)
    assert len({sample for step in one.samples for sample in step}) > 30
    for size in (2, 4):
        traces = ranks(size).run(run_steps, config=config, steps=20)
        together = [[sample for rank in traces for sample in rank.samples[step]] for step in range(20)]
        assert together == one.samples
        for trace in traces:
            equal_up_to(trace.weights, one.weights, 1e-9)


@pytest.mark.parametrize("kind", ["url", "damaged", "on the device"])
def test_a_killed_run_ends_bit_equal(ranks: Any, toy: Path, damaged: Path, tmp_path: Path, kind: str):
    whole, broken = (config_of(kind, toy, damaged, tmp_path, name=name) for name in ("whole", "broken"))
    ranks(2).run(train_until, config=whole)
    ranks(2).run(train_until, config=broken, crash_at=9)
    ranks(2).run(train_until, config=broken)
    expected, found = (ending(config) for config in (whole, broken))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    if kind == "damaged":
        told_in_metrics_and_events(settings_of(whole).folder, damaged)


def test_host_and_device_begin_alike(toy: Path, damaged: Path, tmp_path: Path):
    losses = []
    for where in ("host", "device"):
        config = config_of("on the device", toy, damaged, tmp_path)
        config["data"]["transform_on"] = where
        losses.append(run_steps(World(), config=config, steps=2).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # the host rounds images to float32
    assert losses[0] != losses[1]


def test_no_step_asks_the_device_on_which_images_are_made(toy: Path, damaged: Path, tmp_path: Path):
    job = assemble(settings_of(config_of("on the device", toy, damaged, tmp_path)), World())
    job.method.trainable.train()
    with closing(train_batches(job.dataset, job.plan, World(), 1, 0)) as batches:
        train_step(job, next(batches)[1], Stopwatch())
        _, passes = next(batches)
    assert passes[0].pending is not None
    with Asked() as asked:
        train_step(job, passes, Stopwatch())
    assert asked.found == []


def told_in_metrics_and_events(folder: Path, damaged: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    replaced = [line["replaced"] for line in lines if "replaced" in line]
    assert replaced == sorted(replaced)
    assert replaced[-1] >= 4
    events = [json.loads(line) for path in (folder / "events").iterdir() for line in path.read_text().splitlines()]
    assert {event["sample"] for event in events if event["event"] == "unreadable"} == DAMAGED
    left_out = 0
    for split in ("val", "test"):
        notes = json.loads((folder / "eval" / f"{split}.json").read_text())["levels"]["sample"]["notes"]
        left_out += sum(int(note.split()[0]) for note in notes if "cannot be read and are left out" in note)
    samples, fold = ShardSet(damaged).manifest.samples, ShardSet(damaged).manifest.folds[0]
    held_out = {key for key, patient in zip(samples.key, samples.patient, strict=True) if patient not in fold.train}
    assert left_out == len(DAMAGED & held_out) > 0


def _fetched(world: World, config: dict[str, Any]) -> int:
    job = assemble(settings_of(config), world)
    for _ in train_batches(job.dataset, job.plan, world, job.passes, 0):
        pass
    reader = job.dataset.shard_set
    assert isinstance(reader, StreamReader)
    return reader.store.n_fetched


def test_each_shard_is_fetched_once_a_node(ranks: Any, toy: Path, damaged: Path, tmp_path: Path):
    config = config_of("url", toy, damaged, tmp_path)
    shards = {shard for shard, patient in _training(toy)}
    assert sum(ranks(2).run(_fetched, config=config)) == len(shards) + 1  # the manifest, too


def _training(folder: Path) -> set[tuple[int, str]]:
    manifest = ShardSet(folder).manifest
    pairs = zip(manifest.samples.shard, manifest.samples.patient, strict=True)
    return {(shard, patient) for shard, patient in pairs if patient in manifest.folds[0].train}


def test_too_many_stop_all_ranks_alike(ranks: Any, toy: Path, damaged: Path, tmp_path: Path):
    config = config_of("damaged", toy, damaged, tmp_path, name="too-many")
    config["data"]["max_skipped"] = 0.02
    one, other = ranks(2).run(_failure, config=config)
    assert one == other
    assert one.startswith("one says: ")
    assert "samples cannot be read, data.max_skipped=0.02 of 96 allows 1; mend the shards, or set it to 0.0" in one


def _failure(world: World, config: dict[str, Any]) -> str:
    try:
        train(settings_of(config), world)
    except DataError as error:
        return f"{'each' if error.local else 'one'} says: {str(error).partition('; the last')[0]}"
    return "it trained"


def test_another_shard_set_is_refused_at_a_resume(toy: Path, damaged: Path, tmp_path: Path):
    """The same keys in the same splits, but other labels."""
    config = config_of("oversample", toy, damaged, tmp_path)
    train_until(World(), config, crash_at=9)
    other = tmp_path / "other"
    shutil.copytree(toy, other)
    content = json.loads((other / "manifest.json").read_text())
    content["samples"]["label"] = [1 - label for label in content["samples"]["label"]]
    (other / "manifest.json").write_text(json.dumps(content))
    config["data"]["shards"] = str(other)
    with pytest.raises(ConfigError, match=r"was trained on another shard set than .*other is now: labels, order or"):
        train_until(World(), config)
