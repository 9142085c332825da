"""The glioma tables: who takes part, who is tested, what is missing and what is refused."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distkd.data.dataset import DataConfig, Dataset
from distkd.data.shardset import ShardSet
from distkd.data.splits import check_classes
from distkd.errors import DataError
from shards import tcga_glioma

N_PATIENTS = 60
OMICS = ["A_rnaseq", "B_rnaseq", "EGFR_cnv", "IDH1_mut", "TP53_mut"]
OUTPUTS = ["roi_mean_path_logp_g2", "roi_mean_path_hazard"]
FOLDS = [f"fold_{fold}" for fold in range(1, 16)]

Tables = dict[str, list[dict[str, Any]]]


def tables() -> Tables:
    """Small tables in the real layout: p0 has no split, p1 no histology, p2 no grade, every third no omics."""
    draws = np.random.default_rng(0)
    names = [f"TCGA-00-{number:04d}" for number in range(N_PATIENTS)]
    patients = [
        dict.fromkeys([*(set(tcga_glioma.EXCLUDED) - {"n_test_folds"}), "loh_1p19q"], "")
        | {"patient_id": name, "grade": "" if number == 2 else str(2 + number % 3)}
        for number, name in enumerate(names)
    ]
    omics = [
        {"patient_id": name, **{column: f"{draws.normal():.4f}" for column in OMICS}}
        for number, name in enumerate(names)
        if number % 3
    ]
    histology = [
        {"patient_id": name, "n_test_folds": "3", **{column: f"{draws.normal():.4f}" for column in OUTPUTS}}
        for number, name in enumerate(names)
        if number != 1
    ]
    splits = [
        {"patient_id": name, **{fold: "test" if draws.random() < 0.25 else "train" for fold in FOLDS}}
        for name in names[1:]
    ]
    return {
        "patients.csv": patients,
        "omics.csv.gz": omics,
        "histology_patient.csv": histology,
        "splits15.csv": splits,
    }


def write(raw: Path, tables: Tables) -> Path:
    raw.mkdir(exist_ok=True)
    for name, rows in tables.items():
        open_text = gzip.open if name.endswith(".gz") else open
        with open_text(raw / name, "wt", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return raw


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write(tmp_path / "raw", tables())


def test_each_patient_is_a_sample_with_what_it_has(raw: Path, tmp_path: Path):
    made = tcga_glioma.make(raw, tmp_path / "out")
    shard_set, content = ShardSet(tmp_path / "out"), tables()
    shard_set.verify()
    samples = shard_set.manifest.samples
    assert samples.key == [row["patient_id"] for row in content["patients.csv"][2:]]
    omics = {row["patient_id"]: row for row in content["omics.csv.gz"]}
    for number, patient in enumerate(samples.patient):
        arrays = shard_set.read(number, shard_set.manifest.modalities)
        assert ("omics" in arrays) == (patient in omics)
        if patient in omics:
            expected = {column: np.float32(omics[patient][column]) for column in OMICS}
            features = ["EGFR_cnv", "IDH1_mut", "TP53_mut", "A_rnaseq", "B_rnaseq"]
            assert shard_set.manifest.modalities["omics"].features == features
            assert dict(zip(features, arrays["omics"].tolist(), strict=True)) == expected
            assert arrays["omics_mut"].tolist() == [expected["IDH1_mut"], expected["TP53_mut"]]
    assert made.skipped.by_reason == {
        "in no published split, so never trained on or tested": ["TCGA-00-0000"],
        "no histology outputs: never a test case of the published networks": ["TCGA-00-0001"],
    }


def test_folds_are_the_published_ones_with_a_part_held_out(raw: Path, tmp_path: Path):
    manifest = tcga_glioma.make(raw, tmp_path / "out").manifest
    label_of = dict(zip(manifest.samples.patient, manifest.samples.label, strict=True))
    ungraded = {patient for patient, label in label_of.items() if label == -1}
    assert ungraded == {"TCGA-00-0002"}
    assert len(manifest.folds) == 15
    rows = {row["patient_id"]: row for row in tables()["splits15.csv"]}
    for column, fold in zip(FOLDS, manifest.folds, strict=True):
        assert set(fold.test) == {p for p in label_of if rows[p][column] == "test"} - ungraded
        assert set(fold.train + fold.val) == {p for p in label_of if rows[p][column] == "train"}
        assert not ungraded & {*fold.val, *fold.test}
        assert {label_of[patient] for patient in fold.val} == {0, 1, 2}


def test_paired_only_leaves_out_who_has_no_omics(raw: Path, tmp_path: Path):
    made = tcga_glioma.make(raw, tmp_path / "out", paired_only=True)
    assert all(place is not None for place in made.manifest.samples.bytes["omics"])
    assert len(made.skipped.by_reason["no omics (--paired-only)"]) == 19


def test_the_command_reports_what_it_did(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert tcga_glioma.main(["--raw", str(raw), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "skipped 1: in no published split" in text
    assert "omics, omics_cnv, omics_mut, omics_rnaseq missing unequally (II 100%, III 0%, IV 0%)" in text
    assert "58 samples of 58 patients" in text
    assert "15 folds (the 15 published splits; 0.15 of each training list" in text


def test_another_seed_holds_out_others(raw: Path, tmp_path: Path):
    one, other = (tcga_glioma.make(raw, tmp_path / str(seed), seed=seed).manifest for seed in (0, 1))
    assert [fold.test for fold in one.folds] == [fold.test for fold in other.folds]
    assert [fold.val for fold in one.folds] != [fold.val for fold in other.folds]


@pytest.mark.parametrize("column", ["grade", "oncotree_code", "survival_days", "idh1_mut", "loh_1p19q", "n_test_folds"])
def test_columns_that_leak_are_refused_as_inputs(raw: Path, tmp_path: Path, column: str):
    tcga_glioma.make(raw, tmp_path / "out")
    with pytest.raises(DataError, match=f"'{column}' is excluded from the inputs of task 'glioma_grade': "):
        Dataset(ShardSet(tmp_path / "out"), DataConfig(), [column], seed=0)


def set_cell(table: str, row: int, column: str, value: str) -> Callable[[Tables], None]:
    def change(content: Tables) -> None:
        content[table][row][column] = value

    return change


def drop_column(table: str, column: str) -> Callable[[Tables], None]:
    def change(content: Tables) -> None:
        content[table] = [{name: cell for name, cell in row.items() if name != column} for row in content[table]]

    return change


def repeat_row(content: Tables) -> None:
    content["omics.csv.gz"].append(content["omics.csv.gz"][0])


def drop_copy_numbers(content: Tables) -> None:
    drop_column("omics.csv.gz", "EGFR_cnv")(content)


def other_patients(content: Tables) -> None:
    for row in content["splits15.csv"]:
        row["patient_id"] = "X" + row["patient_id"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            set_cell("patients.csv", 5, "grade", "V"),
            "grade of patient 'TCGA-00-0005' is 'V', expected 2, 3, 4 or a blank",
        ),
        (
            set_cell("omics.csv.gz", 3, "IDH1_mut", "yes"),
            "IDH1_mut of patient .* is 'yes', expected a number or a blank",
        ),
        (set_cell("omics.csv.gz", 3, "A_rnaseq", "inf"), "A_rnaseq of patient .* is infinite; mend the raw file"),
        (set_cell("splits15.csv", 3, "fold_7", "val"), "fold_7 of patient .* is 'val', expected train or test"),
        (drop_column("patients.csv", "oncotree_code"), r"patients\.csv' has no column oncotree_code"),
        (drop_column("splits15.csv", "fold_15"), r"splits15\.csv' has no column fold_15"),
        (repeat_row, r"patient 'TCGA-00-0001' is listed twice in '.*omics\.csv\.gz'; leave one row"),
        (drop_copy_numbers, r"has no columns for omics_cnv; expected names such as IDH1_mut"),
        (other_patients, "no patient of .* is in all of the tables; skipped 60: in no published split"),
    ],
)
def test_bad_tables_are_named_and_nothing_is_written(
    tmp_path: Path, change: Callable[[Tables], None], words: str, capsys: pytest.CaptureFixture[str]
):
    content = tables()
    change(content)
    raw = write(tmp_path / "raw", content)
    with pytest.raises(DataError, match=words):
        tcga_glioma.make(raw, tmp_path / "out")
    assert tcga_glioma.main(["--raw", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_cut_table_is_named(raw: Path, tmp_path: Path):
    content = (raw / "omics.csv.gz").read_bytes()
    (raw / "omics.csv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cannot read '.*omics\.csv\.gz'.*copy it again"):
        tcga_glioma.make(raw, tmp_path / "out")


@pytest.mark.real_data
def test_the_real_patients(real: Callable[[str], Path], tmp_path: Path):
    made = tcga_glioma.make(real("tcga_gbmlgg"), tmp_path / "out")
    manifest = ShardSet(tmp_path / "out").manifest
    assert {name: modality.shape for name, modality in manifest.modalities.items()} == {
        "omics": (1590,),
        "omics_cnv": (30,),
        "omics_mut": (16,),
        "omics_rnaseq": (1544,),
        "histology": (15,),
    }
    assert manifest.n_samples == manifest.n_patients == 589
    assert np.bincount(np.array(manifest.samples.label) + 1).tolist() == [26, 140, 154, 269]
    assert sum(place is None for place in manifest.samples.bytes["omics"]) == 213
    assert [len(names) for names in made.skipped.by_reason.values()] == [63, 29]
    for number, fold in enumerate(manifest.folds):
        check_classes(manifest, number)
        assert len(fold.test) > 100
