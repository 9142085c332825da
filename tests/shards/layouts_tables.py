"""A study in a table of its own, with images or volumes beside it, and what its examination says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distkd.data.raw.table_problems import Problems
from shards import generic
from shards.generic import Options
from tests.shards import layouts_volumes as layouts

LABELS = ("benign", "malignant")


def pixels(number: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def save_image(path: Path, number: int, **more: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels(number)).save(path, **more)


def write(folder: Path, rows: list[dict[str, str]], name: str = "table.csv") -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def study(folder: Path, *, patients: int = 12) -> list[dict[str, str]]:
    """Rows with an image and two numbers; the caller changes and writes them."""
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, str]] = []
    for number in range(patients):
        save_image(folder / "photos" / f"{number}.png", number)
        rows.append(
            {
                "patient": f"patient {number}",
                "label": LABELS[number % 2],
                "photo": f"photos/{number}.png",
                "clinic.age": str(40 + number),
                "clinic.score": str(number / 8),
            }
        )
    return rows


def volumes(folder: Path, *, target: bool) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for number in range(10):
        layouts.save(folder / f"{number}.nii.gz", layouts.voxels(number, "t1", "2020", (6, 5, 4 + number % 2)))
        layouts.save(folder / f"{number}-m.nii", layouts.voxels(number, "seg", "2023", (6, 5, 4 + number % 2)))
        np.save(folder / f"{number}.npy", layouts.voxels(number, "t2", "2020", (6, 5, 4 + number % 2)) / 2)
        rows.append({"patient": f"p{number}", "volume:t1": f"{number}.nii.gz", "second": f"{number}.npy"})
        rows[-1] |= {"target:mask": f"{number}-m.nii"} if target else {"label": LABELS[number % 2]}
    return rows


def examined(table: Path, options: Options | None = None) -> Problems:
    problems = Problems()
    generic.examine(table, options or Options(), problems, seed=0, every_value=True)
    return problems


def problems_of(table: Path, options: Options | None = None) -> list[str]:
    return examined(table, options).lines
