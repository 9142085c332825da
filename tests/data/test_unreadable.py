"""Samples that cannot be read: the run stops at them, or goes on without them, at any number of ranks alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distkd.base import World
from distkd.data.dataset import DataConfig, Dataset
from distkd.data.loader import eval_batches, train_batches
from distkd.data.plan import Plan
from distkd.data.shardset import ShardSet
from distkd.errors import DataError, SampleError
from tests.data.toy import write_toy

MODALITIES = ["gene", "slide"]


def damage(folder: Path, key: str, modality: str = "slide") -> None:
    """Flip a byte in the middle of a member."""
    manifest = ShardSet(folder).manifest
    sample = manifest.samples.key.index(key)
    place = manifest.samples.bytes[modality][sample]
    assert place is not None
    path = folder / manifest.shards[manifest.samples.shard[sample]].file
    content = bytearray(path.read_bytes())
    content[place[0] + place[1] // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy(tmp_path / "shards")
    return tmp_path / "shards"


def dataset(folder: Path, **config: Any) -> Dataset:
    return Dataset(ShardSet(folder), DataConfig.model_validate({"max_skipped": 0.1, **config}), MODALITIES, seed=3)


def key_of(data: Dataset, place: int, split: str = "train") -> str:
    return data.describe(int(data.split_samples(split)[place]))["key"]  # pyright: ignore[reportArgumentType]


def plan_of(data: Dataset) -> Plan:
    return Plan(n_samples=len(data.train_label_N), global_batch=8, seed=3, epochs=2)


def sequence(data: Dataset, size: int = 1, passes: int = 1) -> list[list[int]]:
    """The samples of every global batch, in order."""
    ranks = [list(train_batches(data, plan_of(data), World(rank, size), passes)) for rank in range(size)]
    return [
        [int(s) for number in range(passes) for rank in ranks for s in rank[step][1][number].sample_B]
        for step in range(len(ranks[0]))
    ]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("modality", MODALITIES)
def test_by_default_the_run_stops_and_names_it(folder: Path, threads: int, modality: str):
    key = next(key for key in (key_of(dataset(folder), place) for place in range(9)) if int(key[2:]) % 3 != 2)
    damage(folder, key, modality)
    with pytest.raises(SampleError, match=f"'{modality}' of sample '{key}' in shard 'toy-00000.\\.tar'"):
        sequence(dataset(folder, threads=threads))


def test_the_plans_next_sample_takes_its_place_on_any_number_of_ranks(folder: Path):
    whole = sequence(dataset(folder))
    data = dataset(folder)
    bad = {int(data.split_samples("train")[place]) for place in (4, 11)}
    for sample in bad:
        damage(folder, data.describe(sample)["key"])
    found = {
        (size, passes): sequence(dataset(folder, on_error="skip"), size, passes)
        for size, passes in [(1, 1), (2, 1), (4, 1), (2, 2)]
    }
    assert all(batches == found[1, 1] for batches in found.values())
    plan, train = plan_of(data), data.split_samples("train")
    for step, (before, after) in enumerate(zip(whole, found[1, 1], strict=True)):
        for slot, (was, now) in enumerate(zip(before, after, strict=True)):
            attempt = 0
            while int(train[plan.after(step, slot, attempt)]) in bad:
                attempt += 1
            assert now == int(train[plan.after(step, slot, attempt)])
            assert now == was or was in bad
    assert not bad & {sample for batch in found[1, 1] for sample in batch}


def test_what_is_replaced_is_counted_and_told_once(folder: Path, caplog: pytest.LogCaptureFixture):
    data = dataset(folder, on_error="skip")
    key = key_of(data, 0)
    met = sum(batch.count(int(data.split_samples("train")[0])) for batch in sequence(dataset(folder)))
    damage(folder, key)
    sequence(data)
    assert (data.unreadable.replaced, len(data.unreadable)) == (met, 1)
    news = data.unreadable.news()
    assert [data.describe(sample)["key"] for sample, _ in news] == [key]
    assert data.unreadable.news() == []
    assert [record.getMessage() for record in caplog.records] == [f"left out: {why}" for _, why in news]


def test_a_resumed_run_replaces_alike(folder: Path):
    damage(folder, key_of(dataset(folder), 2))
    whole = sequence(dataset(folder, on_error="skip"))
    data = dataset(folder, on_error="skip")
    rest = [batches[0].sample_B.tolist() for _, batches in train_batches(data, plan_of(data), World(), 1, start_step=3)]
    assert rest == whole[3:]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_leaves_it_out(folder: Path, size: int):
    data = dataset(folder, on_error="skip")
    damage(folder, key_of(data, 1, "test"))
    bad = int(data.split_samples("test")[1])
    ranks = [
        torch.cat([batch.sample_B for batch in eval_batches(data, "test", World(rank, size), 2)])
        for rank in range(size)
    ]
    seen = torch.cat(ranks).tolist()
    assert sorted(seen) == [s for s in data.split_samples("test").tolist() if s != bad]
    assert data.unreadable.untold() == [bad]


def test_a_vector_that_cannot_be_read_does_not_count_in_the_statistics(folder: Path):
    key = next(key for key in (key_of(dataset(folder), place) for place in range(9)) if int(key[2:]) % 3 != 2)
    expected = dataset(folder)
    numbers = [s for s in expected.split_samples("train") if expected.describe(int(s))["key"] != key]
    rows = [expected.shard_set.read(int(s), ["gene"]).get("gene") for s in numbers]
    damage(folder, key, "gene")
    found = dataset(folder, on_error="skip").preprocess.inputs["gene"]
    column = np.array([row[0] for row in rows if row is not None], dtype=np.float64)
    assert found.mean[0] == pytest.approx(column.mean())  # pyright: ignore[reportAttributeAccessIssue]


def test_too_many_stop_the_run_when_the_ranks_have_told_each_other(folder: Path):
    data = dataset(folder, on_error="skip", max_skipped=0.05)
    for place in (0, 1, 2):
        damage(folder, key_of(data, place))
    sequence(data)
    first, *others = data.unreadable.untold()
    data.unreadable.tell([[first], [first]])
    assert data.unreadable.untold() == others
    words = (
        r"3 samples cannot be read, data\.max_skipped=0\.05 of 48 allows 2; mend the shards, or set it to 0\.069; the"
    )
    with pytest.raises(DataError, match=words):
        data.unreadable.tell([[], others])


def test_one_sample_may_always_be_skipped(folder: Path):
    data = dataset(folder, on_error="skip", max_skipped=0.0)
    damage(folder, key_of(data, 0))
    sequence(data)
    data.unreadable.tell([data.unreadable.untold()])


def test_a_split_of_which_nothing_can_be_read_ends_in_words(folder: Path):
    data = dataset(folder, on_error="skip", max_skipped=0.9)
    for sample in data.split_samples("train"):
        damage(folder, data.describe(int(sample))["key"])
    with pytest.raises(DataError, match="no sample of the training split of fold 0 can be read in place of 's-0"):
        sequence(data)
    for sample in data.split_samples("train"):
        if data.shard_set.has("gene")[sample]:
            damage(folder, data.describe(int(sample))["key"], "gene")
    with pytest.raises(DataError, match="'gene' of no training sample of fold 0 can be read"):
        dataset(folder, on_error="skip", max_skipped=0.9)


def test_an_infinite_value_that_no_recipe_would_store_is_a_damaged_sample(folder: Path):
    key = next(key for key in (key_of(dataset(folder), place) for place in range(9)) if int(key[2:]) % 3 != 2)
    shard_set = ShardSet(folder)
    sample = shard_set.manifest.samples.key.index(key)
    place = shard_set.manifest.samples.bytes["gene"][sample]
    assert place is not None
    with (folder / shard_set.manifest.shards[shard_set.manifest.samples.shard[sample]].file).open("r+b") as file:
        file.seek(place[0] + place[1] - 4)
        file.write(np.float32(np.inf).tobytes())

    def unchecked(**config: Any) -> Dataset:
        settings = DataConfig.model_validate({"max_skipped": 0.1, **config})
        return Dataset(ShardSet(folder, check="never"), settings, MODALITIES, seed=3)

    with pytest.raises(SampleError, match=rf"'gene' of sample '{key}' in shard 'toy-00000.\.tar': .*infinite"):
        unchecked()
    data = unchecked(on_error="skip")
    assert sample not in {s for batch in sequence(data) for s in batch}
