"""Files that appear complete or not at all, and what of their errors is the file system's fault."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distkd.errors import DiskError

__all__ = [
    "DISK_FAULTS", "add_event", "atomic_folder", "digest", "raise_disk_fault", "read_json", "sync", "write_bytes",
    "write_json", "write_text",
]  # fmt: skip

log = logging.getLogger(__name__)

DISK_FAULTS = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EUCLEAN),
        # of file systems behind a network: its server, or the connection of this node
        *(errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN),
    )
)
"""Numbers of errors that a file system runs into; with a wrong path or a missing right it is well."""


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a file by way of a neighbour that is flushed to disk first."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by way of a neighbour that is flushed to disk first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def add_event(path: Path, event: str, **values: Any) -> None:
    """One JSON line more, with the time; a disk that does not take it is no reason to stop."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{line}\n")
    except OSError as error:
        log.warning("%s cannot be written: %s; lost: %s", path, error.strerror, event)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; renamed to `target` when the block ends well, removed when it does not."""
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                sync(path)
        sync(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raise_disk_fault(what: str, error: OSError) -> None:
    """Raise `DiskError` where `what` could not be read for a fault of the file system; return where it is another."""
    if error.errno in DISK_FAULTS:
        fault = DiskError(
            f"cannot read {what} on {platform.node()}: {error.strerror}; that is a fault of the file system or of the "
            "way to it: start again when that is over"
        )
        fault.local = True  # other nodes may read it
        raise fault from error
