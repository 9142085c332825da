"""A shard set copied to a disk of this machine, once for all processes, and read from there under its own name.

No collective and no rank: whoever comes first copies under a file lock, the others wait for the lock and find the copy.
What goes wrong on this machine's disk is a warning, and the set is read where it lies; a damaged set is an error.

Others may write to the same disk and know the names beforehand: only a folder and a lock of this user are used, and a
folder that others could write to is made anew.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import pwd
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from distkd.data.disk import sync_names
from distkd.data.manifest import MANIFEST, Shard
from distkd.data.manifest_file import read_manifest
from distkd.data.shardset import REMEDY, Check, ShardSet, size_fault
from distkd.errors import ConfigError, DataError, DiskError
from distkd.files import digest, raise_disk_fault, read_json, write_bytes, write_json

__all__ = ["CopiedSet", "copy_set", "local_copy", "open_copied"]

_MARKER = ".complete.json"
"""Written last: the digest of the manifest, and the size of each file."""
_THREADS = 8
"""Files at a time: a shared file system gives one reader a part of what it can do."""
_BLOCK_BYTES = 8 << 20
_UNIT_BYTES = 4096
"""What a disk gives to a file at a time."""
_RESERVE_BYTES = 1 << 30
"""Left free: other programs need the disk, too."""
_SAY_EVERY_S = 10.0


def open_copied(folder: Path, scratch: str, *, check: Check = "first", speaks: bool = True) -> ShardSet:
    """The shard set in `folder`, read from its copy in `scratch`, which is made first; see `local_copy`."""
    place = local_copy(folder, scratch, speaks=speaks)
    return ShardSet(folder, check=check) if place == folder else CopiedSet(folder, place, check=check)


class CopiedSet(ShardSet):
    """A shard set that is read from a copy, and goes by the name of the original in all that is recorded of a run.

    Messages about damage name the copy: it may be the one that is damaged.
    """

    def __init__(self, original: Path, copy: Path, *, check: Check = "first"):
        self.original = original
        super().__init__(copy, check=check)

    @property
    def place(self) -> str:
        return str(self.original)

    def where(self, sample: int, name: str) -> str:
        return f"{super().where(sample, name)} of {str(self.folder)!r}, a copy of {self.place!r} that may be removed"

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "original": self.original}


def local_copy(folder: Path, scratch: str, *, speaks: bool = True) -> Path:
    """Where to read the shard set: a complete copy below `scratch`, or `folder` itself where no copy can be made.

    Args:
        scratch: a folder on a disk of this machine; `$NAME` and `${NAME}` of the environment are filled in.
        speaks: whether this process says that it waits, or why there is no copy; one of a machine is enough.

    Raises:
        ConfigError: a name in `scratch` is not set, or the folder is not absolute.
        DataError: no shard set in `folder`, or a file of it is damaged.
    """
    target = _filled(scratch, os.environ)
    try:
        return copy_set(folder, target, speaks=speaks)
    except DiskError as error:
        if speaks:
            _say(f"warning: {error}; reads it from {str(folder)!r} instead")
        return folder


def copy_set(folder: Path, scratch: Path, *, threads: int = _THREADS, speaks: bool = True) -> Path:
    """Copy a shard set to `<scratch>/<name>-<digest of the manifest>`, unless it is there; returns that folder.

    One process of the machine copies at a time, and the others wait. Each file is compared with its SHA-256 on the way
    and appears whole; what a killed copy had finished is hashed and kept.

    Raises:
        DataError: no shard set in `folder`, or a file of it is damaged.
        DiskError: no room; the folder cannot be made, locked or written, or is another user's; the set cannot be read.
    """
    manifest_sha256 = _manifest_digest(folder)
    source = Path(os.path.realpath(folder))
    if source.is_relative_to(os.path.realpath(scratch)):
        return folder  # it lies on that disk
    place = scratch / f"{source.name}-{manifest_sha256[:12]}"
    try:
        if _is_private(place) and _is_complete(place, manifest_sha256):
            return place
        scratch.mkdir(parents=True, exist_ok=True)
        with _locked(scratch / f".{place.name}.lock", folder, speaks):
            _make_private(place)
            if not _is_complete(place, manifest_sha256):  # another process may have copied it meanwhile
                _Copy(folder, place, manifest_sha256).run(threads)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DiskError(
            f"cannot copy shard set {str(folder)!r} to {str(place)!r}: {error.strerror or error}; "
            f"{'free some space, or ' if full else ''}name another folder on a disk of this machine"
        ) from error
    return place


def _filled(scratch: str, environ: Mapping[str, str]) -> Path:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not environ.get(name):  # an empty one would lead to the root of the machine
            raise ConfigError(
                f"data.scratch={scratch}: {name} is not set in the environment of {platform.node()}; set it, or read "
                "the shard set where it lies with --data.scratch null"
            )
        return environ[name]

    filled = Path(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, scratch))
    if not filled.is_absolute():
        raise ConfigError(
            f"data.scratch={scratch} is {str(filled)!r} on {platform.node()}, which is no whole path; name a folder on "
            "each machine's own disk by its whole path"
        )
    return filled


def _manifest_digest(folder: Path) -> str:
    try:
        return digest(folder / MANIFEST)
    except OSError:
        read_manifest(folder)  # says what is wrong
        raise


def _is_private(place: Path) -> bool:
    """Whether the folder is there and closed to all others.

    Raises:
        DiskError: it is somebody else's, or no folder.
    """
    try:
        about = place.lstat()
    except FileNotFoundError:
        return False
    _check_ours(place, about)
    if not stat.S_ISDIR(about.st_mode):
        raise DiskError(f"{str(place)!r} is a link or a file, not the folder of a copy; remove it")
    return not about.st_mode & 0o077


def _make_private(place: Path) -> None:
    """An empty folder that is closed to all others, or the one that is there; the caller holds the lock."""
    if not _is_private(place) and place.exists():
        could_be_written = place.stat().st_mode & 0o022
        place.chmod(0o700)
        if could_be_written:  # whatever is in it may be another's
            shutil.rmtree(place)
    place.mkdir(mode=0o700, exist_ok=True)  # patients' data, perhaps below a folder that all can read
    if not _is_private(place):
        raise DiskError(f"{str(place)!r} cannot be closed to others; name a folder on another disk of this machine")


def _check_ours(path: Path, about: os.stat_result) -> None:
    if about.st_uid == os.geteuid():
        return
    try:
        owner = pwd.getpwuid(about.st_uid).pw_name
    except KeyError:
        owner = str(about.st_uid)
    raise DiskError(
        f"{str(path)!r} belongs to user {owner}, who could read and change what is copied there; name another folder, "
        "for example one with $USER in its name"
    )


def _is_complete(place: Path, manifest_sha256: str) -> bool:
    """Whether all files are there in their sizes; their content was compared before the marker was written."""
    try:
        marker = cast(dict[str, Any], read_json(place / _MARKER))
        files = cast(dict[str, int], marker["files"])
        same = marker["manifest_sha256"] == manifest_sha256 == digest(place / MANIFEST)
        return same and not any(size_fault(place, file, size) for file, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _locked(path: Path, folder: Path, speaks: bool) -> Generator[None]:
    """Hold a lock that ends with the process, however that ends."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except PermissionError:
        with suppress(FileNotFoundError):
            _check_ours(path, path.lstat())
        raise
    try:
        _check_ours(path, os.fstat(lock))  # who holds another's lock could keep us waiting for ever
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if speaks:
                _say(f"waits for another process, which copies shard set {str(folder)!r}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class _Copy:
    """The work of the process that holds the lock."""

    def __init__(self, folder: Path, place: Path, manifest_sha256: str):
        self._folder, self._place, self._manifest_sha256 = folder, place, manifest_sha256
        self._shards = read_manifest(folder).shards
        self._stop = threading.Event()

    def run(self, threads: int) -> None:
        (self._place / _MARKER).unlink(missing_ok=True)
        self._check_room()
        total_bytes = sum(shard.bytes for shard in self._shards)
        self._meter = _Meter(f"shard set {str(self._folder)!r} to {str(self._place)!r}", total_bytes)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="distkd-copy")
        try:
            for _ in pool.map(self._file, self._shards):
                pass
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        self._finish()
        self._meter.end()

    def _check_room(self) -> None:
        """An error before the first byte rather than a full disk after hours."""
        missing = [shard for shard in self._shards if size_fault(self._place, shard.file, shard.bytes)]
        needed = sum(-(-shard.bytes // _UNIT_BYTES) * _UNIT_BYTES for shard in missing) + _RESERVE_BYTES
        free = shutil.disk_usage(self._place).free
        if missing and free < needed:
            raise DiskError(
                f"no room for shard set {str(self._folder)!r} in {str(self._place.parent)!r}: {_gib(needed)} GiB are "
                f"needed, {_gib(free)} are free; free some space, or name another folder"
            )

    def _file(self, shard: Shard) -> None:
        target = self._place / shard.file
        if self._stop.is_set():
            return
        if not size_fault(self._place, shard.file, shard.bytes) and digest(target) == shard.sha256:
            self._meter.add(shard.bytes, kept=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            if self._fill(part, shard):
                part.replace(target)
        except BaseException:
            self._stop.set()
            raise
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _fill(self, part: Path, shard: Shard) -> bool:
        """Copy and compare one file; false where the others have stopped."""
        hashed = hashlib.sha256()
        with part.open("wb") as out:
            for block in _blocks(self._folder / shard.file, shard.bytes):
                if self._stop.is_set():
                    return False
                out.write(block)
                hashed.update(block)
                self._meter.add(len(block))
            out.flush()
            os.fsync(out.fileno())  # the marker must not outlive the files when the power fails
        if hashed.hexdigest() != shard.sha256:
            fault = size_fault(self._folder, shard.file, shard.bytes) or (
                f"shard {shard.file!r} of {str(self._folder)!r} has SHA-256 {hashed.hexdigest()[:12]}..., manifest "
                f"says {shard.sha256[:12]}..."
            )
            raise DataError(f"{fault}; {REMEDY}")
        return True

    def _finish(self) -> None:
        manifest = (self._folder / MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != self._manifest_sha256:
            raise DataError(f"shard set {str(self._folder)!r} was changed while it was copied; start again")
        write_bytes(self._place / MANIFEST, manifest)
        for below in {(self._place / shard.file).parent for shard in self._shards}:
            sync_names(below)
        about = {"manifest_sha256": self._manifest_sha256, "copied_from": os.path.realpath(self._folder)}
        write_json(self._place / _MARKER, {**about, "files": {shard.file: shard.bytes for shard in self._shards}})


def _blocks(path: Path, n_bytes: int) -> Iterator[memoryview]:
    """A file of the original in parts, each valid until the next; what cannot be read of it is an error of the set."""
    block = memoryview(bytearray(min(_BLOCK_BYTES, n_bytes + 1)))
    try:
        with path.open("rb", buffering=0) as source:
            while n_read := source.readinto(block):
                yield block[:n_read]
    except OSError as error:
        raise_disk_fault(repr(str(path)), error)
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}; {REMEDY}") from error


class _Meter:
    """Says how far a copy is, a line every ten seconds; used by several threads."""

    def __init__(self, what: str, total_bytes: int):
        self._what, self._total_bytes = what, total_bytes
        self._lock = threading.Lock()
        self._start_s = self._said_s = time.monotonic()
        self._copied = self._kept = 0

    def add(self, n_bytes: int, *, kept: bool = False) -> None:
        """`kept` bytes were there from an earlier copy."""
        with self._lock:
            if kept:
                self._kept += n_bytes
            else:
                self._copied += n_bytes
            now_s = time.monotonic()
            if now_s - self._said_s < _SAY_EVERY_S:
                return
            self._said_s = now_s
            done = self._copied + self._kept
        _say(f"copies {self._what}: {_gib(done)} of {_gib(self._total_bytes)} GiB, {self._rate(now_s)}")

    def end(self) -> None:
        now_s = time.monotonic()
        kept = f", {_gib(self._kept)} GiB were there" if self._kept else ""
        seconds = f"{now_s - self._start_s:.0f} s"
        _say(f"copied {self._what}: {_gib(self._copied)} GiB in {seconds}, {self._rate(now_s)}{kept}")

    def _rate(self, now_s: float) -> str:
        return f"{_gib(self._copied / max(now_s - self._start_s, 1e-3))} GiB/s"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / (1 << 30):.2f}"


def _say(text: str) -> None:
    """On every machine, where a rank's log lines are the main rank's only."""
    print(f"distkd: {platform.node()}: {text}", file=sys.stderr, flush=True)
