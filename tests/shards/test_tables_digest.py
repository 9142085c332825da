"""A build that was interrupted goes on with the same tables only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from distkd.data.raw.recipe import tables_digest
from distkd.errors import DataError
from shards import brats, derm7pt, generic, glioma, lc25000_lung, sicapv2, tcga_glioma, uci_mfeat
from tests.shards import layouts_images, layouts_tables, layouts_volumes, test_lc25000_lung, test_tcga_glioma
from tests.shards.layouts_images import put

TRAIN = "partition/Validation/Val1/Train.xlsx"
Change = Callable[[Path], object]


class Told(Exception):
    """What a recipe tells the writer."""


def told(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> str:
    def writer(out: Path, description: object, *, options: str = "") -> None:
        raise Told(options)

    monkeypatch.setattr(module, "ShardWriter", writer)
    with pytest.raises(Told) as stop:
        module.make(*arguments, **options)
    return str(stop.value)


def shorter_sheet(raw: Path) -> None:
    layouts_images.sheet(raw / TRAIN, sheet_rows(raw / TRAIN)[1:])


def sheet_rows(path: Path) -> list[dict[str, Any]]:
    return [
        {"image_name": name, **{title: int(k == label) for k, title in enumerate(sicapv2.CLASS_NAMES)}}
        for name, label in sicapv2._read_sheet(path).items()
    ]


def tcga(raw: Path) -> Path:
    return test_tcga_glioma.write(raw, test_tcga_glioma.tables())


def tcga_with(name: str, column: str, value: str) -> Change:
    def change(raw: Path) -> None:
        tables = test_tcga_glioma.tables()
        tables[name][7][column] = value
        test_tcga_glioma.write(raw, tables)

    return change


def digits(raw: Path) -> Path:
    raw.mkdir()
    shutil.copy(uci_mfeat.EMBEDDED / "mfeat.npz", raw)
    return raw


def other_digits(raw: Path) -> None:
    with np.load(raw / "mfeat.npz", allow_pickle=False) as file:
        columns = dict(file)
    columns["fac"] = columns["fac"] + 1
    np.savez(raw / "mfeat.npz", **columns)


def study(raw: Path) -> Path:
    layouts_tables.write(raw, layouts_tables.study(raw))
    return raw


GLIOMA = {"options": glioma.Options(size=layouts_images.ROI_PX)}
CASES: list[tuple[ModuleType, Callable[[Path], Path], dict[str, Any], Change]] = [
    (glioma, layouts_images.glioma, GLIOMA, put("all_dataset.csv", 0, "GENE0_cnv", 9)),
    (glioma, layouts_images.glioma, GLIOMA, put("grade_data.csv", 0, "Grade", "4.0")),
    (glioma, layouts_images.glioma, GLIOMA, put("pnas_splits.csv", 0, "Randomization - 2", "Test")),
    (derm7pt, layouts_images.derm7pt, {"size": 16}, put("meta/meta.csv", 0, "streaks", "irregular")),
    (sicapv2, layouts_images.sicapv2, {"size": layouts_images.TILE_PX}, shorter_sheet),
    (lc25000_lung, test_lc25000_lung.write, {}, put("labels.csv", 0, "source_tile", "77")),
    (tcga_glioma, tcga, {}, tcga_with("patients.csv", "grade", "4")),
    (tcga_glioma, tcga, {}, tcga_with("omics.csv.gz", "IDH1_mut", "9")),
    (tcga_glioma, tcga, {}, tcga_with("histology_patient.csv", "roi_mean_path_hazard", "9")),
    (uci_mfeat, digits, {}, other_digits),
    (generic, study, {}, put("table.csv", 0, "clinic.age", "77")),
]


@pytest.mark.parametrize("module, write, options, change", CASES)
def test_other_tables_are_another_build(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    write: Callable[[Path], Path],
    options: dict[str, Any],
    change: Change,
):
    raw = write(tmp_path / "raw")
    first = told(module, monkeypatch, raw, tmp_path / "out", **options)
    assert told(module, monkeypatch, raw, tmp_path / "out", **options) == first
    assert told(module, monkeypatch, shutil.copytree(raw, tmp_path / "elsewhere"), tmp_path / "out", **options) == first
    change(raw)
    assert told(module, monkeypatch, raw, tmp_path / "out", **options) != first


def test_other_split_lists_are_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw = layouts_volumes.brats(tmp_path / "raw")
    names = [layouts_volumes.case_name(number, "2020") for number in range(6)]
    path = tmp_path / "split.json"
    heard: list[str] = []
    for n in (4, 3):
        layouts_volumes.json_list(path, [(names[:n], names[n:])])
        heard.append(told(brats, monkeypatch, raw, tmp_path / "out", split_list=(path,)))
    assert heard[0] != heard[1]


def test_the_digest_is_of_names_and_bytes(tmp_path: Path):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("a")
    two.write_text("a")
    digests = [tables_digest(one), tables_digest(two), tables_digest(one, two), tables_digest(two, one)]
    one.write_text("b")
    assert len({*digests, tables_digest(one), tables_digest()}) == 6
    with pytest.raises(DataError, match=r"cannot read '.*none\.csv': No such file or directory; copy it again"):
        tables_digest(tmp_path / "none.csv")
