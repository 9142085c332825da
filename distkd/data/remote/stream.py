"""Training and evaluation from a remote shard set: shards come before they are needed and go when they are done.

`StreamReader` is a `ShardSet` whose files are fetched; `StreamSource` follows a `StreamPlan` with the store beside it.
Neither decides the order: that is the plan's, so it does not depend on ranks, threads, or how fast shards come.
"""

# Shapes: B samples of a pass, P samples of an evaluation, S shards

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distkd.base import World
from distkd.data.manifest import Manifest, Modality
from distkd.data.remote.store import RemoteStore, ShardFiles
from distkd.data.shardset import Check, ShardSet
from distkd.data.stream_plan import StreamPlan, eval_places
from distkd.data.wds import TarFiles
from distkd.errors import DataError, DiskError

if TYPE_CHECKING:
    from distkd.data.verify import Verified

__all__ = ["StreamReader", "StreamSource", "eval_stream", "numbers_at", "samples_of_shards"]

_LOOK_STEPS = 8
"""Steps between two looks at what comes next."""


def samples_of_shards(manifest: Manifest, samples: np.ndarray) -> list[np.ndarray]:
    """Numbers in the manifest of some samples, by the shard that they lie in, each ascending."""
    shard_S = np.array(manifest.samples.shard, dtype=np.int64)[samples]
    order = np.lexsort((samples, shard_S))
    ends = np.searchsorted(shard_S[order], np.arange(len(manifest.shards)), side="right")
    return np.split(np.asarray(samples, dtype=np.int64)[order], ends)[: len(manifest.shards)]


def numbers_at(samples: Sequence[np.ndarray], shard_B: np.ndarray, inside_B: np.ndarray) -> np.ndarray:
    """Numbers in the manifest, int64 (B,), by shard and place within `samples_of_shards`."""
    places = zip(shard_B.tolist(), inside_B.tolist(), strict=True)
    return np.array([samples[shard][inside] for shard, inside in places], dtype=np.int64)


class StreamReader(ShardSet):
    """A remote shard set for reading: any sample by its number, fetched if its shard is not there.

    Random access works and is slow where shards have to be fetched; with a `StreamSource` they are there. A damaged
    file in the cache is fetched again, once.
    """

    def __init__(self, store: RemoteStore, *, check: Check = "first"):
        # not super().__init__: the files are not there yet, and each is checked when it is fetched
        self.__setstate__({"store": store, "folder": store.folder, "manifest": store.manifest(), "check": check})

    @property
    def place(self) -> str:
        return str(self.store)

    @property
    def failures(self) -> int:
        return self.store.failures

    def verify(
        self, progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names, threads: int | None = None
    ) -> Verified:
        raise DataError(
            f"shard set {str(self.store)!r} is remote: each shard is compared with its SHA-256 when it is fetched; "
            "run `distkd shards verify` where the set lies"
        )

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "store": self.store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.store: RemoteStore = state["store"]
        super().__setstate__(state)

    def _start(self) -> None:
        super()._start()
        self._tars = _FetchedTars(self.store, [shard.bytes for shard in self.manifest.shards])

    def _read_member(self, sample: int, name: str, modality: Modality) -> np.ndarray:
        number = self.manifest.samples.shard[sample]
        self.store.path(number)  # what cannot be fetched is raised here, and is no reason to mend
        try:
            try:
                return super()._read_member(sample, name, modality)
            except (DataError, DiskError):
                if not self.store.mend(number):
                    raise
            return super()._read_member(sample, name, modality)
        finally:
            self.store.release(number)


class _FetchedTars(TarFiles):
    """Tars that are fetched when they are read, and open only then: what nobody reads or holds may be evicted."""

    def __init__(self, files: ShardFiles, sizes: Sequence[int]):
        super().__init__(Path(), [], [])
        self._files, self._sizes = files, list(sizes)

    @contextmanager
    def _open(self, numbers: set[int]) -> Generator[dict[int, int]]:
        with ExitStack() as stack:
            yield {number: stack.enter_context(self._one(number)) for number in sorted(numbers)}

    @contextmanager
    def _one(self, number: int) -> Generator[int]:
        path = self._files.path(number)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        finally:
            self._files.release(number)


class StreamSource:
    """What this rank reads in each step, with the shards there when it is told.

    Iterate once. While a step's samples are out their shards are held; those of the plan's current windows stay, the
    next ones are fetched in the background, and what is behind may be evicted.

    Args:
        samples: of each shard the numbers in the manifest that take part, as `samples_of_shards` gives them; the plan
            was made of their counts.
        start_step: where to begin; nothing of the steps before is fetched.
    """

    def __init__(
        self,
        store: RemoteStore,
        plan: StreamPlan,
        samples: Sequence[np.ndarray],
        world: World,
        passes: int,
        start_step: int = 0,
    ):
        assert [len(numbers) for numbers in samples] == plan.count_S.tolist(), (plan.count_S, len(samples))
        self._store, self._plan, self._world, self._passes = store, plan, world, passes
        self._samples, self._start = samples, start_step
        self._held: set[int] = set()
        window = min(plan.buffer, plan.steps_per_epoch * plan.global_batch // plan.lanes)
        per_window = ceil(window / plan.count_S[plan.count_S > 0].mean()) + 1
        self._n_kept = per_window * (plan.lanes // world.size)
        """About the shards of the current windows; what it misses is held again when it comes."""

    def __iter__(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(step, (B,) sample numbers of each pass); ending the iteration releases all."""
        try:
            for step in range(self._start, self._plan.n_steps):
                places = [
                    self._plan.local_places(step, number, self._passes, self._world) for number in range(self._passes)
                ]
                self._advance(step, np.concatenate([shard_B for shard_B, _ in places]))
                yield step, [numbers_at(self._samples, *place) for place in places]
        finally:
            self._store.prefetch([])
            self._keep(set())

    def _advance(self, step: int, shard_B: np.ndarray) -> None:
        now = dict.fromkeys(shard_B.tolist())
        missing = [number for number in now if number not in self._held]
        looks = bool(missing) or (step - self._start) % _LOOK_STEPS == 0
        if looks:
            ahead = self._plan.shards_ahead(step, self._world, self._n_kept + self._store.ahead)
            self._keep({*now, *ahead[: self._n_kept]})
            known = self._held.union(now)
            # with what is missing now in front: the thread fetches the second while the first is waited for
            self._store.prefetch([*missing, *(number for number in ahead if number not in known)])
        for number in missing:
            self._store.path(number, spare=lambda: self._spare(now))
            self._held.add(number)

    def _spare(self, now: Collection[int]) -> bool:
        """Let one shard go that this step does not need."""
        number = next((number for number in self._held if number not in now), None)
        if number is not None:
            self._keep(self._held - {number})
        return number is not None

    def _keep(self, numbers: set[int]) -> None:
        for number in self._held - numbers:
            self._held.discard(number)
            self._store.release(number)


def eval_stream(
    store: RemoteStore, samples: Sequence[np.ndarray], world: World, micro_batch: int
) -> Iterator[np.ndarray]:
    """(B,) sample numbers after sample numbers: this rank's part of a split in the order of the shards, each once.

    The last batch may be smaller, and ranks may differ by one sample.
    """
    shard_P, inside_P = eval_places([len(numbers) for numbers in samples], world)
    held: set[int] = set()
    try:
        ahead = np.unique(shard_P).tolist()
        for first in range(0, len(shard_P), micro_batch):
            now = set(shard_P[first : first + micro_batch].tolist())
            for number in held - now:
                held.discard(number)
                store.release(number)
            if now - held:
                ahead = [number for number in ahead if number >= min(now)]
                store.prefetch([number for number in ahead if number not in held])
            for number in sorted(now - held):
                store.path(number)
                held.add(number)
            part = slice(first, first + micro_batch)
            yield numbers_at(samples, shard_P[part], inside_P[part])
    finally:
        store.prefetch([])
        for number in held:
            store.release(number)
