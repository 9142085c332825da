"""NIfTI files: the header alone, every voxel to the last byte of the file, and a map written back into its frame."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distkd.data.manifest import Space, frame_fault
from distkd.errors import DataError

__all__ = ["SUFFIXES", "Frame", "read_frame", "read_voxels", "same_affine", "write_map"]

# Shapes: XYZ voxels along the axes of the file

SUFFIXES = (".nii", ".nii.gz")
AFFINE_TOLERANCE = 1e-3
"""Millimetres (and direction cosines) by which the affines of one case's files may differ: float32 headers do."""


@dataclass(frozen=True)
class Frame:
    """Where a file's voxels lie."""

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, float, float, float], ...]
    """4 rows: voxel to scanner, mm."""
    spacing: tuple[float, float, float]
    """mm."""
    dtype: str
    """Of the voxels as the file means them."""

    def space(self) -> Space:
        return Space(shape=self.shape, affine=self.affine, spacing=self.spacing)  # pyright: ignore[reportArgumentType]


def read_frame(path: Path) -> Frame:
    """From the header, without the voxels.

    Raises:
        DataError: no NIfTI file, not three-dimensional, or a frame of NaN or of empty axes.
    """
    library = _library()
    try:
        image = library.load(path)
    except _errors() as error:
        raise _unreadable(path, error) from error
    return _frame(path, image)


def read_voxels(path: Path) -> tuple[np.ndarray, Frame]:
    """Voxels as the file means them (scaled where its header says so), (x, y, z), and their frame.

    The whole file is read: of a `.nii.gz` the checksum at its end, too.

    Raises:
        DataError: as `read_frame`, or the file is cut off or damaged, or holds NaN or infinities.
    """
    library = _library()
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        image = library.Nifti1Image.from_bytes(data)
        frame = _frame(path, image)
        array_XYZ = np.asanyarray(image.dataobj)
    except _errors() as error:
        raise _unreadable(path, error) from error
    if array_XYZ.dtype.kind not in "iuf":
        raise DataError(f"{str(path)!r} holds {array_XYZ.dtype} voxels, expected numbers; convert it")
    if array_XYZ.dtype.kind == "f":
        wrong = np.argwhere(~np.isfinite(array_XYZ))
        if len(wrong):
            x, y, z = wrong[0].tolist()
            raise DataError(
                f"{str(path)!r} holds {array_XYZ[x, y, z]} at voxel {x},{y},{z} ({len(wrong)} voxels are NaN or "
                "infinite), expected finite intensities; mend the file"
            )
    return array_XYZ, frame


def same_affine(one: Frame, other: Frame) -> bool:
    """Both map a voxel to the same place, up to what float32 headers lose."""
    return bool(np.allclose(one.affine, other.affine, rtol=0, atol=AFFINE_TOLERANCE))


def write_map(path: Path, array_XYZ: np.ndarray, space: Space) -> None:
    """A map of a sample, such as a predicted segmentation, as NIfTI in the frame of the sample's own files.

    Raises:
        DataError: the map has another shape than the sample, or nothing says where the sample's voxels lie.
    """
    library = _library()
    if array_XYZ.shape != tuple(space.shape):
        raise DataError(f"the map for {str(path)!r} has shape {array_XYZ.shape}, the sample {tuple(space.shape)}")
    if space.affine is None:
        raise DataError(
            f"cannot write {str(path)!r}: the sample has no affine, as its volumes came as .npy, so nothing says where "
            "the map's voxels lie; save it with numpy.save"
        )
    affine = np.array(space.affine, dtype=np.float64)
    image = library.Nifti1Image(array_XYZ, affine)
    image.header.set_xyzt_units("mm")
    library.save(image, path)


def _library() -> Any:
    import nibabel

    return nibabel


def _frame(path: Path, image: Any) -> Frame:
    shape = tuple(int(n) for n in image.shape)
    if len(shape) != 3:
        raise DataError(f"{str(path)!r} has {len(shape)} dimensions {shape}, expected 3 (x, y, z); take one volume")
    if min(shape) < 1:
        raise DataError(f"{str(path)!r} has shape {shape}, which holds no voxel; copy it again")
    affine = tuple(tuple(float(value) for value in row) for row in image.affine)
    spacing = tuple(float(value) for value in image.header.get_zooms()[:3])
    if fault := frame_fault(affine, spacing):
        raise DataError(f"{str(path)!r} has no usable frame: {fault}; mend its header")
    scaled = image.dataobj.slope != 1 or image.dataobj.inter != 0
    dtype = "float64" if scaled else image.get_data_dtype().newbyteorder("=").name
    return Frame(shape, affine, spacing, dtype)  # pyright: ignore[reportArgumentType]


def _errors() -> tuple[type[Exception], ...]:
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    return (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)


def _unreadable(path: Path, error: Exception) -> DataError:
    text = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"cannot read {str(path)!r}: {text}; expected a whole NIfTI file: copy it again")
