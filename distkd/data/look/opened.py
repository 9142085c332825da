"""The shard set that a person names: by its folder, by its manifest, or by URL."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

from distkd.data.manifest import MANIFEST
from distkd.data.shardset import ShardSet

__all__ = ["opened"]

_LIMIT_BYTES = 1 << 40
"""Of what is fetched for one look: no limit in practice."""


@contextmanager
def opened(place: str) -> Generator[ShardSet]:
    """What is fetched from a URL is kept as long as it is looked at.

    Raises:
        ConfigError: a URL that cannot be read from.
        DataError: there is no shard set.
    """
    from distkd.data.remote.transport import is_url

    if not is_url(place):
        folder = Path(place)
        yield ShardSet(folder.parent if folder.name == MANIFEST and folder.is_file() else folder)
        return
    from distkd.data.remote.store import RemoteStore
    from distkd.data.remote.stream import StreamReader

    url = place.removesuffix(f"/{MANIFEST}")
    with (
        tempfile.TemporaryDirectory(prefix="distkd-shards-") as cache,
        RemoteStore(url, Path(cache), _LIMIT_BYTES) as store,
        closing(StreamReader(store)) as reader,
    ):
        yield reader
