"""Volumes in batches: only what is cut is read, images and label map alike, the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distkd.base import UNLABELLED, Batch, World
from distkd.data.dataset import DataConfig, Dataset
from distkd.data.loader import eval_batches, train_batches
from distkd.data.plan import Plan
from distkd.data.shardset import ShardSet
from distkd.data.volumes import normalise_crop, volume_statistics
from distkd.errors import ConfigError, DataError, SampleError
from tests.data.toy_volumes import LARGEST, N_SAMPLES, VALUES, open_volumes, toy_volume, write_volumes

CUT = {"crop": (6, 4, 4)}
VARIED = {
    **CUT,
    "foreground": 0.5,
    "regions": {"et": [4], "wt": [1, 4]},
    "augment": {"flip": (0.5, 0.5, 0.5), "noise": 0.5},
}


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return open_volumes(tmp_path_factory.mktemp("volumes") / "set")


def dataset(
    shard_set: ShardSet, volume: dict[str, Any], *, modalities: tuple[str, ...] = ("flair", "t1"), **config: Any
):
    settings = DataConfig.model_validate({"volume": volume, "augment": {}, **config})
    return Dataset(shard_set, settings, list(modalities), seed=3)


def batches(data: Dataset, size: int = 1) -> list[list[Batch]]:
    """Of each step those of all ranks."""
    plan = Plan(len(data.train_label_N), 4, seed=3, epochs=2)
    ranks = [[made[0] for _, made in train_batches(data, plan, World(rank, size), 1)] for rank in range(size)]
    return [list(step) for step in zip(*ranks, strict=True)]


def test_every_value_comes_back_as_it_was_written(shard_set: ShardSet):
    assert len(shard_set) == N_SAMPLES
    for number in range(N_SAMPLES):
        shape, volumes = toy_volume(number)
        found = shard_set.read(number, ["flair", "t1", "seg", "age"])
        assert found.keys() == {*volumes, "age"}
        for name, volume in volumes.items():
            np.testing.assert_array_equal(found[name], volume[None])
        assert shard_set.manifest.samples.space[number].shape == shape  # pyright: ignore[reportOptionalMemberAccess]
        assert found["age"] == 40 + number
    shard_set.verify()


def test_the_zarr_library_reads_the_set(shard_set: ShardSet):
    import zarr

    group: Any = zarr.open_group(shard_set.folder / "volumes.zarr", mode="r")
    assert group["flair"].shape == (N_SAMPLES, 1, *LARGEST)
    for number in (0, 3):
        shape, volumes = toy_volume(number)
        x, y, z = shape
        for name in ("flair", "t1", "seg"):
            stored = np.zeros(LARGEST, dtype=np.int16)
            if name in volumes:
                stored[:x, :y, :z] = volumes[name]
            np.testing.assert_array_equal(group[name][number, 0], stored)


def test_evaluation_sees_the_normalised_centre(shard_set: ShardSet):
    data = dataset(shard_set, CUT)
    batch = data.batch(range(N_SAMPLES), epoch=0, train=False)
    assert batch.inputs["flair"].shape == (N_SAMPLES, 1, 6, 4, 4)
    for number in range(N_SAMPLES):
        (x, y, z), volumes = toy_volume(number)
        inside = tuple(slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip((x, y, z), (6, 4, 4), strict=True))
        for name in ("flair", "t1"):
            expected = np.zeros((6, 4, 4), dtype=np.float32)
            if name in volumes:
                expected = normalise_crop(volumes[name][inside], volume_statistics(volumes[name]), "zscore_nonzero")
            np.testing.assert_array_equal(batch.inputs[name][number, 0].numpy(), expected)
            assert batch.present[name][number] == (name in volumes)
        expected = (
            np.searchsorted(VALUES, volumes["seg"][inside]) if "seg" in volumes else np.full((6, 4, 4), UNLABELLED)
        )
        np.testing.assert_array_equal(batch.inputs["seg"][number].numpy(), expected)
    assert batch.inputs["seg"].dtype == torch.int64
    moved = batch.to(torch.device("cpu"), torch.float64)
    assert (moved.inputs["seg"].dtype, moved.inputs["t1"].dtype) == (torch.int64, torch.float64)


@pytest.mark.parametrize("threads", [0, 2])
def test_ranks_see_the_same_crops(shard_set: ShardSet, threads: int):
    whole = batches(dataset(shard_set, VARIED, threads=0, views=2))
    for size in (2, 4):
        for (one,), parts in zip(
            whole, batches(dataset(shard_set, VARIED, threads=threads, views=2), size), strict=True
        ):
            for view in range(2):
                for name, values in one.views[view].items():
                    assert torch.equal(torch.cat([part.views[view][name] for part in parts]), values), name
    assert not torch.equal(whole[0][0].views[0]["flair"], whole[0][0].views[1]["flair"])


def test_images_and_label_map_are_cut_alike(shard_set: ShardSet):
    """In flair a label adds 100 to 1..400, so enhancing voxels are the brightest."""
    data = dataset(shard_set, {**VARIED, "augment": {"flip": (0.5, 0.5, 0.5)}, "foreground": 1.0, "anywhere": False})
    bright: list[float] = []
    for (batch,) in batches(data):
        inside = batch.inputs["seg"] == 2
        if inside.any():
            flair = batch.inputs["flair"][:, 0]
            bright.append(float(flair[inside].mean() - flair[batch.inputs["seg"] == 0].mean()))
    assert len(bright) >= 3
    assert min(bright) > 0


def test_only_the_chunks_of_the_crop_are_read(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, tuple[int, ...]]] = []
    original = ShardSet.crop

    def watched(self: ShardSet, sample: int, name: str, start: Any, size: Any) -> np.ndarray:
        asked.append((name, tuple(size)))
        return original(self, sample, name, start, size)

    monkeypatch.setattr(ShardSet, "crop", watched)
    data = dataset(shard_set, CUT, threads=0)
    asked.clear()
    data.batch([0, 1], epoch=0, train=True)
    assert sorted(asked) == sorted([(name, (6, 4, 4)) for name in ("flair", "t1", "seg")] * 2)


def test_whole_volumes_of_other_sizes_are_filled_up(shard_set: ShardSet):
    batch = dataset(shard_set, {}).batch([0, 1], epoch=0, train=True)
    assert batch.inputs["flair"].shape == (2, 1, *LARGEST)
    assert (batch.inputs["flair"][0, 0, 9:] == 0).all()
    assert (batch.inputs["seg"][0, 9:] == 0).all()


def test_vectors_stand_beside_volumes(shard_set: ShardSet):
    batch = dataset(shard_set, CUT, modalities=("t1", "age")).batch([0, 3], epoch=0, train=False)
    assert set(batch.inputs) == {"t1", "age", "seg"}
    assert batch.inputs["age"].shape == (2, 1)
    assert (batch.inputs["t1"][1] == 0).all()


def test_evaluation_has_every_sample_once(shard_set: ShardSet):
    data = dataset(shard_set, CUT)
    seen = [batch.sample_B for rank in range(4) for batch in eval_batches(data, "test", World(rank, 4), 1)]
    assert sorted(torch.cat(seen).tolist()) == data.split_samples("test").tolist()


def test_a_flipped_byte_is_told_or_skipped(tmp_path: Path):
    shard_set = open_volumes(tmp_path / "set")
    number = shard_set.manifest.samples.file["flair"][2]
    assert number is not None
    path = shard_set.folder / shard_set.manifest.shards[number].file
    content = bytearray(path.read_bytes())
    content[40] ^= 4
    path.write_bytes(content)
    with pytest.raises(SampleError, match="'flair' of sample 'case-02'"):
        batches(dataset(ShardSet(tmp_path / "set"), {}))
    data = dataset(ShardSet(tmp_path / "set"), {}, on_error="skip", max_skipped=0.1)
    found = [batch.sample_B.tolist() for (batch,) in batches(data)]
    assert 2 not in {sample for step in found for sample in step}
    assert data.unreadable.replaced == 2


def test_a_damaged_chunk_is_replaced_alike_whoever_has_met_it(tmp_path: Path):
    """Only crops that touch it cannot be read; what another rank, or an earlier step, has seen must not matter."""
    write_volumes(tmp_path / "set", chunk=(1, 4, 4, 4))
    shard_set = ShardSet(tmp_path / "set")
    for sample in (1, 4, 6):
        number = shard_set.manifest.samples.file["flair"][sample]
        assert number is not None
        path = shard_set.folder / shard_set.manifest.shards[number].file
        content = bytearray(path.read_bytes())
        content[40] ^= 4
        path.write_bytes(content)

    def samples(size: int, start: int = 0) -> list[list[int]]:
        data = dataset(ShardSet(tmp_path / "set"), {"crop": (4, 4, 3)}, on_error="skip", max_skipped=0.5)
        plan = Plan(len(data.train_label_N), 4, seed=3, epochs=12)
        ranks = [list(train_batches(data_of(data), plan, World(rank, size), 1, start)) for rank in range(size)]
        return [[int(s) for rank in ranks for s in rank[step][1][0].sample_B] for step in range(plan.n_steps - start)]

    def data_of(data: Dataset) -> Dataset:
        return Dataset(ShardSet(data.folder), data.config, data.modalities, data.seed)

    whole = samples(1)
    assert any(sample in (1, 4, 6) for step in whole for sample in step)
    assert any(sorted(a + b) != list(range(8)) for a, b in zip(whole[::2], whole[1::2], strict=True))
    for size in (2, 4):
        assert samples(size) == whole
    assert samples(1, start=9) == whole[9:]


@pytest.mark.parametrize(
    ("modalities", "volume", "words"),
    [
        (("seg",), {}, "modality 'seg' is a target of the shard set, no input"),
        (("flair_stats",), {}, "modality 'flair_stats' is a aux of the shard set, no input"),
        (("flair",), {"slices": (2, 20)}, r"data\.volume\.slices=\(2, 20\) of a volume of 8 slices"),
        (("t2",), {}, "unknown modality 't2'"),
    ],
)
def test_what_is_no_input_is_refused(shard_set: ShardSet, modalities: Any, volume: Any, words: str):
    with pytest.raises((ConfigError, DataError), match=words):
        dataset(shard_set, volume, modalities=modalities)
