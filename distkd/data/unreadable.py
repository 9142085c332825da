"""Samples whose bytes turned out to be damaged: the run stops, or goes on without them and says so."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Literal

from distkd.errors import DataError, SampleError

__all__ = ["OnError", "Unreadable"]

OnError = Literal["fail", "skip"]

log = logging.getLogger(__name__)


class Unreadable:
    """What could not be read, here and on the other ranks; it decides nothing but when there is too much of it.

    Which sample stands in for another is found for each batch anew: what one process has met before, or which part of a
    volume another one has read, must not matter.

    Args:
        on_error: `fail` raises at the first; `skip` remembers them.
        share: of the set's samples that may be skipped, one at least.
    """

    def __init__(self, on_error: OnError, n_samples: int, share: float):
        self.replaced = 0
        """How many samples of training batches that this process made were replaced by others."""
        self.failures = 0
        """How often this process failed to read a sample, the same one again included."""
        self.everywhere: set[int] = set()
        """Those that all ranks have told each other of, also in earlier attempts."""
        self._on_error: OnError = on_error
        self._n_samples, self._share = n_samples, share
        self._limit = max(1, int(share * n_samples))
        self._found: dict[int, str] = {}
        self._news: list[tuple[int, str]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, error: SampleError) -> None:
        """Remember a sample, or raise.

        Raises:
            SampleError: it, where the run is to stop.
        """
        with self._lock:
            self.failures += 1
            if self._on_error == "fail":
                raise error
            if error.sample in self._found:
                return
            self._found[error.sample] = str(error)
            self._news.append((error.sample, str(error)))
        log.warning("left out: %s", error)

    def untold(self) -> list[int]:
        """Samples of this process that the other ranks do not know of."""
        return sorted(set(self._found) - self.everywhere)

    def tell(self, by_rank: Iterable[Iterable[int]]) -> None:
        """Put together what the ranks have not told yet; all ranks are given the same.

        Raises:
            DataError: there are more than the limit; on all ranks alike.
        """
        for samples in by_rank:
            self.everywhere.update(samples)
        try:
            self.check(len(self.everywhere))
        except DataError as error:
            error.shared = True
            raise

    def check(self, count: int) -> None:
        """Stop at more than the limit.

        Raises:
            DataError: there are.
        """
        if count > self._limit:
            last = next(reversed(self._found.values()), "on another rank")
            raise DataError(
                f"{count} samples cannot be read, data.max_skipped={self._share:g} of {self._n_samples} allows "
                f"{self._limit}; mend the shards, or set it to {1.1 * count / self._n_samples:.2g}; the last: {last}"
            )

    def news(self) -> list[tuple[int, str]]:
        """(sample, why) of those that this process has found since the last call."""
        with self._lock:
            news, self._news = self._news, []
        return news
