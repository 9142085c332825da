"""A shard set behind a URL or a command, through a cache that the processes of a node share.

A shard is fetched once a node, checked against the manifest's SHA-256, and kept while there is room. Readers ask for
the path of a file by its number in the manifest and say when they are done: `ShardFiles`.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from distkd.data.manifest import MANIFEST, Manifest
from distkd.data.manifest_file import read_manifest
from distkd.data.remote.node_cache import Cancelled, Item, NodeCache, Wait
from distkd.data.remote.prefetch import Ahead
from distkd.data.remote.transport import TransferError, address, check_name, check_url, masked, open_stream
from distkd.errors import DataError

__all__ = ["RemoteStore", "ShardFiles"]

_MAX_MANIFEST_BYTES = 1 << 30
_FRESH_S = 600.0
"""A manifest that a process of the node fetched within this time is not asked for again: the ranks of a job agree."""

_REACH = "check the address, the rights and the network"
_COPY = "copy the shard set there again; `distkd shards verify` checks the original"


class ShardFiles(Protocol):
    """Where a reader finds the files of a shard set."""

    def path(self, number: int) -> Path:
        """The file of that number in the manifest's `shards`, to be opened; blocks until it is there."""
        ...

    def release(self, number: int) -> None:
        """What `path` gave is closed; once for each call of `path`."""
        ...


class RemoteStore:
    """The files of a remote shard set.

    May be used from threads, after a fork, and pickled; each process holds what it asked for itself.

    Args:
        url: `https://host/set`, `file:///path/set`, another scheme that webdataset opens, or `pipe:command {}`, where
            `{}` is the file's name; in a URL it may stand, too, where the name is not at the end of the path.
        cache: folder on a disk of this node.
        limit_bytes: of all that the cache holds, other sets included.
        ahead: files that `prefetch` fetches before they are asked for, at most; fewer where the cache has no room.
        backoff_s: wait before the second attempt; twice as long before each further one.
        stall_s: longest time without a byte.
        wait_s: longest time for which other processes of the node may leave no room in the cache.

    Raises:
        ConfigError: a URL that cannot be read from.
        DataError: the cache cannot be made.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        limit_bytes: int,
        *,
        ahead: int = 32,
        attempts: int = 3,
        backoff_s: float = 0.5,
        stall_s: float = 60.0,
        wait_s: float = 60.0,
    ):
        self.url = check_url(url)
        self._options: dict[str, Any] = {"ahead": ahead, "attempts": attempts, "backoff_s": backoff_s}
        self._options |= {"stall_s": stall_s, "wait_s": wait_s}
        self.ahead = ahead
        self._attempts, self._backoff_s, self._stall_s, self._wait_s = attempts, backoff_s, stall_s, wait_s
        self._cache_folder, self._limit_bytes = cache, limit_bytes
        self._cache = NodeCache(cache, limit_bytes)
        self._never = threading.Event()
        self._loading = threading.Lock()
        self._known: _Known | None = None
        self._ahead = Ahead(self._take_ahead, self._drop, ahead)
        self._process = os.getpid()
        self.n_fetched = 0
        """Files that this process fetched; what another one had fetched does not count."""
        self.bytes_fetched = 0
        self.failures = 0
        """Transfers of this process that failed, whether or not a later attempt succeeded."""

    def __str__(self) -> str:
        return masked(self.url)

    @property
    def folder(self) -> Path:
        """Holds the manifest, and the files while they are in use; do not write there."""
        return self._cache.root / self._set().item.folder

    def manifest(self) -> Manifest:
        """The checked manifest; fetched at the first call.

        Raises:
            DataError: it cannot be fetched, is no manifest, or is one of a zarr set.
        """
        return self._set().manifest

    def path(self, number: int, *, spare: Callable[[], bool] | None = None) -> Path:
        """The file of that number, fetched if need be; it stays until it is released as often as it was asked for.

        Args:
            spare: releases a file that the caller could do without, where the cache is too small; false: there is none.

        Raises:
            DataError: it cannot be fetched, what comes is not what the manifest says, or the cache is too small.
        """
        item, ahead = self._item(number), self._mine()
        if ahead.claim(number):
            return self._cache.root / item.name

        def make_room() -> bool:
            return ahead.spare() or (spare is not None and spare())

        return self._cache.take(item, self._fill(item, self._never), Wait(self._never, self._wait_s, make_room))

    def release(self, number: int) -> None:
        """One use of the file less."""
        self._cache.drop(self._item(number).name)

    def fetch(self, file: str, size: int, sha256: str) -> Path:
        """`path` of any file beside the manifest; held until the store is closed."""
        item = Item(self._set().item.folder, check_name(file), size, sha256)
        return self._cache.take(item, self._fill(item, self._never), Wait(self._never, self._wait_s, self._ahead.spare))

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Fetch these files in the background, in order, at most `ahead` before they are asked for.

        Each call replaces the last one's list. What goes wrong is raised by `path` of that file.
        """
        for number in numbers:
            self._item(number)
        self._mine().want(numbers)

    def mend(self, number: int) -> bool:
        """Compare the cached file with its SHA-256, and fetch it again if they differ; whether they did.

        Open the file anew then: a descriptor of before still reads the damaged one.
        """
        item = self._item(number)
        return self._cache.mend(
            item, self._fill(item, self._never), Wait(self._never, self._wait_s, self._mine().spare)
        )

    def close(self) -> None:
        """End the background thread and release all files."""
        self._mine().close()
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # with the manifest: a worker must not see another one than its parent
        return {"args": (self.url, self._cache_folder, self._limit_bytes), "kw": self._options, "known": self._known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["args"], **state["kw"])
        self._known = state["known"]

    def _mine(self) -> Ahead:
        """The background fetcher of this process; its thread does not survive a fork, and a lock may hang for ever."""
        if self._process != os.getpid():
            self._ahead = Ahead(self._take_ahead, self._drop, self.ahead)
            self._loading, self._process = threading.Lock(), os.getpid()
        return self._ahead

    def _set(self) -> _Known:
        if self._known is None:
            self._mine()
            with self._loading:
                if self._known is None:
                    self._known = self._load()
        return self._known

    def _load(self) -> _Known:
        name = f"{hashlib.sha256(self.url.encode()).hexdigest()[:32]}.json"
        limit = min(_MAX_MANIFEST_BYTES, self._limit_bytes)
        wait = Wait(self._never, self._wait_s)
        content = self._cache.refreshed(
            "manifests",
            name,
            _FRESH_S,
            lambda descriptor: self._download(MANIFEST, descriptor, self._never, limit),
            wait,
        )
        digest = hashlib.sha256(content).hexdigest()
        # the manifest holds the digest of each shard, so sets of equal manifests are the same one, wherever they lie
        item = Item(digest[:32], MANIFEST, len(content), digest)
        path = self._cache.take(item, lambda descriptor: _write(descriptor, content, 0), wait)
        try:
            manifest = read_manifest(path.parent)
            if manifest.container != "wds":
                raise DataError(
                    "it is a zarr set, whose files are read in part and at random; copy the set to a disk of the node "
                    "and name that folder, or make it with `--format wds`"
                )
            files = [Item(item.folder, check_name(s.file), s.bytes, s.sha256) for s in manifest.shards]
        except DataError as error:
            self._cache.drop(item.name)
            self._cache.remove("manifests", name)
            raise DataError(f"shard set {str(self)!r} cannot be streamed: {error}") from error
        return _Known(manifest, item, files)

    def _item(self, number: int) -> Item:
        files = self._set().files
        if not 0 <= number < len(files):
            raise DataError(f"shard {number} is not in shard set {str(self)!r}, which has shards 0..{len(files) - 1}")
        return files[number]

    def _take_ahead(self, number: int, stop: threading.Event) -> None:
        item = self._item(number)
        self._cache.take(item, self._fill(item, stop), Wait(stop))

    def _drop(self, number: int) -> None:
        self._cache.drop(self._item(number).name)

    def _fill(self, item: Item, stop: threading.Event) -> Callable[[int], None]:
        return lambda descriptor: self._download(item.file, descriptor, stop, item.size, item.sha256)

    def _download(
        self, file: str, descriptor: int, stop: threading.Event, size: int, sha256: str | None = None
    ) -> None:
        """Without a digest the size is a limit."""
        place = address(self.url, file)
        for attempt in range(1, self._attempts + 1):
            try:
                self._transfer(place, descriptor, stop, size, sha256)
            except TransferError as error:
                self.failures += 1
                if error.permanent or attempt == self._attempts:
                    advice = _COPY if isinstance(error, _ContentError) else _REACH
                    raise DataError(
                        f"cannot fetch {file!r} from {masked(place)!r}, attempt {attempt} of {self._attempts}: "
                        f"{error}; {advice}"
                    ) from None
                if stop.wait(self._backoff_s * 2 ** (attempt - 1) * _jitter(file, attempt)):
                    raise Cancelled from None
            else:
                return

    def _transfer(self, place: str, descriptor: int, stop: threading.Event, size: int, sha256: str | None) -> None:
        found, digest = 0, hashlib.sha256()
        with open_stream(place, stall_s=self._stall_s) as read:
            while block := read():
                if stop.is_set():
                    raise Cancelled
                if found + len(block) > size:
                    raise _ContentError(f"more than {size} bytes, " + ("manifest says that" if sha256 else "the limit"))
                _write(descriptor, block, found)
                digest.update(block)
                found += len(block)
        if sha256 is None:
            os.ftruncate(descriptor, found)  # an attempt before may have come further
        elif found != size:
            raise _ContentError(f"{found} bytes, manifest says {size}")
        elif digest.hexdigest() != sha256:
            raise _ContentError(f"SHA-256 {digest.hexdigest()[:12]}..., manifest says {sha256[:12]}...")
        self.n_fetched += 1
        self.bytes_fetched += found


@dataclass(frozen=True, slots=True)
class _Known:
    manifest: Manifest
    item: Item
    """The manifest as a file of the set's own folder in the cache."""
    files: list[Item]


class _ContentError(TransferError):
    """Everything came, but it is something else."""


def _write(descriptor: int, content: bytes, place: int) -> None:
    rest = memoryview(content)
    while rest:
        n_bytes = os.pwrite(descriptor, rest, place)
        rest, place = rest[n_bytes:], place + n_bytes


def _jitter(file: str, attempt: int) -> float:
    """0.5 to 1.5: the nodes of a job do not knock together again."""
    text = f"{socket.gethostname()} {os.getpid()} {file} {attempt}"
    return 0.5 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
