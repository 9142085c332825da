"""Made-up samples in the shape of real sets: a cause is drawn, the privileged inputs show it almost plainly, the
student's input blurred by `gap`. Each sample is a function of (seed, its number), so any can be made alone.
"""

# Shapes: H W C of an image, X Y Z of a volume

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from distkd.base import UNLABELLED
from distkd.data.manifest import Modality, Space
from distkd.data.raw.volume_parts import input_parts, input_values, target_parts, target_values
from distkd.data.write import Sample

__all__ = ["LookAlike", "Sequence", "brains", "skin", "tiles"]

PLAIN = 0.05
"""Share of noise in what a privileged input shows; the student's is `gap`, if that is larger."""

Sequence = Literal["flair", "t1", "t1ce", "t2"]
Three = tuple[int, int, int]


@dataclass(frozen=True)
class LookAlike:
    """What is to be written."""

    task: str
    class_names: list[str]
    modalities: dict[str, Modality]
    items: list[tuple[str, Callable[[], Sample]]]
    """(key, what makes the sample)."""
    stratum: list[int]
    """Of each item: what folds are stratified by."""
    excluded: dict[str, str] = field(default_factory=dict[str, str])
    container: Literal["wds", "zarr"] = "wds"
    problem: Literal["classification", "segmentation"] = "classification"


def _blurred(cause: np.ndarray, blur: float, generator: np.random.Generator) -> np.ndarray:
    """As spread as the cause, with a squared correlation of 1 - blur to it."""
    return np.sqrt(1 - blur) * cause + np.sqrt(blur) * generator.normal(size=cause.shape)


# Skin lesions as in shards/derm7pt.py: a picture through the dermoscope, one without, facts, a checklist.

DIAGNOSES = ["BCC", "NEV", "MEL", "MISC", "SK"]
FREQUENT = (1, 1, 2, 1, 0, 1, 2, 3, 2, 4)
"""Diagnoses in turn: nevi and melanomas are the most, and few patients have some of each."""
META = ("elevation=flat", "elevation=nodular", "elevation=palpable", "sex=female", "sex=male")
CRITERIA = ("pigment_network", "streaks", "pigmentation", "regression", "dots_and_globules", "veil", "vessels")
LEVELS = ("absent", "typical", "atypical")


def skin(patients: int, *, size: int, gap: float, missing: float, seed: int) -> LookAlike:
    """`derm` and `checklist` are privileged, `clinic` is the student's, `meta` says little.

    The diagnosis lies in two numbers, of which one is the lesion's darkness and the other its extent.
    """
    picture = Modality(kind="image", dtype="uint8", shape=(size, size, 3), codec="jpg", unit="sRGB")
    vectors: dict[str, list[str]] = {
        "meta": [*META],
        "checklist": [f"{name}={level}" for name in CRITERIA for level in LEVELS],
    }
    labels = [FREQUENT[number % len(FREQUENT)] for number in range(patients)]
    return LookAlike(
        task="skin_lesion",
        class_names=DIAGNOSES,
        modalities={
            "derm": picture,
            "clinic": picture,
            **{
                name: Modality(
                    kind="vector",
                    dtype="float32",
                    shape=(len(features),),
                    codec="npy",
                    unit="one-hot",
                    features=features,
                )
                for name, features in vectors.items()
            },
        },
        items=[
            (f"case-{number:05d}", partial(_skin, number, labels[number], size, gap, missing, seed))
            for number in range(patients)
        ],
        stratum=labels,
        excluded={"cause": "the two numbers that the diagnosis lies in"},
    )


def _skin(number: int, label: int, size: int, gap: float, missing: float, seed: int) -> Sample:
    generator = np.random.default_rng((seed, 2, number))
    angle = 2 * np.pi * label / len(DIAGNOSES)
    cause = 1.5 * np.array([np.cos(angle), np.sin(angle)]) + 0.35 * generator.normal(size=2)
    arrays = {
        "clinic": _lesion(_blurred(cause, max(gap, PLAIN), generator), size, 0.8, generator),
        "meta": _meta(cause, generator),
        "checklist": _checklist(_blurred(cause, PLAIN, generator)),
    }
    derm = _lesion(_blurred(cause, PLAIN, generator), size, 1.0, generator)
    if generator.random() >= missing:
        arrays["derm"] = derm
    return Sample(arrays, patient=f"patient-{number:05d}", label=label)


def _lesion(cause: np.ndarray, size: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    """A dark spot on skin, uint8 (H, W, 3)."""
    tone, extent = np.clip(cause, -3, 3)
    y_H1, x_1W = np.ogrid[:size, :size]
    centre = size / 2 + generator.normal(scale=size / 40, size=2)
    bumps = 1 + 0.1 * np.sin(3 * np.arctan2(y_H1 - centre[0], x_1W - centre[1]) + generator.uniform(0, 6))
    radius = scale * size * 0.25 * np.exp(0.2 * float(extent)) * bumps
    inside_HW = 1 / (1 + np.exp((np.hypot(y_H1 - centre[0], x_1W - centre[1]) - radius) * 24 / size))
    ground = np.array([226, 184, 164]) + generator.normal(scale=6, size=3)
    spot = np.array([128, 84, 64]) - 22 * tone + generator.normal(scale=4, size=3)
    image = ground + inside_HW[:, :, None] * (spot - ground) + generator.normal(scale=5, size=(size, size, 1))
    return np.clip(image, 0, 255).astype(np.uint8)


def _meta(cause: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    height = 0.5 * float(cause[1]) + generator.normal()
    elevation = (height > -0.7) + (height > 0.7)
    sex = int(generator.integers(2))
    return np.array([*(elevation == level for level in range(3)), sex == 0, sex == 1], dtype=np.float32)


def _checklist(cause: np.ndarray) -> np.ndarray:
    angles = np.pi * np.arange(len(CRITERIA)) / len(CRITERIA)
    levels = np.searchsorted((-0.6, 0.6), np.stack([np.cos(angles), np.sin(angles)], axis=1) @ cause)
    return np.eye(len(LEVELS), dtype=np.float32)[levels].reshape(-1)


# Tiles as in shards/sicapv2.py: one sharp picture, of which a student is shown a coarse copy.

GLEASON = ["NC", "G3", "G4", "G5"]
QUARTERS = (-0.6745, 0.0, 0.6745)


def tiles(patients: int, *, most: int, size: int, gap: float, seed: int) -> LookAlike:
    """`patch` shows the grade in its finest texture, which means of 2 x 2 pixels have no trace of; coarser texture,
    which survives in copies of up to a quarter of the size, shows it blurred by `gap`.
    """
    items: list[tuple[str, Callable[[], Sample]]] = []
    stratum: list[int] = []
    for number in range(patients):
        generator = np.random.default_rng((seed, 3, number))
        own = generator.normal()
        for tile in range(int(generator.integers(1, most + 1))):
            grade = float(np.sqrt(0.5) * own + np.sqrt(0.5) * generator.normal())
            label = sum(grade > end for end in QUARTERS)
            items.append((f"slide-{number:05d}-{tile}", partial(_tile, number, tile, grade, label, size, gap, seed)))
            stratum.append(label)
    return LookAlike(
        task="gleason_grade",
        class_names=GLEASON,
        # png: a jpg would take from the texture that the class lies in
        modalities={"patch": Modality(kind="image", dtype="uint8", shape=(size, size, 3), codec="png", unit="sRGB")},
        items=items,
        stratum=stratum,
        excluded={"grade": "the number that the class is cut from"},
    )


def _tile(number: int, tile: int, grade: float, label: int, size: int, gap: float, seed: int) -> Sample:
    generator = np.random.default_rng((seed, 4, number, tile))
    cause = np.array(grade)
    fine, coarse = _blurred(cause, PLAIN, generator), _blurred(cause, max(gap, PLAIN), generator)
    cells = generator.normal(size=(-(-size // 4), -(-size // 4))).repeat(4, axis=0).repeat(4, axis=1)[:size, :size]
    grain = generator.normal(size=(-(-size // 2), -(-size // 2))).repeat(2, axis=0).repeat(2, axis=1)[:size, :size]
    signs_HW = np.tile(np.array([[1, -1], [-1, 1]]), (-(-size // 2), -(-size // 2)))[:size, :size]
    texture_HW = 9 * np.exp(0.5 * fine) * grain * signs_HW + 9 * np.exp(0.5 * coarse) * cells
    ground = np.array([206, 160, 196]) + generator.normal(scale=6, size=3)
    image = (
        ground + texture_HW[:, :, None] * np.array([1.0, 1.2, 0.8]) + generator.normal(scale=2, size=(size, size, 1))
    )
    return Sample(
        {"patch": np.clip(image, 0, 255).astype(np.uint8)},
        patient=f"patient-{number:05d}",
        label=label,
        group=f"slide-{number:05d}",
    )


# Brains as in shards/brats.py: four sequences of one head and a label map.

REGIONS = ["background", "necrotic_core", "oedema", "enhancing"]
VALUES = (0, 1, 2, 4)
CONTRAST: dict[Sequence, tuple[int, int, int]] = {
    "flair": (250, 400, 350),
    "t1": (-400, -300, -250),
    "t1ce": (-300, -250, 450),
    "t2": (450, 400, 250),
}
"""How much brighter than the brain (1000) the core, the oedema and what enhances are."""


def brains(patients: int, *, shape: Three, student: Sequence, gap: float, missing: float, seed: int) -> LookAlike:
    """The tumour shows plainly in three sequences. In the student's its contrast fades with `gap` and lumps that are
    no tumour rise as high, so that averaging over neighbours helps little.
    """
    modalities: dict[str, Modality] = {}
    for name in CONTRAST:
        modalities |= input_parts(name, "int16", (1, *shape), "zstd", "arbitrary")
    modalities |= target_parts("seg", (1, *shape), VALUES, "zstd")
    return LookAlike(
        task="brain_tumour",
        class_names=REGIONS,
        modalities=modalities,
        items=[
            (f"case-{number:05d}", partial(_brain, number, shape, student, gap, missing, seed))
            for number in range(patients)
        ],
        stratum=[int(_is_low(number)) for number in range(patients)],
        excluded={"grade": "it tells whether anything enhances"},
        container="zarr",
        problem="segmentation",
    )


def _is_low(number: int) -> bool:
    """Every fourth tumour is of low grade, and nothing in it enhances."""
    return number % 4 == 3


def _brain(number: int, shape: Three, student: Sequence, gap: float, missing: float, seed: int) -> Sample:
    generator = np.random.default_rng((seed, 5, number))
    size = np.array(shape)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    head_XYZ = (((grid - (size - 1) / 2) / (0.46 * size)) ** 2).sum(axis=-1) < 1
    centre = size / 2 + generator.uniform(-0.15, 0.15, 3) * size
    axes = generator.uniform(0.17, 0.27, 3) * size
    depth_XYZ = np.sqrt((((grid - centre) / axes) ** 2).sum(axis=-1)) + 0.12 * _lumps(shape, generator)
    seg_XYZ = np.zeros(shape, dtype=np.uint8)
    seg_XYZ[head_XYZ & (depth_XYZ < 1)] = 2
    seg_XYZ[head_XYZ & (depth_XYZ < 0.7)] = 1 if _is_low(number) else 4
    seg_XYZ[head_XYZ & (depth_XYZ < 0.45)] = 1
    others = [name for name in CONTRAST if name != student]
    absent = others[int(generator.integers(3))] if generator.random() < missing else None
    arrays: dict[str, np.ndarray] = {}
    for name, (core, oedema, enhancing) in CONTRAST.items():
        bright_XYZ = np.array([0, core, oedema, 0, enhancing], dtype=np.float64)[seg_XYZ]
        lumps_XYZ, noise_XYZ = _lumps(shape, generator), generator.normal(size=shape)
        blur = max(gap, PLAIN) if name == student else PLAIN
        voxels = 1000 + np.sqrt(1 - blur) * bright_XYZ + 300 * np.sqrt(blur) * lumps_XYZ + 40 * noise_XYZ
        if name != absent:
            arrays |= input_values(name, np.where(head_XYZ, np.maximum(voxels, 1), 0).astype(np.int16)[None])
    arrays |= target_values("seg", seg_XYZ[None], VALUES, seed=seed, sample=str(number))
    space = Space(
        shape=shape,
        affine=((-1.0, 0.0, 0.0, 0.0), (0.0, -1.0, 0.0, 239.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
        spacing=(1.0, 1.0, 1.0),
    )
    group = "LGG" if _is_low(number) else "HGG"
    return Sample(arrays, patient=f"patient-{number:05d}", label=UNLABELLED, group=group, space=space)


def _lumps(shape: Three, generator: np.random.Generator) -> np.ndarray:
    """Smooth noise of about unit variance, some voxels wide."""
    knots = torch.tensor(generator.normal(size=tuple(2 + n // 5 for n in shape)))
    smooth = F.interpolate(knots[None, None], size=shape, mode="trilinear", align_corners=True)[0, 0].numpy()
    return smooth / smooth.std()
