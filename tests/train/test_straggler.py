"""The rank that holds the others up shows in the metrics, by as much as it is slower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distkd.base import Batch, World
from distkd.data.dataset import Dataset
from distkd.metrics.jsonl import read_jsonl
from distkd.metrics.meters import HostTimeline
from distkd.train import tally
from distkd.train.loop import train
from tests.laws.common import law_config, settings_of


def _train(world: World, config: dict[str, Any], work: list[float]) -> None:
    """Nothing takes time on the clock of the phases but reading a batch: on each rank as much as `work` says."""
    now = [0.0]
    read = Dataset.batch

    def batch(self: Dataset, *arguments: Any, **options: Any) -> Batch:
        now[0] += work[world.rank]
        return read(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "batch", batch)
        patch.setattr(tally, "HostTimeline", lambda: HostTimeline(lambda: now[0]))
        train(settings_of(config), world)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        # twos: sums and quotients are exact
        ([0.25, 2.0], (1, 8.0)),
        ([0.5, 0.25, 4.0, 1.0], (2, 8.0)),
        ([0.5, 0.5], (0, 1.0)),
        ([0.5], None),
        ([0.0, 0.0], None),
    ],
    ids=["two", "four", "none slower", "alone", "no work"],
)
def test_a_slow_rank_is_named(
    ranks: Any, shards: Path, root: Path, tmp_path: Path, work: list[float], expected: tuple[int, float] | None
):
    # without threads a batch is made in the phase `data`, in which no rank waits for another
    config = law_config(
        "supervised", shards, root, run={"root": str(tmp_path), "epochs": 1, "log_every": 5}, data={"threads": 0}
    )
    ranks(len(work)).run(_train, config=config, work=work)
    lines = [line["timings"] for line in read_jsonl(settings_of(config).folder / "metrics.jsonl") if "timings" in line]
    assert len(lines) == 3
    named = {(line.get("straggler_rank"), line.get("straggler_index")) for line in lines}
    assert named == {expected or (None, None)}
