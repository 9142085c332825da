"""Anybody's table: what its columns are, files kept as they are, splits as stated."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkd.data.shardset import ShardSet
from shards import generic
from shards.generic import Options
from tests.shards import layouts_volumes as layouts
from tests.shards.layouts_tables import examined, pixels, problems_of, save_image, study, volumes, write


def template_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(generic.TEMPLATE)))


def test_the_template_with_its_photos_becomes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        generic.main(["--template"])
    assert stop.value.code == 0
    (tmp_path / "table.csv").write_text(capsys.readouterr().out)
    for number, row in enumerate(template_rows()):
        if row["image:photo"]:
            save_image(tmp_path / row["image:photo"], number)
    arguments = ["--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    assert generic.main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "table.csv: 9 rows of 8 patients" in text
    assert "image 'photo': 8 of 9 rows, 12 x 16 x 3 uint8, files kept as they are" in text
    assert "vector 'clinic': 9 of 9 rows, 2 float32, age, score; 2 values are blank" in text
    assert "1 fold: the column 'split'" in text
    assert "note:" not in text
    assert "classes: benign 5, malignant 4" in text
    assert "fold 0: patients train 4, val 2, test 2" in text
    assert "no problems; run the same command without --dry-run" in text
    assert generic.main(arguments) == 0
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    manifest = shard_set.manifest
    assert manifest.samples.key[0] == "row-0000002"
    assert manifest.folds[0].test == ["gina", "hugo"]
    assert manifest.class_names == ["benign", "malignant"]
    assert manifest.samples.label == [0, 0, 1, 0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(shard_set.read(0, ["photo"])["photo"], pixels(0))
    np.testing.assert_array_equal(shard_set.read(1, ["clinic"])["clinic"], np.array([61, np.nan], np.float32))
    assert shard_set.has("photo").tolist() == [True] * 4 + [False] + [True] * 4


def test_files_are_kept_as_they_are(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["photo"] = f"photos/{number}.jpg"
        save_image(tmp_path / row["photo"], number, quality=50)
    generic.make(write(tmp_path, rows), tmp_path / "out")
    manifest = ShardSet(tmp_path / "out").manifest
    assert manifest.modalities["photo"].codec == "jpg"
    place = manifest.samples.bytes["photo"][5]
    assert place is not None
    tar = (tmp_path / "out" / manifest.shards[0].file).read_bytes()
    assert tar[place[0] : sum(place)] == (tmp_path / "photos" / "5.jpg").read_bytes()


def test_turned_and_mixed_images_are_packed_upright(tmp_path: Path):
    rows = study(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(pixels(3))).save(tmp_path / "photos" / "3.png", exif=turned)
    Image.fromarray(pixels(4)[:, :, 0]).save(tmp_path / "photos" / "4.png")
    Image.fromarray(pixels(5)).quantize().save(tmp_path / "photos" / "5.png")
    generic.make(write(tmp_path, rows), tmp_path / "out")
    shard_set = ShardSet(tmp_path / "out")
    np.testing.assert_array_equal(shard_set.read(3, ["photo"])["photo"], pixels(3))
    np.testing.assert_array_equal(shard_set.read(4, ["photo"])["photo"], np.repeat(pixels(4)[:, :, :1], 3, axis=2))
    assert shard_set.read(5, ["photo"])["photo"].shape == (12, 16, 3)


def test_images_of_other_sizes_are_brought_to_one(tmp_path: Path):
    rows = study(tmp_path)
    Image.fromarray(np.full((30, 20, 3), 77, np.uint8)).save(tmp_path / "photos" / "3.png")
    table = write(tmp_path, rows)
    words = "30 x 20 px (height x width), most have 12 x 16; mend it; or bring all to one with --size H,W"
    assert problems_of(table) == [f"row 5, column 'photo': {words}"]
    assert generic.main(["--raw", str(table), "--out", str(tmp_path / "out"), "--size", "8,10"]) == 0
    shard_set = ShardSet(tmp_path / "out")
    assert shard_set.manifest.modalities["photo"].shape == (8, 10, 3)
    assert (shard_set.read(3, ["photo"])["photo"] == 77).all()


def test_columns_have_roles_by_header_and_by_their_cells(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        np.save(tmp_path / f"{number}.npy", np.arange(5.0) + number)
        row |= {"Deep Features": f"{number}.npy", "vector:more": f"{number}.npy", "notes": "seen", "key": f"k{number}"}
        row |= {"group": f"lesion {number // 2}", "ki67": str(number), "her2": ""}
    options = Options(vectors=(("stain", ("ki67", "her2")),))
    made = generic.make(write(tmp_path, rows), tmp_path / "out", options=options)
    manifest = made.manifest
    assert {name: (m.kind, m.shape) for name, m in manifest.modalities.items()} == {
        "photo": ("image", (12, 16, 3)),
        "deep_features": ("vector", (5,)),
        "more": ("vector", (5,)),
        "clinic": ("vector", (2,)),
        "stain": ("vector", (2,)),
    }
    assert manifest.modalities["clinic"].features == ["age", "score"]
    assert manifest.modalities["stain"].features == ["ki67", "her2"]
    assert manifest.excluded == {"notes": "its header gives it no role"}
    assert (manifest.samples.key[3], manifest.samples.group[3]) == ("k3", "lesion 1")
    np.testing.assert_array_equal(ShardSet(tmp_path / "out").read(2, ["more"])["more"], np.arange(5.0) + 2)


def test_equal_tables_give_equal_bytes(tmp_path: Path):
    table = write(tmp_path, study(tmp_path))
    generic.make(table, tmp_path / "one")
    generic.make(table, tmp_path / "two", options=Options(threads=1))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_spreadsheets_with_semicolons_and_a_byte_order_mark_are_read(tmp_path: Path):
    table = write(tmp_path, study(tmp_path))
    text = table.read_text().replace(",", ";") + ";;;;\n\n"
    table.write_text("\ufeff" + text, encoding="utf-8")
    assert problems_of(table) == []


def test_folds_are_those_of_the_column(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["fold"] = str(number // 4)
    rows[0]["label"] = ""
    manifest = generic.make(write(tmp_path, rows), tmp_path / "out", options=Options(val_share=0.2)).manifest
    assert [len(fold.test) for fold in manifest.folds] == [3, 4, 4]  # who has no label is not tested
    assert "patient 0" in manifest.folds[1].train
    assert all(len(fold.val) == 2 for fold in manifest.folds)


def test_a_validation_part_is_held_out_where_the_table_has_none(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["split"] = "Test" if number < 4 else "Training"
    table = write(tmp_path, rows)
    fold = generic.make(table, tmp_path / "out", options=Options(val_share=0.25)).manifest.folds[0]
    assert (len(fold.train), len(fold.val), len(fold.test)) == (6, 2, 4)
    fold = generic.make(table, tmp_path / "none", options=Options(val_share=0)).manifest.folds[0]
    assert (len(fold.train), len(fold.val), len(fold.test)) == (8, 0, 4)


def test_classes_are_sorted_as_numbers_or_given(tmp_path: Path):
    rows = study(tmp_path, patients=30)
    for number, row in enumerate(rows):
        row["label"] = ("2", "10", "1")[number % 3]
    table = write(tmp_path, rows)
    assert generic.make(table, tmp_path / "out").manifest.class_names == ["1", "2", "10"]
    made = generic.make(table, tmp_path / "given", options=Options(classes=("10", "2", "1"))).manifest
    assert made.samples.label[:3] == [1, 0, 2]
    for number, row in enumerate(rows):
        row["label"] = str(number % 3)
    made = generic.make(write(tmp_path, rows), tmp_path / "numbers", options=Options(classes=("a", "b", "c"))).manifest
    assert (made.class_names, made.samples.label[:3]) == (["a", "b", "c"], [0, 1, 2])


def test_volumes_with_a_target_are_a_segmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = volumes(tmp_path, target=True)
    rows[7]["second"] = ""
    table = write(tmp_path, rows)
    arguments = ["--raw", str(table), "--out", str(tmp_path / "out"), "--classes", "ground,core,rim,edge"]
    assert generic.main([*arguments, "--dry-run"]) == 0
    assert "classes by value: 0 ground, 1 core, 2 rim, 3 edge" in capsys.readouterr().out
    assert generic.main(arguments) == 0
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    manifest = shard_set.manifest
    assert (manifest.problem, manifest.container) == ("segmentation", "zarr")
    assert manifest.modalities["t1"].shape == (1, 6, 5, 5)
    assert shard_set.has("second").tolist() == [True] * 7 + [False] + [True] * 2
    for number in (0, 1):
        arrays = shard_set.read(number, ["t1", "mask", "t1_stats"])
        np.testing.assert_array_equal(arrays["t1"][0], layouts.voxels(number, "t1", "2020", (6, 5, 4 + number)))
        np.testing.assert_array_equal(arrays["mask"][0], layouts.voxels(number, "seg", "2023", (6, 5, 4 + number)))
    space = manifest.samples.space[0]
    assert space is not None
    np.testing.assert_array_equal(space.affine, layouts.AFFINE)
    assert "second" in manifest.modalities


def test_volumes_with_labels_are_a_classification(tmp_path: Path):
    rows = volumes(tmp_path, target=False)
    for row in rows:
        row["clinic.age"] = "50"
    manifest = generic.make(write(tmp_path, rows), tmp_path / "out").manifest
    assert (manifest.problem, manifest.container) == ("classification", "zarr")
    assert ShardSet(tmp_path / "out").read(3, ["clinic"])["clinic"].tolist() == [50]


def test_arrays_have_no_anatomy(tmp_path: Path):
    rows = volumes(tmp_path, target=False)
    for row in rows:
        row["volume:t1"] = ""
    rows[0]["volume:t1"] = "0.nii.gz"
    manifest = generic.make(write(tmp_path, rows), tmp_path / "out").manifest
    first, second = manifest.samples.space[:2]
    assert first is not None
    assert first.affine is not None  # the NIfTI file beside it knows
    assert second is not None
    assert (second.affine, second.spacing, second.shape) == (None, None, (6, 5, 5))


def test_folds_may_be_counted_from_one(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["fold"] = str(number // 4 + 1)
    found = examined(write(tmp_path, rows))
    assert found.lines == []
    assert found.notes[0] == "note: column 'fold' counts from 1: fold 1 of the table is fold 0 of the set, of 3 folds"
    manifest = generic.make(tmp_path, tmp_path / "out").manifest
    assert [fold.test[0] for fold in manifest.folds] == ["patient 0", "patient 4", "patient 10"]


def test_folds_of_a_segmentation_are_not_stratified(tmp_path: Path):
    table = write(tmp_path, volumes(tmp_path, target=True))
    options = Options(classes=("ground", "core", "rim", "edge"))
    manifest = generic.make(table, tmp_path / "out", options=options).manifest
    assert manifest.split_rule == "by patient; 0.15 of the rest is the validation part"
    write(tmp_path, volumes(tmp_path, target=True)[:1])
    assert problems_of(table, options) == ["1 patient; 5 folds with train, val and test need at least 5; add patients"]


def test_decimal_commas_are_read_where_they_separate_nothing(tmp_path: Path):
    rows = study(tmp_path)
    for number, row in enumerate(rows):
        row["clinic.age"] = f"3{number % 10},5"
    table = write(tmp_path, rows)
    assert all("write it with a point, 3" in line for line in problems_of(table))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    found = examined(table)
    assert (found.lines, found.notes) == (
        [],
        ["note: column 'clinic.age' has decimal commas, such as '30,5', read as 30.5"],
    )
    generic.make(table, tmp_path / "out")
    assert ShardSet(tmp_path / "out").read(3, ["clinic"])["clinic"][0] == 33.5


@pytest.mark.real_data
def test_a_real_table_of_skin_lesions(real: Callable[[str], Path], tmp_path: Path):
    folder = real("ham10000_small")
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = [
        {
            "patient": row["lesion_id"],
            "label": row["dx"],
            "key": row["image_id"],
            "image:derm": str(folder / row["file"]),
            "clinic.age": row["age"],
            "sex": row["sex"],
        }
        for row in rows
    ]
    manifest = generic.make(write(tmp_path, own), tmp_path / "out").manifest
    assert manifest.n_samples == len(rows)
    assert manifest.class_names == sorted({row["dx"] for row in rows})
    assert manifest.modalities["derm"].codec == "jpg"
    assert len(manifest.folds) == 5
    shard_set = ShardSet(tmp_path / "out")
    with Image.open(folder / rows[7]["file"]) as image:
        number = manifest.samples.key.index(rows[7]["image_id"])
        np.testing.assert_array_equal(shard_set.read(number, ["derm"])["derm"], np.asarray(image))
