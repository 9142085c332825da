"""zarr arrays that are damaged, or other than the manifest says: found and named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from distkd.data.zarr import ZarrArrays
from distkd.errors import DataError
from tests.data.toy_zarr import MODALITIES, VOLUMES, N, n_chunks, own_shape, values, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    return write(tmp_path_factory.mktemp("zarr") / "volumes.zarr")


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A group of one's own, to be damaged."""
    return shutil.copytree(folder, tmp_path / "volumes.zarr")


def change(path: Path, place: int, by: int = 255) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= by
    path.write_bytes(content)


@pytest.mark.parametrize("name", VOLUMES)
def test_a_flipped_byte_names_file_and_chunk(own: Path, name: str):
    change(own / name / "c/0/0/0/0/0", 30, by=1)
    arrays = ZarrArrays(own, MODALITIES, N)
    with pytest.raises(
        DataError,
        match=rf"chunk \(.*\) of 'volumes\.zarr/{name}/c/0/0/0/0/0' is damaged: CRC-32C \w{{8}}, stored with it "
        r"\w{8}; "
        "copy it again or build it again; `distkd shards verify`",
    ):
        arrays.read(name, 0)
    arrays.read(name, 1, shape=own_shape(1))


@pytest.mark.parametrize("name", VOLUMES)
def test_every_flipped_byte_of_a_file_is_found(own: Path, name: str):
    path = own / name / "c/0/0/0/0/0"
    sound = path.read_bytes()
    for place in range(0, len(sound), 1 + len(sound) // 40):
        change(path, place, by=4)
        with pytest.raises(DataError):
            ZarrArrays(own, MODALITIES, N).read(name, 0)
        path.write_bytes(sound)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 60])
def test_a_file_cut_off_is_found(own: Path, keep: int, check: bool):
    os.truncate(own / "flair/c/0/0/0/0/0", keep)
    with pytest.raises(DataError, match=rf"'volumes.zarr/flair/c/0/0/0/0/0' is cut off: {keep} bytes, its index alone"):
        ZarrArrays(own, MODALITIES, N).read("flair", 0, check=check)


def test_a_file_that_ends_within_its_chunks_is_found(own: Path):
    path = own / "flair/c/0/0/0/0/0"
    os.truncate(path, path.stat().st_size - 60)
    with pytest.raises(DataError, match=r"the index of 'volumes\.zarr/flair/c/0/0/0/0/0' is damaged: CRC-32C"):
        ZarrArrays(own, MODALITIES, N).read("flair", 0, check=False)


@pytest.mark.parametrize("name", VOLUMES)
def test_a_file_cut_off_after_its_index_was_read_is_found(own: Path, name: str):
    arrays = ZarrArrays(own, MODALITIES, N)
    arrays.read(name, 0)
    os.truncate(own / name / "c/0/0/0/0/0", 10)
    with pytest.raises(DataError, match=rf"'volumes.zarr/{name}/c/0/0/0/0/0' is cut off: \d+ bytes at \d+, expected"):
        arrays.read(name, 0, check=False)


def set_index(path: Path, n_chunks: int, entry: int, offset: int, n_bytes: int) -> None:
    """Change an index and make its checksum right again."""
    from google_crc32c import value

    content = path.read_bytes()
    body, index = content[: -16 * n_chunks - 4], np.frombuffer(content[-16 * n_chunks - 4 : -4], "<u8").copy()
    index[2 * entry : 2 * entry + 2] = offset, n_bytes
    path.write_bytes(body + index.tobytes() + value(index.tobytes()).to_bytes(4, "little"))


@pytest.mark.parametrize("offset, n_bytes", [(10**9, 124), (2**64 - 60, 124), (0, 123), (0, 2**63), (0, 2**64 - 1)])
def test_an_index_that_points_elsewhere_is_found(own: Path, offset: int, n_bytes: int):
    set_index(own / "flair/c/0/0/0/0/0", n_chunks("flair"), 26, offset, n_bytes)
    with pytest.raises(
        DataError,
        match=rf"the index of 'volumes.zarr/flair/c/0/0/0/0/0' puts chunk \(0, 2, 2, 2\) at {offset} with {n_bytes} "
        r"bytes, expected 124 bytes that end by \d+; copy it",
    ):
        ZarrArrays(own, MODALITIES, N).read("flair", 0)


def with_crc(data: bytes) -> bytes:
    from google_crc32c import value

    return data + value(data).to_bytes(4, "little")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda compress: compress(bytes(769)), "decodes to 769 bytes, expected 770"),
        (lambda compress: compress(bytes(771)), "decodes to 771 bytes, expected 770"),
        (lambda compress: compress(bytes(200)), "decodes to 200 bytes, expected 770"),
        (lambda compress: b"no frame at all", "decodes to -1 bytes, expected 770"),
        (lambda compress: compress(np.random.default_rng(0).bytes(770))[:-300], "is not readable zstd"),
    ],
)
def test_a_chunk_that_does_not_decode_is_found(own: Path, make, words: str):
    from numcodecs.zstd import compress

    chunk = with_crc(make(compress))
    index = np.array([0, len(chunk)], "<u8").tobytes()
    (own / "mask/c/0/0/0/0/0").write_bytes(chunk + with_crc(index))
    with pytest.raises(DataError, match=rf"chunk \(0, 0, 0, 0\) of 'volumes.zarr/mask/c/0/0/0/0/0' {words}"):
        ZarrArrays(own, MODALITIES, N).read("mask", 0)


def test_damaged_vectors_are_found(own: Path):
    path = own / "gene/c/0/0"
    change(path, 4)
    arrays = ZarrArrays(own, MODALITIES, N)
    with pytest.raises(DataError, match=r"'volumes\.zarr/gene/c/0/0' is damaged: CRC-32C"):
        arrays.read("gene", 1)
    os.truncate(path, 99)
    with pytest.raises(DataError, match=r"'volumes\.zarr/gene/c/0/0' has 99 bytes, expected 5124"):
        arrays.read("gene", 1, check=False)
    path.unlink()
    with pytest.raises(
        DataError, match=r"cannot read 'volumes\.zarr/gene/c/0/0' with 'gene' of sample 1: No such file"
    ):
        arrays.read("gene", 1)


def edit(*path: str | int, value: object):
    def apply(meta):
        for step in path[:-1]:
            meta = meta[step]
        meta[path[-1]] = value

    return apply


INNER = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    "change_meta, words",
    [
        (edit("zarr_format", value=2), "has zarr_format 2, expected 3"),
        (edit("node_type", value="group"), 'has node_type "group", expected "array"'),
        (edit("data_type", value="uint16"), 'has data_type "uint16", expected "int16"'),
        (edit("shape", 0, value=7), r"has shape \[7, 1, 10, 11, 7\], expected \[6, 1, 10, 11, 7\]"),
        (edit("shape", 4, value=8), r"has shape \[6, 1, 10, 11, 8\], expected"),
        (edit("fill_value", value=1), "has fill_value 1, expected 0"),
        (
            edit("chunk_grid", "configuration", "chunk_shape", 0, value=2),
            r"has chunk_grid .*\[2, 1, 12, 15, 9\].*expected",
        ),
        (edit("chunk_grid", "name", value="rectangular"), "has chunk_grid .*rectangular.*expected"),
        (edit("chunk_key_encoding", "configuration", "separator", value="."), "has chunk_key_encoding"),
        (edit("chunk_key_encoding", value={"name": "v2"}), "has chunk_key_encoding"),
        (edit("codecs", value=[{"name": "bytes", "configuration": {"endian": "little"}}]), "has codecs"),
        (edit("codecs", value=None), "has codecs null"),
        (edit(*INNER, "chunk_shape", 2, value=3), "has codecs"),
        (edit(*INNER, "codecs", 0, "configuration", "endian", value="big"), "has codecs .*big"),
        (edit(*INNER, "codecs", 1, "name", value="gzip"), "has codecs .*gzip"),
        (edit(*INNER, "index_codecs", value=[{"name": "bytes", "configuration": {"endian": "little"}}]), "has codecs"),
        (edit(*INNER, "index_location", value="start"), "has codecs .*start"),
        (edit("storage_transformers", value=[{"name": "other"}]), "has storage_transformers"),
    ],
)
def test_metadata_that_disagrees_with_the_manifest_is_refused(own: Path, change_meta, words: str):
    path = own / "flair/zarr.json"
    meta = json.loads(path.read_text())
    change_meta(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(DataError, match=rf"'volumes.zarr/flair/zarr.json' {words}.* by the manifest; .*copy it again"):
        ZarrArrays(own, MODALITIES, N)


@pytest.mark.parametrize("text, words", [("{", "is not readable JSON"), ("[1]", "holds list, expected a JSON object")])
def test_unreadable_metadata_is_refused(own: Path, text: str, words: str):
    (own / "gene/zarr.json").write_text(text)
    with pytest.raises(DataError, match=f"'volumes.zarr/gene/zarr.json' {words}"):
        ZarrArrays(own, MODALITIES, N)
    (own / "gene/zarr.json").unlink()
    with pytest.raises(DataError, match=r"cannot read 'volumes\.zarr/gene/zarr\.json': No such file"):
        ZarrArrays(own, MODALITIES, N)


def test_metadata_in_another_spelling_is_the_same(own: Path):
    path = own / "mask/zarr.json"
    meta = json.loads(path.read_text())
    meta["chunk_key_encoding"] = {"name": "default"}
    meta["codecs"][0]["configuration"]["codecs"][0] = {"name": "bytes", "configuration": {"endian": "little"}}
    del meta["codecs"][0]["configuration"]["index_location"], meta["storage_transformers"]
    path.write_text(json.dumps(meta))
    np.testing.assert_array_equal(ZarrArrays(own, MODALITIES, N).read("mask", 0), values(0)["mask"])


def test_chunks_that_a_builder_chose_without_being_told_are_read(own: Path):
    told = {"flair": MODALITIES["flair"].model_copy(update={"chunk": None})}
    np.testing.assert_array_equal(ZarrArrays(own, told, N).read("flair", 0), values(0)["flair"])
