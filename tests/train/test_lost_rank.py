"""What one rank alone runs into: it says what it was, the others say that it is gone, and the run can go on."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from distkd.base import Batch, World
from distkd.data.dataset import Dataset
from distkd.errors import DataError, DistkdError
from distkd.metrics.jsonl import read_jsonl
from distkd.train.loop import train
from tests.laws.common import settings_of
from tests.small import Small


def _train(world: World, config: dict[str, Any], bad_step: int | None) -> tuple[str, str, bool]:
    """Train, while rank 1 cannot read a sample of `bad_step`; the error's type, its words, and whether it is local."""
    original, found = Dataset.batch, ("", "", False)

    def batch(self: Dataset, numbers: Any, **options: Any) -> Batch:
        if world.rank == 1 and options["train"] and options["step"] == bad_step:
            raise DataError("'slide' of sample 's-007' in shard 'toy-000000.tar' is cut off")
        return original(self, numbers, **options)

    Dataset.batch = batch  # type: ignore[method-assign]
    try:
        train(settings_of(config), world)
    except DistkdError as error:
        found = type(error).__name__, str(error), error.local
    finally:
        Dataset.batch = original  # type: ignore[method-assign]
    gc.collect()  # a process that ends closes its connections; one that lives on keeps them in the frames of the error
    return found


@pytest.mark.parametrize("norm", ["sync", "group"])  # noticed in a collective of ours, or in DDP's own
def test_one_rank_cannot_read_a_sample(ranks: Any, small: Small, tmp_path: Path, norm: str):
    run = {"root": str(tmp_path), "name": "run", "epochs": 3}
    config = small.config("picture", run=run, model={"norm": norm})
    # torch keeps the first group that a process gave to DDP until the process ends; in a pool that is one too long
    ranks(2).run(_train, config=small.config("alone", run={**run, "name": "first", "epochs": 1}), bad_step=None)
    first, second = ranks(2).run(_train, config=config, bad_step=4)
    assert first[0] == "LostRankError"
    assert first[1].startswith("rank 0 of 2: ")
    assert first[1].endswith("another rank died or stopped answering, start the run again to resume")
    assert not first[2]
    assert second == ("DataError", "'slide' of sample 's-007' in shard 'toy-000000.tar' is cut off", True)
    folder = tmp_path / "run"
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["state"], outcome["kind"], outcome["step"]) == ("failed", "lost_rank", 4)
    last = read_jsonl(folder / "events" / "rank-00001.jsonl")[-1]
    assert (last["event"], last["kind"], last["message"]) == ("failed", "data", second[1])
    assert ranks(2).run(_train, config=config, bad_step=None) == [("", "", False)] * 2
    assert json.loads((folder / "outcome.json").read_text())["state"] == "done"


def test_our_own_mistake_is_recorded_as_one(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def batch(*_: Any, **__: Any) -> Batch:
        raise ZeroDivisionError("a mistake of ours")

    config = small.config("alone", run={"root": str(tmp_path), "name": "run"})
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "batch", batch)
        with pytest.raises(ZeroDivisionError):
            train(settings_of(config), World())
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["state"], outcome["kind"], outcome["message"]) == ("failed", "internal", "a mistake of ours")
