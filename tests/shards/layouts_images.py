"""Raw folders in the layouts of the image sets, with pictures of a few pixels."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Rows = list[dict[str, Any]]

ROI_PX = 24
PATCH_PX = 12
TILE_PX = 16

CNV = [f"GENE{number}_cnv" for number in range(78)]
OMICS = [*CNV, "idh mutation", "codeletion"]
RANDOMIZATIONS = [f"Randomization - {number}" for number in range(1, 16)]
N_GLIOMA = 18
CRITERIA = {
    "pigment_network": ["absent", "typical", "atypical"],
    "streaks": ["absent", "regular", "irregular"],
    "pigmentation": ["absent", "diffuse regular", "localized irregular"],
    "regression_structures": ["absent", "blue areas", "white areas", "combinations"],
    "dots_and_globules": ["absent", "regular", "irregular"],
    "blue_whitish_veil": ["absent", "present"],
    "vascular_structures": ["absent", "arborizing", "dotted"],
}
DIAGNOSES = ["basal cell carcinoma", "clark nevus", "melanoma (in situ)", "lentigo", "seborrheic keratosis"]
N_DERM = 20
SLIDES = [f"{16 + number % 3}B00{number:04d}" for number in range(15)]


def picture(path: Path, width: int, height: int | None = None, *, mode: str = "RGB", **options: Any) -> None:
    """Noise that depends on the name; a mode that pillow can save as the path's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(list(path.name.encode()))
    pixels = draws.integers(0, 256, size=(height or width, width, 3), dtype=np.uint8)
    if path.suffix == ".png":
        options = {"compress_level": 1, **options}  # not what pillow takes by itself: encoding again would show
    Image.fromarray(pixels).convert(mode).save(path, **options)


def table(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def change(name: str, apply: Callable[[Rows], object]) -> Callable[[Path], None]:
    """What edits the rows of a table of a raw folder."""

    def changed(raw: Path) -> None:
        rows = read_rows(raw / name)
        apply(rows)
        table(raw / name, rows)

    return changed


def put(name: str, row: int, column: str, value: object) -> Callable[[Path], None]:
    """What sets one cell of a table of a raw folder."""
    return change(name, lambda rows: rows[row].update({column: value}))


# -- gliomas as PathomicFusion hands them out --


def glioma_patient(number: int) -> str:
    return f"TCGA-{number % 3:02d}-{number:04d}"


def glioma_roi(number: int, roi: int) -> str:
    return f"{glioma_patient(number)}-01Z-00-DX1.0a1b2c3d-{number:04d}-4e5f-8a9b-0c1d2e3f4a5b_{roi}"


def glioma(raw: Path, *, suffix: str = ".png") -> Path:
    """18 patients, grades in turn, 1 or 2 regions; 3 has no grade, 4 no molecular subtype, 5 no row of omics."""
    draws = np.random.default_rng(0)
    names = [glioma_patient(number) for number in range(N_GLIOMA)]
    omics = [
        {
            "indexes": number,
            "TCGA ID": name,
            "censored": number % 2,
            "Survival months": 10 + number,
            **{column: int(draws.integers(-2, 3)) for column in CNV},
            "idh mutation": "" if number == 4 else number % 2,
            "codeletion": "" if number == 4 else number % 2,
        }
        for number, name in enumerate(names)
        if number != 5
    ]
    grades = [
        {
            "TCGA ID": name,
            "Histology": "" if number == 3 else "oligodendroglioma",
            "Grade": "" if number == 3 else f"{2 + number % 3}.0",
            "Molecular subtype": "" if number == 4 else "IDHwt",
            "Age at diagnosis": 40 + number,
            "Smoker": "no",
        }
        for number, name in enumerate(names)
    ]
    splits = [
        {
            "TCGA ID": name,
            **{
                column: "Test" if (number // 3 + fold) % 4 == 0 else "Train"
                for fold, column in enumerate(RANDOMIZATIONS)
            },
        }
        for number, name in enumerate(names)
    ]
    table(raw / "all_dataset.csv", omics)
    table(raw / "grade_data.csv", grades)
    table(raw / "pnas_splits.csv", splits)
    for number in range(N_GLIOMA):
        for roi in range(1, 2 + number % 2):
            stem = glioma_roi(number, roi)
            picture(raw / "all_st" / f"{stem}{suffix}", ROI_PX)
            for patch in range(2):
                picture(raw / "all_st_patches_512" / f"{stem}_{patch}_0{suffix}", PATCH_PX)
    return raw


# -- derm7pt, release_v0 --


def derm_file(number: int, view: str) -> str:
    return f"{['NEL', 'FDL'][number % 2]}/{view[0].upper()}{number:03d}.jpg"


def derm7pt(raw: Path) -> Path:
    """20 cases, diagnoses in turn, 10 / 5 / 5; the pictures of case 1 are 16 x 16, the others of several shapes."""
    rows = [
        {
            "case_num": number + 1,
            "diagnosis": DIAGNOSES[number % 5],
            "seven_point_score": number % 7,
            **{name: values[number % len(values)] for name, values in CRITERIA.items()},
            "level_of_diagnostic_difficulty": "low",
            "elevation": ["flat", "palpable", "nodular"][number % 3],
            "location": ["back", "head neck"][number % 2],
            "sex": ["female", "male"][number // 2 % 2],
            "management": "excision",
            "clinic": derm_file(number, "clinic"),
            "derm": derm_file(number, "derm"),
            "case_id": f"NEL{number:03d}",
            "notes": "",
        }
        for number in range(N_DERM)
    ]
    table(raw / "meta" / "meta.csv", rows)
    for name, numbers in (("train", range(10)), ("valid", range(10, 15)), ("test", range(15, 20))):
        table(raw / "meta" / f"{name}_indexes.csv", [{"indexes": number} for number in numbers])
    for number in range(N_DERM):
        picture(raw / "images" / derm_file(number, "derm"), 16 if number == 0 else 36, 16 if number == 0 else 24)
        picture(raw / "images" / derm_file(number, "clinic"), 16 if number == 0 else 30, 16 if number == 0 else 40)
    return raw


# -- SICAPv2 --


def sicap_image(slide: str, number: int) -> str:
    return f"{slide}_Block_Region_{number}_0_0_xini_{6803 + number}_yini_59786.jpg"


def sheet(path: Path, rows: Rows) -> None:
    from openpyxl import Workbook

    path.parent.mkdir(parents=True, exist_ok=True)
    book = Workbook()
    page = book.active
    assert page is not None
    page.append(list(rows[0]))
    for row in rows:
        page.append(list(row.values()))
    book.save(path)


def sicap_rows(slides: list[str]) -> Rows:
    classes = ["NC", "G3", "G4", "G5"]
    return [
        {
            "image_name": sicap_image(slide, number),
            **{name: int(classes.index(name) == (number + SLIDES.index(slide)) % 4) for name in classes},
            "G4C": 0,
        }
        for slide in slides
        for number in range(4)
    ]


def sicapv2(raw: Path, *, size: int = TILE_PX) -> Path:
    """15 slides of 4 patches; 3 slides are the test, and each fold keeps 3 others for validation."""
    rest = SLIDES[3:]
    sheet(raw / "partition" / "Test" / "Test.xlsx", sicap_rows(SLIDES[:3]))
    for fold in range(4):
        held = rest[3 * fold : 3 * fold + 3]
        folder = raw / "partition" / "Validation" / f"Val{fold + 1}"
        sheet(folder / "Train.xlsx", sicap_rows([slide for slide in rest if slide not in held]))
        sheet(folder / "Test.xlsx", sicap_rows(held))
    for slide in SLIDES:
        for number in range(4):
            picture(raw / "images" / sicap_image(slide, number), size)
    return raw


# -- what was made of them --


def stored_bytes(out: Path, modality: str, key: str) -> bytes:
    """The member of a shard as it lies there."""
    from distkd.data.manifest_file import read_manifest

    manifest = read_manifest(out)
    sample = manifest.samples.key.index(key)
    place = manifest.samples.bytes[modality][sample]
    assert place is not None, (modality, key)
    shard = out / manifest.shards[manifest.samples.shard[sample]].file
    return shard.read_bytes()[place[0] : sum(place)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
