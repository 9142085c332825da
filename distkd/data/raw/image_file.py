"""Image files of raw data, stored as they are where that can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from distkd.data.codec import IMAGE_FAULTS, Encoded
from distkd.data.manifest import Modality
from distkd.errors import DataError

__all__ = ["read_square"]

_FORMATS = {"png": "PNG", "jpg": "JPEG"}


def read_square(path: Path, modality: Modality) -> np.ndarray | Encoded:
    """The file itself if it is of the modality's codec and in colour, its pixels otherwise.

    Raises:
        DataError: it is no image, or not of the modality's size.
    """
    side = modality.shape[0]
    try:
        with Image.open(path) as image:
            if image.size != (side, side):
                raise DataError(
                    f"{str(path)!r} is {image.width} x {image.height} px, expected {side} x {side}; leave this image "
                    "out, or name with --size the side that all images have"
                )
            if image.mode == "RGB" and image.format == _FORMATS[modality.codec]:
                return Encoded(path.read_bytes())
            return np.asarray(image.convert("RGB"))
    except IMAGE_FAULTS as error:
        raise DataError(f"cannot read the image {str(path)!r}: {error}; copy it again") from error
