"""The rank that holds the others up shows in the metrics, by as much as it is slower."""

from __future__ import annotations

import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from distkd.base import Batch, World
from distkd.data.dataset import Dataset
from distkd.engines import DDPEngine
from distkd.metrics.jsonl import read_jsonl
from distkd.metrics.meters import HostTimeline
from distkd.train import tally
from distkd.train.loop import train
from tests.laws.common import law_config, settings_of


def _train(world: World, config: dict[str, Any], work: list[float], together: float) -> None:
    """Nothing takes time on the clock of the phases but reading a batch, on each rank as much as `work` says.

    Args:
        together: where more than 0, the backward takes so long after the slowest rank has come to it.
    """
    now = [0.0]
    read, backward = Dataset.batch, DDPEngine.backward

    def batch(self: Dataset, *arguments: Any, **options: Any) -> Batch:
        now[0] += work[world.rank]
        return read(self, *arguments, **options)

    def waiting(self: DDPEngine, loss: Tensor) -> None:
        backward(self, loss)
        if together:
            now[0] += max(work) - work[world.rank] + together

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "batch", batch)
        patch.setattr(DDPEngine, "backward", waiting)
        patch.setattr(tally, "HostTimeline", lambda: HostTimeline(lambda: now[0]))
        train(settings_of(config), world)


def _sleep(world: World, config: dict[str, Any], slow: int, seconds: float) -> None:
    """A rank whose disk is slow."""
    read = Dataset.batch

    def batch(self: Dataset, *arguments: Any, **options: Any) -> Batch:
        if world.rank == slow:
            time.sleep(seconds)
        return read(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "batch", batch)
        train(settings_of(config), world)


def _named(config: dict[str, Any]) -> list[tuple[int | None, float | None]]:
    """At each reading."""
    lines = [line["timings"] for line in read_jsonl(settings_of(config).folder / "metrics.jsonl") if "timings" in line]
    return [(line.get("straggler_rank"), line.get("straggler_index")) for line in lines]


@pytest.mark.parametrize(
    ("work", "together", "expected"),
    [
        # twos: sums and quotients are exact. Where nobody waits, a step is no less than the median's own work
        ([0.25, 2.0], 0.0, (1, 8.0)),
        ([0.5, 0.25, 4.0, 1.0], 0.0, (2, 8.0)),
        ([0.5, 0.5], 0.0, (0, 1.0)),
        ([0.5], 0.0, None),
        ([0.0, 0.0], 0.0, None),
        # eight times the median's data, and a step twice as long as without it
        ([0.25, 2.0], 1.5, (1, 2.0)),
        ([0.5, 0.25, 4.0, 1.0], 1.25, (2, 3.0)),
        ([0.0, 0.5], 2.0, (1, 1.25)),
    ],
    ids=["two", "four", "none slower", "alone", "no work", "two that wait", "four that wait", "no work but one's"],
)
def test_a_slow_rank_is_named(
    ranks: Any,
    shards: Path,
    root: Path,
    tmp_path: Path,
    work: list[float],
    together: float,
    expected: tuple[int, float] | None,
):
    # without threads a batch is made in the phase `data`, in which no rank waits for another
    config = law_config(
        "supervised", shards, root, run={"root": str(tmp_path), "epochs": 1, "log_every": 5}, data={"threads": 0}
    )
    ranks(len(work)).run(_train, config=config, work=work, together=together)
    named = _named(config)
    assert len(named) == 3
    assert set(named) == {expected or (None, None)}


ENGINES = [{"name": "ddp"}, {"name": "fsdp"}]
if find_spec("deepspeed") is not None:
    ENGINES += [{"name": "deepspeed", "precision": "fp32", "zero_stage": stage} for stage in (2, 3)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine['name']}{engine.get('zero_stage', '')}")
def test_who_waits_for_a_slow_rank_is_not_named(
    ranks: Any, shards: Path, root: Path, tmp_path: Path, engine: dict[str, Any]
):
    """Where weights are gathered the fast rank waits in its forward or in its update.

    Other work on the machine holds either rank up now and then. A rank that is slow by enough stands out from that,
    whereas one that waits for it would have the same index, however slow that is.
    """
    tried: list[list[tuple[int | None, float | None]]] = []
    for seconds in (0.25, 1.0, 4.0):
        run = {"root": str(tmp_path / f"{seconds}"), "epochs": 1, "log_every": 5}
        config = law_config("supervised", shards, root, run=run, data={"threads": 0}, engine=engine)
        ranks(2).run(_sleep, config=config, slow=1, seconds=seconds)
        tried.append(_named(config))
        assert len(tried[-1]) == 3
        is_named = {rank for rank, _ in tried[-1]} == {1}
        if is_named and statistics.median(index or 0.0 for _, index in tried[-1]) > 1.5:
            return
    pytest.fail(f"named as slow, with its index, at each reading: {tried}")
