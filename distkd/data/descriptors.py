"""Open files that are kept for the next read, and the cache that lets go of what was used longest ago."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Generic, TypeVar

__all__ = ["OpenFile", "Recent"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class OpenFile:
    """A descriptor for reading; closed when nobody holds it any more, so that a cache may push it out at any time.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | Path):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Recent(Generic[K, V]):
    """The values used last; the caller holds a lock."""

    def __init__(self, limit: int):
        self._limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._limit:
            self._values.popitem(last=False)

    def clear(self) -> None:
        self._values.clear()
