"""What the tests of remote sets share: how a store is opened, what lies in a cache, and servers that answer wrongly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distkd.data.remote.store import RemoteStore
from tests.data.remote.serve import Handler

MIB = 1 << 20
SHARD = "toy-000000.tar"


def open_store(url: str, cache: Path, limit_bytes: int = 64 * MIB, **options: Any) -> RemoteStore:
    return RemoteStore(url, cache, limit_bytes, **{"backoff_s": 0.0, "wait_s": 0.0, **options})


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def bytes_on_disk(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*.part")]


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*.tar")}


def flipped(handler: Handler, body: bytes, turn: int) -> None:
    handler.reply(body[:700] + bytes([body[700] ^ 1]) + body[701:])


def short(handler: Handler, body: bytes, turn: int) -> None:
    handler.reply(body[:1000], length=len(body))


def long(handler: Handler, body: bytes, turn: int) -> None:
    handler.reply(body + b"more")


def busy(handler: Handler, body: bytes, turn: int) -> None:
    handler.send_error(503)


def silent(handler: Handler, body: bytes, turn: int) -> None:
    handler.wfile.close()
