"""BraTS cases (2018 to 2021, and 2023's file names): four MRI sequences and the tumour's label map, as a zarr group.

--raw DIR holds a folder per case, in HGG/ and LGG/ or directly (beside tables, which are not read):
  <case>/<case>_{flair,t1,t1ce,t2,seg}.nii[.gz]        2018, 2019 (.nii), 2020, 2021 (.nii.gz)
  <case>/<case>-{t2f,t1n,t1c,t2w,seg}.nii.gz           2023; the last number of a case is the time point of a patient
One sample a case, voxels as they are in the files:
  flair t1 t1ce t2    (1, x, y, z) int16, or float32 with --dtype float32
  seg                 the target, uint8, raw values: 0 1 2 4, or 0 1 2 3 in 2023's numbering
  <name>_stats        of each sequence, five numbers for the normalisation; seg_points: places in the tumour, for crops
A sequence or a label map may be missing; it is recorded as missing. Affine and spacing are kept, so that a prediction
goes back into the scanner's frame. The grade folder, where there is one, is the sample's group.
Folds: --folds by patient, stratified by grade, or the lists of --split-list: MTCM-KD's JSON (each fold's valid_samples
become its test part) or LCKD's text files of case folders (train, val, test by their names).
Terms of the data: on request from the challenge (2018 to 2021: non-commercial, cite Menze 2015, Bakas 2017, Baid 2021);
BraTS 2021 is also at TCIA under CC BY 4.0 (doi 10.7937/jc8x-9874).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from distkd.data.manifest import Description, Fold, Modality
from distkd.data.raw.mri_cases import (
    SEQUENCES,
    Case,
    OnError,
    UnusableCase,
    check_frames,
    find_cases,
    guarded,
    numbering,
)
from distkd.data.raw.nifti import Frame, read_voxels
from distkd.data.raw.recipe import Made, Skipped, arguments, run, tables_digest
from distkd.data.raw.split_lists import read_lists
from distkd.data.raw.volume_parts import Compression, input_parts, input_values, target_parts, target_values
from distkd.data.splits import hold_out, patient_folds
from distkd.data.write import Sample, ShardWriter, SkipSample
from distkd.errors import ConfigError, DataError

# Shapes: X Y Z voxels

NEEDS_RAW = True
FOLDER = "BraTS cases (<case>/<case>_{flair,t1,t1ce,t2,seg}.nii[.gz], or below HGG/ and LGG/)"
CLASS_NAMES = ["background", "necrotic_core", "oedema", "enhancing"]
VALUES = {"2018": [0, 1, 2, 4], "2023": [0, 1, 2, 3]}
"""Raw values of the label map in the order of the class names, by numbering."""
N_FOLDS = 5
VAL_SHARE = 0.15
INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Options:
    """What is made, beside the folds."""

    labels: Literal["auto", "2018", "2023"] = "auto"
    dtype: Literal["int16", "float32"] = "int16"
    compression: Compression = "zstd"
    on_error: OnError = "fail"
    threads: int = 2


def make(
    raw: Path | None,
    out: Path,
    *,
    options: Options | None = None,
    folds: int = N_FOLDS,
    val_share: float = VAL_SHARE,
    split_list: tuple[Path, ...] = (),
    seed: int = 0,
) -> Made:
    """Shard set of the cases; with `folds` 0 every case is for testing."""
    if raw is None:
        raise DataError(f"no raw data; name with --raw the folder of {FOLDER}")
    options = options or Options()
    if folds < 0 or folds == 1:
        raise ConfigError(f"--folds is {folds}, expected 2 or more, or 0 for cases that are only tested on")
    if options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}, expected at least 1")
    skipped = Skipped()
    cases = find_cases(raw, skipped, options.on_error, FOLDER)
    lists = read_lists(split_list, {case.name: case.patient for case in cases}) if split_list else []
    if lists:
        named = {name for fold in lists for names in fold.values() for name in names}
        for case in cases:
            if case.name not in named:
                skipped.add("in no list of --split-list", case.name)
        cases = [case for case in cases if case.name in named]
    used = numbering(cases) if options.labels == "auto" else options.labels
    frames = check_frames(cases, skipped, options.on_error)
    cases = [case for case in cases if case.name in frames]
    if not cases:
        raise DataError(f"no case of {str(raw)!r} can be used: {'; '.join(skipped.lines())}; check --raw")
    grade_of = {case.name: case.grade for case in cases}
    # folds that cannot be made are told before hours of work
    _folds({case.name: case.patient for case in cases}, grade_of, lists, folds, val_share, seed)
    shape = np.max([frame.shape for frame in frames.values()], axis=0).tolist()
    description = _description(cases, (shape[0], shape[1], shape[2]), VALUES[used], options)
    lists_digest = tables_digest(*split_list)
    with ShardWriter(out, description, options=f"brats {used} {options.dtype} {seed} {lists_digest}") as writer:
        writer.add_all(
            ((case.name, _loader(case, frames[case.name], VALUES[used], options, seed)) for case in cases),
            total=len(cases),
            label="cases",
            threads=options.threads,
        )
        kept = dict(zip(writer.keys, writer.patients, strict=True))
        made_folds, rule = _folds(kept, grade_of, lists, folds, val_share, seed)
        writer.split(made_folds, rule=rule, seed=seed)
    assert writer.manifest is not None
    for reason, names in writer.skipped.by_reason.items():
        for name in names:
            skipped.add(reason, name)
    return Made(writer.manifest, skipped)


def _description(cases: list[Case], shape: tuple[int, int, int], values: list[int], options: Options) -> Description:
    modalities: dict[str, Modality] = {}
    for name in SEQUENCES:
        if any(name in case.files for case in cases):
            modalities |= input_parts(name, options.dtype, (1, *shape), options.compression, "scanner's intensity")
    modalities |= target_parts("seg", (1, *shape), values, options.compression)
    return Description(
        task="brain_tumour",
        problem="segmentation",
        container="zarr",
        class_names=CLASS_NAMES,
        modalities=modalities,
        excluded={"survival": "a table of the challenge that no method here uses"},
        source="BraTS (Menze 2015, Bakas 2017, Baid 2021), files of the challenge as they are",
        licence="terms of the challenge's year: non-commercial research; BraTS 2021 at TCIA also CC BY 4.0",
    )


def _loader(case: Case, frame: Frame, values: list[int], options: Options, seed: int) -> Callable[[], Sample]:
    def load() -> Sample:
        try:
            arrays = _arrays(case, values, options.dtype, seed)
        except UnusableCase as fault:
            if options.on_error == "fail":
                raise
            raise SkipSample(fault.reason) from fault
        return Sample(arrays, patient=case.patient, label=None, group=case.grade, space=frame.space())

    return load


def _arrays(case: Case, values: list[int], dtype: str, seed: int) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name in SEQUENCES:
        if name in case.files:
            voxels_XYZ, _ = guarded(case, lambda path=case.files[name]: read_voxels(path))
            arrays |= input_values(name, _intensities(case, name, voxels_XYZ, dtype)[None])
    if "seg" in case.files:
        voxels_XYZ, _ = guarded(case, lambda: read_voxels(case.files["seg"]))
        arrays |= target_values("seg", _labels(case, voxels_XYZ, values)[None], values, seed=seed, sample=case.name)
    return arrays


def _intensities(case: Case, name: str, voxels_XYZ: np.ndarray, dtype: str) -> np.ndarray:
    """int16 without any loss, or float32."""
    if dtype == "float32":
        return voxels_XYZ.astype(np.float32)
    if voxels_XYZ.dtype.kind == "f":
        wrong = np.argwhere(voxels_XYZ != np.rint(voxels_XYZ))
        if len(wrong):
            x, y, z = wrong[0].tolist()
            raise UnusableCase(
                "intensities that are no whole numbers",
                f"{case.files[name].name!r} of case {case.name!r} holds {voxels_XYZ[x, y, z]} at voxel {x},{y},{z} "
                f"({len(wrong)} voxels are no whole numbers), expected int16; run with --dtype float32",
            )
    low, high = voxels_XYZ.min(), voxels_XYZ.max()
    if low < INT16.min or high > INT16.max:
        raise UnusableCase(
            "intensities beyond int16",
            f"{case.files[name].name!r} of case {case.name!r} holds {low} to {high}, expected {INT16.min} to "
            f"{INT16.max}; run with --dtype float32",
        )
    return voxels_XYZ.astype(np.int16)


def _labels(case: Case, voxels_XYZ: np.ndarray, values: list[int]) -> np.ndarray:
    known = np.isin(voxels_XYZ, values)
    if not known.all():
        found, counts = np.unique(voxels_XYZ[~known], return_counts=True)
        hint = "; is it 2023's numbering? then run with --labels 2023" if float(found[0]) == 3 else ""
        hint = "; is it the numbering before 2023? then run with --labels 2018" if float(found[0]) == 4 else hint
        raise UnusableCase(
            "an unknown label",
            f"{case.files['seg'].name!r} of case {case.name!r} holds the label {found[0]:g} at {counts[0]} voxels, "
            f"expected {values}{hint}",
        )
    return voxels_XYZ.astype(np.uint8)


def _folds(
    kept: dict[str, str],
    grade_of: dict[str, str | None],
    lists: list[dict[str, list[str]]],
    n_folds: int,
    val_share: float,
    seed: int,
) -> tuple[list[Fold], str]:
    """Folds of the patients of the cases that were kept, and their rule in words."""
    codes = {grade: code for code, grade in enumerate(sorted({grade_of[name] or "" for name in kept}))}
    stratum = {patient: codes[grade_of[name] or ""] for name, patient in kept.items()}
    by_grade = ", stratified by grade" if len(codes) > 1 else ""
    if not lists and n_folds == 0:
        return [Fold(train=[], val=[], test=sorted(stratum))], "no folds: every patient is for testing"
    if not lists:
        folds = patient_folds(list(stratum), list(stratum.values()), n_folds=n_folds, val_share=val_share, seed=seed)
        held = f"; {val_share:g} of the rest is the validation part" if val_share else ""
        return folds, f"{n_folds} folds by patient{by_grade}{held}"
    folds = [_listed(fold, kept, stratum, val_share, (seed, number)) for number, fold in enumerate(lists)]
    held = (
        ""
        if "val" in lists[0] or not val_share
        else f"; {val_share:g} of each training list{by_grade} is the validation part"
    )
    return folds, f"the lists of --split-list{held}"


def _listed(
    lists: dict[str, list[str]], kept: dict[str, str], stratum: dict[str, int], share: float, seed: tuple[int, int]
) -> Fold:
    parts = {split: {kept[name] for name in names if name in kept} for split, names in lists.items()}
    empty = [split for split, patients in parts.items() if not patients]
    if empty:
        raise DataError(f"split list, fold {seed[1]}: every case of {' and '.join(empty)} was skipped; mend them")
    train, val = sorted(parts["train"]), sorted(parts.get("val", ()))
    if "val" not in parts:
        train, val = hold_out({patient: stratum[patient] for patient in train}, share, seed=seed)
    return Fold(train=train, val=val, test=sorted(parts.get("test", ())))


def main(argv: list[str] | None = None) -> int:
    default = Options()
    parser = arguments(__doc__, raw=f"folder of {FOLDER}", formats=("zarr",))
    parser.add_argument(
        "--labels", choices=["auto", *VALUES], default=default.labels, help="numbering (default: by the file names)"
    )
    parser.add_argument("--dtype", choices=["int16", "float32"], default=default.dtype, help="of the sequences")
    parser.add_argument("--compression", choices=["zstd", "none"], default=default.compression, help="of the chunks")
    parser.add_argument("--on-error", choices=["fail", "skip"], default=default.on_error, help="at an unusable case")
    parser.add_argument("--threads", type=int, default=default.threads, help="cases in memory at a time")
    parser.add_argument("--folds", type=int, default=N_FOLDS, help=f"0: all for testing (default {N_FOLDS})")
    parser.add_argument("--val-share", type=float, default=VAL_SHARE, help=f"of what is trained on ({VAL_SHARE})")
    parser.add_argument(
        "--split-list", type=Path, nargs="+", default=[], metavar="FILE", help="a .json, or {train,val,test} text files"
    )
    return run(_make, parser, argv)


def _make(options: argparse.Namespace) -> Made:
    chosen = {name: value for name, value in vars(options).items() if name in Options.__dataclass_fields__}
    return make(
        options.raw,
        options.out,
        options=Options(**chosen),
        folds=options.folds,
        val_share=options.val_share,
        split_list=tuple(options.split_list),
        seed=options.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
