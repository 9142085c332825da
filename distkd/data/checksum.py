"""CRC-32C of values in memory: google_crc32c with the types that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from google_crc32c import extend, value  # pyright: ignore[reportUnknownVariableType]

__all__ = ["crc32c", "crc32c_on"]

_Contiguous = bytes | bytearray | memoryview | np.ndarray

# bound, not wrapped: every row of a batch is checked
crc32c = cast(Callable[[_Contiguous], int], value)
"""Of contiguous memory; other threads run meanwhile."""
crc32c_on = cast(Callable[[int, _Contiguous], int], extend)
"""Of memory that follows other memory, whose CRC-32C is the first argument."""
