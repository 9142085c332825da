"""Reading by number: what was written comes back from any thread or process, and damage is named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from distkd.data import wds
from distkd.data.manifest import MANIFEST, Fold, Modality, Space
from distkd.data.shardset import ShardSet
from distkd.data.write import ShardWriter
from distkd.errors import DataError
from tests.data.toy import DESCRIPTION, toy_arrays


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


def test_many_shards_are_read_while_few_are_kept_open(toy: ShardSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wds, "_MAX_OPEN", 1)
    fresh = ShardSet(toy.folder)
    assert [digest(fresh, sample) for sample in range(len(fresh))] == [expected_digest(s) for s in range(len(fresh))]
    assert fresh._tars.n_open == 1


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
    shard_set.read(1, ["slide"])
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


def test_a_shard_of_another_size_that_came_after_opening_is_found_when_it_is_read(toy_folder: Path):
    shard_set = ShardSet(toy_folder)
    (toy_folder / "toy-000000.tar").write_bytes(b"a tar of another build")
    with pytest.raises(
        DataError,
        match=r"cannot read 'slide' of sample 's-000' in shard 'toy-000000\.tar': the file was replaced or cut: it has "
        r"22 bytes, manifest says \d+; copy it again",
    ):
        shard_set.read(0, ["slide"])


def test_a_shard_of_the_same_size_that_came_after_opening_is_found_by_its_checksums(toy_folder: Path):
    shard_set = ShardSet(toy_folder)
    path = toy_folder / "toy-000000.tar"
    other = bytearray(path.read_bytes())
    place = shard_set.manifest.samples.bytes["gene"][0]
    assert place is not None
    other[place[0] + place[1] - 1] ^= 1  # a float that differs decodes as well as the right one
    path.unlink()
    path.write_bytes(other)
    with pytest.raises(
        DataError, match=r"'gene' of sample 's-000' in shard 'toy-000000\.tar' has CRC-32C [0-9a-f]{8}, manifest says"
    ):
        shard_set.read(0, ["gene"])


def test_a_shard_replaced_while_it_is_open_is_read_on(toy_folder: Path):
    shard_set = ShardSet(toy_folder)
    shard_set.read(0, ["slide"])
    path = toy_folder / "toy-000000.tar"
    path.unlink()
    path.write_bytes(b"other")
    assert digest(shard_set, 1) == expected_digest(1)


def damage(shard_set: ShardSet, sample: int, name: str, at: int = -1) -> None:
    """Change one byte of the member's data."""
    samples = shard_set.manifest.samples
    place = samples.bytes[name][sample]
    assert place is not None
    with (shard_set.folder / shard_set.manifest.shards[samples.shard[sample]].file).open("r+b") as file:
        file.seek(place[0] + (at if at >= 0 else place[1] + at))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["slide", "gene"])
def test_a_flipped_byte_is_found_when_it_is_read(toy_folder: Path, name: str):
    shard_set = ShardSet(toy_folder)
    damage(shard_set, 0, name)
    with pytest.raises(
        DataError,
        match=rf"'{name}' of sample 's-000' in shard 'toy-000000\.tar' has CRC-32C [0-9a-f]{{8}}, manifest says "
        r"[0-9a-f]{8}; copy it again or build it again; `distkd shards verify` checks every byte",
    ):
        shard_set.read(0, [name])


def test_an_unreadable_image_is_named(toy_folder: Path):
    shard_set = ShardSet(toy_folder, check="never")
    damage(shard_set, 0, "slide", at=3)
    with pytest.raises(
        DataError,
        match=r"'slide' of sample 's-000' in shard 'toy-000000\.tar' is not a readable image .*; copy it again",
    ):
        shard_set.read(0, ["slide"])


def test_checksums_are_compared_at_the_first_read_always_or_never(toy_folder: Path):
    first, always, never = (ShardSet(toy_folder, check=check) for check in ("first", "always", "never"))
    before = first.read(0, ["gene"])["gene"]
    damage(first, 0, "gene")
    assert not np.array_equal(first.read(0, ["gene"])["gene"], before)
    assert not np.array_equal(never.read(0, ["gene"])["gene"], before)
    for shard_set in (always, first.checking("first"), pickle.loads(pickle.dumps(first))):
        with pytest.raises(DataError, match=r"'gene' of sample 's-000' .* has CRC-32C"):
            shard_set.read(0, ["gene"])


def test_a_set_of_format_1_is_read_without_checksums(toy_folder: Path):
    content = json.loads((toy_folder / MANIFEST).read_text())
    content["format_version"] = 1
    for name in ("crc32c", "file", "space"):
        content["samples"].pop(name, None)
    (toy_folder / MANIFEST).write_text(json.dumps(content))
    old = ShardSet(toy_folder, check="always")
    assert [digest(old, sample) for sample in range(len(old))] == [expected_digest(s) for s in range(len(old))]
    rows = np.empty((2, 5), dtype=np.float32)
    old.read_rows("gene", [3, 0], rows)
    np.testing.assert_array_equal(rows, [toy_arrays(3)["gene"], toy_arrays(0)["gene"]])


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("name", ["gene", "slide"])
def test_rows_are_what_single_reads_give(toy: ShardSet, name: str, pool: int | None):
    samples = np.flatnonzero(toy.has(name))[::-1]
    shape, dtype = toy.manifest.modalities[name].shape, toy.manifest.modalities[name].dtype
    for check in ("first", "always", "never"):
        shard_set = toy.checking(check)
        for _ in range(2):
            out = np.empty((len(samples), *shape), dtype=dtype)
            if pool is None:
                shard_set.read_rows(name, samples, out)
            else:
                with ThreadPoolExecutor(pool) as threads:
                    shard_set.read_rows(name, samples, out, pool=threads, parts=3)
            np.testing.assert_array_equal(out, [toy_arrays(int(sample))[name] for sample in samples])


def test_no_rows_are_no_work(toy: ShardSet):
    toy.read_rows("gene", [], np.empty((0, 5), dtype=np.float32))


@pytest.mark.parametrize("name", ["gene", "slide"])
def test_rows_are_compared_with_their_checksums(toy_folder: Path, name: str):
    shard_set = ShardSet(toy_folder)
    shape, dtype = shard_set.manifest.modalities[name].shape, shard_set.manifest.modalities[name].dtype
    out = np.empty((3, *shape), dtype=dtype)
    damage(shard_set, 3, name)
    with pytest.raises(DataError, match=rf"'{name}' of sample 's-003' in shard 'toy-000000\.tar' has CRC-32C"):
        shard_set.read_rows(name, [0, 3, 1], out)
    with pytest.raises(DataError, match="of sample 's-003'"):  # a failed check is no first read
        shard_set.read_rows(name, [0, 3, 1], out)
    shard_set.read_rows(name, [0, 4, 1], out)


def test_a_row_with_another_header_is_read_or_refused(toy_folder: Path):
    """Another writer may say the same in other words."""
    shard_set = ShardSet(toy_folder, check="never")
    places = shard_set.manifest.samples.bytes["gene"]
    assert places[0] is not None
    assert places[1] is not None
    with (toy_folder / "toy-000000.tar").open("r+b") as file:
        file.seek(places[0][0])
        header = file.read(128)
        for place, told in ((places[0], b"{'descr': '<f4','fortran_order':False, 'shape': (5,)  }"), (places[1], b"")):
            file.seek(place[0])
            file.write(header[:10] + told.ljust(117) + b"\n")
    out = np.empty((1, 5), dtype=np.float32)
    shard_set.read_rows("gene", [0], out)
    np.testing.assert_array_equal(out[0], toy_arrays(0)["gene"])
    with pytest.raises(DataError, match=r"'gene' of sample 's-001' .* is not a readable npy array"):
        shard_set.read_rows("gene", [1], out)


def test_rows_of_samples_without_the_modality_or_of_no_sample_are_refused(toy: ShardSet):
    out = np.empty((3, 5), dtype=np.float32)
    with pytest.raises(DataError, match=r"sample 's-002' has no 'gene' \(2 of 3 samples lack it\); ask `has` before"):
        toy.read_rows("gene", [0, 2, 5], out)
    with pytest.raises(DataError, match=r"sample -1 is not in shard set .*, which has samples 0\.\.47"):
        toy.read_rows("gene", [0, -1, 5], out)
    with pytest.raises(DataError, match="unknown modality 'gen'"):
        toy.read_rows("gen", [0, 1, 3], out)
    with pytest.raises(DataError, match="'gene' is a vector, only a volume is read in crops; read it whole"):
        toy.crop(0, "gene", (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["samples"]["key"].__setitem__(1, "s-000"), "key 's-000' occurs 2 times"),
        (lambda c: c["samples"]["label"].__setitem__(0, 2), r"labels \[2\] are outside -1\.\.1 \(2 class names\)"),
        (lambda c: c["shards"][0].__setitem__("file", "../toy-000000.tar"), r"shards\.0\.file: string should match"),
        (lambda c: c["shards"][0].__setitem__("file", "/etc/x.tar"), r"shards\.0\.file: string should match"),
        (lambda c: c["shards"][0].__setitem__("file", "volumes.zarr/../x"), r"shards\.0\.file: string should match"),
        (
            lambda c: c["shards"][0].__setitem__("samples", 1),
            r"shard 'toy-000000\.tar' has 1 samples, the columns list",
        ),
        (lambda c: c.__setitem__("format_version", 9), "has format version 9, this distkd reads .*; update distkd"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused_when_the_set_is_opened(
    toy_folder: Path, change: Callable[[dict], None], words: str
):
    content = json.loads((toy_folder / MANIFEST).read_text())
    change(content)
    (toy_folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        ShardSet(toy_folder)


SHAPES = [(9, 8, 7), (9, 8, 7), (6, 8, 5)]


def volume(sample: int, name: str) -> np.ndarray:
    draws = np.random.default_rng((sample, len(name)))
    return draws.integers(1, 100, (1, *SHAPES[sample]), dtype=np.int16)


def vector(sample: int) -> np.ndarray:
    return np.arange(4, dtype=np.float32) + sample


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Three samples; the second one has no t2."""
    kind = {"kind": "volume", "dtype": "int16", "shape": (1, 9, 8, 7), "codec": "zarr", "chunk": (1, 4, 4, 4)}
    description = DESCRIPTION.model_copy(
        update={
            "container": "zarr",
            "modalities": {
                "flair": Modality.model_validate(kind),
                "t2": Modality.model_validate(kind),
                "gene": Modality(kind="vector", dtype="float32", shape=(4,), codec="zarr"),
            },
        }
    )
    with ShardWriter(tmp_path / "set", description) as writer:
        for sample, shape in enumerate(SHAPES):
            arrays = {"flair": volume(sample, "flair"), "t2": volume(sample, "t2"), "gene": vector(sample)}
            if sample == 1:
                del arrays["t2"]
            affine = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
            space = Space(shape=shape, affine=affine, spacing=(1.0, 1.0, 1.0))
            writer.add(f"v{sample}", arrays, patient=f"p{sample}", label=sample % 2, space=space)
        writer.split([Fold(train=["p0", "p1"], val=["p2"], test=[])], rule="by hand", seed=0)
    return tmp_path / "set"


def test_volumes_and_vectors_come_back_in_their_own_shape(volumes: Path):
    shard_set = ShardSet(volumes)
    assert shard_set.has("t2").tolist() == [True, False, True]
    for opened in (shard_set, pickle.loads(pickle.dumps(shard_set)), shard_set.checking("never")):
        for sample in range(3):
            found = opened.read(sample, ["flair", "t2", "gene"])
            assert found.keys() == ({"flair", "gene"} if sample == 1 else {"flair", "t2", "gene"})
            np.testing.assert_array_equal(found["flair"], volume(sample, "flair"))
            np.testing.assert_array_equal(found["gene"], vector(sample))
            assert not found["flair"].flags.writeable
        opened.close()


def test_a_crop_is_that_part_of_the_volume(volumes: Path):
    shard_set = ShardSet(volumes)
    for start, size in (((0, 0, 0), (6, 8, 5)), ((1, 3, 2), (4, 2, 3)), ((5, 7, 4), (1, 1, 1))):
        expected = volume(2, "t2")[(slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))]
        np.testing.assert_array_equal(shard_set.crop(2, "t2", start, size), expected)


def test_rows_of_a_zarr_set(volumes: Path):
    shard_set = ShardSet(volumes)
    genes = np.empty((3, 4), dtype=np.float32)
    shard_set.read_rows("gene", [2, 0, 1], genes)
    np.testing.assert_array_equal(genes, [vector(2), vector(0), vector(1)])
    flairs = np.empty((2, 1, 9, 8, 7), dtype=np.int16)
    shard_set.read_rows("flair", [1, 0], flairs)
    np.testing.assert_array_equal(flairs, [volume(1, "flair"), volume(0, "flair")])
    with pytest.raises(
        DataError, match=r"'flair' of sample 'v2' .* has \(6, 8, 5\) voxels, a batch of whole volumes needs"
    ):
        shard_set.read_rows("flair", [1, 2], flairs)


def test_crops_that_are_not_inside_are_refused(volumes: Path):
    shard_set = ShardSet(volumes)
    for start, size in (((0, 0, 0), (7, 8, 5)), ((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (0, 1, 1))):
        with pytest.raises(
            DataError, match=r"crop \(.*\) at \(.*\) of 'flair' of sample 'v2' .* is not inside \(6, 8, 5\)"
        ):
            shard_set.crop(2, "flair", start, size)
    with pytest.raises(DataError, match="sample 'v1' has no 't2'"):
        shard_set.crop(1, "t2", (0, 0, 0), (1, 1, 1))


def test_a_chunk_is_compared_at_its_own_first_read(volumes: Path):
    shard_set = ShardSet(volumes)
    shard_set.crop(0, "flair", (0, 0, 0), (4, 4, 4))  # the first chunk only
    number = shard_set.manifest.samples.file["flair"][0]
    assert number is not None
    path = volumes / shard_set.manifest.shards[number].file
    content = bytearray(path.read_bytes())
    content[3] ^= 1  # in the first chunk
    path.write_bytes(content)
    shard_set.crop(0, "flair", (0, 0, 0), (4, 4, 4))
    shard_set.crop(0, "flair", (4, 4, 4), (4, 4, 3))
    with pytest.raises(
        DataError, match=r"cannot read 'flair' of sample 'v0' in shard 'volumes\.zarr/flair/c/0/0/0/0/0'.*CRC"
    ):
        shard_set.checking("first").crop(0, "flair", (0, 0, 0), (1, 1, 1))
    with pytest.raises(DataError, match=r"'flair' of sample 'v0'.*CRC"):
        shard_set.crop(0, "flair", (3, 3, 3), (2, 2, 2))  # reads other chunks for the first time, and compares all


def test_a_missing_or_truncated_file_of_a_zarr_set_is_found_when_it_is_opened(volumes: Path):
    file = volumes / "volumes.zarr" / "flair" / "c" / "0" / "0" / "0" / "0" / "0"
    size = file.stat().st_size
    os.truncate(file, 10)
    with pytest.raises(
        DataError, match=rf"shard 'volumes\.zarr/flair/c/0/0/0/0/0' is truncated: 10 bytes, manifest says {size}"
    ):
        ShardSet(volumes)
    file.unlink()
    with pytest.raises(DataError, match=r"shard 'volumes\.zarr/flair/c/0/0/0/0/0' is missing from"):
        ShardSet(volumes)
