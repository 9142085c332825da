"""A folder of fetched files that the processes of a node share: each is fetched once, and the total has a limit.

Two kinds of lock, both flock, which a dead process gives back by itself. Who fetches or evicts a file holds its lock
file; who uses it holds a shared lock on the file itself, so that nobody evicts it. All lies in a folder of its own
below the given one, and nothing outside is touched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from distkd.errors import DataError

__all__ = ["FOLDER_KEY", "LIMIT_KEY", "CacheFullError", "Cancelled", "Item", "NodeCache", "Wait"]

FOLDER_KEY = "data.stream.cache"
LIMIT_KEY = "data.stream.cache_gib"
"""The config keys that messages name."""

_ROOT = "distkd-shards"
_PART = ".part"
_POLL_S = 0.05
_ROOM_POLL_S = 0.05
"""Between two looks whether somebody has released a file."""

Fill = Callable[[int], None]
"""Writes the whole content to a descriptor; raises where it is not what it must be."""


class CacheFullError(DataError):
    """All that is in the cache is in use, and one file more exceeds the limit."""


class Cancelled(Exception):
    """Who waited was told to stop."""


@dataclass(frozen=True, slots=True)
class Item:
    """A file that the cache is to hold."""

    folder: str
    """One name: files of one set lie together."""
    file: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.file}"


@dataclass(frozen=True, slots=True)
class Wait:
    """How somebody waits for others."""

    stop: threading.Event
    """Ends it with `Cancelled`."""
    room_s: float = 0.0
    """For how long to wait for room that others hold."""
    spare: Callable[[], bool] = lambda: False
    """Gives back a file that this process could do without for now; false where there is none."""


@dataclass(slots=True)
class _Held:
    descriptor: int
    """Carries the shared lock."""
    uses: int


class NodeCache:
    """Files by name, fetched when they are not there.

    Args:
        folder: on a disk of this node; made if it is not there.
        limit_bytes: of all files together, those of other sets and runs included.

    Raises:
        DataError: the folder cannot be made or written to, or somebody else could change what is in it.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.root, self.limit_bytes = folder / _ROOT, limit_bytes
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._locks: set[int] = set()
        with self._in_words("the folder"):
            folder.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)  # patients' data, perhaps below a folder that all can read
            self._check_ours()
        _caches.add(self)

    def take(self, item: Item, fill: Fill, wait: Wait) -> Path:
        """The path of a file, which stays until `drop`; blocks while this or another process fetches it.

        Args:
            fill: fetches the file; called by one process of the node at a time.

        Raises:
            CacheFullError: the files in use leave no room.
            Cancelled: `wait.stop` was set.
            DataError: the file is larger than the limit, the disk is full, or what `fill` raised.
        """
        path = self.root / item.name
        with self._lock:
            if item.name in self._held:
                self._held[item.name].uses += 1
                return path
        with self._in_words(f"{item.file!r} ({item.size} bytes)"), self._exclusive(path, wait.stop) as lock:
            descriptor = self._open_sound(path, item, lock)
            if descriptor is None:
                self._fetch(path, item.size, fill, wait)
                os.pwrite(lock, _boot(), 0)
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._hold(item.name, descriptor)
        return path

    def drop(self, name: str) -> None:
        """One use less; a file without uses may be evicted."""
        with self._lock:
            held = self._held.get(name)
            if held is None:  # all were released since, by `close` or a fork
                return
            held.uses -= 1
            if held.uses == 0:
                del self._held[name]
                _touch(held.descriptor)
                _unlock(held.descriptor)

    def mend(self, item: Item, fill: Fill, wait: Wait) -> bool:
        """Fetch a file again if its bytes are damaged; whether they were."""
        path = self.root / item.name
        with self._in_words(f"{item.file!r} ({item.size} bytes)"), self._exclusive(path, wait.stop) as lock:
            os.pwrite(lock, b"-" * len(_boot()), 0)
            descriptor = self._open_sound(path, item, lock)
            if descriptor is not None:
                os.close(descriptor)
                return False
            self._fetch(path, item.size, fill, wait)
            os.pwrite(lock, _boot(), 0)
            with self._lock:
                if (held := self._held.get(item.name)) is not None:
                    old, held.descriptor = held.descriptor, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    fcntl.flock(held.descriptor, fcntl.LOCK_SH)
                    _unlock(old)
        return True

    def refreshed(self, folder: str, file: str, max_age_s: float, fill: Fill, wait: Wait) -> bytes:
        """Content of a file that nobody knows beforehand, fetched unless a process of this node just did."""
        path = self.root / folder / file
        with self._in_words(repr(file)), self._exclusive(path, wait.stop):
            if not path.exists() or time.time() - path.stat().st_mtime > max_age_s:
                self._fetch(path, 0, fill, wait)
            return path.read_bytes()

    def remove(self, folder: str, file: str) -> None:
        """Forget a file that turned out to be of no use."""
        path = self.root / folder / file
        with self._in_words(repr(file)), self._exclusive(path, threading.Event()):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release all files."""
        with self._lock:
            for held in self._held.values():
                _unlock(held.descriptor)
            self._held.clear()

    def forget(self) -> None:
        """After a fork: the parent's locks are not ours, and must not outlive the parent by our copies of them."""
        for descriptor in [held.descriptor for held in self._held.values()] + list(self._locks):
            with suppress(OSError):
                os.close(descriptor)
        self._lock, self._held, self._locks = threading.Lock(), {}, set()

    def __del__(self) -> None:
        if hasattr(self, "_held"):
            self.close()

    def _check_ours(self) -> None:
        """In a folder such as /tmp anybody can have made one of this name, and would own what is read from it."""
        state = self.root.lstat()
        rights = stat.S_IMODE(state.st_mode)
        if not stat.S_ISDIR(state.st_mode):
            fault = "it is a link or a file, expected a folder"
        elif state.st_uid != os.getuid():
            fault = f"it belongs to user {state.st_uid}, expected {os.getuid()}, who runs this"
        elif rights & (stat.S_IWGRP | stat.S_IWOTH):
            fault = f"its rights are {rights:o}, so others can write to it, expected 700"
        else:
            return
        raise DataError(
            f"the cache folder {str(self.root)!r} cannot be trusted: {fault}; remove it, or choose a folder of "
            f"your own with {FOLDER_KEY}"
        )

    def _hold(self, name: str, descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _touch(descriptor)
        with self._lock:
            if name in self._held:  # another thread was waiting for the same file
                self._held[name].uses += 1
                _unlock(descriptor)
            else:
                self._held[name] = _Held(descriptor, 1)

    def _open_sound(self, path: Path, item: Item, lock: int) -> int | None:
        """A descriptor of the file if it is what it must be; otherwise it is removed."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        # nothing is flushed when a file is fetched: after a crash of the node it may have its size and other bytes
        if os.fstat(descriptor).st_size == item.size:
            if os.pread(lock, len(_boot()), 0) == _boot():
                return descriptor
            if _sha256(descriptor) == item.sha256:
                os.pwrite(lock, _boot(), 0)
                return descriptor
        os.close(descriptor)
        path.unlink()
        return None

    def _fetch(self, path: Path, size: int, fill: Fill, wait: Wait) -> None:
        part = path.with_name(f".{path.name}{_PART}")
        part.unlink(missing_ok=True)  # of a process that was killed
        descriptor = self._reserve(part, size, wait)
        try:
            fill(descriptor)
            with self._exclusive(self.root / "cache", wait.stop):  # who counts the files must not miss it
                part.rename(path)
        finally:
            os.close(descriptor)
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int, wait: Wait) -> int:
        """A new file with its disk space; what is not in use makes room, the least recently used first."""
        if size > self.limit_bytes:
            raise DataError(
                f"{_whole(part).name!r} has {size} bytes, more than the {self.limit_bytes} of {LIMIT_KEY}; raise it to "
                "several times that, or make smaller shards"
            )
        deadline = time.monotonic() + wait.room_s
        while True:
            with self._exclusive(self.root / "cache", wait.stop):
                in_use = self._make_room(size)
                if in_use + size <= self.limit_bytes:
                    return self._allocate(part, size)
            if wait.spare():
                continue
            if time.monotonic() >= deadline:
                raise CacheFullError(
                    f"no room for {_whole(part).name!r} in the cache {str(self.root)!r}: it needs {size} bytes, "
                    f"{in_use} of the {self.limit_bytes} of {LIMIT_KEY} are in use by the processes of this node; "
                    f"raise it to {(in_use + size) / (1 << 30):.3g} or more"
                )
            if wait.stop.wait(_ROOM_POLL_S):
                raise Cancelled

    def _allocate(self, part: Path, size: int) -> int:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            while size:
                try:
                    os.posix_fallocate(descriptor, 0, size)
                    break
                except OSError as error:
                    # the disk is shared with others, so it may be full below our limit
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._evict_next():
                        raise
        except OSError as error:
            os.close(descriptor)
            part.unlink()
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            os.ftruncate(descriptor, size)  # no space, but the bytes are counted
        return descriptor

    def _make_room(self, size: int) -> int:
        """Bytes that are left after the eviction of as much as is needed."""
        found = sorted(self._files())
        total = sum(n_bytes for _, n_bytes, _ in found)
        for _, n_bytes, path in found:
            if total + size <= self.limit_bytes:
                break
            if self._evict(path):
                total -= n_bytes
        return total

    def _evict_next(self) -> bool:
        return any(self._evict(path) for _, _, path in sorted(self._files()))

    def _files(self) -> list[tuple[int, int, Path]]:
        """(last use, bytes, path) of all that counts; a file that is just being fetched counts in full."""
        found: list[tuple[int, int, Path]] = []
        for folder in self.root.iterdir():
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        if not entry.name.endswith(".lock") and entry.is_file(follow_symlinks=False):
                            state = entry.stat(follow_symlinks=False)
                            found.append((state.st_mtime_ns, state.st_size, Path(entry.path)))
        return found

    def _evict(self, path: Path) -> bool:
        """Remove a file that nobody fetches or uses."""
        try:
            with self._exclusive(_whole(path), None):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    _unlock(descriptor)
        except (BlockingIOError, FileNotFoundError):
            return False
        return True

    @contextmanager
    def _exclusive(self, path: Path, stop: threading.Event | None) -> Generator[int, None, None]:
        """Hold a file's lock; without `stop` a `BlockingIOError` where somebody else has it."""
        place, flags = f"{path.parent}/.{path.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            lock = os.open(place, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(place, flags, 0o600)
        self._locks.add(lock)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if stop is None:
                        raise
                    if stop.wait(_POLL_S):
                        raise Cancelled from None
            yield lock
        finally:
            self._locks.discard(lock)
            _unlock(lock)

    @contextmanager
    def _in_words(self, what: str) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            where, words = f"the cache folder {str(self.root)!r}", error.strerror or str(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.root.parent).free
                raise DataError(
                    f"the disk of {where} is full: no space for {what}, {free} bytes free; free some, lower "
                    f"{LIMIT_KEY} ({self.limit_bytes} bytes), or choose another folder with {FOLDER_KEY}"
                ) from error
            raise DataError(
                f"cannot use {where} for {what}: {words}; choose a folder of this node that can be written to and "
                f"locked with {FOLDER_KEY}"
            ) from error


_caches: weakref.WeakSet[NodeCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_caches):
        cache.forget()


os.register_at_fork(after_in_child=_after_fork)


def _whole(path: Path) -> Path:
    """The file that a partial one is to become."""
    return path.with_name(path.name.removeprefix(".").removesuffix(_PART)) if path.name.endswith(_PART) else path


def _touch(descriptor: int) -> None:
    """Used now; the file system's own clock is too coarse to tell who came first."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))


def _unlock(descriptor: int) -> None:
    """Give a lock back and close; a forked process may hold a copy of the descriptor, so closing is not enough."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _sha256(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def _boot() -> bytes:
    """Which start of the machine this is; equal everywhere where that cannot be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b"unknown"
