"""Reading by number: what was written comes back from any thread or process, and damage is named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from distkd.data import wds
from distkd.data.manifest import MANIFEST
from distkd.data.wds import ShardSet
from distkd.errors import DataError
from tests.data.toy import toy_arrays


def digest(shard_set: ShardSet, sample: int) -> str:
    arrays = shard_set.read(sample, shard_set.manifest.modalities)
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def expected_digest(sample: int) -> str:
    arrays = toy_arrays(sample)
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def test_every_sample_comes_back_as_it_was_written(toy: ShardSet):
    for sample in range(len(toy)):
        found = toy.read(sample, toy.manifest.modalities)
        assert found.keys() == toy_arrays(sample).keys()
        for name, array in toy_arrays(sample).items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def test_only_what_is_asked_for_is_read_and_what_is_missing_is_absent(toy: ShardSet):
    assert toy.read(0, ["gene"]).keys() == {"gene"}
    assert toy.read(2, ["gene", "coarse"]).keys() == {"coarse"}
    assert toy.has("gene").tolist() == [number % 3 != 2 for number in range(len(toy))]


def test_threads_read_the_same(toy: ShardSet):
    wanted = list(range(len(toy))) * 5
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda sample: digest(toy, sample), wanted)) == [
            expected_digest(sample) for sample in wanted
        ]


def test_many_shards_are_read_without_keeping_them_open(toy: ShardSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wds, "_MAX_OPEN", 1)
    fresh = ShardSet(toy.folder)
    assert [digest(fresh, sample) for sample in range(len(fresh))] == [expected_digest(s) for s in range(len(fresh))]
    assert fresh._descriptors == {}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_reads_the_same(toy: ShardSet):
    assert digest(toy, 0) == expected_digest(0)  # descriptors are open before the fork
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, "".join(digest(toy, sample) for sample in (0, 30, 5)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read_end, 1000).decode() == "".join(expected_digest(sample) for sample in (0, 30, 5))
    os.close(read_end)
    os.close(write_end)
    assert digest(toy, 1) == expected_digest(1)


def test_it_travels_to_another_process(toy: ShardSet):
    assert digest(pickle.loads(pickle.dumps(toy)), 7) == expected_digest(7)


def test_a_closed_set_opens_again_when_it_is_read(toy_folder: Path):
    shard_set = ShardSet(toy_folder)
    assert digest(shard_set, 3) == expected_digest(3)
    shard_set.close()
    assert digest(shard_set, 3) == expected_digest(3)


def test_unknown_samples_and_modalities_are_refused(toy: ShardSet):
    with pytest.raises(DataError, match=r"sample 48 is not in shard set .*, which has samples 0\.\.47"):
        toy.read(48, ["gene"])
    with pytest.raises(DataError, match=r"unknown modality 'gen' .*did you mean 'gene'"):
        toy.read(0, ["gen"])
    with pytest.raises(DataError, match="'outcome' is excluded"):
        toy.has("outcome")


def test_a_missing_shard_is_found_when_the_set_is_opened(toy_folder: Path):
    (toy_folder / "toy-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard 'toy-000001\.tar' is missing from .*copy it again or build it again"):
        ShardSet(toy_folder)


def test_a_truncated_shard_is_found_when_the_set_is_opened(toy_folder: Path):
    path = toy_folder / "toy-000000.tar"
    size = path.stat().st_size
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=rf"shard 'toy-000000\.tar' is truncated: 1000 bytes, manifest says {size}"):
        ShardSet(toy_folder)


def test_a_longer_shard_is_found_when_the_set_is_opened(toy_folder: Path):
    with (toy_folder / "toy-000000.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"shard 'toy-000000\.tar' has \d+ bytes, manifest says \d+"):
        ShardSet(toy_folder)


def test_a_shard_cut_after_opening_is_found_when_it_is_read(toy_folder: Path):
    shard_set = ShardSet(toy_folder)
    os.truncate(toy_folder / "toy-000000.tar", 600)
    with pytest.raises(
        DataError, match=r"'slide' of sample 's-000' in shard 'toy-000000\.tar' is cut off: 0 bytes, expected"
    ):
        shard_set.read(0, ["slide"])


def test_a_shard_removed_after_opening_is_found_when_it_is_read(toy_folder: Path):
    shard_set = ShardSet(toy_folder)
    (toy_folder / "toy-000000.tar").unlink()
    with pytest.raises(DataError, match="cannot read 'slide' of sample 's-000'"):
        shard_set.read(0, ["slide"])


def test_damaged_bytes_are_found_when_they_are_read(toy_folder: Path):
    shard_set = ShardSet(toy_folder)
    place = shard_set.manifest.samples.bytes["slide"][0]
    assert place is not None
    with (toy_folder / "toy-000000.tar").open("r+b") as file:
        file.seek(place[0])
        file.write(b"damage")
    with pytest.raises(
        DataError, match=r"'slide' of sample 's-000' in shard 'toy-000000\.tar' is not a readable image"
    ):
        shard_set.read(0, ["slide"])


def test_a_sound_set_verifies_and_shows_its_progress(toy: ShardSet):
    seen: list[str] = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    toy.verify(progress)
    assert seen == [shard.file for shard in toy.manifest.shards]


@pytest.mark.parametrize("place", [0, 100, 700, 20_000, -1])
def test_one_changed_byte_anywhere_is_found(toy_folder: Path, place: int):
    path = toy_folder / "toy-000001.tar"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard 'toy-000001\.tar' has SHA-256 .*, manifest says"):
        ShardSet(toy_folder).verify()


def test_verify_names_every_damaged_shard_and_counts_the_rest(toy_folder: Path):
    for path in sorted(toy_folder.glob("*.tar")):
        content = bytearray(path.read_bytes())
        content[600] ^= 255
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"toy-000000\.tar.*toy-000001\.tar"):
        ShardSet(toy_folder).verify()


def test_verify_finds_a_manifest_that_points_elsewhere(toy_folder: Path):
    content = json.loads((toy_folder / MANIFEST).read_text())
    slides = content["samples"]["bytes"]["slide"]
    slides[0], slides[1] = slides[1], slides[0]
    (toy_folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"'s-000\.slide\.png' of shard 'toy-000000\.tar' lies at .*, manifest says"):
        ShardSet(toy_folder).verify()


def test_verify_finds_a_sample_that_the_manifest_does_not_list(toy_folder: Path):
    content = json.loads((toy_folder / MANIFEST).read_text())
    for column in [
        *content["samples"]["bytes"].values(),
        *(content["samples"][n] for n in content["samples"] if n != "bytes"),
    ]:
        del column[0]
    content["shards"][0]["samples"] -= 1
    (toy_folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shard 'toy-000000\.tar' has (\d+) samples, manifest says \d+"):
        ShardSet(toy_folder).verify()


def test_verify_finds_a_stray_shard(toy_folder: Path):
    shutil.copy(toy_folder / "toy-000000.tar", toy_folder / "other.tar")
    with pytest.raises(DataError, match=r"'other\.tar' is in the folder, but not in the manifest; remove it"):
        ShardSet(toy_folder).verify()
