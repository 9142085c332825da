"""Files that a table names: images, volumes and npy arrays, looked at (header or every value) and loaded."""

# Shapes: H W C of an image, C X Y Z of a volume, F features

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from distkd.data.codec import IMAGE_FAULTS
from distkd.data.manifest import Space
from distkd.data.raw.nifti import read_frame, read_voxels
from distkd.data.write import Encoded
from distkd.errors import DataError

__all__ = ["Facts", "Stored", "load_array", "load_image", "load_labels", "load_volume", "look"]

Stored = Literal["png", "jpg", "again"]
"""How an image can be kept: its file as it is, or decoded and packed as png."""

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
GREY = ("1", "L", "LA")
_ORIENTATION = 0x0112
_FEW = 16
"""Values of a label map, at most."""


@dataclass(frozen=True)
class Facts:
    """What a file holds."""

    kind: Literal["image", "volume", "vector"]
    shape: tuple[int, ...]
    dtype: str
    stored: Stored = "again"
    space: Space | None = None
    """Of a volume."""
    few_values: tuple[int, ...] = ()
    """Of a volume whose every value was looked at: those that occur, if they are few small whole numbers."""


def look(path: Path, *, every_value: bool) -> Facts:
    """What the file holds, by its header, or by all of it.

    Raises:
        DataError: it cannot be read, or cannot be an input; without the row, which the caller knows.
    """
    suffix = path.name.lower()
    if suffix.endswith((".nii", ".nii.gz")):
        array, frame = read_voxels(path) if every_value else (None, read_frame(path))
        few = () if array is None else _few_values(array)
        return Facts("volume", (1, *frame.shape), _storable(frame.dtype, path), space=frame.space(), few_values=few)
    if suffix.endswith(".npy"):
        return _look_npy(path, every_value)
    return _look_image(path, every_value)


def _look_image(path: Path, every_value: bool) -> Facts:
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            # asking a png for tags behind its pixels would decode it
            tags = image.getexif() if image.format != "PNG" or "exif" in image.info else dict[int, int]()
            orientation = tags.get(_ORIENTATION, 1)
            size, mode, made_by = image.size, image.mode, image.format
            if every_value:
                image.load()
    except IMAGE_FAULTS as error:
        raise DataError(f"cannot read the image {str(path)!r}: {error}; copy it again") from error
    if mode not in EIGHT_BITS:
        raise DataError(
            f"{str(path)!r} has pixels of mode {mode}, expected 8 bits a channel; convert it, or save it as .npy"
        )
    if frames > 1 and made_by != "MPO":  # a phone's photo with a preview; the photo comes first
        raise DataError(f"{str(path)!r} holds {frames} images, expected one; save them apart")
    width, height = size[::-1] if orientation in (5, 6, 7, 8) else size
    stored: Stored = "again"
    if mode in ("L", "RGB") and orientation not in range(2, 9):
        stored = "png" if made_by == "PNG" else "jpg" if made_by == "JPEG" else "again"
    return Facts("image", (height, width, 1 if mode in GREY else 3), "uint8", stored)


def _look_npy(path: Path, every_value: bool) -> Facts:
    array = _npy(path)
    shape = tuple(int(n) for n in array.shape)
    if len(shape) not in (1, 3, 4) or math.prod(shape) == 0:
        raise DataError(
            f"{str(path)!r} holds an array of shape {shape}, expected a vector (features,), or a volume (x, y, z) or "
            "(channels, x, y, z)"
        )
    if array.dtype.kind not in "biuf":
        raise DataError(f"{str(path)!r} holds {array.dtype}, expected numbers; convert it")
    is_vector = len(shape) == 1
    if every_value:
        _check_values(path, np.asarray(array), nan_is_missing=is_vector)
    if is_vector:
        return Facts("vector", shape, "float32")
    channels, x, y, z = shape if len(shape) == 4 else (1, *shape)
    few = _few_values(np.asarray(array)) if every_value else ()
    # where its voxels lie the file does not know
    space = Space(shape=(x, y, z))
    return Facts("volume", (channels, x, y, z), _storable(array.dtype.name, path), space=space, few_values=few)


def _few_values(array: np.ndarray) -> tuple[int, ...]:
    """Values of what may be a label map, or nothing."""
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 255 or low == high or (array.dtype.kind == "f" and not (array == np.rint(array)).all()):
        return ()
    counts = np.bincount(array.astype(np.uint8).ravel(), minlength=256)
    return tuple(np.flatnonzero(counts).tolist()) if np.count_nonzero(counts) <= _FEW else ()


def _npy(path: Path) -> np.ndarray:
    """Mapped, not read; objects are refused, since unpickling runs what a stranger wrote."""
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read the array {str(path)!r}: {error}; save it again with numpy.save") from error
    if isinstance(array, np.lib.npyio.NpzFile):
        array.close()
        raise DataError(f"{str(path)!r} holds several arrays (npz), expected one; save it with numpy.save")
    return array


def _check_values(path: Path, array: np.ndarray, *, nan_is_missing: bool) -> None:
    if array.dtype.kind != "f":
        return
    wrong = np.argwhere(np.isinf(array) if nan_is_missing else ~np.isfinite(array))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        allowed = "" if nan_is_missing else "NaN or "
        raise DataError(
            f"{str(path)!r} holds {array[place]} at {','.join(map(str, place))} ({len(wrong)} values are {allowed}"
            "infinite), expected finite numbers; mend the file"
        )


def _storable(dtype: str, path: Path) -> str:
    """The type that holds such voxels in a set."""
    wider = {"bool": "uint8", "int8": "int16", "uint32": "int64", "float64": "float32"}
    name = wider.get(dtype, dtype)
    if name not in ("uint8", "uint16", "int16", "int32", "int64", "float16", "float32"):
        raise DataError(f"{str(path)!r} holds {dtype} voxels, expected whole or floating-point numbers; convert it")
    return name


def load_image(path: Path, shape_HWC: tuple[int, int, int], stored: Stored) -> np.ndarray | Encoded:
    """The file as it is, or its pixels turned upright, in the channels and the size that are asked for.

    Raises:
        DataError: it cannot be read, or has another size where the set keeps files as they are.
    """
    try:
        data = path.read_bytes()
        if stored != "again":
            return Encoded(data)
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = upright.convert("L" if shape_HWC[2] == 1 else "RGB")
    except IMAGE_FAULTS as error:
        raise DataError(f"cannot read the image {str(path)!r}: {error}; copy it again") from error
    size = (shape_HWC[1], shape_HWC[0])
    if pixels.size != size:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(pixels).reshape(shape_HWC)


def load_volume(path: Path, dtype: str) -> np.ndarray:
    """(channels, x, y, z) of a NIfTI or npy file.

    Raises:
        DataError: it cannot be read, or holds NaN or infinities.
    """
    if path.name.lower().endswith(".npy"):
        array = np.asarray(_npy(path))
        _check_values(path, array, nan_is_missing=False)
    else:
        array, _ = read_voxels(path)
    return (array if array.ndim == 4 else array[None]).astype(dtype)


def load_labels(path: Path, n_classes: int) -> np.ndarray:
    """uint8 (1, x, y, z) label map with values 0 to n_classes - 1.

    Raises:
        DataError: as `load_volume`, or another value occurs.
    """
    map_CXYZ = load_volume(path, "float64")
    wrong = (map_CXYZ != np.rint(map_CXYZ)) | (map_CXYZ < 0) | (map_CXYZ >= n_classes)
    if wrong.any():
        first = map_CXYZ[wrong][0]
        raise DataError(
            f"{str(path)!r} has the label {first:g} ({int(wrong.sum())} such voxels), expected 0 to {n_classes - 1}; "
            "mend the map, or name more --classes"
        )
    return map_CXYZ.astype(np.uint8)


def load_array(path: Path) -> np.ndarray:
    """float32 (features,) of an npy file."""
    array = np.asarray(_npy(path))
    _check_values(path, array, nan_is_missing=True)
    return array.astype(np.float32)
