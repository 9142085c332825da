"""What a build has finished, line by line, so that a killed one goes on behind it.

A line is written when the files that it names are complete; what lies behind the last line is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from distkd.data.disk import UnwrittenError, sync_names, told
from distkd.data.manifest import Shard, Space
from distkd.data.shardset import size_fault
from distkd.errors import DataError

__all__ = ["Block", "BusyError", "Journal", "Row", "aside_of", "real_folder", "wait_for_builder"]

_NAME = "journal.jsonl"
_TRIES = 10
"""To lock the folder, while others move or remove it."""
_PAUSE_S = 0.2


class BusyError(DataError):
    """Another process builds the same set."""


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

    The folder is locked by the journal's file until `close`; `publish` and `remove` come before that, so that nobody
    else builds in a folder that is about to be moved or removed.

    Raises:
        DataError: another process builds there, the set is there already, or its folder cannot be locked or written.
    """

    def __init__(self, out: Path, fingerprint: str):
        self._out = out = real_folder(out)
        self.folder = aside_of(out)
        self._fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()
        _check_free(out)
        self._file = _lock(self.folder)
        try:
            _check_free(out)  # again: another process may have published while we came to the lock
            self.blocks = self._open()
            """What an earlier build of the same input finished."""
        except BaseException:
            if not os.fstat(self._file.fileno()).st_size:
                self.remove()
            self.close()
            raise

    def _open(self) -> list[Block]:
        blocks, self._length = self._complete(self._file.readall().splitlines(keepends=True))
        recorded = {shard.file.partition("/")[0] for block in blocks for shard in block.shards}
        _empty(self.folder, {_NAME, *recorded})
        # a half line of a killed process would make the next one unreadable
        with told(_NAME, self.folder):
            self._file.truncate(self._length)
        if not self._length:
            self._write(_Head(fingerprint=self._fingerprint).model_dump(mode="json"))
        return blocks

    def _complete(self, lines: list[bytes]) -> tuple[list[Block], int]:
        """Readable blocks from the start whose files are there, and the bytes they take; none of another input."""
        blocks: list[Block] = []
        length = 0
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            try:
                if number == 0:
                    if _Head.model_validate_json(line).fingerprint != self._fingerprint:
                        break
                else:
                    block = Block.model_validate_json(line)
                    # a disk that lost power may have the line and not the file
                    if any(size_fault(self.folder, shard.file, shard.bytes) for shard in block.shards):
                        break
                    blocks.append(block)
            except ValidationError:
                break
            length += len(line)
        return blocks, length

    def add(self, block: Block) -> None:
        """Record a block; its files must be complete.

        Raises:
            UnwrittenError: the disk is full, or does not take it otherwise; the blocks before it stay.
        """
        self._write(block.model_dump(mode="json"))

    def _write(self, value: Any) -> None:
        data = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        rest = memoryview(data)
        with told(_NAME, self.folder):
            try:
                while rest:  # an unbuffered file may take a part; a buffered one would try again when it is closed
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._length)
                raise
        self._length += len(data)

    def publish(self) -> None:
        """Give the folder its name, without the journal, and the lock back; after an error the journal is still there.

        Raises:
            UnwrittenError: it cannot be moved.
        """
        try:
            sync_names(self.folder)
            self.folder.rename(self._out)
        except OSError as error:
            raise UnwrittenError(
                f"cannot move the finished shards from {str(self.folder)!r} to {str(self._out)!r}: "
                f"{error.strerror or error}",
                "mend that",
            ) from error
        with suppress(OSError):  # the set is there; a journal beside it harms nobody
            (self._out / _NAME).unlink()
            sync_names(self._out)
            sync_names(self._out.parent)
        self.close()

    def remove(self) -> None:
        """All of the folder; the journal last, so that who waits for its lock finds an empty folder or none."""
        with suppress(OSError):
            _empty(self.folder, {_NAME})
            (self.folder / _NAME).unlink()
            self.folder.rmdir()

    def close(self) -> None:
        self._file.close()


def real_folder(out: Path) -> Path:
    """Where a set named `out` goes: `.` has no name, and no folder can be renamed to a link."""
    return Path(os.path.realpath(out))


def aside_of(out: Path) -> Path:
    """The folder in which the set is built."""
    out = real_folder(out)
    return out.parent / f".{out.name}.partial"


def _check_free(out: Path) -> None:
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"output {str(out)!r} exists already; remove it or name another folder with --out")


def _lock(folder: Path) -> FileIO:
    """The journal's file, open and locked, in its folder."""
    path = folder / _NAME
    for _ in range(_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = FileIO(path, "a+")
        except FileNotFoundError:
            continue  # its builder has just moved or removed the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.seek(0)
                return file
        except BlockingIOError:
            file.close()
            break
        except FileNotFoundError:
            pass
        except OSError as error:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()
            file.close()
            raise DataError(
                f"cannot lock {str(path)!r}: {error.strerror or error}; without a lock two builds of one folder would "
                "spoil each other: mount the file system with locks (Lustre: -o flock), or choose another --out"
            ) from error
        file.close()  # we have locked a file that is no longer in the folder
    raise BusyError(f"another process is building {str(folder)!r}; wait for it, or choose another --out")


def wait_for_builder(out: Path) -> None:
    """Return when the process that builds `out` has ended, well or not; its lock goes with it."""
    try:
        with FileIO(aside_of(out) / _NAME, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # it has just ended; on some file systems a lock of a file that is removed meanwhile is an error
        time.sleep(_PAUSE_S)


def _empty(folder: Path, but: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in but:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
