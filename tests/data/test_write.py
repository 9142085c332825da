"""Shards: plain WebDataset tars, equal bytes for equal input, all of it or nothing."""

from __future__ import annotations

import gc
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from webdataset.compat import WebDataset

from distkd.data.codec import DecodeError, decode, encode
from distkd.data.manifest import Description, Fold, Modality
from distkd.data.raw.volume_parts import target_values
from distkd.data.shardset import ShardSet
from distkd.data.write import ShardWriter
from distkd.errors import DataError
from tests.data.toy import DESCRIPTION, toy_arrays, write_toy

EVERYONE = Fold(train=["p"], val=[], test=[])


def add_all(
    writer: ShardWriter,
    keys: list[str],
    *,
    label: int = 0,
    change: dict[str, np.ndarray] | None = None,
    folds: list[Fold] | None = None,
) -> None:
    """Samples of one patient; `label` and `change` are the last one's."""
    for key in keys:
        last = key == keys[-1]
        arrays = {**toy_arrays(0), **(change or {})} if last else toy_arrays(0)
        writer.add(key, arrays, patient="p", label=label if last else 0)
    writer.split(folds or [EVERYONE], rule="", seed=None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_input_gives_equal_bytes(tmp_path: Path):
    write_toy(tmp_path / "one")
    write_toy(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) > 2


def test_tars_are_ustar_without_anything_of_this_machine(toy: ShardSet):
    for shard in toy.manifest.shards:
        with tarfile.open(toy.folder / shard.file) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        assert not any(m.pax_headers for m in members)
        assert (toy.folder / shard.file).stat().st_size % tarfile.RECORDSIZE == 0


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_the_tars(toy: ShardSet):
    urls = [str(toy.folder / shard.file) for shard in toy.manifest.shards]
    pipeline: Any = WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    samples = list(pipeline)
    gc.collect()  # the library leaves its files to the collector, which warns
    assert [sample["__key__"] for sample in samples] == toy.manifest.samples.key
    for number, sample in enumerate(samples):
        expected = toy_arrays(number)
        assert sample["json"]["label"] == toy.manifest.samples.label[number]
        assert sample["json"]["patient"] == toy.manifest.samples.patient[number]
        np.testing.assert_array_equal(sample["slide.png"], expected["slide"])
        assert ("gene.npy" in sample) == ("gene" in expected)
        if "gene" in expected:
            np.testing.assert_array_equal(sample["gene.npy"], expected["gene"])


def test_a_shard_is_closed_when_it_is_full(toy: ShardSet):
    assert len(toy.manifest.shards) > 2
    assert sum(shard.samples for shard in toy.manifest.shards) == len(toy)
    assert all(shard.bytes <= 60_000 + tarfile.RECORDSIZE for shard in toy.manifest.shards)


def test_a_failure_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(DataError), ShardWriter(tmp_path / "out", DESCRIPTION, shard_bytes=1) as writer:
        add_all(writer, ["a", "b", "b"])
    assert list(tmp_path.iterdir()) == []


def test_an_inconsistent_set_is_refused_and_leaves_nothing_behind(tmp_path: Path):
    with (
        pytest.raises(DataError, match=r"the new shard set .* fold 0 names patients without samples: 'q'"),
        ShardWriter(tmp_path / "out", DESCRIPTION) as writer,
    ):
        add_all(writer, ["a"], folds=[Fold(train=["q"], val=[], test=[])])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(DataError, match="exists already; remove it or name another folder with --out"):
        write_toy(tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine": b"x"}


def test_an_empty_folder_may_be_filled(tmp_path: Path):
    (tmp_path / "out").mkdir()
    write_toy(tmp_path / "out")
    ShardSet(tmp_path / "out").verify()


def test_an_output_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot make the output folder .*choose another --out"):
        write_toy(tmp_path / "file" / "out")


def test_a_set_without_samples_is_refused(tmp_path: Path):
    with (
        pytest.raises(DataError, match=r"no sample for .*: every one was skipped; check --raw"),
        ShardWriter(tmp_path / "out", DESCRIPTION) as writer,
    ):
        writer.split([EVERYONE], rule="", seed=None)


@pytest.mark.parametrize(
    ("key", "label", "change", "words"),
    [
        ("a.b", 0, {}, r"sample key 'a\.b' is not usable; expected 1 to 80 letters"),
        ("a/b", 0, {}, "sample key 'a/b' is not usable"),
        ("seen", 0, {}, "sample key 'seen' occurs twice; keys must be unique"),
        ("a", 2, {}, r"sample 'a' has label 2, expected 0\.\.1, or None where it is unknown"),
        ("a", 0, {"gene": np.zeros(4, np.float32)}, r"'gene' of sample 'a' has shape \(4,\), expected \(5,\)"),
        ("a", 0, {"slide": np.zeros((12, 10, 3))}, "'slide' of sample 'a' is float64, which does not fit uint8"),
        (
            "a",
            0,
            {"gene": np.array([0, np.inf, 0, 0, 0])},
            r"'gene' of sample 'a' is infinite in column b \(1 such values\)",
        ),
        ("a", 0, {"gene": np.array([0, 0, 1e300, 0, 0])}, "'gene' of sample 'a' is infinite in column c"),
        ("a", 0, {"outcome": np.zeros(1)}, "'outcome' is excluded from the inputs"),
        ("a", 0, {"sound": np.zeros(1)}, "unknown modality 'sound'"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(
    tmp_path: Path, key: str, label: int, change: dict[str, np.ndarray], words: str
):
    with pytest.raises(DataError, match=words), ShardWriter(tmp_path / "out", DESCRIPTION) as writer:
        add_all(writer, ["seen", key], label=label, change=change)


def test_a_name_that_is_too_long_for_a_tar_is_refused(tmp_path: Path):
    name = "m" * 30
    modality = Modality(kind="vector", dtype="float32", shape=(1,), codec="npy")
    description = Description(task="t", class_names=["a", "b"], modalities={name: modality}, source="", licence="")
    arrays = {name: np.zeros(1, np.float32)}
    words = r"'m+' of sample 'k+' would be 'k+\.m+\.npy' in its tar: 101 characters \(key 66, name 30\), expected 100"
    with pytest.raises(DataError, match=words), ShardWriter(tmp_path / "out", description) as writer:
        writer.add("k" * 66, arrays, patient="p", label=0)
    with ShardWriter(tmp_path / "out", description) as writer:
        writer.add("k" * 65, arrays, patient="p", label=0)
        writer.split([EVERYONE], rule="", seed=None)
    ShardSet(tmp_path / "out").verify()


def test_a_label_map_with_a_value_that_is_no_class_is_refused():
    target_CXYZ = np.zeros((1, 4, 4, 4), np.uint8)
    target_CXYZ[0, :2, 0, 0] = 3
    words = r"label map 'seg' of sample 'case-7' holds 3 at 2 voxels, expected \[0, 1, 4\]: the values of its classes"
    with pytest.raises(DataError, match=words):
        target_values("seg", target_CXYZ, [0, 1, 4], seed=0, sample="case-7")
    intensities_CXYZ = np.arange(64, dtype=np.int16).reshape(1, 4, 4, 4)
    with pytest.raises(DataError, match=r"holds 1 at 1 voxels, .*, 5 at 1 voxels and 58 more values, expected \[0\]"):
        target_values("seg", intensities_CXYZ, [0], seed=0, sample="a")


def test_a_sample_without_any_modality_is_refused(tmp_path: Path):
    with (
        pytest.raises(DataError, match="sample 'a' has no modality at all"),
        ShardWriter(tmp_path / "out", DESCRIPTION) as writer,
    ):
        writer.add("a", {}, patient="p", label=0)


def test_gaps_are_for_vectors_only(tmp_path: Path):
    image = Modality(kind="image", dtype="float32", shape=(2, 2, 1), codec="npy")
    description = Description(task="t", class_names=["a", "b"], modalities={"x": image}, source="", licence="")
    with (
        pytest.raises(DataError, match="holds NaN, which only a vector may"),
        ShardWriter(tmp_path / "o", description) as writer,
    ):
        writer.add("a", {"x": np.full((2, 2, 1), np.nan, np.float32)}, patient="p", label=0)


@given(
    array=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int16, np.uint8, np.int64]),
        hnp.array_shapes(max_dims=1, max_side=9),
    )
)
def test_npy_gives_back_what_was_put_in(array: np.ndarray):
    modality = Modality(kind="vector", dtype=array.dtype.name, shape=array.shape, codec="npy")  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(decode(encode(array, modality), modality), array)


@given(image=hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))))
def test_png_gives_back_what_was_put_in(image: np.ndarray):
    modality = Modality(kind="image", dtype="uint8", shape=image.shape, codec="png")
    np.testing.assert_array_equal(decode(encode(image, modality), modality), image)


def test_jpg_gives_back_nearly_what_was_put_in():
    image = np.broadcast_to(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], (32, 32, 3))
    modality = Modality(kind="image", dtype="uint8", shape=(32, 32, 3), codec="jpg")
    assert np.abs(decode(encode(image, modality), modality).astype(int) - image).max() < 8


def test_what_does_not_decode_says_so():
    vector = Modality(kind="vector", dtype="float32", shape=(3,), codec="npy")
    image = Modality(kind="image", dtype="uint8", shape=(2, 2, 1), codec="png")
    other = encode(np.zeros(4, np.float32), vector.model_copy(update={"shape": (4,)}))
    with pytest.raises(DecodeError, match=r"holds float32 of shape \(4,\), expected float32 of shape \(3,\)"):
        decode(other, vector)
    with pytest.raises(DecodeError, match="is not a readable npy array"):
        decode(b"nonsense", vector)
    with pytest.raises(DecodeError, match="is not a readable npy array"):
        decode(encode(np.zeros(3, np.float32), vector)[:-4], vector)
    with pytest.raises(DecodeError, match="is not a readable image"):
        decode(b"nonsense", image)


def test_a_pickle_in_a_shard_is_never_loaded():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match=r"holds object of shape \(1,\), expected float32"):
        decode(file.getvalue(), Modality(kind="vector", dtype="float32", shape=(1,), codec="npy"))


def test_images_of_other_modes_are_refused():
    file = io.BytesIO()
    Image.new("RGBA", (2, 2)).save(file, "PNG")
    with pytest.raises(DecodeError, match=r"mode RGBA, expected 8-bit grey \(L\) or RGB"):
        decode(file.getvalue(), Modality(kind="image", dtype="uint8", shape=(2, 2, 3), codec="png"))
