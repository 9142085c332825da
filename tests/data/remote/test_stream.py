"""Streaming: the plan's order at any world size, shards there in time and gone after, resumed without what was."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from distkd.base import World
from distkd.data.config import DataConfig
from distkd.data.dataset import Dataset
from distkd.data.manifest import MANIFEST, Manifest
from distkd.data.remote.stream import StreamReader, StreamSource, eval_stream, samples_of_shards
from distkd.data.shardset import ShardSet
from distkd.data.splits import split_numbers
from distkd.data.stream_plan import StreamPlan
from distkd.errors import DataError
from tests.data.remote.common import open_store
from tests.data.remote.serve import Server
from tests.data.toy import toy_arrays, write_toy

EPOCHS, GLOBAL_BATCH, LANES = 2, 8, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Some dozens of shards of a few samples."""
    folder = tmp_path_factory.mktemp("stream") / "set"
    return folder, write_toy(folder, n_samples=96, shard_bytes=5_000)


@pytest.fixture
def server(made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server(made[0]) as running:
        yield running


def train_samples(manifest: Manifest) -> list[np.ndarray]:
    return samples_of_shards(manifest, split_numbers(manifest, 0, "train"))


def make_plan(samples: list[np.ndarray], buffer: int = 8) -> StreamPlan:
    counts = [len(numbers) for numbers in samples]
    return StreamPlan(counts, GLOBAL_BATCH, seed=3, epochs=EPOCHS, lanes=LANES, buffer=buffer)


def tars(server: Server) -> list[str]:
    return [name for name in server.asked if name != MANIFEST]


def test_samples_are_sorted_into_their_shards(made: tuple[Path, Manifest]):
    manifest = made[1]
    wanted = np.array([90, 3, 17, 4])
    found = samples_of_shards(manifest, wanted)
    assert len(found) == len(manifest.shards)
    for shard, numbers in enumerate(found):
        assert numbers.tolist() == sorted(s for s in wanted.tolist() if manifest.samples.shard[s] == shard)


def test_a_streamed_sample_is_the_stored_one_and_brings_its_shard_only(
    server: Server, made: tuple[Path, Manifest], tmp_path: Path
):
    with open_store(server.url, tmp_path) as store:
        reader = StreamReader(store)
        for sample in (5, 6, 80):
            found = reader.read(sample, reader.manifest.modalities)
            assert found.keys() == toy_arrays(sample).keys()
            for name, array in toy_arrays(sample).items():
                np.testing.assert_array_equal(found[name], array)
        shard = made[1].samples.shard
        assert set(tars(server)) == {made[1].shards[shard[sample]].file for sample in (5, 6, 80)}


def test_nothing_stays_in_use_after_a_read(server: Server, tmp_path: Path):
    with open_store(server.url, tmp_path) as store:
        reader = StreamReader(store)
        reader.read(0, ["slide"])
        held = store._cache._held
        assert [name.rpartition("/")[2] for name in held] == [MANIFEST]


def test_rows_are_read_from_many_shards(server: Server, tmp_path: Path):
    with open_store(server.url, tmp_path) as store:
        reader = StreamReader(store)
        samples = np.array([91, 0, 46, 1, 93])
        rows = np.empty((5, 5), dtype=np.float32)
        reader.read_rows("gene", samples, rows)
        np.testing.assert_array_equal(rows, np.stack([toy_arrays(int(sample))["gene"] for sample in samples]))


def test_a_reader_travels_and_forks(server: Server, tmp_path: Path):
    with open_store(server.url, tmp_path) as store:
        reader = StreamReader(store)
        other = pickle.loads(pickle.dumps(reader))
        np.testing.assert_array_equal(other.read(7, ["slide"])["slide"], toy_arrays(7)["slide"])
        other.store.close()


def test_a_dataset_makes_the_same_batches_of_it(server: Server, made: tuple[Path, Manifest], tmp_path: Path):
    with open_store(server.url, tmp_path) as store:
        config = DataConfig(threads=2)
        batches = [
            Dataset(shard_set, config, ["slide", "gene"], seed=1).batch([4, 60, 2], epoch=1, train=True)
            for shard_set in (StreamReader(store), ShardSet(made[0]))
        ]
        for name in ("slide", "gene"):
            assert batches[0].views[0][name].equal(batches[1].views[0][name])
        assert Dataset(StreamReader(store), config, ["gene"], seed=1).provenance()["task"] == "toy"


def test_a_file_damaged_in_the_cache_is_fetched_again_once(server: Server, tmp_path: Path):
    with open_store(server.url, tmp_path) as store:
        reader = StreamReader(store)
        path = store.path(0)
        place = reader.manifest.samples.bytes["slide"][0]
        assert place is not None
        with path.open("r+b") as file:
            file.seek(place[0] + 40)
            file.write(b"damage")
        np.testing.assert_array_equal(reader.read(0, ["slide"])["slide"], toy_arrays(0)["slide"])
        assert tars(server) == [path.name] * 2


def test_what_is_damaged_at_its_origin_is_named(made: tuple[Path, Manifest], tmp_path: Path):
    folder = Path(shutil.copytree(made[0], tmp_path / "set"))
    with open_store(f"file://{folder}", tmp_path / "cache") as store:
        reader = StreamReader(store)
        with (folder / made[1].shards[0].file).open("r+b") as file:
            file.seek(600)
            file.write(b"damage")
        with pytest.raises(DataError, match=rf"cannot fetch '{made[1].shards[0].file}' .* SHA-256 .*, manifest says"):
            reader.read(0, ["slide"])
        with pytest.raises(DataError, match="sample 96 is not in shard set"):
            reader.read(96, ["slide"])


def test_a_shard_that_cannot_be_fetched_is_asked_for_three_times(server: Server, tmp_path: Path):
    with open_store(server.url, tmp_path) as store:
        reader = StreamReader(store)
        name = reader.manifest.shards[0].file
        server.answers[name] = lambda handler, body, turn: handler.send_error(500)
        with pytest.raises(DataError, match=rf"cannot fetch '{name}' .* attempt 3 of 3: HTTP status 500"):
            reader.read(0, ["slide"])
        with pytest.raises(DataError, match=rf"cannot fetch '{name}' .* attempt 3 of 3: HTTP status 500"):
            reader.read_rows("gene", np.array([0]), np.empty((1, 5), dtype=np.float32))
    assert tars(server) == [name] * 6


def test_a_remote_set_is_not_verified_from_afar(server: Server, tmp_path: Path):
    with open_store(server.url, tmp_path) as store, pytest.raises(DataError, match=r"is remote: .* where the set lies"):
        StreamReader(store).verify()


@pytest.mark.parametrize("passes", [1, 2])
def test_global_batches_are_the_same_at_any_world_size(
    server: Server, made: tuple[Path, Manifest], tmp_path: Path, passes: int
):
    samples = train_samples(made[1])
    plan = make_plan(samples)
    runs: dict[int, list[list[int]]] = {}
    with open_store(server.url, tmp_path) as store:
        for size in (1, 2, 4):
            sources = [StreamSource(store, plan, samples, World(rank, size), passes) for rank in range(size)]
            steps = zip(*sources, strict=True)
            runs[size] = [
                list(chain.from_iterable(parts[number].tolist() for number in range(passes) for _, parts in ranks))
                for ranks in steps
            ]
    assert runs[1] == runs[2] == runs[4]
    assert len(runs[1]) == plan.n_steps
    epoch = list(chain.from_iterable(runs[1][: plan.steps_per_epoch]))
    assert len(epoch) == len(set(epoch)) == plan.steps_per_epoch * GLOBAL_BATCH
    assert set(epoch) <= set(np.concatenate(samples).tolist())
    assert epoch != list(chain.from_iterable(runs[1][plan.steps_per_epoch :]))


def test_a_step_s_shards_are_there_when_it_is_told(made: tuple[Path, Manifest], server: Server, tmp_path: Path):
    samples = train_samples(made[1])
    with open_store(server.url, tmp_path) as store:
        for _, parts in StreamSource(store, make_plan(samples), samples, World(), passes=2):
            for sample in np.concatenate(parts).tolist():
                assert (store.folder / made[1].shards[made[1].samples.shard[sample]].file).exists()
        assert [name.rpartition("/")[2] for name in store._cache._held] == [MANIFEST]
    assert len(tars(server)) == len(set(tars(server)))  # room for all of them: each once in the whole run


@pytest.mark.parametrize("size", [1, 2])
def test_resumed_in_mid_epoch_it_goes_on_and_fetches_what_is_needed_only(
    server: Server, made: tuple[Path, Manifest], tmp_path: Path, size: int
):
    samples = train_samples(made[1])
    plan, world = make_plan(samples), World(size - 1, size)
    start = plan.n_steps - 3
    with open_store(server.url, tmp_path / "whole") as store:
        whole = dict(StreamSource(store, plan, samples, world, passes=1))
    server.asked.clear()
    with open_store(server.url, tmp_path / "resumed") as store:
        resumed = dict(StreamSource(store, plan, samples, world, 1, start_step=start))
    assert list(resumed) == [start, start + 1, start + 2]
    for step, (part,) in resumed.items():
        np.testing.assert_array_equal(part, whole[step][0])
    needed = {made[1].samples.shard[sample] for (part,) in resumed.values() for sample in part.tolist()}
    window = plan.shards_ahead(start, world, 1000)  # of a window begun all that is left of it
    fetched = {int(name.removesuffix(".tar")[-6:]) for name in tars(server)}
    assert needed <= fetched <= needed | set(window)
    assert len(tars(server)) == len(fetched) < len(made[1].shards) / 2


def test_a_small_cache_is_enough_for_a_long_run(server: Server, made: tuple[Path, Manifest], tmp_path: Path):
    samples = train_samples(made[1])
    plan = make_plan(samples)
    with open_store(server.url, tmp_path) as store:
        store.manifest()
        room = sum(path.stat().st_size for path in tmp_path.rglob("*.json"))
    largest = max(shard.bytes for shard in made[1].shards)
    limit = room + GLOBAL_BATCH * largest  # what one step may touch at worst
    assert limit < room + sum(shard.bytes for shard in made[1].shards) / 2
    with open_store(server.url, tmp_path, limit, wait_s=240.0) as store:
        reader = StreamReader(store)
        for _, (part,) in StreamSource(store, plan, samples, World(), passes=1):
            for sample in part.tolist():
                np.testing.assert_array_equal(reader.read(sample, ["slide"])["slide"], toy_arrays(sample)["slide"])
            while (thread := store._ahead._thread) is not None:
                thread.join()  # otherwise files come and go while they are counted
            found = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".lock", ".part")]
            assert sum(path.stat().st_size for path in found) <= limit
        assert len(tars(server)) > len(set(tars(server)))  # what came back in the second epoch


def test_shards_behind_the_windows_are_released(server: Server, made: tuple[Path, Manifest], tmp_path: Path):
    samples = train_samples(made[1])
    plan = make_plan(samples, buffer=2)
    most = 0
    with open_store(server.url, tmp_path, ahead=1) as store:
        for _ in StreamSource(store, plan, samples, World(), passes=1):
            most = max(most, len(store._cache._held))
    assert most < np.count_nonzero(plan.count_S) * 0.6


def test_a_run_left_in_the_middle_releases_all(server: Server, made: tuple[Path, Manifest], tmp_path: Path):
    samples = train_samples(made[1])
    with open_store(server.url, tmp_path) as store:
        steps = iter(StreamSource(store, make_plan(samples), samples, World(), passes=1))
        next(steps)
        steps.close()
        while (thread := store._ahead._thread) is not None:
            thread.join()
        assert [name.rpartition("/")[2] for name in store._cache._held] == [MANIFEST]


def test_an_unreachable_shard_stops_the_step_that_needs_it(server: Server, made: tuple[Path, Manifest], tmp_path: Path):
    samples = train_samples(made[1])
    plan = make_plan(samples)
    last = plan.n_steps - 1
    lost = int(plan.local_places(last, 0, 1, World())[0][0])  # fetched ahead long before
    name = made[1].shards[lost].file
    first = next(step for step in range(plan.n_steps) if lost in plan.local_places(step, 0, 1, World())[0].tolist())
    server.answers[name] = lambda handler, body, turn: handler.send_error(403)
    seen: list[int] = []
    with open_store(server.url, tmp_path) as store:
        steps = iter(StreamSource(store, plan, samples, World(), 1))
        with pytest.raises(DataError, match=rf"cannot fetch '{name}' .* HTTP status 403 Forbidden"):
            seen.extend(step for step, _ in steps)
    assert server.asked.count(name) == 1
    assert seen == list(range(first))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_evaluation_reads_each_sample_on_one_rank(
    server: Server, made: tuple[Path, Manifest], tmp_path: Path, size: int
):
    wanted = split_numbers(made[1], 0, "test")
    samples = samples_of_shards(made[1], wanted)
    with open_store(server.url, tmp_path) as store:
        batches = [list(eval_stream(store, samples, World(rank, size), micro_batch=5)) for rank in range(size)]
        assert [name.rpartition("/")[2] for name in store._cache._held] == [MANIFEST]
    assert all(len(batch) == 5 for rank in batches for batch in rank[:-1])
    assert sorted(np.concatenate([batch for rank in batches for batch in rank]).tolist()) == sorted(wanted.tolist())
    needed = {made[1].shards[shard].file for shard, numbers in enumerate(samples) if len(numbers)}
    assert sorted(tars(server)) == sorted(needed)
