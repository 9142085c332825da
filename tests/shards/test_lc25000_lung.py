"""The lung tiles: grey, in the sizes asked for of the same tile, and copies of a tile together."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkd.data.shardset import ShardSet
from distkd.errors import ConfigError, DataError
from shards import lc25000_lung


def write(raw: Path, *, per_class: int = 7, side: int = 112, copies: int = 1) -> Path:
    """Tiles in the real layout; `copies` share a source tile."""
    rows: list[dict[str, str]] = []
    for label, name in enumerate(lc25000_lung.CLASS_NAMES):
        (raw / "images" / name).mkdir(parents=True)
        for number in range(per_class * copies):
            file = f"images/{name}/{name.replace('_', '')}{number}.jpeg"
            pixels = np.random.default_rng((label, number)).integers(
                0, 256, size=(side // 8, side // 8, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).resize((side, side)).save(raw / file, quality=95)
            tile = str(number // copies)
            rows.append({"file": file, "class_name": name, "label": str(label), "source_tile": tile, "n_aug": "9"})
    with (raw / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return raw


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write(tmp_path / "raw")


def test_tiles_are_grey_and_the_coarse_one_is_the_box_mean(raw: Path, tmp_path: Path):
    lc25000_lung.make(raw, tmp_path / "out")
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    for sample in range(len(shard_set)):
        arrays = shard_set.read(sample, ["tile", "tile28"])
        assert arrays["tile"].shape == (112, 112, 1)
        mean = arrays["tile"].reshape(28, 4, 28, 4).mean(axis=(1, 3))
        assert np.abs(arrays["tile28"][:, :, 0] - mean).max() <= 1  # pillow rounds after each of two passes
    first = shard_set.manifest.samples.key[0]
    assert first == "lungaca0"
    with Image.open(raw / "images" / "lung_aca" / f"{first}.jpeg") as image:
        np.testing.assert_array_equal(shard_set.read(0, ["tile"])["tile"][:, :, 0], np.asarray(image.convert("L")))


def test_larger_tiles_are_box_filtered(tmp_path: Path):
    lc25000_lung.make(write(tmp_path / "raw", side=224), tmp_path / "out")
    shard_set = ShardSet(tmp_path / "out")
    with Image.open(tmp_path / "raw" / "images" / "lung_aca" / "lungaca0.jpeg") as image:
        mean = np.asarray(image.convert("L")).reshape(112, 2, 112, 2).mean(axis=(1, 3))
    assert (
        np.abs(shard_set.read(0, ["tile"])["tile"][:, :, 0] - mean).max() <= 1
    )  # pillow rounds after each of two passes


def test_tiles_of_the_raw_size_are_kept_as_they_are(tmp_path: Path):
    raw = write(tmp_path / "raw", side=224)
    assert lc25000_lung.main(["--raw", str(raw), "--out", str(tmp_path / "out"), "--tile", "224"]) == 0
    shard_set = ShardSet(tmp_path / "out")
    arrays = shard_set.read(0, ["tile", "tile28"])
    with Image.open(raw / "images" / "lung_aca" / "lungaca0.jpeg") as image:
        np.testing.assert_array_equal(arrays["tile"][:, :, 0], np.asarray(image.convert("L")))
    mean = arrays["tile"].reshape(28, 8, 28, 8).mean(axis=(1, 3))
    assert np.abs(arrays["tile28"][:, :, 0] - mean).max() <= 1


def test_copies_of_a_tile_stay_together(tmp_path: Path):
    manifest = lc25000_lung.make(write(tmp_path / "raw", copies=3), tmp_path / "out").manifest
    assert (manifest.n_samples, manifest.n_patients) == (63, 21)
    assert len(manifest.folds) == 5
    assert sorted(patient for fold in manifest.folds for patient in fold.test) == sorted(set(manifest.samples.patient))


def test_other_coarse_sizes_can_be_asked_for(raw: Path, tmp_path: Path):
    assert lc25000_lung.main(["--raw", str(raw), "--out", str(tmp_path / "out"), "--coarse", "28", "14"]) == 0
    assert list(ShardSet(tmp_path / "out").manifest.modalities) == ["tile", "tile28", "tile14"]


def test_without_coarse_sizes_the_tile_alone_is_stored(raw: Path, tmp_path: Path):
    arguments = ["--raw", str(raw), "--out", str(tmp_path / "out"), "--tile", "28", "--coarse"]
    assert lc25000_lung.main(arguments) == 0
    modalities = ShardSet(tmp_path / "out").manifest.modalities
    assert {name: modality.shape for name, modality in modalities.items()} == {"tile": (28, 28, 1)}


@pytest.mark.parametrize(
    ("tile", "coarse", "words"),
    [
        (112, (112,), r"--coarse is \[112\], expected different sizes below the 112 pixels of --tile, or none"),
        (28, (28,), r"--coarse is \[28\], expected different sizes below the 28 pixels of --tile, or none"),
        (112, (14, 14), r"--coarse is \[14, 14\], expected different sizes"),
        (112, (0,), r"--coarse is \[0\], expected different sizes"),
        (0, (), r"--tile is 0, expected a size of 1 pixel or more"),
    ],
)
def test_sizes_that_make_no_copies_are_refused(
    raw: Path, tmp_path: Path, tile: int, coarse: tuple[int, ...], words: str
):
    with pytest.raises(ConfigError, match=words):
        lc25000_lung.make(raw, tmp_path / "out", tile=tile, coarse=coarse)


def test_tiles_are_never_enlarged(raw: Path, tmp_path: Path):
    words = r"is 112 x 112 px, expected a square of at least 113; leave it out, or make all tiles smaller with --tile"
    with pytest.raises(DataError, match=words):
        lc25000_lung.make(raw, tmp_path / "out", tile=113)


def cut_image(raw: Path) -> None:
    path = raw / "images" / "lung_n" / "lungn3.jpeg"
    path.write_bytes(path.read_bytes()[:300])


def remove_image(raw: Path) -> None:
    (raw / "images" / "lung_n" / "lungn3.jpeg").unlink()


def small_image(raw: Path) -> None:
    Image.new("RGB", (100, 100)).save(raw / "images" / "lung_n" / "lungn3.jpeg")


def wrong_label(raw: Path) -> None:
    path = raw / "labels.csv"
    path.write_text(path.read_text().replace("lung_scc,2,", "lung_scc,1,"))


def no_labels(raw: Path) -> None:
    (raw / "labels.csv").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_image, r"cannot read the image '.*lungn3\.jpeg': .*copy it again"),
        (remove_image, r"raw data .* has no file 'images/lung_n/lungn3\.jpeg'"),
        (small_image, r"lungn3\.jpeg' is 100 x 100 px, expected a square of at least 112; leave it out"),
        (wrong_label, r"has class 'lung_scc', label '1' in labels\.csv, expected lung_n 0, lung_aca 1, lung_scc 2"),
        (no_labels, r"raw data .* has no file 'labels\.csv'; name with --raw the folder of LC25000 lung tiles"),
    ],
)
def test_bad_images_are_named_and_nothing_is_written(
    raw: Path, tmp_path: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
):
    damage(raw)
    with pytest.raises(DataError, match=words):
        lc25000_lung.make(raw, tmp_path / "out")
    assert lc25000_lung.main(["--raw", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.real_data
def test_the_real_tiles(real: Callable[[str], Path], tmp_path: Path):
    lc25000_lung.make(real("lc25000_lung"), tmp_path / "out")
    manifest = ShardSet(tmp_path / "out").manifest
    assert np.bincount(manifest.samples.label).tolist() == [199, 194, 198]
    assert manifest.n_patients == 591
    assert [len(fold.test) for fold in manifest.folds] == [119, 118, 118, 118, 118]
