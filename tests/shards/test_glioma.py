"""Gliomas in the PathomicFusion layout: who takes part, what is stored as it is, what the splits are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkd.data.dataset import DataConfig, Dataset
from distkd.data.shardset import ShardSet
from distkd.errors import ConfigError, DataError
from shards import glioma
from shards.glioma import Options
from tests.shards import layouts_images as layouts
from tests.shards.layouts_images import change, glioma_patient, glioma_roi, put

ROI = Options(size=layouts.ROI_PX)
PATCHES = Options(level="patches", size=layouts.PATCH_PX)
COMPLETE = [number for number in range(layouts.N_GLIOMA) if number not in (3, 4)]


def key(number: int, roi: int = 1) -> str:
    return glioma_roi(number, roi).replace(".", "_")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.glioma(tmp_path_factory.mktemp("glioma") / "raw")


@pytest.fixture
def raw(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "raw"))


@pytest.fixture(scope="module")
def regions(pristine: Path) -> ShardSet:
    glioma.make(pristine, pristine.parent / "regions", options=ROI)
    return ShardSet(pristine.parent / "regions")


def test_each_region_of_a_complete_patient_is_a_sample(regions: ShardSet):
    samples = regions.manifest.samples
    assert samples.key == sorted(key(number, roi) for number in COMPLETE for roi in range(1, 2 + number % 2))
    assert samples.group == samples.key
    assert dict(zip(samples.patient, samples.label, strict=True)) == {
        glioma_patient(number): number % 3 for number in COMPLETE
    }
    regions.verify()


def test_images_are_stored_as_they_are(pristine: Path, regions: ShardSet):
    for number in COMPLETE:
        original = (pristine / "all_st" / f"{glioma_roi(number, 1)}.png").read_bytes()
        assert layouts.stored_bytes(regions.folder, "path", key(number)) == original


def test_omics_are_the_80_columns_of_the_patient_and_recorded_as_missing_without_a_row(
    pristine: Path, regions: ShardSet
):
    assert regions.manifest.modalities["omic"].features == layouts.OMICS
    row = next(row for row in layouts.read_rows(pristine / "all_dataset.csv") if row["TCGA ID"] == glioma_patient(7))
    for roi in (1, 2):
        omic = regions.read(regions.manifest.samples.key.index(key(7, roi)), ["omic"])["omic"]
        np.testing.assert_array_equal(omic, [float(row[column]) for column in layouts.OMICS])
    lacking = {
        patient
        for patient, has in zip(regions.manifest.samples.patient, regions.has("omic").tolist(), strict=True)
        if not has
    }
    assert lacking == {glioma_patient(5)}


def test_folds_are_the_published_splits_with_a_part_held_out_by_patient(pristine: Path, regions: ShardSet):
    rows = {row["TCGA ID"]: row for row in layouts.read_rows(pristine / "pnas_splits.csv")}
    label_of = dict(zip(regions.manifest.samples.patient, regions.manifest.samples.label, strict=True))
    assert len(regions.manifest.folds) == 15
    for fold, column in zip(regions.manifest.folds, layouts.RANDOMIZATIONS, strict=True):
        assert set(fold.test) == {patient for patient in label_of if rows[patient][column] == "Test"}
        assert {*fold.train, *fold.val} == {patient for patient in label_of if rows[patient][column] == "Train"}
        assert {label_of[patient] for patient in fold.val} == {0, 1, 2}


def test_another_seed_holds_out_others(pristine: Path, regions: ShardSet, tmp_path: Path):
    other = glioma.make(pristine, tmp_path / "other", options=ROI, seed=1).manifest
    assert [fold.test for fold in other.folds] == [fold.test for fold in regions.manifest.folds]
    assert [fold.val for fold in other.folds] != [fold.val for fold in regions.manifest.folds]


def test_the_same_bytes_twice(pristine: Path, regions: ShardSet, tmp_path: Path):
    glioma.make(pristine, tmp_path / "again", options=ROI)
    assert layouts.bytes_of(tmp_path / "again") == layouts.bytes_of(regions.folder)


def test_patches_are_grouped_by_their_region(pristine: Path, tmp_path: Path):
    manifest = glioma.make(pristine, tmp_path / "out", options=PATCHES).manifest
    assert manifest.modalities["path"].shape == (layouts.PATCH_PX, layouts.PATCH_PX, 3)
    regions = [key(number, roi) for number in COMPLETE for roi in range(1, 2 + number % 2)]
    expected = {f"{region}_{patch}_0": region for region in regions for patch in range(2)}
    assert dict(zip(manifest.samples.key, manifest.samples.group, strict=True)) == expected
    first = f"{glioma_roi(0, 1)}_0_0.png"
    stored = layouts.stored_bytes(tmp_path / "out", "path", first.removesuffix(".png").replace(".", "_"))
    assert stored == (pristine / "all_st_patches_512" / first).read_bytes()


def test_a_patch_belongs_to_the_region_with_the_longest_name(raw: Path, tmp_path: Path):
    for name in ("TCGA-00-0000_1", "TCGA-00-0000_1_2"):
        layouts.picture(raw / "all_st" / f"{name}.png", layouts.ROI_PX)
        layouts.picture(raw / "all_st_patches_512" / f"{name}_512_0.png", layouts.PATCH_PX)
    samples = glioma.make(raw, tmp_path / "out", options=PATCHES).manifest.samples
    group_of = dict(zip(samples.key, samples.group, strict=True))
    assert group_of["TCGA-00-0000_1_512_0"] == "TCGA-00-0000_1"
    assert group_of["TCGA-00-0000_1_2_512_0"] == "TCGA-00-0000_1_2"


def test_incomplete_patients_are_kept_when_asked_for(pristine: Path, tmp_path: Path):
    made = glioma.make(pristine, tmp_path / "out", options=Options(size=layouts.ROI_PX, keep_incomplete=True))
    samples = made.manifest.samples
    label_of = dict(zip(samples.patient, samples.label, strict=True))
    assert len(label_of) == layouts.N_GLIOMA
    no_grade, no_subtype = glioma_patient(3), glioma_patient(4)
    assert (label_of[no_grade], label_of[no_subtype]) == (-1, 1)
    omic = ShardSet(tmp_path / "out").read(samples.key.index(key(4)), ["omic"])["omic"]
    assert np.flatnonzero(np.isnan(omic)).tolist() == [78, 79]
    for fold in made.manifest.folds:
        assert no_grade not in {*fold.val, *fold.test}
    assert any(no_grade in fold.train for fold in made.manifest.folds)


def test_folds_of_our_own_need_no_published_splits(raw: Path, tmp_path: Path):
    (raw / "pnas_splits.csv").unlink()
    with pytest.raises(DataError, match=r"has no file 'pnas_splits\.csv'; .* or ask for folds .* with --folds 5"):
        glioma.make(raw, tmp_path / "out", options=ROI)
    manifest = glioma.make(raw, tmp_path / "out", options=Options(size=layouts.ROI_PX, folds=3)).manifest
    assert sorted(patient for fold in manifest.folds for patient in fold.test) == sorted(set(manifest.samples.patient))
    assert manifest.split_rule.startswith("3 folds by patient, stratified by grade")


def test_jpegs_pass_through_and_beside_a_png_become_one(tmp_path: Path):
    raw = layouts.glioma(tmp_path / "raw", suffix=".jpg")
    manifest = glioma.make(raw, tmp_path / "jpg", options=ROI).manifest
    file = raw / "all_st" / f"{glioma_roi(0, 1)}.jpg"
    assert manifest.modalities["path"].codec == "jpg"
    assert layouts.stored_bytes(tmp_path / "jpg", "path", key(0)) == file.read_bytes()
    layouts.picture(raw / "all_st" / f"{glioma_roi(0, 9)}.png", layouts.ROI_PX)
    manifest = glioma.make(raw, tmp_path / "png", options=ROI).manifest
    assert manifest.modalities["path"].codec == "png"
    pixels = ShardSet(tmp_path / "png").read(manifest.samples.key.index(key(0)), ["path"])["path"]
    with Image.open(file) as image:
        np.testing.assert_array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_what_is_no_8_bit_rgb_is_converted(raw: Path, tmp_path: Path, mode: str):
    file = raw / "all_st" / f"{glioma_roi(0, 1)}.png"
    layouts.picture(file, layouts.ROI_PX, mode=mode)
    glioma.make(raw, tmp_path / "out", options=ROI)
    with Image.open(file) as image:
        np.testing.assert_array_equal(ShardSet(tmp_path / "out").read(0, ["path"])["path"], image.convert("RGB"))


def test_the_command_reports_what_it_left_out(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("notes.txt", "slide.png", "TCGA-99-9999_1.png"):
        layouts.picture(raw / "all_st" / name, layouts.ROI_PX, format="png")
    (raw / "all_st" / ".DS_Store").touch()
    (raw / "all_st" / f"{glioma_roi(6, 1)}.png").unlink()
    change("pnas_splits.csv", lambda rows: rows.pop(7))(raw)
    arguments = ["--raw", str(raw), "--out", str(tmp_path / "out"), "--size", str(layouts.ROI_PX)]
    assert glioma.main(arguments) == 0
    text = capsys.readouterr().out
    for line in (
        "skipped 1: no image in all_st/ (notes.txt)",
        "skipped 1: file name that does not start with a TCGA barcode (slide.png)",
        "skipped 1: image of a patient who is not in grade_data.csv (TCGA-99-9999_1.png)",
        "skipped 1: patient without an image (TCGA-00-0006)",
        "skipped 1: patient in no published split (TCGA-01-0007)",
        "skipped 1: patient without a grade (TCGA-00-0003)",
        "skipped 1: patient without a molecular subtype (TCGA-01-0004)",
        "21 samples of 14 patients",
        "15 folds (the 15 published splits; 0.15 of each training list, by grade, for validation)",
    ):
        assert line in text
    assert ".DS_Store" not in text


def test_patches_without_a_region_and_regions_without_a_patch_are_counted(raw: Path, tmp_path: Path):
    layouts.picture(raw / "all_st_patches_512" / "TCGA-00-0000-other_1_0_0.png", layouts.PATCH_PX)
    for patch in (raw / "all_st_patches_512").glob(f"{glioma_roi(7, 2)}_*"):
        patch.unlink()
    skipped = glioma.make(raw, tmp_path / "out", options=PATCHES).skipped.by_reason
    assert skipped["patch of no region in all_st/"] == ["TCGA-00-0000-other_1_0_0.png"]
    assert skipped["region without a patch"] == [glioma_roi(7, 2)]


@pytest.mark.parametrize("column", ["Grade", "Histology", "Molecular subtype", "Survival months", "Age at diagnosis"])
def test_columns_that_leak_are_refused_as_inputs(regions: ShardSet, column: str):
    with pytest.raises(DataError, match=f"'{column}' is excluded from the inputs of task 'glioma_grade': "):
        Dataset(regions, DataConfig(), [column], seed=0)


def rename(name: str, old: str, new: str) -> Callable[[Path], None]:
    def renamed(raw: Path) -> None:
        first, rest = (raw / name).read_text().split("\n", 1)
        assert f",{old}," in f",{first.strip()},"
        first = ",".join(new if cell == old else cell for cell in first.strip().split(","))
        (raw / name).write_text(f"{first}\n{rest}")

    return renamed


@pytest.mark.parametrize(
    "alias",
    [
        rename("grade_data.csv", "TCGA ID", "\ufeffpatient_id"),
        rename("grade_data.csv", "Molecular subtype", "IDH/codel subtype"),
        rename("grade_data.csv", "Grade", "neoplasm_histologic_grade"),
        rename("pnas_splits.csv", "TCGA ID", ""),
        rename("all_dataset.csv", "indexes", "Unnamed: 0"),
        rename("all_dataset.csv", "TCGA ID", "tcga_id"),
        put("grade_data.csv", 0, "Grade", "II"),
        put("grade_data.csv", 0, "Grade", "G2"),
        put("grade_data.csv", 0, "Grade", "2"),
        put("grade_data.csv", 3, "Grade", "NaN"),
        put("grade_data.csv", 0, "TCGA ID", "tcga-00-0000-01Z"),
        put("pnas_splits.csv", 0, "Randomization - 2", " train "),
    ],
)
def test_names_and_values_may_be_written_otherwise(
    raw: Path, tmp_path: Path, regions: ShardSet, alias: Callable[[Path], None]
):
    alias(raw)
    manifest = glioma.make(raw, tmp_path / "out", options=ROI).manifest
    assert manifest.samples == regions.manifest.samples
    assert manifest.folds == regions.manifest.folds


def test_other_columns_can_be_excluded_by_name(raw: Path, tmp_path: Path):
    rename("all_dataset.csv", "GENE3_cnv", "Smoker")(raw)
    options = Options(size=layouts.ROI_PX, exclude=("smoker",), omics=79)
    manifest = glioma.make(raw, tmp_path / "out", options=options).manifest
    assert manifest.modalities["omic"].shape == (79,)
    assert manifest.excluded["Smoker"] == "named with --exclude"
    with pytest.raises(
        DataError, match=r"--exclude names 'colour', which .*all_dataset\.csv' has not; it has 'indexes'"
    ):
        glioma.make(raw, tmp_path / "other", options=Options(exclude=("colour",)))


def drop_region(raw: Path) -> None:
    shutil.rmtree(raw / "all_st")


def small_region(raw: Path) -> None:
    layouts.picture(raw / "all_st" / f"{glioma_roi(0, 1)}.png", 20, 24)


def cut_region(raw: Path) -> None:
    path = raw / "all_st" / f"{glioma_roi(0, 1)}.png"
    path.write_bytes(path.read_bytes()[:200])


def no_image(raw: Path) -> None:
    (raw / "all_st" / f"{glioma_roi(0, 1)}.png").write_text("not a picture")


def twice(raw: Path) -> None:
    layouts.picture(raw / "all_st" / f"{glioma_roi(0, 1)}.jpg", layouts.ROI_PX)


def no_split_columns(raw: Path) -> None:
    rows = layouts.read_rows(raw / "pnas_splits.csv")
    layouts.table(raw / "pnas_splits.csv", [{"TCGA ID": row["TCGA ID"], "which": "Train"} for row in rows])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            drop_region,
            r"raw data .* has no folder 'all_st'; name with --raw the folder of PathomicFusion's glioma data",
        ),
        (small_region, r"_1\.png' is 20 x 24 px, expected 24 x 24; leave this image out, or name with --size the side"),
        (cut_region, r"'path' of sample 'TCGA-00-0000-.*_1' is not a readable image .*; mend the raw file"),
        (no_image, r"cannot read the image '.*_1\.png': .*; copy it again"),
        (twice, r"all_st/ has '.*_1\.jpg' and '.*_1\.png', expected one file of a name; remove one"),
        (
            no_split_columns,
            r"pnas_splits\.csv' has no column for a split; expected names such as 'Randomization - 1'; it",
        ),
        (
            put("grade_data.csv", 2, "Grade", "V"),
            r"grade of patient 'TCGA-02-0002' is 'V' in .*grade_data\.csv', expected 2, 3, 4 or a blank",
        ),
        (
            put("grade_data.csv", 2, "TCGA ID", "P17"),
            r"'TCGA ID' in .*grade_data\.csv' is 'P17', expected a barcode such as TCGA-06-0174; mend the table",
        ),
        (
            put("grade_data.csv", 2, "TCGA ID", "TCGA-01-0001"),
            r"patient 'TCGA-01-0001' is listed twice in .*grade_data\.csv'; leave one row",
        ),
        (
            rename("grade_data.csv", "Grade", "degree"),
            r"grade_data\.csv' has no column for the grade; looked for grade, .*; it has 'TCGA ID', .*'degree', .*",
        ),
        (rename("all_dataset.csv", "TCGA ID", "who"), "has no column for the patient; looked for tcga id, patient id"),
        (
            put("all_dataset.csv", 1, "GENE3_cnv", "gain"),
            r"'GENE3_cnv' of patient 'TCGA-01-0001' in .*all_dataset\.csv' is 'gain', expected a number or a blank",
        ),
        (
            rename("all_dataset.csv", "Survival months", "KPS"),
            r"has 81 columns of omics, expected 80: 'KPS', 'GENE0_cnv', .*; name those that are none with --exclude",
        ),
        (
            put("pnas_splits.csv", 1, "Randomization - 7", "Val"),
            r"'Randomization - 7' of patient 'TCGA-01-0001' in pnas_splits\.csv is 'Val', expected Train or Test; mend",
        ),
        (
            change("grade_data.csv", lambda rows: [row.update({"Grade": ""}) for row in rows]),
            "no image of .* is of a patient to use; skipped 18: patient without a grade",
        ),
    ],
)
def test_bad_raw_data_is_named_and_nothing_is_written(
    raw: Path, tmp_path: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
):
    damage(raw)
    with pytest.raises(DataError, match=words):
        glioma.make(raw, tmp_path / "out", options=ROI)
    assert glioma.main(["--raw", str(raw), "--out", str(tmp_path / "out"), "--size", str(layouts.ROI_PX)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_the_published_size_is_the_default(pristine: Path, tmp_path: Path):
    with pytest.raises(DataError, match="is 24 x 24 px, expected 1024 x 1024"):
        glioma.make(pristine, tmp_path / "out")
    with pytest.raises(DataError, match="is 12 x 12 px, expected 512 x 512"):
        glioma.make(pristine, tmp_path / "out", options=Options(level="patches"))


@pytest.mark.parametrize(
    "options, words",
    [
        (Options(size=0), "--size is 0, expected at least 1"),
        (Options(omics=0), "--omics is 0, expected at least 1"),
        (Options(folds=1), "--folds is 1, expected at least 2"),
        (Options(val_share=1.0), "--val-share is 1, expected 0 <= share < 1"),
    ],
)
def test_options_out_of_range_are_named(pristine: Path, tmp_path: Path, options: Options, words: str):
    with pytest.raises(ConfigError, match=words):
        glioma.make(pristine, tmp_path / "out", options=options)


@pytest.mark.real_data
def test_real_regions_pass_through(real: Callable[[str], Path], tmp_path: Path):
    """Three real regions with real omics, laid out as PathomicFusion lays them out."""
    import gzip

    source = real("tcga_gbmlgg")
    files = sorted((source / "roi_images").glob("*.jpg"))
    raw = tmp_path / "raw"
    (raw / "all_st").mkdir(parents=True)
    for file in files:
        (raw / "all_st" / file.name).symlink_to(file)
    names = [file.name[:12] for file in files]
    patients = {row["patient_id"]: row for row in layouts.read_rows(source / "patients.csv")}
    layouts.table(
        raw / "grade_data.csv",
        [{"TCGA ID": name, "Grade": patients[name]["grade"], "Molecular subtype": "x"} for name in names],
    )
    with gzip.open(source / "omics.csv.gz", "rt") as table:
        header = table.readline().strip().split(",")
        rows = [line.strip().split(",") for line in table if line[:12] in names]
    assert rows
    chosen = [0, *(n for n, column in enumerate(header) if column.endswith(("_cnv", "_mut")))]
    layouts.table(raw / "all_dataset.csv", [{header[n]: row[n] for n in chosen} for row in rows])
    layouts.table(
        raw / "pnas_splits.csv",
        [{"TCGA ID": name, "Randomization - 1": "Train" if n else "Test"} for n, name in enumerate(names)],
    )
    manifest = glioma.make(raw, tmp_path / "out", options=Options(omics=len(chosen) - 1)).manifest
    assert manifest.modalities["path"].shape == (1024, 1024, 3)
    assert manifest.samples.patient == names
    for file in files:
        assert layouts.stored_bytes(tmp_path / "out", "path", file.stem) == file.read_bytes()
    ShardSet(tmp_path / "out").verify()
