"""Samples whose bytes turned out to be damaged: the run stops, or goes on without them and says so."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np

from distkd.errors import DataError, SampleError

__all__ = ["OnError", "Unreadable"]

OnError = Literal["fail", "skip"]

log = logging.getLogger(__name__)


class Unreadable:
    """What this process could not read so far, up to a limit.

    Args:
        on_error: `fail` raises at the first; `skip` remembers them.
        share: of the set's samples that may be skipped.
    """

    def __init__(self, on_error: OnError, n_samples: int, share: float):
        self.replaced = 0
        """How many samples of training batches were replaced by others."""
        self.left_out = 0
        """How many samples of evaluations were left out."""
        self._on_error: OnError = on_error
        self._n_samples, self._share = n_samples, share
        self._limit = int(share * n_samples)
        self._found: dict[int, str] = {}
        self._news: list[tuple[int, str]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, sample: int) -> bool:
        return sample in self._found

    def is_known(self, sample_B: Sequence[int] | np.ndarray) -> np.ndarray:
        """(B,) bool: which of the samples are among them."""
        if not self._found:
            return np.zeros(len(sample_B), dtype=bool)
        return np.array([int(sample) in self._found for sample in sample_B], dtype=bool)

    def add(self, error: SampleError) -> None:
        """Remember a sample, or raise.

        Raises:
            SampleError: it, where the run is to stop.
            DataError: there are more than the limit.
        """
        if self._on_error == "fail":
            raise error
        with self._lock:
            if error.sample in self._found:
                return
            self._found[error.sample] = str(error)
            self._news.append((error.sample, str(error)))
        log.warning("left out: %s", error)
        if len(self._found) > self._limit:
            raise DataError(
                f"{len(self._found)} samples cannot be read, data.max_skipped={self._share:g} of {self._n_samples} "
                f"allows {self._limit}; the last: {error}"
            ) from error

    def news(self) -> list[tuple[int, str]]:
        """(sample, why) of those found since the last call."""
        with self._lock:
            news, self._news = self._news, []
        return news
