"""Arrays to the bytes of a tar member and back: npy, png, jpg."""

from __future__ import annotations

import io
import math
import tokenize
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from distkd.data.manifest import Modality

__all__ = ["IMAGE_FAULTS", "DecodeError", "Encoded", "decode", "decode_image", "encode", "npy_header"]

JPEG_QUALITY = 95

_LONGEST = 160
"""Characters of another library's message."""

IMAGE_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are made errors
)
"""What pillow raises of a file that is damaged, no image, or too large to be one."""


class DecodeError(ValueError):
    """The bytes do not hold what the modality promises; the reader adds shard and sample."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A png, jpg or npy file as it is: stored without being encoded again, which would cost time and blur a jpg."""

    data: bytes


@lru_cache(maxsize=256)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What an npy file of such an array begins with."""
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def encode(array: np.ndarray, modality: Modality) -> bytes:
    """Equal arrays give equal bytes (for one version of pillow)."""
    assert (array.shape, array.dtype) == (modality.shape, modality.dtype), (array.shape, array.dtype, modality)
    if modality.codec == "npy":
        return npy_header(modality.dtype, modality.shape) + np.ascontiguousarray(array).tobytes()
    file = io.BytesIO()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    if modality.codec == "png":
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def decode(data: bytes, modality: Modality) -> np.ndarray:
    """Read-only array of the modality's shape and dtype.

    Raises:
        DecodeError: anything else came out.
    """
    if modality.codec == "npy":
        header = npy_header(modality.dtype, modality.shape)
        if data.startswith(header):  # parsing the header costs more than reading a vector
            return _values(data, len(header), modality)
        return _any_npy(data, modality)
    array = decode_image(data, shape=modality.shape)
    if array.dtype != modality.dtype:
        raise _unlike(array.dtype, array.shape, modality)
    return array


def _any_npy(data: bytes, modality: Modality) -> np.ndarray:
    """What another writer's header describes, where that is the modality; nothing is made of what is not."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
    # numpy parses the header as Python: a damaged one fails in any way that source code does
    except (ValueError, SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError) as error:
        raise DecodeError(f"is not a readable npy array ({_brief(error)})") from error
    if shape != modality.shape or dtype != modality.dtype:
        raise _unlike(dtype, shape, modality)
    return _values(data, file.tell(), modality, "F" if is_fortran else "C")


def _values(data: bytes, start: int, modality: Modality, order: Literal["C", "F"] = "C") -> np.ndarray:
    found, expected = len(data) - start, math.prod(modality.shape) * np.dtype(modality.dtype).itemsize
    if found != expected:
        raise DecodeError(f"is not a readable npy array ({found} bytes of values, expected {expected})")
    return np.frombuffer(data, dtype=modality.dtype, offset=start).reshape(modality.shape, order=order)


def decode_image(data: bytes, *, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """uint8 (height, width, 1 or 3) of a grey or colour png or jpg file.

    Args:
        shape: the only one that is taken; compared before there are pixels, so that no small file fills the memory.

    Raises:
        DecodeError: no image, one of another mode or shape, or without `shape` more pixels than pillow takes for sound.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.mode not in ("L", "RGB"):
                raise DecodeError(f"is an image of mode {image.mode}, expected 8-bit grey (L) or RGB")
            found = (image.height, image.width, len(image.getbands()))
            if shape is not None and found != shape:
                raise DecodeError(f"holds uint8 of shape {found}, expected uint8 of shape {shape}")
            most = Image.MAX_IMAGE_PIXELS
            if shape is None and most is not None and image.height * image.width > most:
                raise DecodeError(f"is an image of {image.width} x {image.height} px, expected {most} pixels at most")
            array = np.asarray(image)
    except DecodeError:
        raise
    except IMAGE_FAULTS as error:
        raise DecodeError(f"is not a readable image ({_brief(error)})") from error
    return array[:, :, None] if array.ndim == 2 else array


def _unlike(dtype: np.dtype, shape: tuple[int, ...], modality: Modality) -> DecodeError:
    return DecodeError(f"holds {dtype} of shape {shape}, expected {modality.dtype} of shape {modality.shape}")


def _brief(error: BaseException) -> str:
    """On one line; numpy repeats the whole header."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= _LONGEST else words[:_LONGEST] + "..."
