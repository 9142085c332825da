"""Decoded samples in memory, so that a small set is read once and not once an epoch."""

# Shapes: B samples

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distkd.data.shardset import ShardSet

__all__ = ["Cache"]


class Cache:
    """Stored values of whole modalities, filled as they are read; two threads that meet write the same bytes."""

    def __init__(self, shard_set: ShardSet, modalities: Sequence[str], n_bytes: int):
        self._shard_set = shard_set
        self._table: dict[str, np.ndarray] = {}
        self._filled: dict[str, np.ndarray] = {}
        sizes = {
            name: len(shard_set) * int(np.prod(modality.shape)) * np.dtype(modality.dtype).itemsize
            for name, modality in shard_set.manifest.modalities.items()
            if name in modalities
        }
        for name in sorted(sizes, key=lambda name: (sizes[name], name)):
            n_bytes -= sizes[name]
            if n_bytes < 0:
                break
            modality = shard_set.manifest.modalities[name]
            self._table[name] = np.empty((len(shard_set), *modality.shape), dtype=modality.dtype)
            self._filled[name] = np.zeros(len(shard_set), dtype=bool)

    def filled(self, name: str, samples: np.ndarray) -> np.ndarray | None:
        """The table of a modality, in which these samples' rows are filled; None where it is not kept."""
        table = self._table.get(name)
        if table is None:
            return None
        filled = self._filled[name]
        missing = np.unique(samples[~filled[samples]])
        if len(missing):
            rows = np.empty((len(missing), *table.shape[1:]), dtype=table.dtype)
            self._shard_set.read_rows(name, missing, rows)
            table[missing] = rows
            filled[missing] = True  # after the values: a reader that sees it finds them
        return table

    def read(self, name: str, sample: int) -> np.ndarray:
        """Stored values of a sample that has the modality."""
        filled = self._filled.get(name)
        if filled is not None and filled[sample]:
            return self._table[name][sample]
        values = self._shard_set.read(sample, (name,))[name]
        if filled is not None:
            self._table[name][sample] = values
            filled[sample] = True  # after the values: a reader that sees it finds them
        return values
