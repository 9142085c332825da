"""What people read of a shard set: every number of it in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distkd.cli import main
from distkd.data.look.info import info, size_words, verified
from distkd.data.look.summary import missing_notes, summary
from distkd.data.shardset import ShardSet
from tests.data.look.scans import SHAPE, placeless, words
from tests.data.toy import open_toy


def test_info_counts_everything(toy: ShardSet):
    text = info(toy)
    for expected in (
        "task 'toy', classes low, high",
        "48 samples of 24 patients in 12 groups",
        "format    2, classification, tars",
        "checksums SHA-256 of each file, CRC-32C of each value",
        "licence   none",
        "folds: by patient (seed 1)",
        "outcome: it is known only after the label",
    ):
        assert expected in text
    lines = words(text)
    slide = next(line for line in lines if line[:2] == ["slide", "image"])
    assert slide[2:9] == ["12", "x", "10", "x", "3", "uint8", "png"]
    gene = next(line for line in lines if line[:2] == ["gene", "vector"])
    assert gene[-1] == "16"  # missing
    assert ["low", "24", "50.0%", "12"] in lines
    assert ["0", "train", "12", "24", "12", "12", "0"] in lines
    assert ["2", "test", "8", "16", "8", "8", "0"] in lines
    assert "role" not in text
    assert "chunk" not in text


def test_info_says_who_has_what_most_frequent_first(toy: ShardSet, brains: ShardSet):
    lines = words(info(toy))
    at = lines.index(["samples", "share", "gene", "slide", "coarse"])
    assert lines[at + 1 : at + 3] == [["32", "66.7%", "x", "x", "x"], ["16", "33.3%", "-", "x", "x"]]
    lines = words(info(brains))
    at = lines.index(["samples", "share", "flair", "t1", "seg"])  # numbers about a sample are left out
    assert [line[0] for line in lines[at + 1 : at + 4]] == ["3", "2", "1"]
    assert lines[at + 3] == ["1", "16.7%", "x", "x", "-"]


def test_info_of_a_segmentation_has_roles_chunks_and_spaces_in_place_of_labels(brains: ShardSet):
    text = info(brains)
    assert "format    2, segmentation, a zarr group" in text
    assert "CRC-32C of each chunk" in text
    assert "values of seg: 0 background, 1 oedema, 2 core" in text
    assert "spaces: 1 shape 14 x 12 x 10 voxels, 2 spacings 1 x 1 x 1..3 mm" in text
    lines = words(text)
    assert ["5", "14", "x", "12", "x", "10", "1", "x", "1", "x", "1", "LPS"] in lines
    assert ["1", "14", "x", "12", "x", "10", "1", "x", "1", "x", "3", "RAS"] in lines
    assert ["0", "train", "2", "2"] in lines
    flair = next(line for line in lines if line[:3] == ["flair", "input", "volume"])
    assert "1 x 7 x 6 x 5" in " ".join(flair)
    # the manifest leaves the target's chunk to the group, which has one chunk for so small a volume
    seg = next(line for line in lines if line[:3] == ["seg", "target", "volume"])
    assert " ".join(seg).count("1 x 14 x 12 x 10") == 2
    assert "zarr+zstd" in seg
    assert "no label" not in text


def test_the_summary_is_what_lies_on_the_disk(brains: ShardSet):
    found = json.loads(summary(brains).to_json())
    volumes = brains.folder / "volumes.zarr"
    assert found["bytes"] == sum(path.stat().st_size for path in volumes.rglob("*") if path.is_file())
    t1 = found["modalities"]["t1"]
    assert t1["bytes"] == sum(path.stat().st_size for path in (volumes / "t1" / "c").rglob("*") if path.is_file())
    assert t1["raw_bytes"] == 4 * np.prod(SHAPE) * 2
    assert (t1["present"], t1["missing"]) == (4, 2)
    assert found["modalities"]["seg"]["values"] == [0, 1, 2]
    assert found["combinations"][0] == {"modalities": ["flair", "t1", "seg"], "samples": 3}
    assert [space["samples"] for space in found["spaces"]] == [5, 1]
    assert found["classes"] == []
    assert found["largest"]["bytes"] >= found["smallest"]["bytes"]
    assert not found["smallest"]["file"].endswith(".json")


def test_unequal_gaps_are_pointed_out(toy: ShardSet, tmp_path: Path):
    assert missing_notes(toy.manifest) == []
    unequal = open_toy(tmp_path / "shards")
    for number, label in enumerate(unequal.manifest.samples.label):
        if label == 1:
            unequal.manifest.samples.bytes["gene"][number] = None
    expected = "note: gene missing unequally (low 33%, high 100%): that tells the class; compare models on pairs only"
    assert missing_notes(unequal.manifest) == [expected]
    assert expected in info(unequal)


def test_a_set_without_checksums_of_values_says_so(tmp_path: Path):
    old = open_toy(tmp_path / "shards")
    old.manifest.samples.crc32c.clear()
    assert "checksums SHA-256 of each file, none of single values" in info(old)


def test_what_was_verified_is_counted(toy: ShardSet, tmp_path: Path):
    assert verified(toy, 2).startswith("checked 3 files, ")
    assert "48 samples with 128 values" in verified(toy, 1)
    volumes = placeless(tmp_path / "shards")
    assert " 2 samples with 4 values in " in verified(volumes)
    assert verified(volumes, 1).endswith(f"1 thread\n{volumes.folder}: every byte is as the manifest says")


@pytest.mark.parametrize(("n_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (5e10, "50.0 GB")])
def test_sizes_are_readable(n_bytes: float, text: str):
    assert size_words(n_bytes) == text


def test_padded_blocks_of_vectors_are_no_largest_shard(tmp_path: Path):
    found = summary(placeless(tmp_path / "shards"))
    assert found.largest.file.startswith("volumes.zarr/ct/")
    age = next(line for line in words(info(placeless(tmp_path / "more"))) if line[:2] == ["age", "vector"])
    assert age[-2:] == ["-", "0"]  # no ratio


def test_the_manifest_stands_for_its_folder(toy_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["shards", "info", str(toy_folder / "manifest.json")]) == 0
    assert f"{toy_folder}: task 'toy'" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error(toy_folder: Path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "distkd.cli", "shards", "info", str(toy_folder)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=240)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
