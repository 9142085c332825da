"""What people see of a shard set: every number of it in words, and a picture that is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from distkd.data.show import info, missing_notes, show
from distkd.data.wds import ShardSet
from distkd.errors import DataError
from tests.data.toy import open_toy


def test_info_counts_everything(toy: ShardSet):
    text = info(toy)
    for words in (
        "task 'toy', classes low, high",
        "48 samples of 24 patients",
        "licence  none",
        "folds: by patient (seed 1)",
        "outcome: it is known only after the label",
    ):
        assert words in text
    lines = [line.split() for line in text.splitlines()]
    assert ["slide", "image", "12", "x", "10", "x", "3", "uint8", "png", "0.0", "0"] in lines
    gene = next(line for line in lines if line[:2] == ["gene", "vector"])
    assert gene[-1] == "16"  # missing
    assert ["0", "train", "12", "24", "12", "12", "0"] in lines
    assert ["2", "test", "8", "16", "8", "8", "0"] in lines


def test_unequal_gaps_are_pointed_out(toy: ShardSet, tmp_path: Path):
    assert missing_notes(toy.manifest) == []
    unequal = open_toy(tmp_path / "shards")
    for number, label in enumerate(unequal.manifest.samples.label):
        if label == 1:
            unequal.manifest.samples.bytes["gene"][number] = None
    expected = "note: gene missing unequally (low 33%, high 100%): that tells the class; compare models on pairs only"
    assert missing_notes(unequal.manifest) == [expected]
    assert expected in info(unequal)


def test_the_picture_is_a_png(tmp_path: Path):
    shard_set = open_toy(tmp_path / "shards", unlabelled=True)
    path = show(shard_set, tmp_path / "samples.png", per_class=2)
    assert path == tmp_path / "samples.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100


def test_a_picture_that_cannot_be_written_is_a_data_error(toy: ShardSet, tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot write the picture .*choose another place"):
        show(toy, tmp_path / "nowhere" / "samples.png", per_class=1)
