"""Tiny volumes in the layouts in which the real ones come."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np

from distkd.data.raw.mri_cases import NAMES_2023

Layout = Literal["2018", "2020", "2023"]

SHAPE = (14, 12, 10)
AFFINE = np.array([[-1.0, 0, 0, 0.5], [0, -1.0, 0, 239.25], [0, 0, 1.0, -3.125], [0, 0, 0, 1]])
SEQUENCES = ("flair", "t1", "t1ce", "t2")


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image: Any = nibabel.Nifti1Image(array, affine)  # pyright: ignore[reportPrivateImportUsage]
    nibabel.save(image, path)  # pyright: ignore[reportPrivateImportUsage]
    return path


def load(path: Path) -> Any:
    return nibabel.load(path)  # pyright: ignore[reportPrivateImportUsage]


def case_name(number: int, layout: Layout) -> str:
    return {
        "2018": f"Brats18_TCIA{number:02d}_1",
        "2020": f"BraTS20_Training_{number:03d}",
        "2023": f"BraTS-GLI-{number:05d}-000",
    }[layout]


def file_of(folder: Path, name: str, layout: Layout) -> Path:
    if layout == "2023":
        of_2023 = {own: theirs for theirs, own in NAMES_2023.items()}
        return folder / f"{folder.name}-{of_2023[name]}.nii.gz"
    return folder / f"{folder.name}_{name}.nii{'' if layout == '2018' else '.gz'}"


def voxels(number: int, name: str, layout: Layout, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """int16 intensities, 0 outside the head, or the raw labels."""
    generator = np.random.default_rng((number, *name.encode()))
    if name == "seg":
        labels = np.array([0, 1, 2, 3 if layout == "2023" else 4], dtype=np.uint8)
        return labels[generator.integers(0, 4, shape)]
    array = generator.integers(1, 2000, shape).astype(np.int16)
    array[:2] = 0
    return array


def brats(raw: Path, *, cases: int = 6, layout: Layout = "2020") -> Path:
    """Case folders: in 2018's layout the first half is HGG, the other LGG, and the files are not compressed."""
    for number in range(cases):
        grade = ("HGG" if 2 * number < cases else "LGG") if layout == "2018" else "."
        folder = raw / grade / case_name(number, layout)
        for name in (*SEQUENCES, "seg"):
            save(file_of(folder, name, layout), voxels(number, name, layout))
    (raw / "survival_info.csv").write_text("Brats18ID,Age,Survival\n")
    return raw


def cut(path: Path) -> None:
    """The last third is missing, as after a broken download."""
    path.write_bytes(path.read_bytes()[: 2 * path.stat().st_size // 3])


def flip(path: Path) -> None:
    """One bit of the packed voxels differs; the file can be unpacked, but its checksum does not fit."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    packed = bytearray(gzip.compress(bytes(data), mtime=0))
    packed[-8] ^= 1  # of the stored CRC-32
    path.write_bytes(bytes(packed))


def json_list(path: Path, folds: list[tuple[list[str], list[str]]]) -> Path:
    """In MTCM-KD's form."""
    path.write_text(json.dumps([{"train_samples": train, "valid_samples": valid} for train, valid in folds]))
    return path
