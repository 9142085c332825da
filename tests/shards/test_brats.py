"""BraTS cases: voxels as in the files, the scanner's frame, what is missing, folds and lists, bad files by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distkd.data.raw.nifti import write_map
from distkd.data.shardset import ShardSet
from distkd.data.volumes import read_points, volume_statistics
from distkd.errors import ConfigError, DataError
from shards import brats
from shards.brats import Options
from tests.shards import layouts_volumes as layouts
from tests.shards.layouts_volumes import SEQUENCES, Layout


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return layouts.brats(tmp_path / "raw")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["2018", "2020", "2023"])
def test_voxels_are_those_of_the_files(tmp_path: Path, layout: Layout):
    raw = layouts.brats(tmp_path / "raw", layout=layout)
    made = brats.make(raw, tmp_path / "out", folds=3 if layout == "2018" else 2)
    assert made.skipped.lines() == []
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    samples = shard_set.manifest.samples
    assert samples.key == [layouts.case_name(number, layout) for number in range(6)]
    assert samples.group == (["HGG"] * 3 + ["LGG"] * 3 if layout == "2018" else [None] * 6)
    assert samples.patient[0] == ("BraTS-GLI-00000" if layout == "2023" else samples.key[0])
    assert set(samples.label) == {-1}
    values = [0, 1, 2, 3] if layout == "2023" else [0, 1, 2, 4]
    assert shard_set.manifest.modalities["seg"].values == values
    for number in range(6):
        arrays = shard_set.read(number, list(shard_set.manifest.modalities))
        for name in (*SEQUENCES, "seg"):
            np.testing.assert_array_equal(arrays[name][0], layouts.voxels(number, name, layout))
        assert arrays["seg"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["t1ce_stats"], volume_statistics(arrays["t1ce"]))
        points = read_points(arrays["seg_points"], values[1:])
        for value, (count, places) in points.items():
            assert count == (arrays["seg"] == value).sum()
            assert (arrays["seg"][0][tuple(places.T)] == value).all()


def test_a_prediction_goes_back_into_the_frame_of_the_scanner(raw: Path, tmp_path: Path):
    affine = layouts.AFFINE @ np.array([[0.9, 0.1, 0, 0], [-0.1, 0.9, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]])
    folder = raw / layouts.case_name(0, "2020")
    for name in (*SEQUENCES, "seg"):
        layouts.save(layouts.file_of(folder, name, "2020"), layouts.voxels(0, name, "2020"), affine)
    brats.make(raw, tmp_path / "out", folds=2)
    shard_set = ShardSet(tmp_path / "out")
    space = shard_set.manifest.samples.space[0]
    assert space is not None
    write_map(tmp_path / "prediction.nii.gz", shard_set.read(0, ["seg"])["seg"][0], space)
    written, original = (
        layouts.load(tmp_path / "prediction.nii.gz"),
        layouts.load(layouts.file_of(folder, "seg", "2020")),
    )
    np.testing.assert_array_equal(written.affine, original.affine)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(original.dataobj))
    assert written.header.get_zooms() == original.header.get_zooms() == pytest.approx(space.spacing)
    with pytest.raises(DataError, match=r"the map for .* has shape \(2, 2, 2\), the sample \(14, 12, 10\)"):
        write_map(tmp_path / "no.nii.gz", np.zeros((2, 2, 2), np.uint8), space)


def test_what_is_missing_is_recorded(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layouts.file_of(raw / layouts.case_name(1, "2020"), "t1ce", "2020").unlink()
    layouts.file_of(raw / layouts.case_name(2, "2020"), "seg", "2020").unlink()
    assert brats.main(["--raw", str(raw), "--out", str(tmp_path / "out"), "--folds", "2"]) == 0
    shard_set = ShardSet(tmp_path / "out")
    assert shard_set.has("t1ce").tolist() == [True, False, True, True, True, True]
    assert shard_set.has("t1ce_stats").tolist() == shard_set.has("t1ce").tolist()
    assert shard_set.has("seg").tolist() == [True, True, False, True, True, True]
    assert shard_set.has("seg_points").tolist() == shard_set.has("seg").tolist()
    assert "6 samples of 6 patients" in capsys.readouterr().out


def test_equal_input_gives_equal_bytes_and_options_matter(raw: Path, tmp_path: Path):
    brats.make(raw, tmp_path / "one", folds=2)
    brats.make(raw, tmp_path / "two", folds=2, options=Options(threads=1))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    brats.make(raw, tmp_path / "plain", folds=2, options=Options(compression="none", dtype="float32"))
    plain = ShardSet(tmp_path / "plain")
    np.testing.assert_array_equal(plain.read(3, ["t2"])["t2"][0], layouts.voxels(3, "t2", "2020").astype(np.float32))
    assert plain.manifest.modalities["t2"].compression == "none"


def test_the_zarr_library_reads_the_arrays(raw: Path, tmp_path: Path):
    import zarr

    brats.make(raw, tmp_path / "out", folds=2)
    group = zarr.open_group(tmp_path / "out" / "volumes.zarr", mode="r")
    for number in range(6):
        for name in ("flair", "seg"):
            np.testing.assert_array_equal(np.asarray(group[name])[number, 0], layouts.voxels(number, name, "2020"))


def test_volumes_of_several_sizes_keep_their_own(raw: Path, tmp_path: Path):
    folder = raw / layouts.case_name(0, "2020")
    for name in (*SEQUENCES, "seg"):
        layouts.save(layouts.file_of(folder, name, "2020"), layouts.voxels(0, name, "2020", (6, 16, 5)))
    brats.make(raw, tmp_path / "out", folds=2)
    shard_set = ShardSet(tmp_path / "out")
    assert shard_set.manifest.modalities["t1"].shape == (1, 14, 16, 10)
    assert shard_set.read(0, ["t1"])["t1"].shape == (1, 6, 16, 5)
    np.testing.assert_array_equal(shard_set.read(0, ["t1"])["t1"][0], layouts.voxels(0, "t1", "2020", (6, 16, 5)))


def test_folds_are_by_patient_and_stratified_by_grade(tmp_path: Path):
    raw = layouts.brats(tmp_path / "raw", cases=12, layout="2018")
    manifest = brats.make(raw, tmp_path / "out", folds=3).manifest
    assert sorted(patient for fold in manifest.folds for patient in fold.test) == sorted(manifest.samples.patient)
    grade_of = dict(zip(manifest.samples.patient, manifest.samples.group, strict=True))
    assert [sorted(str(grade_of[p]) for p in fold.test) for fold in manifest.folds] == [
        ["HGG", "HGG", "LGG", "LGG"]
    ] * 3
    assert "3 folds by patient, stratified by grade" in manifest.split_rule


def test_time_points_of_a_patient_stay_together(tmp_path: Path):
    raw = layouts.brats(tmp_path / "raw", layout="2023")
    for folder in [path for path in raw.iterdir() if path.is_dir()]:
        for path in folder.iterdir():
            later_name = folder.name.removesuffix("000") + "001"
            later = raw / later_name / path.name.replace(folder.name, later_name)
            later.parent.mkdir(exist_ok=True)
            later.write_bytes(path.read_bytes())
    manifest = brats.make(raw, tmp_path / "out", folds=3).manifest
    assert (manifest.n_samples, manifest.n_patients) == (12, 6)


def test_without_folds_every_case_is_for_testing(raw: Path, tmp_path: Path):
    fold = brats.make(raw, tmp_path / "out", folds=0).manifest.folds[0]
    assert (fold.train, fold.val, len(fold.test)) == ([], [], 6)
    with pytest.raises(ConfigError, match="--folds is 1, expected 2 or more, or 0"):
        brats.make(raw, tmp_path / "other", folds=1)


def test_the_list_of_mtcm_kd_gives_its_folds(raw: Path, tmp_path: Path):
    names = [layouts.case_name(number, "2020") for number in range(6)]
    path = layouts.json_list(tmp_path / "folds.json", [(names[:4], names[4:5]), (names[1:5], names[:1])])
    made = brats.make(raw, tmp_path / "out", split_list=(path,), val_share=0)
    assert [(fold.train, fold.val, fold.test) for fold in made.manifest.folds] == [
        (names[:4], [], names[4:5]),
        (names[1:5], [], names[:1]),
    ]
    assert made.skipped.lines() == [f"skipped 1: in no list of --split-list ({names[5]})"]
    made = brats.make(raw, tmp_path / "held", split_list=(path,), val_share=0.25)
    assert [len(fold.val) for fold in made.manifest.folds] == [1, 1]


def test_the_lists_of_lckd_give_one_fold(tmp_path: Path):
    raw = layouts.brats(tmp_path / "raw", layout="2018")
    names = [layouts.case_name(number, "2018") for number in range(6)]
    lines = [f"{'HGG' if number < 3 else 'LGG'}/{name}/" for number, name in enumerate(names)]
    for split, own in {"train": lines[:3], "val": lines[3:5], "test": lines[5:]}.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(own) + "\n")
    paths = tuple(tmp_path / f"{split}.txt" for split in ("train", "val", "test"))
    fold = brats.make(raw, tmp_path / "out", split_list=paths).manifest.folds[0]
    assert (fold.train, fold.val, fold.test) == (names[:3], names[3:5], names[5:])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.json": "{"}, r"split list '.*a\.json' is not of the form \[\{\"train_samples\": .*; mend the list"),
        ({"a.json": "[]"}, r"split list '.*a\.json' has no fold"),
        (
            {"a.json": '[{"train_samples": ["BraTS20_Training_000"], "valid_samples": ["BraTS20_Training_077"]}]'},
            "split list, fold 0, test: 1 of 1 cases are not in --raw: BraTS20_Training_077; mend the list or --raw",
        ),
        (
            {"a.json": '[{"train_samples": ["BraTS20_Training_000"], "valid_samples": ["BraTS20_Training_000"]}]'},
            r"split list, fold 0: patient 'BraTS20_Training_000' is in test and train \(1 such patients\)",
        ),
        ({"a.txt": "x"}, r"split list '.*a\.txt': its name says no split, expected one \.json, or text files"),
        ({"train_val.txt": "x"}, "its name says train and val"),
        ({"val.txt": "BraTS20_Training_000"}, "have no training list"),
        ({"train.txt": " \n"}, "is empty, expected a case folder a line"),
    ],
)
def test_a_wrong_list_is_named(raw: Path, tmp_path: Path, files: dict[str, str], words: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        brats.make(raw, tmp_path / "out", split_list=tuple(tmp_path / name for name in files))
    assert not (tmp_path / "out").exists()


CASE = layouts.case_name(3, "2020")


def path_of(raw: Path, name: str) -> Path:
    return layouts.file_of(raw / CASE, name, "2020")


def cut_image(raw: Path) -> None:
    layouts.cut(path_of(raw, "t1"))


def wrong_checksum(raw: Path) -> None:
    layouts.flip(path_of(raw, "t1"))


def no_image(raw: Path) -> None:
    path_of(raw, "t1").write_bytes(b"")


def with_nan(raw: Path) -> None:
    array = layouts.voxels(3, "t1", "2020").astype(np.float32)
    array[3, 4, 5] = np.nan
    layouts.save(path_of(raw, "t1"), array)


def four_dimensions(raw: Path) -> None:
    layouts.save(path_of(raw, "t1"), np.zeros((4, 4, 4, 2), np.int16))


def other_shape(raw: Path) -> None:
    layouts.save(path_of(raw, "t2"), np.zeros((4, 4, 4), np.int16))


def other_affine(raw: Path) -> None:
    layouts.save(path_of(raw, "seg"), layouts.voxels(3, "seg", "2020"), np.eye(4))


def unknown_label(raw: Path) -> None:
    array = layouts.voxels(3, "seg", "2020")
    array[array == 4] = 3
    layouts.save(path_of(raw, "seg"), array)


def fractions(raw: Path) -> None:
    layouts.save(path_of(raw, "t1"), layouts.voxels(3, "t1", "2020").astype(np.float32) / 2)


def too_bright(raw: Path) -> None:
    layouts.save(path_of(raw, "t1"), layouts.voxels(3, "t1", "2020").astype(np.float32) + 40000)


def empty_folder(raw: Path) -> None:
    for path in (raw / CASE).iterdir():
        path.unlink()


def odd_name(raw: Path) -> None:
    path_of(raw, "t1").rename(raw / CASE / "scan1.nii.gz")


def twice(raw: Path) -> None:
    layouts.save(raw / CASE / f"{CASE}_t1.nii", layouts.voxels(3, "t1", "2020"))


DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (cut_image, "a file that cannot be used", rf"case '{CASE}': cannot read '.*_t1\.nii\.gz': .*copy it again"),
    (wrong_checksum, "a file that cannot be used", rf"case '{CASE}': cannot read '.*_t1\.nii\.gz': CRC check failed"),
    (no_image, "a file that cannot be used", rf"case '{CASE}': cannot read '.*_t1\.nii\.gz': .*copy it again"),
    (
        with_nan,
        "a file that cannot be used",
        r"_t1\.nii\.gz' holds nan at voxel 3,4,5 \(1 voxels are NaN or infinite\)",
    ),
    (four_dimensions, "a file that cannot be used", r"has 4 dimensions \(4, 4, 4, 2\), expected 3"),
    (
        other_shape,
        "files of other shapes",
        rf"case '{CASE}' differ in shape: '.*_flair.nii.gz' and '.*_t2.nii.gz' have \(14, 12, 10\) and \(4, 4, 4\)",
    ),
    (
        other_affine,
        "files of other affines",
        r"differ in affine: .* have -1 0 0 0\.5 / .* and 1 0 0 0 / .* register them",
    ),
    (
        unknown_label,
        "an unknown label",
        rf"'{CASE}_seg\.nii\.gz' of case '{CASE}' holds the label 3 at \d+ voxels, expected \[0, 1, 2, 4\]; is it 20",
    ),
    (
        fractions,
        "intensities that are no whole numbers",
        r"voxels are no whole numbers\), expected int16; run with --dtype",
    ),
    (too_bright, "intensities beyond int16", r"holds 40000\.0 to 4\d+\.0, expected -32768 to 32767; run with --dtype"),
    (empty_folder, "no sequence in the folder", r"holds nothing, expected at least one of flair, t1, t1ce, t2"),
    (odd_name, "a file whose name says no sequence", rf"case '{CASE}' has the file 'scan1\.nii\.gz', expected {CASE}_"),
    (twice, "a sequence in two files", rf"case '{CASE}' has t1 twice: '{CASE}_t1\.nii' and '{CASE}_t1\.nii\.gz'"),
]


@pytest.mark.parametrize(("damage", "reason", "words"), DAMAGE, ids=[damage.__name__ for damage, _, _ in DAMAGE])
def test_a_bad_case_is_named_or_skipped(
    raw: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str, words: str
):
    damage(raw)
    with pytest.raises(DataError, match=words + ".*; or leave the case out with --on-error skip"):
        brats.make(raw, tmp_path / "out", folds=2)
    assert not (tmp_path / "out").exists()
    made = brats.make(raw, tmp_path / "out", folds=2, options=Options(on_error="skip"))
    assert made.skipped.lines() == [f"skipped 1: {reason} ({CASE})"]
    assert made.manifest.n_samples == 5
    ShardSet(tmp_path / "out").verify()


def test_fractions_and_bright_voxels_fit_float32(raw: Path, tmp_path: Path):
    fractions(raw)
    brats.make(raw, tmp_path / "out", folds=2, options=Options(dtype="float32"))
    np.testing.assert_array_equal(
        ShardSet(tmp_path / "out").read(3, ["t1"])["t1"][0], layouts.voxels(3, "t1", "2020").astype(np.float32) / 2
    )


def test_whole_numbers_in_a_float_file_are_stored_as_int16(raw: Path, tmp_path: Path):
    layouts.save(path_of(raw, "t1"), layouts.voxels(3, "t1", "2020").astype(np.float64))
    layouts.save(path_of(raw, "seg"), layouts.voxels(3, "seg", "2020").astype(np.float32))
    brats.make(raw, tmp_path / "out", folds=2)
    arrays = ShardSet(tmp_path / "out").read(3, ["t1", "seg"])
    assert (arrays["t1"].dtype, arrays["seg"].dtype) == (np.int16, np.uint8)
    np.testing.assert_array_equal(arrays["t1"][0], layouts.voxels(3, "t1", "2020"))
    np.testing.assert_array_equal(arrays["seg"][0], layouts.voxels(3, "seg", "2020"))


def test_the_odd_label_map_of_2020_is_known(raw: Path, tmp_path: Path):
    path_of(raw, "seg").rename(raw / CASE / "W39_1998.09.19_Segm.nii.gz")
    brats.make(raw, tmp_path / "out", folds=2)
    assert ShardSet(tmp_path / "out").has("seg").all()


def test_two_numberings_need_a_word(raw: Path, tmp_path: Path):
    layouts.brats(raw, cases=1, layout="2023")
    with pytest.raises(DataError, match=r"two numberings .* 'BraTS20_Training_005', 2023 as in 'BraTS-GLI-00000-000'"):
        brats.make(raw, tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({}, "holds no case; name with --raw the folder of BraTS cases"),
        ({"HGG/a": "a_t1.nii", "a": "a_t1.nii"}, r"case 'a' is in '.*' and '.*'; keep one"),
        ({"wrapper/a": "a_t1.nii"}, r"case folder '.*wrapper' holds a, expected .* name the folder above the cases"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path: Path, layout: dict[str, str], words: str):
    (tmp_path / "raw").mkdir()
    for folder, file in layout.items():
        layouts.save(tmp_path / "raw" / folder / file, np.zeros((2, 2, 2), np.int16))
    with pytest.raises(DataError, match=words):
        brats.make(tmp_path / "raw", tmp_path / "out")


def test_when_every_case_is_bad_the_reasons_are_told(raw: Path, tmp_path: Path):
    for folder in raw.iterdir():
        if folder.is_dir():
            layouts.cut(layouts.file_of(folder, "t2", "2020"))
    with pytest.raises(DataError, match=r"every one was skipped; check --raw; skipped 6: a file that cannot be used"):
        brats.make(raw, tmp_path / "out", folds=2, options=Options(on_error="skip"))


def test_cases_without_any_label_map_are_for_testing(raw: Path, tmp_path: Path):
    for number in range(6):
        layouts.file_of(raw / layouts.case_name(number, "2020"), "seg", "2020").unlink()
    brats.make(raw, tmp_path / "out", folds=0)
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    assert not shard_set.has("seg").any()
    assert shard_set.has("t2").all()


def test_what_cannot_be_split_is_told_before_any_case_is_read(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(brats, "read_voxels", None)
    with pytest.raises(DataError, match="6 patients; 7 folds with train, val and test need at least 7"):
        brats.make(raw, tmp_path / "out", folds=7)
    with pytest.raises(DataError, match=r"share to hold out is 1\.5, expected 0 <= share < 1"):
        brats.make(raw, tmp_path / "out", folds=2, val_share=1.5)
    with pytest.raises(ConfigError, match="--threads is 0, expected at least 1"):
        brats.make(raw, tmp_path / "out", options=Options(threads=0))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.real_data
def test_the_real_case(real: Callable[[str], Path], tmp_path: Path):
    folder = real("brats_like") / "BraTS-GLI-00000-000"
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / folder.name).symlink_to(folder)
    made = brats.make(raw, tmp_path / "out", folds=0)
    shard_set = ShardSet(tmp_path / "out")
    shard_set.verify()
    import zarr

    group = zarr.open_group(tmp_path / "out" / "volumes.zarr", mode="r")
    assert made.manifest.modalities["seg"].values == [0, 1, 2, 3]
    for name, theirs in {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}.items():
        image = layouts.load(folder / f"{folder.name}-{theirs}.nii.gz")
        expected = np.asanyarray(image.dataobj)
        np.testing.assert_array_equal(shard_set.read(0, [name])[name][0], expected)
        np.testing.assert_array_equal(np.asarray(group[name])[0, 0], expected)
        space = made.manifest.samples.space[0]
        assert space is not None
        np.testing.assert_array_equal(space.affine, image.affine)
