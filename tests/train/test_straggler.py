"""The rank that holds the others up shows in the metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from distkd.base import Batch, World
from distkd.data.dataset import Dataset
from distkd.metrics.jsonl import read_jsonl
from distkd.train.loop import train
from distkd.train.tally import _straggler
from tests.laws.common import law_config, settings_of


def _train(world: World, config: dict[str, Any], slow: int) -> None:
    """One rank reads its data slowly; the others wait for it in their collectives."""
    original = Dataset.batch

    def batch(self: Dataset, *arguments: Any, **options: Any) -> Batch:
        if world.rank == slow:
            time.sleep(0.2)  # the injected fault
        return original(self, *arguments, **options)

    Dataset.batch = batch  # type: ignore[method-assign]
    try:
        train(settings_of(config), world)
    finally:
        Dataset.batch = original  # type: ignore[method-assign]


def test_a_slow_rank_is_named(ranks: Any, shards: Path, root: Path):
    run = {"name": "straggler", "epochs": 1, "log_every": 5}
    config = law_config("dc_distill", shards, root, run=run)
    ranks(2).run(_train, config=config, slow=1)
    lines = [line["timings"] for line in read_jsonl(settings_of(config).folder / "metrics.jsonl") if "timings" in line]
    assert len(lines) == 3
    assert {line["straggler_rank"] for line in lines} == {1}
    assert all(line["straggler_index"] > 1.1 for line in lines)


def test_the_index_is_work_over_the_median():
    assert _straggler([1.0, 1.0, 3.0, 1.0]) == {"straggler_rank": 2, "straggler_index": 3.0}
    assert _straggler([1.0]) == {}
    assert _straggler([0.0, 0.0]) == {}
