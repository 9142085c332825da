"""What goes wrong on the disk while a shard set is built, in words; names in folders, flushed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from distkd.errors import DataError
from distkd.files import sync

__all__ = ["UnwrittenError", "sync_names", "told"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


class UnwrittenError(DataError):
    """A build could not write. Who builds sets `kept` where the next build goes on behind what is finished."""

    def __init__(self, fault: str, remedy: str):
        super().__init__(fault, remedy)
        self.kept = False

    def __str__(self) -> str:
        fault, remedy = self.args
        behind = ", which goes on behind what is finished" if self.kept else ""
        return f"{fault}; {remedy} and start the same command again{behind}, or choose another --out"


@contextmanager
def told(file: str, folder: Path) -> Generator[None]:
    """Errors of the file system, while `file` in `folder` is written, as what they mean to who builds."""
    try:
        yield
    except OSError as error:
        free = ""
        with suppress(OSError):
            free = f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB are free)"
        raise UnwrittenError(
            f"cannot write {file!r} in {str(folder)!r}{free}: {error.strerror or error}",
            "free some space" if error.errno in _FULL else "mend that",
        ) from error


def sync_names(folder: Path) -> None:
    """Flush the names in a folder to disk, where the file system can do that and we may read the folder."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
