"""The loader: the plan's batches in the plan's order at any world size, and a thread that never outlives its use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from distkd.base import World
from distkd.data.dataset import DataConfig, Dataset
from distkd.data.loader import eval_batches, train_batches
from distkd.data.plan import Plan
from distkd.data.shardset import ShardSet
from distkd.errors import DataError


@pytest.fixture(params=[0, 2], ids=["inline", "threaded"])
def data(request: pytest.FixtureRequest, toy: ShardSet) -> Iterator[Dataset]:
    config = DataConfig.model_validate(
        {"views": 2, "threads": request.param, "augment": {"hflip": 0.5, "vector_noise": 0.1}}
    )
    yield Dataset(toy, config, ["gene", "slide"], seed=5)
    assert not [thread for thread in threading.enumerate() if thread.name == "distkd-batches"]


def plan_of(data: Dataset, epochs: int = 2) -> Plan:
    return Plan(n_samples=len(data.train_label_N), global_batch=8, seed=5, epochs=epochs)


def test_steps_come_in_order_with_the_plans_samples(data: Dataset):
    plan = plan_of(data)
    train = data.split_samples("train")
    steps = list(train_batches(data, plan, World(), passes=2))
    assert [step for step, _ in steps] == list(range(plan.n_steps))
    for step, batches in steps:
        assert len(batches) == 2
        seen = torch.cat([batch.index_B for batch in batches])
        assert seen.tolist() == plan.global_positions(step).tolist()
        assert torch.cat([batch.sample_B for batch in batches]).tolist() == train[seen].tolist()
        assert {(b.step, b.epoch, b.progress) for b in batches} == {(step, plan.epoch_of(step), step / plan.n_steps)}


@pytest.mark.parametrize(("size", "passes"), [(2, 1), (2, 2), (4, 1), (1, 4)])
def test_the_global_batch_is_the_same_at_any_world_size(data: Dataset, size: int, passes: int):
    plan = plan_of(data, epochs=1)
    whole = [batches[0] for _, batches in train_batches(data, plan, World(), passes=1)]
    ranks = [list(train_batches(data, plan, World(rank, size), passes)) for rank in range(size)]
    for step, expected in enumerate(whole):
        parts = [ranks[rank][step][1][number] for number in range(passes) for rank in range(size)]
        for view in range(2):
            for name in ("gene", "slide"):
                assert torch.equal(torch.cat([part.views[view][name] for part in parts]), expected.views[view][name])
        assert torch.equal(torch.cat([part.key_B for part in parts]), expected.key_B)
        assert torch.equal(torch.cat([part.label_B for part in parts]), expected.label_B)


def test_a_later_start_is_the_rest_of_the_run(data: Dataset):
    plan = plan_of(data)
    whole = list(train_batches(data, plan, World(), passes=1))
    rest = list(train_batches(data, plan, World(), passes=1, start_step=4))
    assert [step for step, _ in rest] == [step for step, _ in whole[4:]]
    for (_, one), (_, other) in zip(rest, whole[4:], strict=True):
        assert torch.equal(one[0].views[1]["slide"], other[0].views[1]["slide"])


def test_closing_ends_the_thread(data: Dataset):
    with closing(train_batches(data, plan_of(data, epochs=50), World(), passes=1)) as batches:  # pyright: ignore[reportArgumentType]
        assert next(batches)[0] == 0
    with pytest.raises(StopIteration):
        next(batches)


def test_a_failure_in_the_thread_is_raised_where_batches_are_used(data: Dataset, monkeypatch: pytest.MonkeyPatch):
    make = data.batch

    def failing(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("step") == 3:
            raise DataError("shard is gone")
        return make(*args, **kwargs)

    monkeypatch.setattr(data, "batch", failing)
    seen: list[int] = []
    with pytest.raises(DataError, match="shard is gone"):
        seen.extend(step for step, _ in train_batches(data, plan_of(data), World(), passes=1))
    assert seen in ([], [0, 1, 2])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_evaluation_sees_each_sample_once_at_any_world_size(data: Dataset, size: int):
    seen = [
        batch.sample_B for rank in range(size) for batch in eval_batches(data, "test", World(rank, size), micro_batch=3)
    ]
    assert sorted(torch.cat(seen).tolist()) == data.split_samples("test").tolist()
    assert all(len(samples) <= 3 for samples in seen)


def test_an_empty_share_gives_no_batch(data: Dataset):
    assert list(eval_batches(data, "val", World(60, 64), micro_batch=4)) == []
