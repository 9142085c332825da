"""Whether one sample's values are what the description of the set promises."""

from __future__ import annotations

import re

import numpy as np

from distkd.data.manifest import Modality, Space
from distkd.errors import DataError

__all__ = ["check_key", "check_member", "checked", "n_bytes"]

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_LONGEST = 100
"""Characters of a name in a USTAR header."""


def check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise DataError(f"sample key {key!r} is not usable; expected 1 to 80 letters, digits, '-' or '_'")


def check_member(key: str, name: str, modality: Modality) -> None:
    """The name of the values in a tar fits into its header."""
    length = len(f"{key}.{name}.{modality.codec}")
    if length > _LONGEST:
        raise DataError(
            f"{name!r} of sample {key!r} would be '{key}.{name}.{modality.codec}' in its tar: {length} characters (key "
            f"{len(key)}, name {len(name)}), expected {_LONGEST} at most; shorten the key or the modality's name"
        )


def n_bytes(value: bytes | np.ndarray) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else len(value)


def checked(array: np.ndarray, modality: Modality, name: str, key: str, space: Space | None) -> np.ndarray:
    """The array as it is stored.

    Raises:
        DataError: its shape or type are others, or it holds what may not be stored.
    """
    shape = modality.shape
    if modality.kind == "volume":
        if space is None:
            raise DataError(f"sample {key!r} has volume {name!r} without its space; say shape, affine and spacing")
        shape = (modality.shape[0], *space.shape)
        if any(own > most for own, most in zip(shape, modality.shape, strict=True)):
            raise DataError(f"{name!r} of sample {key!r} has shape {shape}, larger than the set's {modality.shape}")
    if array.shape != shape:
        raise DataError(f"{name!r} of sample {key!r} has shape {array.shape}, expected {shape}")
    if not np.can_cast(array.dtype, modality.dtype, "same_kind"):
        raise DataError(f"{name!r} of sample {key!r} is {array.dtype}, which does not fit {modality.dtype}")
    # an overflow in the cast becomes an infinity and is refused as one
    with np.errstate(over="ignore"):
        array = array.astype(modality.dtype, copy=False)
    if array.dtype.kind == "f":
        infinite = np.flatnonzero(np.isinf(array))
        if len(infinite):
            first = int(infinite[0])
            column = modality.features[first] if modality.features else str(first)
            raise DataError(
                f"{name!r} of sample {key!r} is infinite in column {column} ({len(infinite)} such values); "
                "mend the raw file, or leave the value blank if it is missing"
            )
        if modality.kind != "vector" and np.isnan(array).any():
            raise DataError(
                f"{name!r} of sample {key!r} holds NaN, which only a vector may (missing values); mend the raw file"
            )
    return array
