"""Arrays to the bytes of a tar member and back: npy, png, jpg."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from distkd.data.manifest import Modality

__all__ = ["DecodeError", "Encoded", "decode", "decode_image", "encode"]

JPEG_QUALITY = 95


class DecodeError(ValueError):
    """The bytes do not hold what the modality promises; the reader adds shard and sample."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A png, jpg or npy file as it is: stored without being encoded again, which would cost time and blur a jpg."""

    data: bytes


@lru_cache(maxsize=256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def encode(array: np.ndarray, modality: Modality) -> bytes:
    """Equal arrays give equal bytes (for one version of pillow)."""
    assert (array.shape, array.dtype) == (modality.shape, modality.dtype), (array.shape, array.dtype, modality)
    if modality.codec == "npy":
        return _npy_header(modality.dtype, modality.shape) + np.ascontiguousarray(array).tobytes()
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
        header = _npy_header(modality.dtype, modality.shape)
        if data.startswith(header):  # parsing the header costs more than reading a vector
            array = np.frombuffer(data, dtype=modality.dtype, offset=len(header))
            if array.nbytes + len(header) == len(data) and array.size == int(np.prod(modality.shape)):
                return array.reshape(modality.shape)
        array = _any_npy(data)
    else:
        array = decode_image(data)
    if array.shape != modality.shape or array.dtype != modality.dtype:
        raise DecodeError(
            f"holds {array.dtype} of shape {array.shape}, expected {modality.dtype} of shape {modality.shape}"
        )
    return array


def _any_npy(data: bytes) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DecodeError(f"is not a readable npy array ({error})") from error


def decode_image(data: bytes) -> np.ndarray:
    """uint8 (height, width, 1 or 3) of a grey or colour image file.

    Raises:
        DecodeError: no image, or one of another mode.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            array = np.asarray(image)
            mode = image.mode
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DecodeError(f"is not a readable image ({error})") from error
    if mode not in ("L", "RGB"):
        raise DecodeError(f"is an image of mode {mode}, expected 8-bit grey (L) or RGB")
    return array[:, :, None] if array.ndim == 2 else array
