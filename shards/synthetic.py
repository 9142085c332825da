"""Made-up patients with a planted gap between what the teacher and the student can know, in the shape of real sets.

--like says which set the result looks like; each has a hidden cause that the privileged inputs show almost plainly and
the student's input blurred. --gap sets how blurred: at 0 it tells as much as they do, at 1 nothing.
  glioma     (the default) as shards/glioma.py. Each patient has a severity; three grades are its thirds. `omic`
             (privileged, one vector a patient) shows it; the regions of the patient's slide show it blurred: as an
             image `path` whose nuclei grow denser, and as a vector `cells` of measurements
  vectors    glioma without images
  derm7pt    as shards/derm7pt.py: `derm` and `checklist` show the diagnosis, `clinic` blurred, `meta` says little
  sicapv2    as shards/sicapv2.py: the finest texture of `patch` shows the grade, what a coarse copy keeps blurred
  brats      as shards/brats.py: the tumour `seg` shows in three of `flair t1 t1ce t2`, in that of --student blurred

  tiny (the default)         a second or two
  the layout of the papers   --patients 769 --image-size 512 --omic-width 80 --patches 9
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from distkd.data.manifest import Description, Modality
from distkd.data.raw.lookalike import LookAlike, Sequence, brains, skin, tiles
from distkd.data.raw.recipe import Made, arguments, run, track
from distkd.data.splits import patient_folds
from distkd.data.write import ShardWriter
from distkd.errors import ConfigError

NEEDS_RAW = False
CLASS_NAMES = ["II", "III", "IV"]
THIRDS = (-0.4307, 0.4307)
"""Where a standard normal severity passes to the next grade."""
LABEL_NOISE = 0.3
"""Of the grade as it is given against the severity, in the severity's standard deviations: pathologists disagree."""
PATIENTS = {"brats": 40, "sicapv2": 120}
"""Where it is not 240."""
OMIC_BLUR = 0.05
"""Share of the omics' signal that is noise; the region's is `gap`, if that is larger."""


@dataclass(frozen=True)
class Options:
    """What is made."""

    like: Literal["glioma", "vectors", "derm7pt", "sicapv2", "brats"] = "glioma"
    kind: Literal["images", "vectors"] = "images"
    patients: int | None = None
    """As many as make a small set, where it is None."""
    max_regions: int = 3
    patches: int = 1
    image_size: int = 32
    omic_width: int = 16
    cell_width: int = 12
    gap: float = 0.6
    missing: float = 0.1
    """Share of the patients without omics, of the cases without `derm`, of the heads without one sequence."""
    folds: int = 3
    volume_size: tuple[int, int, int] = (24, 24, 20)
    student: Sequence = "t1ce"

    @property
    def n_patients(self) -> int:
        return PATIENTS.get(self.like, 240) if self.patients is None else self.patients

    @property
    def has_images(self) -> bool:
        return self.like == "glioma" and self.kind == "images"


def make(raw: Path | None, out: Path, *, options: Options | None = None, seed: int = 0) -> Made:
    """Shard set of made-up patients; every patient is a function of (seed, its number)."""
    del raw  # nothing is read
    options = options or Options()
    _check(options)
    if options.like not in ("glioma", "vectors"):
        return _write(_look_alike(options, seed), out, options, seed)
    description = Description(
        task="synthetic_grade",
        class_names=CLASS_NAMES,
        modalities=_modalities(options),
        excluded={"severity": "the hidden cause of the grade"},
        source=f"made by shards/synthetic.py: seed {seed}, {options}",
        licence="CC0 1.0",
    )
    mixing = np.random.default_rng((seed, 0))
    cells_of = _Mixer(options.cell_width, mixing)
    omic_of = _Mixer(options.omic_width, mixing)
    with ShardWriter(out, description) as writer:
        for number in track(range(options.n_patients), "patients"):
            generator = np.random.default_rng((seed, 1, number))
            patient = f"patient-{number:05d}"
            severity = generator.normal()
            label = int(
                np.searchsorted(THIRDS, (severity + LABEL_NOISE * generator.normal()) / np.hypot(1, LABEL_NOISE))
            )
            omic = omic_of(_blurred(severity, OMIC_BLUR, generator), generator)
            omic[generator.random(len(omic)) < 0.02] = np.nan
            has_omic = generator.random() >= options.missing
            for region in range(int(generator.integers(1, options.max_regions + 1))):
                seen = _blurred(severity, max(options.gap, OMIC_BLUR), generator)
                for patch in range(options.patches):
                    arrays = {"cells": cells_of(seen, generator)}
                    if options.has_images:
                        arrays["path"] = _slide(seen, options.image_size, generator)
                    if has_omic:
                        arrays["omic"] = omic
                    group = f"{patient}-r{region}"
                    key = group if options.patches == 1 else f"{group}-p{patch}"
                    writer.add(key, arrays, patient=patient, group=group, label=label)
        writer.split(
            patient_folds(writer.patients, writer.labels, n_folds=options.folds, val_share=0.2, seed=seed),
            rule=f"{options.folds} folds by patient, stratified by grade; a fifth of the rest is the validation part",
            seed=seed,
        )
    assert writer.manifest is not None
    return Made(writer.manifest)


def _look_alike(options: Options, seed: int) -> LookAlike:
    n, size, gap, missing = options.n_patients, options.image_size, options.gap, options.missing
    if options.like == "derm7pt":
        return skin(n, size=size, gap=gap, missing=missing, seed=seed)
    if options.like == "sicapv2":
        return tiles(n, most=options.max_regions, size=size, gap=gap, seed=seed)
    return brains(n, shape=options.volume_size, student=options.student, gap=gap, missing=missing, seed=seed)


def _write(look: LookAlike, out: Path, options: Options, seed: int) -> Made:
    description = Description(
        task=look.task,
        problem=look.problem,
        container=look.container,
        class_names=look.class_names,
        modalities=look.modalities,
        excluded=look.excluded,
        source=f"made by shards/synthetic.py: seed {seed}, {options}",
        licence="CC0 1.0",
    )
    with ShardWriter(out, description) as writer:
        writer.add_all(look.items, total=len(look.items))
        writer.split(
            patient_folds(writer.patients, look.stratum, n_folds=options.folds, val_share=0.2, seed=seed),
            rule=f"{options.folds} folds by patient, stratified; a fifth of the rest is the validation part",
            seed=seed,
        )
    assert writer.manifest is not None
    return Made(writer.manifest)


def _check(options: Options) -> None:
    for name in ("gap", "missing"):
        if not 0 <= getattr(options, name) <= 1:
            raise ConfigError(f"--{name} is {getattr(options, name):g}, expected 0 to 1")
    smallest = {
        "n_patients": 30,
        "max_regions": 1,
        "patches": 1,
        "image_size": 8,
        "omic_width": 1,
        "cell_width": 1,
        "folds": 2,
    }
    for name, least in smallest.items():
        if getattr(options, name) < least:
            raise ConfigError(
                f"--{name.removeprefix('n_').replace('_', '-')} is {getattr(options, name)}, expected at least {least}"
            )
    if min(options.volume_size) < 8:
        raise ConfigError(f"--volume-size is {options.volume_size}, expected at least 8 voxels along each axis")


def _modalities(options: Options) -> dict[str, Modality]:
    size = options.image_size
    found = {
        "cells": Modality(kind="vector", dtype="float32", shape=(options.cell_width,), codec="npy", unit="arbitrary"),
        "omic": Modality(kind="vector", dtype="float32", shape=(options.omic_width,), codec="npy", unit="arbitrary"),
    }
    if options.has_images:
        found["path"] = Modality(kind="image", dtype="uint8", shape=(size, size, 3), codec="png", unit="sRGB")
    return found


def _blurred(severity: float, blur: float, generator: np.random.Generator) -> float:
    """Standard normal again, with a squared correlation of 1 - blur to the severity."""
    return float(np.sqrt(1 - blur) * severity + np.sqrt(blur) * generator.normal())


class _Mixer:
    """A signal and nuisances as correlated columns: no column tells the signal alone."""

    def __init__(self, width: int, generator: np.random.Generator, n_nuisances: int = 3):
        self.loadings = generator.normal(size=(1 + n_nuisances, width))
        self.scale = np.exp(generator.normal(size=width))

    def __call__(self, signal: float, generator: np.random.Generator) -> np.ndarray:
        causes = np.concatenate([[signal], generator.normal(size=len(self.loadings) - 1)])
        noise = 0.3 * generator.normal(size=len(self.scale))
        return (self.scale * (causes @ self.loadings + noise)).astype(np.float32)


def _slide(signal: float, size: int, generator: np.random.Generator) -> np.ndarray:
    """Dark nuclei on a pink ground, (size, size, 3) uint8; their density rises with the signal, the stain varies."""
    field = (size / 32) ** 2
    n_nuclei = int(generator.poisson(field * 12 * np.exp(0.5 * np.clip(signal, -2.5, 2.5))))
    ink = np.zeros((size, size), dtype=np.float32)
    for y, x, radius in zip(
        generator.uniform(0, size, n_nuclei),
        generator.uniform(0, size, n_nuclei),
        generator.uniform(1.2, 2.2, n_nuclei),
        strict=True,
    ):
        top, left = max(0, int(y - 3 * radius)), max(0, int(x - 3 * radius))
        rows = np.arange(top, min(size, int(y + 3 * radius) + 1))[:, None]
        columns = np.arange(left, min(size, int(x + 3 * radius) + 1))[None, :]
        spot = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * (radius * 0.6) ** 2))
        part = ink[top : top + rows.shape[0], left : left + columns.shape[1]]
        np.maximum(part, spot, out=part)
    ground = np.array([232, 198, 216]) + generator.normal(scale=8, size=3)
    nucleus = np.array([92, 62, 132]) + generator.normal(scale=8, size=3)
    image = ground + ink[:, :, None] * (nucleus - ground) + generator.normal(scale=4, size=(size, size, 1))
    return np.clip(image, 0, 255).astype(np.uint8)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, raw=None, formats=("wds", "zarr"))
    default = Options()
    likes = ["glioma", "vectors", "derm7pt", "sicapv2", "brats"]
    parser.add_argument("--like", choices=likes, default=default.like, help="the set that it looks like")
    parser.add_argument("--kind", choices=["images", "vectors"], default=default.kind, help="glioma: without images")
    parser.add_argument("--patients", type=int, default=None, help="default 240, brats 40, sicapv2 120")
    parser.add_argument(
        "--max-regions", type=int, default=default.max_regions, help="regions of a patient, 1 to this many"
    )
    parser.add_argument("--patches", type=int, default=default.patches, help="patches of a region; each is a sample")
    parser.add_argument("--image-size", type=int, default=default.image_size, help="side of `path` in pixels")
    parser.add_argument("--omic-width", type=int, default=default.omic_width)
    parser.add_argument("--cell-width", type=int, default=default.cell_width)
    parser.add_argument("--gap", type=float, default=default.gap, help="what a region hides of the severity, 0 to 1")
    parser.add_argument("--missing", type=float, default=default.missing, help="share of the patients without omics")
    parser.add_argument("--folds", type=int, default=default.folds)
    parser.add_argument(
        "--volume-size", type=int, nargs=3, default=default.volume_size, metavar=("X", "Y", "Z"), help="voxels of brats"
    )
    parser.add_argument("--student", choices=["flair", "t1", "t1ce", "t2"], default=default.student, help="of brats")
    return run(_make, parser, argv)


def _make(options: argparse.Namespace) -> Made:
    if options.format == "zarr" and options.like != "brats":
        raise ConfigError(f"--format zarr is for volumes, --like {options.like} has none; leave it out")
    chosen = {name: value for name, value in vars(options).items() if name in Options.__dataclass_fields__}
    chosen["volume_size"] = tuple(options.volume_size)
    return make(None, options.out, options=Options(**chosen), seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
