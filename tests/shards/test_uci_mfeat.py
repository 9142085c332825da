"""The embedded digits: their shape, their folds, their licence, and what happens when the file is damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from distkd.data.shardset import ShardSet
from distkd.errors import DataError
from shards import uci_mfeat


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("digits") / "shards"
    uci_mfeat.make(None, out)
    return ShardSet(out)


def test_the_embedded_file_is_the_one_that_its_readme_names():
    content = (uci_mfeat.EMBEDDED / "mfeat.npz").read_bytes()
    readme = (uci_mfeat.EMBEDDED / "README.md").read_text()
    assert hashlib.sha256(content).hexdigest() in readme
    assert "CC BY 4.0" in readme


def test_views_and_classes_are_those_of_the_source(digits: ShardSet):
    shapes = {name: modality.shape for name, modality in digits.manifest.modalities.items()}
    assert shapes == {"fac": (216,), "fou": (76,), "kar": (64,), "mor": (6,), "pix": (240,), "zer": (47,)}
    assert np.bincount(digits.manifest.samples.label).tolist() == [160] * 10
    assert digits.manifest.licence == "CC BY 4.0"
    assert "row" in digits.manifest.excluded


def test_folds_are_1200_80_320_and_stratified(digits: ShardSet):
    label_of = dict(zip(digits.manifest.samples.patient, digits.manifest.samples.label, strict=True))
    assert len(digits.manifest.folds) == 5
    for fold in digits.manifest.folds:
        for patients, each in ((fold.train, 120), (fold.val, 8), (fold.test, 32)):
            assert np.bincount([label_of[patient] for patient in patients]).tolist() == [each] * 10


def test_values_are_those_of_the_file(digits: ShardSet):
    with np.load(uci_mfeat.EMBEDDED / "mfeat.npz") as file:
        columns = {name: file[name] for name in file}
    for sample in (0, 777, 1599):
        place = columns["row"].tolist().index(int(digits.manifest.samples.key[sample].removeprefix("digit-")))
        assert digits.manifest.samples.label[sample] == columns["y"][place]
        for name, values in digits.read(sample, uci_mfeat.VIEWS).items():
            np.testing.assert_array_equal(values, columns[name][place])


def damaged(folder: Path, **change: np.ndarray | None) -> Path:
    folder.mkdir()
    with np.load(uci_mfeat.EMBEDDED / "mfeat.npz") as file:
        columns = {name: file[name][::40] for name in file} | change
    np.savez(folder / "mfeat.npz", **{name: array for name, array in columns.items() if array is not None})  # pyright: ignore[reportArgumentType]
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zer": None}, "lacks an array: .*zer"),
        ({"fou": np.zeros((40, 75), np.float32)}, r"'fou' .* has shape \(40, 75\), expected \(40, 76\)"),
        ({"mor": np.full((40, 6), np.inf, np.float32)}, "'mor' of sample 'digit-0000' is infinite"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path: Path, change: dict[str, np.ndarray], words: str):
    raw = damaged(tmp_path / "raw", **change)
    with pytest.raises(DataError, match=words):
        uci_mfeat.make(raw, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_cut_file_is_named(tmp_path: Path):
    content = (uci_mfeat.EMBEDDED / "mfeat.npz").read_bytes()
    (tmp_path / "mfeat.npz").write_bytes(content[:5000])
    with pytest.raises(DataError, match=r"cannot read '.*mfeat\.npz': .*copy it again"):
        uci_mfeat.make(tmp_path, tmp_path / "out")
