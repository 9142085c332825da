"""Volumes from zarr arrays: whole samples against the page cache, crops against nibabel.

Whole samples are 4 x 64^3 float16 with a uint8 mask (2.36 MB), read into one reused batch in memory. `floor` reads the
same number of bytes from plain files of these sizes by `readinto` into the same batch, nothing else. `ours` compares
every CRC-32C, as a set does at the first read of a sample; `ours_unchecked` none, as it reads it later. Target: at
least 0.6 of the floor. Threads share the samples of a turn; their sides are compared with the floor in as many threads.

Crops are 80 slices of 160 x 160 of a 240 x 240 x 155 int16 volume, with zeros around a head-shaped part as after skull
stripping; the peers are nibabel on .nii.gz, which decodes all of it, and on .nii, of which it maps the file and reads
the crop. Target: at most 1.5 x the bytes of the chunks that the crop touches.

All in the page cache. Ratios above 1 mean that we are faster than the side named.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import compare, report
from distkd.data.manifest import Modality
from distkd.data.zarr import ZarrArrays, ZarrWriter
from distkd.data.zarr_layout import VolumeLayout, touched

VOLUME, CROP = (240, 240, 155), (160, 160, 80)
WHOLE = {
    "scan": Modality(kind="volume", dtype="float16", shape=(4, 64, 64, 64), codec="zarr"),
    "mask": Modality(kind="volume", dtype="uint8", shape=(1, 64, 64, 64), codec="zarr"),
}

Sides = dict[str, Callable[[], Any]]


def whole_sides(root: Path, n_samples: int, threads: int, pool: ThreadPoolExecutor) -> Sides:
    """Every side reads all samples once, each into its row of the same batch."""
    import zarr

    rng = np.random.default_rng(0)
    folder = root / "whole" / "volumes.zarr"
    writer = ZarrWriter(folder, WHOLE)
    plain: dict[str, list[Path]] = {name: [] for name in WHOLE}
    for name, modality in WHOLE.items():
        for sample in range(n_samples):
            array = rng.integers(0, 255, modality.shape, dtype=np.uint8).astype(modality.dtype)
            writer.write(name, sample, array)
            plain[name].append(root / f"{name}-{sample}")
            plain[name][-1].write_bytes(array.tobytes())
    writer.finish(n_samples)
    ours, group = ZarrArrays(folder, WHOLE, n_samples), zarr.open_group(folder, mode="r")
    batch = {name: np.zeros((n_samples, *modality.shape), modality.dtype) for name, modality in WHOLE.items()}
    files = {name: [path.open("rb", buffering=0) for path in paths] for name, paths in plain.items()}
    peer: dict[str, Any] = {name: group[name] for name in WHOLE}

    def read(sample: int, *, check: bool) -> None:
        for name, rows in batch.items():
            ours.read(name, sample, out=rows[sample], check=check)

    def floor(sample: int) -> None:
        for name, rows in batch.items():
            file = files[name][sample]
            file.seek(0)
            assert file.readinto(rows[sample]) == rows[sample].nbytes  # pyright: ignore[reportAttributeAccessIssue]

    def library(sample: int) -> None:
        for name, rows in batch.items():
            rows[sample] = peer[name][sample]

    for sample in range(n_samples):  # every side reads the same
        library(sample)
        expected = {name: rows[sample].copy() for name, rows in batch.items()}
        for side in (floor, lambda n: read(n, check=True)):
            for rows in batch.values():
                rows[sample] = 0
            side(sample)
            assert all(np.array_equal(rows[sample], expected[name]) for name, rows in batch.items())
    one: dict[str, Callable[[int], None]] = {
        "floor": floor,
        "ours": lambda sample: read(sample, check=True),
        "ours_unchecked": lambda sample: read(sample, check=False),
        "zarr_library": library,
    }

    def in_turn(side: Callable[[int], None], samples: Sequence[int]) -> None:
        for sample in samples:
            side(sample)

    def in_threads(side: Callable[[int], None]) -> None:
        parts = [range(k, n_samples, threads) for k in range(threads)]
        list(pool.map(in_turn, [side] * threads, parts))

    sides: Sides = {name: lambda side=side: in_turn(side, range(n_samples)) for name, side in one.items()}
    return sides | {
        f"{name}_{threads}_threads": lambda side=one[name]: in_threads(side)
        for name in ("floor", "ours", "ours_unchecked")
    }


def head() -> np.ndarray:
    """Noise within an ellipsoid that fills about a sixth of the volume, zeros around it; (1, x, y, z) int16."""
    rng = np.random.default_rng(0)
    x, y, z = np.ogrid[-1:1:240j, -1:1:240j, -1:1:155j]  # pyright: ignore[reportAssignmentType, reportIndexIssue]
    inside = (x / 0.56) ** 2 + (y / 0.70) ** 2 + (z / 0.82) ** 2 < 1
    smooth = 600 + 300 * np.cos(5 * x) * np.cos(4 * y) * np.cos(6 * z)
    return (np.where(inside, smooth + rng.normal(0, 40, VOLUME), 0)).astype(np.int16)[None]


def crop_sides(
    root: Path, starts: list[tuple[int, int, int]], volume_CXYZ: np.ndarray, chunk: tuple[int, ...] | None
) -> tuple[Sides, dict[str, ZarrArrays]]:
    """Every side reads all crops once; sides of zlib-packed files only some of them, counted by who calls."""
    import nibabel as nib
    import zarr

    arrays: dict[str, ZarrArrays] = {}
    for compression in ("none", "zstd"):
        modalities = {
            "flair": Modality(
                kind="volume", dtype="int16", shape=(1, *VOLUME), codec="zarr", chunk=chunk, compression=compression
            )
        }
        folder = root / compression / "volumes.zarr"
        writer = ZarrWriter(folder, modalities)
        writer.write("flair", 0, volume_CXYZ)
        writer.finish(1)
        arrays[compression] = ZarrArrays(folder, modalities, 1)
    image = nib.Nifti1Image(volume_CXYZ[0], np.eye(4))
    for name in ("flair.nii", "flair.nii.gz"):
        nib.save(image, root / name)
    opened: dict[str, Any] = dict(zarr.open_group(root / "zstd" / "volumes.zarr", mode="r").arrays())
    out_CXYZ = np.zeros((1, *CROP), np.int16)

    def ours(compression: str, check: bool) -> None:
        for start in starts:
            arrays[compression].read("flair", 0, start=start, size=CROP, out=out_CXYZ, check=check)

    def nibabel(name: str, starts: list[tuple[int, int, int]]) -> None:
        for start in starts:
            # a new image for each crop, as a data loader opens them
            values = _stored(root / name)
            out_CXYZ[0] = values[_slices(start)] if name.endswith(".nii") else np.asanyarray(values)[_slices(start)]

    def library() -> None:
        for start in starts:
            out_CXYZ[...] = opened["flair"][(0, slice(None), *_slices(start))]

    sides: Sides = {
        "ours_none": lambda: ours("none", True),
        "ours_none_unchecked": lambda: ours("none", False),
        "ours_zstd": lambda: ours("zstd", True),
        "zarr_library_zstd": library,
        "nibabel_nii": lambda: nibabel("flair.nii", starts),
        "nibabel_nii_gz": lambda: nibabel("flair.nii.gz", starts[:1]),
    }
    for side in sides.values():  # every side ends with a crop that is right
        out_CXYZ[...] = -1
        side()
        last = starts[0] if side is sides["nibabel_nii_gz"] else starts[-1]
        assert np.array_equal(out_CXYZ[0], volume_CXYZ[0][_slices(last)])
    return sides, arrays


def _stored(path: Path) -> Any:
    """Values of a NIfTI file, which are read when they are asked for."""
    import nibabel as nib

    image: Any = nib.load(path)
    return image.dataobj


def _slices(start: tuple[int, int, int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(start, CROP, strict=True))


def crop_bytes(arrays: ZarrArrays, starts: list[tuple[int, int, int]]) -> dict[str, float]:
    """What the crops read, beside the stored bytes of the chunks that they touch and beside their own bytes."""
    layout = arrays._layouts["flair"]
    assert isinstance(layout, VolumeLayout)
    index = arrays._file("flair", layout, 0).index
    of_chunks = sum(int(index[touched(layout, start, CROP)[0], 1].sum()) for start in starts)
    read = 0
    real, arrays.bytes_read = os.preadv, 0

    def counting(descriptor: int, buffers: Any, offset: int, /) -> int:
        nonlocal read
        n = real(descriptor, buffers, offset)
        read += n
        return n

    os.preadv = counting  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for start in starts:
            arrays.read("flair", 0, start=start, size=CROP)
    finally:
        os.preadv = real
    assert read == arrays.bytes_read, (read, arrays.bytes_read)
    per_crop = len(starts) * np.prod(CROP) * 2
    return {
        "read / chunks touched": read / of_chunks,
        "read / crop": read / per_crop,
        "chunks a crop": statistics.mean(len(touched(layout, start, CROP)[1]) for start in starts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--crops", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--chunk", type=int, nargs=3, help="inner chunk of the crops' volume, instead of the default")
    parser.add_argument("--volume", type=Path, help="NIfTI file of 240 x 240 x 155 to crop, instead of a made one")
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    starts: list[tuple[int, int, int]] = [
        tuple(int(rng.integers(n - c + 1)) for n, c in zip(VOLUME, CROP, strict=True)) for _ in range(arguments.crops)
    ]  # pyright: ignore[reportAssignmentType]
    volume_CXYZ = head()
    if arguments.volume:
        volume_CXYZ = np.asanyarray(_stored(arguments.volume)).astype(np.int16)[None]
    chunk = None if arguments.chunk is None else (1, *arguments.chunk)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.threads) as pool:
        root = Path(folder)
        whole = compare(
            whole_sides(root, arguments.samples, arguments.threads, pool), repeats=arguments.repeats, warmup=1
        )
        crop_of, arrays = crop_sides(root, starts, volume_CXYZ, chunk)
        crops = compare(crop_of, repeats=arguments.repeats, warmup=1)
        read = {compression: crop_bytes(of, starts) for compression, of in arrays.items()}
        stored = (root / "zstd/volumes.zarr/flair/c/0/0/0/0/0").stat().st_size / volume_CXYZ.nbytes
    for figures in (crops[name] for name in crops if name != "nibabel_nii_gz"):
        figures.update({key: value / len(starts) for key, value in figures.items()})
    in_threads = f"_{arguments.threads}_threads"
    ratios: dict[str, float] = {}
    for key, word in (("wall_s", "wall"), ("least_processor_s", "processor")):
        for side in ("ours", "ours_unchecked"):
            ratios[f"whole: floor / {side}, {word}"] = whole["floor"][key] / whole[side][key]
        ratios[f"whole: zarr_library / ours, {word}"] = whole["zarr_library"][key] / whole["ours"][key]
    for side in ("ours", "ours_unchecked"):
        ratios[f"whole, {arguments.threads} threads: floor / {side}, wall"] = (
            whole["floor" + in_threads]["wall_s"] / whole[side + in_threads]["wall_s"]
        )
        ratios[f"whole: {side} in {arguments.threads} threads / in 1, samples/s"] = (
            whole[side]["wall_s"] / whole[side + in_threads]["wall_s"]
        )
    for ours in ("ours_none", "ours_zstd"):
        for peer in ("nibabel_nii_gz", "nibabel_nii", "zarr_library_zstd"):
            ratios[f"crop: {peer} / {ours}, processor"] = (
                crops[peer]["least_processor_s"] / crops[ours]["least_processor_s"]
            )
    for compression, figures in read.items():
        ratios |= {f"crop, {compression}: {name}": value for name, value in figures.items()}
    report(
        "volume_reading",
        {f"whole/{name}": figures for name, figures in whole.items()}
        | {f"crop/{name}": figures for name, figures in crops.items()},
        ratios,
        samples=arguments.samples,
        crops=len(starts),
        threads=arguments.threads,
        stored_by_zstd=round(stored, 3),
        unit="s: whole, all samples; crop, one crop",
    )


if __name__ == "__main__":
    main()
