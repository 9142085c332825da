"""zarr arrays: the zarr library reads what we write and we what it writes; a crop costs its chunks."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkd.data import zarr as ours
from distkd.data.manifest import Modality
from distkd.data.zarr import ZarrArrays, ZarrWriter, default_chunk
from distkd.errors import DataError
from tests.data.toy_zarr import MODALITIES, SHAPE, VOLUMES, N, n_chunks, own_shape, values, write


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    return write(tmp_path_factory.mktemp("zarr") / "volumes.zarr")


@pytest.fixture(scope="module")
def arrays(folder: Path) -> ZarrArrays:
    return ZarrArrays(folder, MODALITIES, N)


def test_the_zarr_library_reads_what_we_write(folder: Path):
    import zarr

    group = zarr.open_group(folder, mode="r")
    assert sorted(group.array_keys()) == sorted(MODALITIES)
    for name, modality in MODALITIES.items():
        array = group[name]
        assert (array.shape, array.dtype) == ((N, *modality.shape), modality.dtype)
        expected = np.zeros(array.shape, dtype=modality.dtype)  # a missing sample is zeros, as is what is not covered
        for sample in range(N):
            if name in (found := values(sample)):
                corner = (slice(None), *(slice(n) for n in own_shape(sample))) if modality.kind == "volume" else ...
                expected[sample][corner] = found[name]
        np.testing.assert_array_equal(array[:], expected)


def test_every_value_comes_back_as_it_was_written(arrays: ZarrArrays):
    for sample in range(N):
        for name, array in values(sample).items():
            shape = own_shape(sample) if MODALITIES[name].kind == "volume" else None
            for check in (True, False):
                found = arrays.read(name, sample, shape=shape, check=check)
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array)


def test_we_read_what_the_zarr_library_wrote(tmp_path: Path):
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

    group = zarr.create_group(tmp_path / "volumes.zarr")
    modality = MODALITIES["both"]
    codecs = [BytesCodec(endian="little"), ZstdCodec(level=9, checksum=True), Crc32cCodec()]
    array = group.create_array(
        "both",
        shape=(N, 2, *SHAPE),
        chunks=(1, 2, 10, 12, 7),
        dtype="float32",
        serializer=ShardingCodec(chunk_shape=(1, 1, 10, 4, 7), codecs=codecs),
        compressors=None,
        attributes={"by": "another program"},
    )
    written = np.random.default_rng(0).normal(size=array.shape).astype(np.float32)
    array[:] = written
    found = ZarrArrays(tmp_path / "volumes.zarr", {"both": modality}, N)
    np.testing.assert_array_equal(np.stack([found.read("both", n) for n in range(N)]), written)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_crop_equals_the_plain_arrays(arrays: ZarrArrays, data: st.DataObject):
    name = data.draw(st.sampled_from(VOLUMES))
    sample = data.draw(st.sampled_from([n for n in range(N) if name in values(n)]))
    own_size = own_shape(sample)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in own_size)
    size = tuple(data.draw(st.integers(1, n - at)) for n, at in zip(own_size, start, strict=True))
    crop = (slice(None), *(slice(at, at + n) for at, n in zip(start, size, strict=True)))
    expected = values(sample)[name][crop]
    into = np.full_like(expected, 77)  # what is in the buffer must not shine through
    kwargs = {"shape": own_size, "start": start, "size": size, "check": data.draw(st.booleans())}
    assert arrays.read(name, sample, out=into, **kwargs) is into
    np.testing.assert_array_equal(into, expected)
    np.testing.assert_array_equal(arrays.read(name, sample, **kwargs), expected)


def test_a_crop_goes_into_a_part_of_a_batch_that_is_not_contiguous(arrays: ZarrArrays):
    batch = np.zeros((2, 2, 12, 12, 12), dtype=np.float16)
    arrays.read("whole", 0, out=batch[1, :, 1:11, :11, 3:10])
    np.testing.assert_array_equal(batch[1, :, 1:11, :11, 3:10], values(0)["whole"])
    assert np.count_nonzero(batch) == np.count_nonzero(values(0)["whole"])


@pytest.mark.parametrize(
    "start, size", [((0, 0, 0), SHAPE), ((4, 5, 3), (4, 5, 3)), ((3, 4, 2), (2, 2, 2)), ((9, 9, 6), (1, 1, 1))]
)
def test_a_crop_reads_the_chunks_that_it_touches_and_no_other(
    folder: Path, start: tuple[int, int, int], size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
):
    fetched = 0

    def counting(descriptor, buffers, offset):
        nonlocal fetched
        n = real(descriptor, buffers, offset)
        fetched += n
        return n

    real = os.preadv
    arrays = ZarrArrays(folder, MODALITIES, N)
    monkeypatch.setattr(os, "preadv", counting)
    for name in VOLUMES:
        volume, chunk = values(0)[name], MODALITIES[name].chunk or MODALITIES[name].shape
        arrays.bytes_read = fetched = 0
        arrays.read(name, 0, start=start, size=size)
        stored = (folder / name / "c/0/0/0/0/0").read_bytes()[-16 * n_chunks(name) - 4 : -4]
        index = np.frombuffer(stored, "<u8").reshape(-1, 2)
        expected = 0
        for chunk_number, at in enumerate(
            itertools.product(*(range(0, n, c) for n, c in zip(volume.shape, chunk, strict=True)))
        ):
            touches = all(
                a < s + n and s < a + c
                for a, c, s, n in zip(at, chunk, (0, *start), (volume.shape[0], *size), strict=True)
            )
            is_stored = volume[tuple(slice(a, a + c) for a, c in zip(at, chunk, strict=True))].any()
            assert (index[chunk_number, 1] != 2**64 - 1) == is_stored
            expected += int(index[chunk_number, 1]) if touches and is_stored else 0
        assert arrays.bytes_read == fetched == expected


def test_a_whole_uncompressed_chunk_is_read_by_one_call(folder: Path, monkeypatch: pytest.MonkeyPatch):
    arrays = ZarrArrays(folder, MODALITIES, N)
    calls: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, b, o: calls.append(len(b)) or real(d, b, o))
    arrays.read("whole", 0)
    assert calls == [2]  # the values, which need no copy, and their checksum


def test_an_index_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ours, "_MAX_OPEN", 1)
    arrays = ZarrArrays(folder, MODALITIES, N)
    sizes: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda d, n, o: sizes.append(n) or real(d, n, o))
    for sample in (0, 1, 0, 4, 0):  # each pushes out the descriptor of the one before
        np.testing.assert_array_equal(arrays.read("flair", sample, shape=own_shape(sample)), values(sample)["flair"])
    assert sizes == [16 * n_chunks("flair") + 4] * 3
    assert len(arrays._files) == 1


def test_equal_input_gives_equal_files(folder: Path, tmp_path: Path):
    assert digests(write(tmp_path / "volumes.zarr")) == digests(folder)


@pytest.mark.parametrize("done", [0, 1, 3, N])
def test_a_folder_that_a_killed_process_left_is_gone_on_with(folder: Path, tmp_path: Path, done: int):
    target = write(tmp_path / "volumes.zarr", range(min(done + 2, N)), finish=False)
    torn = target / "flair" / f"c/{done}/0/0/0/0"
    if torn.exists():
        torn.write_bytes(torn.read_bytes()[:50])
    (target / "both/c/2/0/0/0").mkdir(parents=True, exist_ok=True)
    (target / "both/c/2/0/0/0/0").write_bytes(b"of an earlier attempt; this sample lacks it now")
    writer = ZarrWriter(target, MODALITIES)
    writer.drop_from(min(done, 2))
    for sample in range(min(done, 2), N):
        for name, array in values(sample).items():
            writer.write(name, sample, array)
    writer.finish(N)
    assert digests(target) == digests(folder)


def test_vectors_of_many_blocks_survive_a_kill_between_any_two_rows(tmp_path: Path):
    modality = {"gene": Modality(kind="vector", dtype="float32", shape=(3,), codec="zarr")}
    rows = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    for first, last in ((0, 100), (99, 256), (255, 530), (500, 600)):  # goes on with the sample it was killed in
        writer = ZarrWriter(tmp_path / "volumes.zarr", modality)
        for number in range(first, last):
            assert writer.write("gene", number, rows[number]) == writer.vector_file("gene", number)
        file = writer.vector_file("gene", last - 1)
        file.write_bytes(file.read_bytes()[:-4] + b"torn")  # killed after the row, before its checksum
    assert len(writer.finish(590)) == 2
    arrays = ZarrArrays(tmp_path / "volumes.zarr", modality, 590)
    for check in (True, False):
        np.testing.assert_array_equal(np.stack([arrays.read("gene", n, check=check) for n in range(590)]), rows[:590])
    into = np.zeros((2, 3), dtype=np.float32)
    arrays.read("gene", 300, out=into[1])
    np.testing.assert_array_equal(into, [[0, 0, 0], rows[300]])
    import zarr

    np.testing.assert_array_equal(zarr.open_group(tmp_path / "volumes.zarr", mode="r")["gene"][:], rows[:590])
    stored = np.frombuffer((tmp_path / "volumes.zarr/gene/c/2/0").read_bytes()[:-4], np.float32).reshape(-1, 3)
    assert not stored[590 - 512 :].any()


def test_threads_read_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ours, "_MAX_OPEN", 2)  # descriptors are pushed out while others read through them
    arrays = ZarrArrays(folder, MODALITIES, N)
    wanted = [(name, sample) for sample in range(N) for name in values(sample) if MODALITIES[name].kind == "volume"] * 8

    def is_right(of: tuple[str, int]) -> bool:
        name, sample = of
        return np.array_equal(arrays.read(name, sample, shape=own_shape(sample)), values(sample)[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, wanted))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_reads_the_same(folder: Path):
    arrays = ZarrArrays(folder, MODALITIES, N)
    np.testing.assert_array_equal(arrays.read("flair", 0), values(0)["flair"])  # open before the fork
    arrays._lock.acquire()  # by a thread that the child will not have
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = all(np.array_equal(arrays.read("flair", n), values(n)["flair"]) for n in (0, 4, 5))
        finally:
            os._exit(0 if right else 1)
    arrays._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(arrays.read("flair", 0), values(0)["flair"])


def test_it_travels_to_another_process_and_opens_again_after_close(folder: Path):
    arrays = ZarrArrays(folder, MODALITIES, N)
    arrays.read("mask", 0)
    there = pickle.loads(pickle.dumps(arrays))
    np.testing.assert_array_equal(there.read("mask", 0), values(0)["mask"])
    there.close()
    np.testing.assert_array_equal(there.read("mask", 4), values(4)["mask"])


def test_descriptors_are_given_back(folder: Path):
    n_open = len(os.listdir("/proc/self/fd"))
    arrays = ZarrArrays(folder, MODALITIES, N)
    for sample in (0, 1, 3, 4):
        arrays.read("flair", sample)
    assert len(os.listdir("/proc/self/fd")) == n_open + 4
    arrays.close()
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_what_is_not_there_is_refused(arrays: ZarrArrays):
    with pytest.raises(DataError, match=r"no sample 6 of array 'flair' .*samples 0\.\.5 of flair, both"):
        arrays.read("flair", N)
    with pytest.raises(DataError, match="no sample 0 of array 'flare'"):
        arrays.read("flare", 0)
    with pytest.raises(DataError, match=r"cannot read 'volumes.zarr/both/c/2/0/0/0/0': No such file.*copy it again"):
        arrays.read("both", 2)


@pytest.mark.parametrize(
    "start, size", [((0, 0, 4), (1, 1, 2)), ((-1, 0, 0), (2, 1, 1)), ((0, 0, 0), (1, 0, 1)), ((9, 0, 0), None)]
)
def test_a_crop_beyond_the_volume_is_refused(arrays: ZarrArrays, start, size):
    with pytest.raises(DataError, match=r"does not lie in 'flair' of sample 1, which has \(9, 11, 5\); choose a crop"):
        arrays.read("flair", 1, shape=own_shape(1), start=start, size=size)


def test_a_sample_larger_than_the_array_is_refused(arrays: ZarrArrays):
    with pytest.raises(DataError, match=r"said to have \(10, 11, 8\) voxels, expected at most \(10, 11, 7\)"):
        arrays.read("flair", 1, shape=(10, 11, 8))


@pytest.mark.parametrize(
    "name, array, words",
    [
        (
            "flair",
            np.zeros((1, 11, 11, 7), np.int16),
            r"int16 of shape \(1, 11, 11, 7\), expected int16 of \(1, 10, 11, 7\) at",
        ),
        ("flair", np.zeros((2, 9, 9, 7), np.int16), r"shape \(2, 9, 9, 7\)"),
        ("flair", np.zeros((1, 9, 0, 7), np.int16), r"shape \(1, 9, 0, 7\)"),
        ("flair", np.zeros((10, 11, 7), np.int16), r"shape \(10, 11, 7\)"),
        ("flair", np.zeros((1, 9, 9, 7), np.int32), "'flair' of sample 3 is int32"),
        (
            "gene",
            np.zeros(4, np.float32),
            r"'gene' of sample 3 is float32 of shape \(4,\), expected float32 of \(5,\); mend",
        ),
    ],
)
def test_values_of_another_shape_or_dtype_are_not_written(tmp_path: Path, name: str, array: np.ndarray, words: str):
    with pytest.raises(DataError, match=words):
        ZarrWriter(tmp_path / "volumes.zarr", MODALITIES).write(name, 3, array)


@pytest.mark.parametrize("name", ["flair", "gene"])
def test_a_full_disk_is_told_and_leaves_no_part_of_a_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    writer = ZarrWriter(tmp_path / "volumes.zarr", MODALITIES)
    writer.write(name, 0, values(0)[name])

    def full(path: Path, *_: object):
        if name == "flair":
            path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes" if name == "flair" else "open", full)
    with pytest.raises(
        DataError,
        match=rf"cannot write 'volumes\.zarr/{name}/c/.*No space left on device; free some space and start the",
    ):
        writer.write(name, 1, values(1)[name])
    assert not (tmp_path / "volumes.zarr/flair/c/1/0/0/0/0").exists()


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path):
    (tmp_path / "volumes.zarr").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot write 'volumes\.zarr/flair/c/0.*Not a directory; mend that"):
        ZarrWriter(tmp_path / "volumes.zarr", MODALITIES).write("flair", 0, values(0)["flair"])


@pytest.mark.parametrize(
    "modality, words",
    [
        (Modality(kind="image", dtype="uint8", shape=(4, 4, 3), codec="zarr"), "is a image of shape"),
        (
            Modality(kind="vector", dtype="float32", shape=(4,), codec="zarr", compression="zstd"),
            "uncompressed vectors",
        ),
        (Modality(kind="volume", dtype="int16", shape=(1, 4, 4, 4), codec="zarr", chunk=(1, 5, 4, 4)), "has chunk"),
        (Modality(kind="volume", dtype="int16", shape=(1, 4, 4, 4), codec="zarr", chunk=(4, 4, 4)), "has chunk"),
    ],
)
def test_what_a_group_cannot_hold_is_refused(tmp_path: Path, modality: Modality, words: str):
    with pytest.raises(DataError, match=f"modality 'x' {words}" if words.startswith(("is", "has")) else words):
        ZarrWriter(tmp_path / "volumes.zarr", {"x": modality})


def test_default_chunks():
    assert default_chunk((1, 240, 240, 155), "int16") == (1, 40, 40, 39)
    assert default_chunk((1, 240, 240, 155), "float32") == (1, 30, 30, 31)
    assert default_chunk((4, 64, 64, 64), "float16") == (4, 64, 64, 64)
    assert default_chunk((1, 512, 512, 7), "int16") == (1, 512, 512, 7)
    assert default_chunk((1, 512, 512, 20), "int16") == (1, 40, 40, 20)


@given(st.tuples(st.integers(1, 8), *[st.integers(1, 600)] * 3), st.sampled_from(["uint8", "int16", "float64"]))
def test_a_default_chunk_fits_and_is_of_moderate_size(shape: tuple[int, int, int, int], dtype: str):
    chunk = default_chunk(shape, dtype)
    assert all(0 < c <= n for c, n in zip(chunk, shape, strict=True))
    assert int(np.prod(chunk)) * np.dtype(dtype).itemsize <= 4 << 20
