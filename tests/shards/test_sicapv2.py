"""SICAPv2: its sheets are the folds, its JPEGs stay as they are, a slide is in one split."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkd.data.shardset import ShardSet
from distkd.data.splits import check_classes
from distkd.errors import ConfigError, DataError
from shards import sicapv2
from tests.shards import layouts_images as layouts
from tests.shards.layouts_images import SLIDES, TILE_PX, sicap_image, sicap_rows

VAL2_TRAIN = "partition/Validation/Val2/Train.xlsx"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.sicapv2(tmp_path_factory.mktemp("sicapv2") / "raw")


@pytest.fixture
def raw(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "raw"))


@pytest.fixture(scope="module")
def patches(pristine: Path) -> ShardSet:
    sicapv2.make(pristine, pristine.parent / "out", size=TILE_PX)
    return ShardSet(pristine.parent / "out")


def test_each_labelled_patch_is_a_sample_of_its_slide(patches: ShardSet):
    samples = patches.manifest.samples
    rows = {row["image_name"].removesuffix(".jpg"): row for row in sicap_rows(SLIDES)}
    assert samples.key == sorted(rows)
    assert patches.manifest.class_names == ["NC", "G3", "G4", "G5"]
    for key, patient, label in zip(samples.key, samples.patient, samples.label, strict=True):
        assert rows[key][patches.manifest.class_names[label]] == 1
        assert key.startswith(f"{patient}_Block_")
    assert set(samples.patient) == set(SLIDES)
    patches.verify()


def test_jpegs_are_stored_as_they_are(pristine: Path, patches: ShardSet):
    for number, slide in enumerate(SLIDES):
        file = pristine / "images" / sicap_image(slide, number % 4)
        assert layouts.stored_bytes(patches.folder, "patch", file.stem) == file.read_bytes()


def test_folds_are_the_published_sheets(patches: ShardSet):
    assert len(patches.manifest.folds) == 4
    for number, fold in enumerate(patches.manifest.folds):
        held = SLIDES[3 + 3 * number : 6 + 3 * number]
        assert (set(fold.test), set(fold.val)) == (set(SLIDES[:3]), set(held))
        assert set(fold.train) == {*SLIDES[3:]} - {*held}
        check_classes(patches.manifest, number)


def test_the_same_bytes_twice(pristine: Path, patches: ShardSet, tmp_path: Path):
    sicapv2.make(pristine, tmp_path / "again", size=TILE_PX)
    assert layouts.bytes_of(tmp_path / "again") == layouts.bytes_of(patches.folder)


def test_cribriform_growth_and_masks_are_no_inputs(patches: ShardSet):
    assert {"G4C", "masks", "wsi_labels"} == set(patches.manifest.excluded)


@pytest.mark.parametrize("options", [{"mode": "L"}, {"format": "PNG"}], ids=["grey", "a PNG by another name"])
def test_what_is_no_rgb_jpeg_is_encoded_again(raw: Path, tmp_path: Path, options: dict[str, str]):
    file = raw / "images" / sicap_image(SLIDES[0], 0)
    layouts.picture(file, TILE_PX, **options)
    sicapv2.make(raw, tmp_path / "out", size=TILE_PX)
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    pixels = shard_set.read(shard_set.manifest.samples.key.index(file.stem), ["patch"])["patch"]
    with Image.open(file) as image:
        gap = np.abs(pixels.astype(int) - np.asarray(image.convert("RGB")))
    assert gap.mean() < 4  # JPEG quality 95


def test_names_without_a_suffix_and_empty_rows_are_read(raw: Path, tmp_path: Path, patches: ShardSet):
    rows = sicap_rows(SLIDES[:3])
    bare = [row | {"image_name": row["image_name"].removesuffix(".jpg"), "NC": float(row["NC"])} for row in rows]
    layouts.sheet(raw / sicapv2.TEST, [*bare, dict.fromkeys(rows[0])])
    assert sicapv2.make(raw, tmp_path / "out", size=TILE_PX).manifest.samples == patches.manifest.samples


def test_a_sheet_that_states_a_wrong_size_is_read_to_its_end(raw: Path, tmp_path: Path, patches: ShardSet):
    path = raw / sicapv2.TEST
    with zipfile.ZipFile(path) as book:
        members = {name: book.read(name) for name in book.namelist()}
    page = "xl/worksheets/sheet1.xml"
    assert b'<dimension ref="A1:F13"' in members[page]
    members[page] = members[page].replace(b'<dimension ref="A1:F13"', b'<dimension ref="A1:A1"')
    with zipfile.ZipFile(path, "w") as book:
        for name, content in members.items():
            book.writestr(name, content)
    assert sicapv2.make(raw, tmp_path / "out", size=TILE_PX).manifest.samples == patches.manifest.samples


def test_images_in_no_sheet_and_few_missing_ones_are_counted(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    extra, gone = sicap_image("18B0009999", 0), sicap_image(SLIDES[5], 2)
    layouts.picture(raw / "images" / extra, TILE_PX)
    (raw / "images" / gone).unlink()
    (raw / "images" / ".DS_Store").touch()
    monkeypatch.setattr(sicapv2, "MISSING_SHARE", 0.02)
    assert sicapv2.main(["--raw", str(raw), "--out", str(tmp_path / "out"), "--size", str(TILE_PX)]) == 0
    text = capsys.readouterr().out
    assert f"skipped 1: image of a sheet that is not there ({gone})" in text
    assert f"skipped 1: image in no sheet ({extra})" in text
    assert "59 samples of 15 patients" in text
    assert "4 folds (the 4 published validation splits and the one published test split)" in text


def rows_of(name: str) -> layouts.Rows:
    return sicap_rows(SLIDES[3:6] + SLIDES[9:] if name == VAL2_TRAIN else SLIDES[:3])


def put(name: str, row: int, column: str, value: object) -> Callable[[Path], None]:
    def changed(raw: Path) -> None:
        rows = rows_of(name)
        rows[row][column] = value
        layouts.sheet(raw / name, rows)

    return changed


def drop_column(raw: Path) -> None:
    layouts.sheet(
        raw / VAL2_TRAIN, [{k: v for k, v in row.items() if k not in ("G3", "G5")} for row in rows_of(VAL2_TRAIN)]
    )


def repeat_row(raw: Path) -> None:
    rows = rows_of(VAL2_TRAIN)
    layouts.sheet(raw / VAL2_TRAIN, [*rows, rows[0]])


def other_class(raw: Path) -> None:
    rows = rows_of(VAL2_TRAIN)
    rows[0] |= {"NC": rows[0]["G3"], "G3": rows[0]["NC"], "G4": rows[0]["G5"], "G5": rows[0]["G4"]}
    layouts.sheet(raw / VAL2_TRAIN, rows)


def no_rows(raw: Path) -> None:
    layouts.sheet(raw / VAL2_TRAIN, [dict.fromkeys(rows_of(VAL2_TRAIN)[0])])


def cut_sheet(raw: Path) -> None:
    path = raw / VAL2_TRAIN
    path.write_bytes(path.read_bytes()[:900])


def no_sheet(raw: Path) -> None:
    (raw / VAL2_TRAIN).unlink()


def leak(raw: Path) -> None:
    layouts.sheet(raw / VAL2_TRAIN, sicap_rows(SLIDES[:1] + SLIDES[3:6] + SLIDES[9:]))


def no_slide(raw: Path) -> None:
    rows = rows_of(VAL2_TRAIN)
    rows[0]["image_name"] = "patch17.jpg"
    layouts.sheet(raw / VAL2_TRAIN, rows)
    layouts.picture(raw / "images" / "patch17.jpg", TILE_PX)


def few_images(raw: Path) -> None:
    for slide in SLIDES[4:6]:
        (raw / "images" / sicap_image(slide, 1)).unlink()


def no_images(raw: Path) -> None:
    shutil.rmtree(raw / "images")


def small_image(raw: Path) -> None:
    layouts.picture(raw / "images" / sicap_image(SLIDES[4], 1), 8)


def cut_image(raw: Path) -> None:
    path = raw / "images" / sicap_image(SLIDES[4], 1)
    path.write_bytes(path.read_bytes()[:-60])


def no_image(raw: Path) -> None:
    (raw / "images" / sicap_image(SLIDES[4], 1)).write_text("not a picture")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_column, r"Val2/Train\.xlsx' has no column G3, G5; it has image_name, NC, G4, G4C"),
        (
            put(VAL2_TRAIN, 2, "NC", 1),
            r"Val2/Train\.xlsx' row 4: '.*_Region_2_.*\.jpg' has 1, 1, 0, 0 for NC, G3, G4, G5, expected a name, one 1",
        ),
        (put(VAL2_TRAIN, 0, "G5", 0.5), r"row 2: .* has \d, \d, \d, 0\.5 for NC, G3, G4, G5"),
        (put(VAL2_TRAIN, 0, "G5", None), r"row 2: .*None for NC, G3, G4, G5, expected a name, one 1 and else 0"),
        (put(VAL2_TRAIN, 0, "image_name", None), r"row 2: '' has .* for NC, G3, G4, G5, expected a name"),
        (repeat_row, r"Val2/Train\.xlsx' row 38: '.*' is listed twice; leave one row"),
        (other_class, r"'.*' is \w+ in 'partition/Validation/Val2/Train\.xlsx' and \w+ in a sheet before it, expected"),
        (no_rows, r"Val2/Train\.xlsx' has no rows; copy it again"),
        (cut_sheet, r"cannot read '.*Val2/Train\.xlsx': .*; copy it again"),
        (no_sheet, r"has no file 'partition/Validation/Val2/Train\.xlsx'; name with --raw the folder of SICAPv2"),
        (
            leak,
            rf"slide '{SLIDES[0]}' is in '.*Val2/Train\.xlsx' and in '.*Test/Test\.xlsx', 1 such slides in fold 1",
        ),
        (no_slide, r"image name 'patch17\.jpg' does not tell the slide; expected <slide>_Block_<region>\.\.\.; mend"),
        (
            few_images,
            r"images' lacks 2 of the 60 images that the sheets name, such as .*_yini_59786\.jpg; expected 1% at most",
        ),
        (no_images, "has no folder 'images'; name with --raw the folder of SICAPv2"),
        (
            small_image,
            r"_yini_59786\.jpg' is 8 x 8 px, expected 16 x 16; leave this image out, or name with --size the side",
        ),
        (cut_image, r"'patch' of sample '.*_yini_59786' is not a readable image .*truncated.*; mend the raw file"),
        (no_image, r"cannot read the image '.*_yini_59786\.jpg': .*; copy it again"),
    ],
)
def test_bad_raw_data_is_named_and_nothing_is_written(
    raw: Path, tmp_path: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
):
    damage(raw)
    with pytest.raises(DataError, match=words):
        sicapv2.make(raw, tmp_path / "out", size=TILE_PX)
    assert sicapv2.main(["--raw", str(raw), "--out", str(tmp_path / "out"), "--size", str(TILE_PX)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_the_published_size_is_the_default(pristine: Path, tmp_path: Path):
    with pytest.raises(DataError, match="is 16 x 16 px, expected 512 x 512"):
        sicapv2.make(pristine, tmp_path / "out")
    with pytest.raises(ConfigError, match="--size is 0, expected at least 1 pixel"):
        sicapv2.make(pristine, tmp_path / "out", size=0)
