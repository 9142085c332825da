"""The dataset: rows, labels and views of a batch are functions of the sample, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distkd.base import UNLABELLED, Batch, InputSpec
from distkd.data.dataset import DataConfig, Dataset
from distkd.data.manifest import Fold
from distkd.data.shardset import ShardSet
from distkd.data.splits import choose_labelled
from distkd.errors import ConfigError, DataError
from distkd.ops.draws import integer_key
from tests.data.toy import open_toy

ALL = ["gene", "slide", "coarse"]
AUGMENT: dict[str, Any] = {"hflip": 0.5, "vflip": 0.5, "crop": 0.5, "brightness": 0.2, "hue": 0.05, "vector_noise": 0.1}


def dataset(toy: ShardSet, modalities: list[str] | None = None, *, seed: int = 3, **config: Any) -> Dataset:
    return Dataset(toy, DataConfig.model_validate(config), modalities or ALL, seed)


def assert_equal(one: Batch, other: Batch) -> None:
    assert len(one.views) == len(other.views)
    for view, other_view in zip(one.views, other.views, strict=True):
        for name in view:
            assert torch.equal(view[name], other_view[name]), name
    for field in ("label_B", "index_B", "sample_B", "key_B"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


def test_rows_are_places_in_the_training_list(toy: ShardSet):
    data = dataset(toy)
    train = data.split_samples("train")
    batch = data.batch(train[[4, 0, 7]], epoch=0, train=True)
    assert batch.index_B.tolist() == [4, 0, 7]
    assert batch.sample_B.tolist() == train[[4, 0, 7]].tolist()
    assert (data.batch(data.split_samples("test"), epoch=0, train=False).index_B == -1).all()
    assert data.train_label_N.tolist() == [toy.manifest.samples.label[i] for i in train]


def test_splits_are_those_of_the_fold(toy: ShardSet):
    data = dataset(toy, fold=2)
    for split in ("train", "val", "test"):
        patients = {toy.manifest.samples.patient[i] for i in data.split_samples(split)}
        assert patients == set(toy.manifest.folds[2].patients(split))
    with pytest.raises(ConfigError, match="unknown split 'dev'; available: train, val, test"):
        data.split_samples("dev")  # pyright: ignore[reportArgumentType]


def test_keys_are_the_hash_of_seed_epoch_and_sample(toy: ShardSet):
    batch = dataset(toy, seed=9).batch([3, 11], epoch=2, train=True, step=5, progress=0.25)
    assert batch.key_B.tolist() == [integer_key(9, 2, 3), integer_key(9, 2, 11)]
    assert (batch.seed, batch.step, batch.epoch, batch.progress) == (9, 5, 2, 0.25)


@pytest.mark.parametrize("train", [True, False])
def test_a_sample_is_the_same_in_any_batch(toy: ShardSet, train: bool):
    data = dataset(toy, views=2, augment=AUGMENT)
    numbers = data.split_samples("train")
    whole = data.batch(numbers, epoch=1, train=train)
    for place in (0, 5, len(numbers) - 1):
        alone = data.batch(numbers[place : place + 1], epoch=1, train=train)
        for view, alone_view in zip(whole.views, alone.views, strict=True):
            for name in ALL:
                assert torch.equal(view[name][place], alone_view[name][0])


@pytest.mark.parametrize("change", [{"threads": 0}, {"threads": 3}, {"cache_mib": 0}])
def test_threads_and_cache_change_nothing(toy: ShardSet, change: dict[str, Any]):
    expected, found = dataset(toy, views=2, augment=AUGMENT), dataset(toy, views=2, augment=AUGMENT, **change)
    for epoch in range(2):  # the second comes from the cache
        numbers = expected.split_samples("train")
        assert_equal(found.batch(numbers, epoch=epoch, train=True), expected.batch(numbers, epoch=epoch, train=True))


def test_views_and_epochs_differ_in_training_and_evaluation_has_one(toy: ShardSet):
    data = dataset(toy, views=3, augment=AUGMENT)
    numbers = data.split_samples("train")
    first, second = data.batch(numbers, epoch=0, train=True), data.batch(numbers, epoch=1, train=True)
    assert len(first.views) == 3
    for name in ALL:
        assert not torch.equal(first.views[0][name], first.views[1][name])
        assert not torch.equal(first.views[0][name], second.views[0][name])
    one, other = (data.batch(numbers, epoch=epoch, train=False) for epoch in (0, 1))
    assert len(one.views) == 1
    assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in ALL)


def test_a_missing_modality_is_zero_and_not_present(toy: ShardSet):
    batch = dataset(toy, augment={"vector_noise": 1.0}).batch(range(12), epoch=0, train=True)
    assert batch.present["gene"].tolist() == [number % 3 != 2 for number in range(12)]
    assert (batch.inputs["gene"][~batch.present["gene"]] == 0).all()
    assert (batch.inputs["gene"][batch.present["gene"]] != 0).any(dim=1).all()
    assert batch.present["slide"].all()


def test_batches_are_float32_of_the_promised_shapes(toy: ShardSet):
    data = dataset(toy, augment={"crop": {"slide": 8}})
    assert data.input_specs == {
        "gene": InputSpec("vector", (5,)),
        "slide": InputSpec("image", (3, 8, 8)),
        "coarse": InputSpec("image", (1, 6, 5)),
    }
    batch = data.batch([0, 1], epoch=0, train=True)
    for name, spec in data.input_specs.items():
        assert batch.inputs[name].dtype == torch.float32
        assert batch.inputs[name].shape == (2, *spec.shape)


def test_statistics_come_from_the_training_samples_alone(toy: ShardSet):
    data = dataset(toy)
    batch = data.batch(data.split_samples("train"), epoch=0, train=False)
    there = batch.inputs["gene"][batch.present["gene"]]
    np.testing.assert_allclose(there.mean(dim=0), 0, atol=1e-5)
    np.testing.assert_allclose(there[:, :4].std(dim=0, correction=0), 1, atol=1e-5)
    assert data.preprocess.to_dict() != dataset(toy, fold=1).preprocess.to_dict()


def test_hidden_labels_are_hidden_in_training_only(toy: ShardSet):
    data = dataset(toy, labelled=6)
    train = data.split_samples("train")
    assert (data.train_label_N != UNLABELLED).sum() == 6
    assert data.batch(train, epoch=0, train=True).label_B.tolist() == data.train_label_N.tolist()
    truth = [toy.manifest.samples.label[i] for i in train]
    assert data.batch(train, epoch=0, train=False).label_B.tolist() == truth
    test = data.split_samples("test")
    assert data.batch(test, epoch=0, train=False).label_B.tolist() == [toy.manifest.samples.label[i] for i in test]


def test_samples_without_a_label_have_none(tmp_path: Path):
    data = dataset(open_toy(tmp_path / "shards", n_samples=96, unlabelled=True))
    hidden = data.train_label_N == UNLABELLED
    assert 0 < hidden.sum() < len(hidden)
    assert dataset(data.shard_set, labelled=int((~hidden).sum())).train_label_N.tolist() == data.train_label_N.tolist()


@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    unknown=st.integers(0, 9),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_labels_are_kept_by_class_shares_and_nested(counts: list[int], unknown: int, seed: int, data: st.DataObject):
    label_N = np.repeat([*range(len(counts)), UNLABELLED], [*counts, unknown])
    sample_N = np.arange(len(label_N)) * 3
    more = data.draw(st.integers(1, sum(counts)))
    fewer = data.draw(st.integers(1, more))
    kept = choose_labelled(label_N, sample_N, more, seed)
    assert kept.sum() == more
    assert not kept[label_N == UNLABELLED].any()
    assert kept[choose_labelled(label_N, sample_N, fewer, seed)].all()
    if more >= len(counts):
        for label, count in enumerate(counts):
            share = more * count / sum(counts)
            assert max(1, share - len(counts)) <= kept[label_N == label].sum() <= share + 1 + len(counts)


def test_the_choice_of_labels_follows_the_seed():
    label_N, sample_N = np.repeat([0, 1], 50), np.arange(100)
    assert (choose_labelled(label_N, sample_N, 20, 0) != choose_labelled(label_N, sample_N, 20, 1)).any()
    assert choose_labelled(label_N, sample_N, 20, 0)[:50].sum() == 10


def test_impossible_numbers_of_labels_are_refused(toy: ShardSet):
    with pytest.raises(
        DataError, match=r"data\.labelled=999, the fold has \d+ labelled training samples; use at most that"
    ):
        dataset(toy, labelled=999)
    with pytest.raises(DataError, match=r"data\.labelled=1 leaves no label of class 'high' in fold 0; use at least 2"):
        dataset(toy, labelled=1)


def test_a_sample_can_be_described(toy: ShardSet):
    data = dataset(toy)
    assert data.describe(4) == {"key": "s-004", "patient": "p2", "group": "p2-r0", "label": 0}
    assert data.describe(3)["group"] is None


def test_it_says_where_its_samples_come_from(toy: ShardSet):
    data = dataset(toy, labelled=6)
    found = data.provenance()
    assert found["samples"] == {"train": 24, "val": 8, "test": 16}
    assert (found["task"], found["fold"], found["labelled"], found["licence"]) == ("toy", 0, 6, "none")
    assert len(found["manifest_sha256"]) == 64
    assert data.digest is data.digest  # it is counted once


@pytest.mark.parametrize(
    ("modalities", "config", "words"),
    [
        (["outcome"], {}, "'outcome' is excluded from the inputs of task 'toy': it is known only after the label"),
        (["slides"], {}, r"unknown modality 'slides' .*did you mean 'slide'\?"),
        (["gene"], {"fold": 7}, r"data\.fold=7, .* has folds 0\.\.2"),
    ],
)
def test_what_the_shard_set_does_not_have_is_refused(
    toy: ShardSet, modalities: list[str], config: dict[str, Any], words: str
):
    with pytest.raises(DataError, match=words):
        dataset(toy, modalities, **config)


def test_a_copy_is_made_of_a_stored_image(toy: ShardSet):
    def message(**of: str) -> str:
        with pytest.raises((ConfigError, DataError)) as caught:
            dataset(toy, ["dim"], degraded={name: {"of": stored, "factor": 2} for name, stored in of.items()})
        return str(caught.value)

    unknown = "data.degraded.dim.of: unknown modality"
    assert message(dim="slid") == f"{unknown} 'slid'; did you mean 'slide'?; available: coarse, slide"
    assert message(dim="dimmer", dimmer="slide") == f"{unknown} 'dimmer'; available: coarse, slide"
    assert message(dim="gene") == "data.degraded.dim.of=gene is a vector, only an image has coarser copies"


def test_no_modality_or_a_crop_of_an_unknown_one_is_refused(toy: ShardSet):
    with pytest.raises(ConfigError, match="no modality is asked for; name some of coarse, gene, slide"):
        Dataset(toy, DataConfig(), [], 0)
    with pytest.raises(ConfigError, match=r"data\.augment\.crop names \['slid'\]; the modalities are"):
        dataset(toy, augment={"crop": {"slid": 4}})
    assert dataset(toy, ["gene"], augment={"crop": {"slide": 4}}).modalities == ["gene"]


def with_fold(toy: ShardSet, fold: Fold) -> ShardSet:
    changed = ShardSet(toy.folder)
    changed.manifest = toy.manifest.model_copy(update={"folds": [fold]})
    return changed


def test_a_fold_that_cannot_be_trained_is_refused(toy: ShardSet):
    patients = sorted(set(toy.manifest.samples.patient), key=lambda patient: int(patient[1:]))
    with pytest.raises(DataError, match=r"fold 0 of .* has no training samples; choose another data\.fold"):
        dataset(with_fold(toy, Fold(train=[], val=[], test=patients)))
    with pytest.raises(DataError, match="no sample of class 'high' in split 'train' of fold 0"):
        dataset(with_fold(toy, Fold(train=patients[::2], val=[], test=patients[1::2])))


def test_a_modality_that_no_training_sample_has_is_refused(tmp_path: Path):
    shard_set = open_toy(tmp_path / "shards")
    shard_set.manifest.samples.bytes["gene"][:] = [None] * len(shard_set)
    with pytest.raises(DataError, match="no training sample of fold 0 has modality 'gene'; leave it out"):
        dataset(shard_set)


@pytest.mark.parametrize(
    "config",
    [
        {"fold": -1},
        {"views": 0},
        {"labelled": 0},
        {"make": "../evil"},
        {"make": "os.path"},
        {"image_std": [0]},
        {"shard": "x"},
    ],
)
def test_config_out_of_range_is_refused(config: dict[str, Any]):
    with pytest.raises(ValidationError):
        DataConfig.model_validate(config)
