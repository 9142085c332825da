"""A log that grows, read on from where it was read before: never a whole one, however long the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distkd.metrics.jsonl import objects

__all__ = ["Follower"]

_MARK = 64
"""Bytes before the place read up to; another file in its place, or one that was cut back, differs there."""


class Follower:
    """The newest objects of a JSONL file.

    Args:
        path: need not exist yet.
        size: bytes that are read from the end at first, and where the file is another one than before.
        keep: lines that are kept at most.
    """

    def __init__(self, path: Path, *, size: int = 2**20, keep: int = 2000):
        self.path, self.size, self.keep = path, size, keep
        self.lines: list[dict[str, Any]] = []
        self._end = 0
        self._mark = b""

    def read(self) -> list[dict[str, Any]]:
        """The kept lines with those that have come since the last call; a line that is being written waits.

        Raises:
            OSError: the file system has a fault. A file that is not there is none: it has no lines.
        """
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(self._end - len(self._mark))
                if size - self._end > self.size or file.read(len(self._mark)) != self._mark:
                    self._start_over(max(0, size - self.size))
                    file.seek(self._end)
                content = file.read(size - self._end)
        except (FileNotFoundError, NotADirectoryError):
            self._start_over(0)
            return self.lines
        self._take(content)
        return self.lines

    def _start_over(self, end: int) -> None:
        self.lines, self._end, self._mark = [], end, b""

    def _take(self, content: bytes) -> None:
        whole = content[: content.rfind(b"\n") + 1]
        is_cut = bool(self._end) and not self._mark  # begins in the middle of a line, which is no object then
        self.lines += objects(whole.split(b"\n")[1 if is_cut else 0 :])
        del self.lines[: -self.keep]
        self._end += len(whole)
        self._mark = (self._mark + whole)[-_MARK:]
