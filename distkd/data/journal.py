"""What a build has finished, line by line, so that a killed one goes on behind it.

A line is written when the files that it names are complete; what lies behind the last line is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from distkd.data.manifest import Shard, Space
from distkd.errors import DataError

__all__ = ["Block", "Journal", "Row"]

_NAME = "journal.jsonl"


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Line):
    """One sample, as the manifest will have it."""

    key: str
    patient: str
    group: str | None
    label: int
    shard: int
    offset: int
    bytes: dict[str, tuple[int, int] | None]
    crc32c: dict[str, int | None]
    file: dict[str, int | None]
    space: Space | None


class Block(_Line):
    """Samples whose files are complete, these files, and what was left out before the next block."""

    rows: list[Row]
    shards: list[Shard]
    skipped: list[tuple[str, str]]
    """(key, reason)."""
    order: list[str]
    """Keys of the rows and of what was skipped, in the order in which they came."""


class _Head(_Line):
    fingerprint: str


class Journal:
    """The journal of a build that is made aside, in a folder of its own; one process at a time.

    Raises:
        DataError: another process builds there.
    """

    def __init__(self, aside: Path, fingerprint: str):
        self.folder = aside
        self._fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()
        self.blocks = self._open()
        """What an earlier build of the same input finished."""

    def _open(self) -> list[Block]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (self.folder / _NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise DataError(
                f"another process is building {str(self.folder)!r}; wait for it, or choose another --out"
            ) from None
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        blocks, length = self._complete(lines)
        if not length:
            for path in self.folder.iterdir():
                if path.name != _NAME:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        # a half line of a killed process would make the next one unreadable
        self._file.truncate(length)
        if not length:
            self._write(_Head(fingerprint=self._fingerprint).model_dump(mode="json"))
        return blocks

    def _complete(self, lines: list[str]) -> tuple[list[Block], int]:
        """Readable blocks from the start, and the bytes they take; nothing of a build of another input."""
        blocks: list[Block] = []
        length = 0
        for number, line in enumerate(lines):
            try:
                if number == 0:
                    if _Head.model_validate_json(line).fingerprint != self._fingerprint:
                        break
                elif not line.endswith("\n"):
                    break
                else:
                    blocks.append(Block.model_validate_json(line))
            except ValidationError:
                break
            length += len(line.encode())
        return blocks, length

    def add(self, block: Block) -> None:
        """Record a block; its files must be complete."""
        self._write(block.model_dump(mode="json"))

    def _write(self, value: Any) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The file alone; what was built stays."""
        self.close()
        (self.folder / _NAME).unlink()
