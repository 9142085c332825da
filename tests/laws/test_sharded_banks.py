"""Laws 1 and 2 where banks are sharded: the numbers of replicated banks, and checkpoints for any other layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkd import methods
from distkd.train.rows import is_part
from tests.laws.common import (
    Trace,
    ending,
    equal_up_to,
    law_config,
    run_steps,
    train_until,
)

WITH_BANKS = [name for name in methods.available() if "bank" in methods.config_class(name).model_fields]


def _config(method: str, shards: Path, root: Path, placement: str, **overrides: Any) -> dict[str, Any]:
    config = law_config(method, shards, root, **overrides)
    return {**config, "method": {**config["method"], "bank": {"placement": placement, "check_every": 5}}}


def _whole(traces: list[Trace]) -> dict[str, Tensor]:
    """The state of a run, with sharded rows in their order."""
    state = dict(traces[0].state)
    for name in [name for name in state if name.endswith(("rows_ND", "written_N"))]:
        parts = [trace.state[name] for trace in traces]
        state[name] = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
        for rank, part in enumerate(parts):
            state[name][rank :: len(parts)] = part
    return state


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", WITH_BANKS)
def test_sharded_banks_learn_what_one_process_learns(ranks: Any, shards: Path, root: Path, method: str, size: int):
    [alone] = ranks(1).run(run_steps, config=_config(method, shards, root, "replicated"), steps=20)
    traces = ranks(size).run(run_steps, config=_config(method, shards, root, "sharded"), steps=20)
    for trace in traces:
        assert trace.losses == pytest.approx(alone.losses, abs=1e-9)
        equal_up_to(trace.weights, alone.weights, 1e-9)
    equal_up_to(_whole(traces), alone.state, 1e-9)


def _run(name: str) -> dict[str, Any]:
    return {"name": f"banks-{name}", "epochs": 2, "checkpoint_every": 4}


def test_a_killed_run_with_sharded_banks_ends_bit_equal(ranks: Any, shards: Path, root: Path):
    whole, broken = (_config("dc_distill", shards, root, "sharded", run=_run(name)) for name in ("whole", "broken"))
    ranks(2).run(train_until, config=whole)
    ranks(2).run(train_until, config=broken, crash_at=7)
    ranks(2).run(train_until, config=broken)
    expected, found = ending(whole), ending(broken)
    assert sum(map(is_part, expected)) == 2 * 4 * 2  # ranks, banks, rows and when they were written
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_run_goes_from_layout_to_layout(ranks: Any, shards: Path, root: Path):
    """One folder, four attempts at four layouts; what is learned is that of one that was left alone."""
    stays = _config("crd", shards, root, "replicated", run=_run("stays"))
    ranks(1).run(train_until, config=stays)
    for size, placement, crash_at in ((2, "sharded", 6), (4, "sharded", 10), (2, "replicated", 14), (4, "sharded", 18)):
        moves = _config("crd", shards, root, placement, run=_run("moves"))
        ranks(size).run(train_until, config=moves, crash_at=crash_at)
    moves = _config("crd", shards, root, "replicated", run=_run("moves"))
    ranks(1).run(train_until, config=moves)
    expected = ending(stays)
    equal_up_to(ending(moves), expected, 1e-9)
    assert not any(map(is_part, expected))
