"""Laws 1 and 2 under every engine: what DDP learns, killed and resumed, on other ranks, and from engine to engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distkd import methods
from distkd.base import World
from distkd.engines.deepspeed import DeepSpeedEngine
from tests.laws.common import ending, equal_up_to, law_config, settings_of, train_until

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "zero-0": {"name": "deepspeed", "zero_stage": 0},
    "zero-1": {"name": "deepspeed", "zero_stage": 1},
    "zero-2": {"name": "deepspeed", "zero_stage": 2},
    "zero-3": {"name": "deepspeed", "zero_stage": 3},
    "fsdp": {"name": "fsdp"},
}
FLOAT = 2e-4
"""Float32, Adam, 30 steps: gradients near zero are rounding, and Adam makes them as large as any other."""


def _train(world: World, config: dict[str, Any], crash_at: int | None = None) -> None:
    threshold = DeepSpeedEngine.keep_whole
    DeepSpeedEngine.keep_whole = 0  # stage 3 would keep weights as small as these whole
    try:
        train_until(world, config, crash_at)
    finally:
        DeepSpeedEngine.keep_whole = threshold


def _config(method: str, shards: Path, root: Path, name: str, engine: str, **overrides: Any) -> dict[str, Any]:
    run = {"name": f"engines-{method}-{name}", "epochs": 2, "checkpoint_every": 4}
    precise = {"precision": "fp32", **ENGINES[engine]}
    return law_config(method, shards, root, run=run, **{"eval": {"select": "best"}, "engine": precise, **overrides})


def _test_metrics(config: dict[str, Any]) -> dict[str, float]:
    return json.loads((settings_of(config).folder / "eval" / "test.json").read_text())["metrics"]


def _pairs() -> list[tuple[str, str]]:
    """Every method under an engine that spreads weights; under both where it asks more of them than a forward.

    Single steps of every method under every engine are in tests/engines. `crd` has its whole run under fsdp, which adds
    in DDP's order: its gradient norm is some 20, and the first ReLU that another rounding turns moves it by 1e-3.
    """
    both = ("dc_distill", "dc_teacher")
    others = [name for name in methods.available() if name not in both]
    pairs = [(name, engine) for name in both for engine in ("zero-3", "fsdp")]
    turns = {name: ("fsdp", "zero-3")[number % 2] for number, name in enumerate(others)}
    return pairs + [*(turns | {"crd": "fsdp"}).items()]


@pytest.mark.parametrize(("method", "engine"), _pairs())
def test_a_killed_run_ends_bit_equal_and_near_ddp(ranks: Any, shards: Path, root: Path, method: str, engine: str):
    """A whole run: steps, mean teacher, evaluation, selection of the best, checkpoints, export."""
    plain = _config(method, shards, root, "ddp", "ddp")
    whole, broken = (_config(method, shards, root, f"{engine}-{name}", engine) for name in ("whole", "broken"))
    ranks(2).run(_train, config=plain)
    ranks(2).run(_train, config=whole)
    ranks(2).run(_train, config=broken, crash_at=7)
    ranks(2).run(_train, config=broken)
    expected, found, reference = (ending(config) for config in (whole, broken, plain))
    assert found.keys() == expected.keys() == reference.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert _test_metrics(broken) == _test_metrics(whole)
    trained = {name: tensor for name, tensor in reference.items() if name.startswith(("trainable/", "state/"))}
    equal_up_to({name: expected[name] for name in trained}, trained, FLOAT)


def test_a_run_goes_from_engine_to_engine_and_from_world_to_world(ranks: Any, shards: Path, root: Path):
    """One folder, six attempts: the checkpoint belongs to none of them."""
    whole, moved = (_config("dc_distill", shards, root, name, "ddp") for name in ("stays", "moves"))
    ranks(2).run(_train, config=whole)
    way = [("ddp", 1, 5), ("zero-3", 2, 9), ("fsdp", 4, 13), ("zero-1", 1, 17), ("zero-2", 2, 21), ("fsdp", 1, None)]
    for engine, size, crash_at in way:
        config = {**moved, "engine": {**moved["engine"], **ENGINES[engine]}}
        ranks(size).run(_train, config=config, crash_at=crash_at)
    expected, found = ending(whole), ending(moved)
    assert found.keys() == expected.keys()
    trained = {name: tensor for name, tensor in expected.items() if name.startswith(("trainable/", "state/"))}
    equal_up_to({name: found[name] for name in trained}, trained, FLOAT)
    outcome = json.loads((settings_of(moved).folder / "outcome.json").read_text())
    assert (outcome["state"], outcome["attempt"]) == ("done", len(way))


@pytest.mark.parametrize("engine", ["zero-1", "zero-2", "zero-3"])
def test_accumulation_clipping_and_schedule_are_those_of_ddp(ranks: Any, shards: Path, root: Path, engine: str):
    changes = {
        "batch": {"global_batch": 16, "micro_batch": 4},
        "optim": {"clip": 0.5, "schedule": "cosine", "warmup_epochs": 0.5},
    }
    plain, other = (_config("logit_kd", shards, root, f"acc-{name}", name, **changes) for name in ("ddp", engine))
    ranks(2).run(_train, config=plain)
    ranks(2).run(_train, config=other)
    expected, found = ending(plain), ending(other)
    trained = {name: tensor for name, tensor in expected.items() if name.startswith("trainable/")}
    equal_up_to({name: found[name] for name in trained}, trained, FLOAT)


def test_fsdp_is_ddp_to_the_law_in_float64(ranks: Any, shards: Path, root: Path):
    changes = {"batch": {"global_batch": 16, "micro_batch": 4}, "optim": {"clip": 0.5}}
    configs = [
        _config("dc_distill", shards, root, f"64-{name}", name, **changes)
        | {"engine": {"precision": "fp64", "device": "cpu", **ENGINES[name]}}
        for name in ("ddp", "fsdp")
    ]
    for config in configs:
        ranks(2).run(_train, config=config)
    expected, found = (ending(config) for config in configs)
    equal_up_to(found, expected, 1e-9)
