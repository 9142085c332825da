"""Samples to a shard set: equal bytes for equal input, all of it or nothing; a killed build goes on where it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.codec import DecodeError, Encoded, decode, encode
from distkd.data.consistency import check_consistency
from distkd.data.containers import Container, TarContainer, ZarrContainer, count_samples
from distkd.data.disk import UnwrittenError, told
from distkd.data.journal import Block, Journal, Row
from distkd.data.manifest import MANIFEST, Description, Fold, Manifest, Samples, Shard, Space, check_modality
from distkd.data.manifest_file import write_manifest
from distkd.data.progress import track
from distkd.data.sample_values import check_key, check_member, checked, n_bytes
from distkd.errors import DataError

__all__ = ["Encoded", "Sample", "ShardWriter", "SkipSample", "Skipped"]


@dataclass(frozen=True)
class Sample:
    """What `add_all` is given of one sample; a modality that it lacks is left out of `arrays`."""

    arrays: Mapping[str, np.ndarray | Encoded]
    patient: str
    label: int | None
    group: str | None = None
    space: Space | None = None


class SkipSample(Exception):
    """Raised by what loads a sample: it is left out, and the report says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Skipped:
    """What a recipe left out, by reason."""

    by_reason: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, reason: str, name: str) -> None:
        self.by_reason.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        """One line per reason: how many, why, and the first few names."""
        return [
            f"skipped {len(names)}: {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for reason, names in self.by_reason.items()
        ]


@dataclass(frozen=True)
class _Ready:
    """A sample that is checked and encoded, or the reason why it is left out."""

    sample: Sample | None
    values: dict[str, bytes | np.ndarray] = field(default_factory=dict[str, "bytes | np.ndarray"])
    reason: str = ""


class ShardWriter:
    """Writes samples in the order in which they come; the folder appears when the `with` block ends well.

    In tars each sample is `<key>.json` (label, patient, group: what other WebDataset readers need) and
    `<key>.<modality>.<ext>` per modality that it has. What `add_all` finished before the process died, or before an
    error, is found again by the same build: same description, same `options`. The raw files of samples that are
    finished are not opened again, so that a change of them stays unseen.

    Args:
        options: what the samples depend on beside the description and their own raw files: the recipe's options, the
            seed, `tables_digest` of the tables.

    Raises:
        DataError: the folder exists or cannot be made, or another process builds it.
    """

    def __init__(self, out: Path, description: Description, *, options: str = "", shard_bytes: int = 64 << 20):
        self.out = out
        self.manifest: Manifest | None = None
        self.skipped = Skipped()
        self._description = description
        self._shard_bytes = shard_bytes
        self._fingerprint = f"{description.model_dump_json()} {shard_bytes} {options}"
        self._rows: list[Row] = []
        self._order: list[str] = []
        """Keys in the order in which they came, the skipped ones too."""
        self._found = 0
        """How many of the order an earlier build finished."""
        self._met = 0
        """How many of these this build was given again."""
        self._seen: set[str] = set()
        self._shards: list[Shard] = []
        self._recorded = (0, 0, 0)
        """Rows, skipped and order that the journal has."""
        self._left_out: list[tuple[str, str]] = []
        self._folds: tuple[list[Fold], str, int | None] | None = None
        self._resumable = False

    def __enter__(self) -> Self:
        try:
            self._journal = Journal(self.out, self._fingerprint)
        except OSError as error:
            raise DataError(
                f"cannot make the output folder beside {str(self.out)!r}: {error}; choose another --out"
            ) from error
        for block in self._journal.blocks:
            self._rows += block.rows
            self._shards += block.shards
            self._left_out += block.skipped
            self._order += block.order
        self._found = len(self._order)
        self._recorded = (len(self._rows), len(self._left_out), len(self._order))
        self._seen.update(row.key for row in self._rows)
        try:
            self._container = self._open_container()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def _open_container(self) -> Container:
        folder = self._journal.folder
        if self._description.container == "zarr":
            return ZarrContainer(folder, self._description, len(self._shards), len(self._rows))
        return TarContainer(folder, self._description, self._shard_bytes, len(self._shards))

    def add(
        self,
        key: str,
        arrays: Mapping[str, np.ndarray | Encoded],
        *,
        patient: str,
        label: int | None,
        group: str | None = None,
        space: Space | None = None,
    ) -> None:
        """One sample; a modality that it lacks is left out of `arrays`.

        NaN in a vector is a missing value; the transform fills it.

        Raises:
            DataError: the sample does not fit the description, holds infinities, or its key was seen before.
        """
        sample = Sample(arrays, patient=patient, label=label, group=group, space=space)
        if not self._was_found(key):
            self._put(key, self._prepare(key, sample))

    def add_all(
        self,
        items: Iterable[tuple[str, Callable[[], Sample]]],
        *,
        total: int | None = None,
        label: str = "samples",
        threads: int = 2,
    ) -> None:
        """Samples in order, loaded some ahead by threads; what an earlier build finished is not loaded again.

        Args:
            items: (key, what loads the sample), in an order that depends on the input alone.
            total: how many, for the progress bar.
            label: what they are, for the progress bar.

        Raises:
            DataError: as `add`, or the items are others than those of the build that was interrupted.
        """
        self._resumable = True
        waiting: deque[tuple[str, Future[_Ready]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="distkd-build") as pool:
            try:
                for key, load in track(items, label, total=total):
                    if self._was_found(key):
                        continue
                    waiting.append((key, pool.submit(self._load, key, load)))
                    if len(waiting) > 2 * threads:
                        self._take(waiting.popleft())
                while waiting:
                    self._take(waiting.popleft())
            finally:
                for _, future in waiting:
                    future.cancel()

    def split(self, folds: Sequence[Fold], *, rule: str, seed: int | None) -> None:
        """Who is in which split, and the rule in words; once, at any time before the end."""
        self._folds = (list(folds), rule, seed)

    @property
    def keys(self) -> list[str]:
        """Of the samples added so far, in order."""
        return [row.key for row in self._rows]

    @property
    def patients(self) -> list[str]:
        """Of the samples added so far, in order."""
        return [row.patient for row in self._rows]

    @property
    def labels(self) -> list[int]:
        """Of the samples added so far, in order."""
        return [row.label for row in self._rows]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException as own:
            error = own
            raise
        finally:
            if error is not None:
                self._container.drop()
                self._leave(error)

    def _leave(self, error: BaseException) -> None:
        """Without a set; what a later build can go on with stays."""
        kept = self._recorded[0] > 0 and (self._resumable or bool(self._journal.blocks))
        if isinstance(error, UnwrittenError):
            error.kept = kept
        if not kept:
            self._journal.remove()
        self._journal.close()

    def _was_found(self, key: str) -> bool:
        """Whether the next item is one of those that an earlier build finished."""
        if self._met == self._found:
            return False
        expected = self._order[self._met]
        if key != expected:
            raise DataError(
                f"the interrupted build of {str(self.out)!r} had {expected!r} as item {self._met + 1}, now it is "
                f"{key!r}: the raw data have changed; remove {str(self._journal.folder)!r} to start anew"
            )
        self._met += 1
        return True

    def _load(self, key: str, load: Callable[[], Sample]) -> _Ready:
        try:
            return self._prepare(key, load())
        except SkipSample as skip:
            return _Ready(None, reason=skip.reason)

    def _take(self, item: tuple[str, Future[_Ready]]) -> None:
        self._put(item[0], item[1].result())

    def _prepare(self, key: str, sample: Sample) -> _Ready:
        check_key(key)
        n_classes = len(self._description.class_names)
        if sample.label is not None and sample.label != UNLABELLED and not 0 <= sample.label < n_classes:
            raise DataError(
                f"sample {key!r} has label {sample.label}, expected 0..{n_classes - 1}, or None where it is unknown"
            )
        if not sample.arrays:
            raise DataError(f"sample {key!r} has no modality at all; leave it out")
        values = {name: self._value(key, name, array, sample.space) for name, array in sample.arrays.items()}
        return _Ready(sample, values)

    def _value(self, key: str, name: str, array: np.ndarray | Encoded, space: Space | None) -> bytes | np.ndarray:
        modality = check_modality(self._description, name)
        if self._description.container == "wds":
            check_member(key, name, modality)
        if isinstance(array, Encoded):
            try:
                decode(array.data, modality)
            except DecodeError as error:
                raise DataError(f"{name!r} of sample {key!r} {error}; mend the raw file or leave it out") from error
            return array.data
        array = checked(array, modality, name, key, space)
        return array if modality.codec == "zarr" else encode(array, modality)

    def _put(self, key: str, ready: _Ready) -> None:
        if key in self._seen:
            raise DataError(f"sample key {key!r} occurs twice; keys must be unique in a shard set")
        if ready.sample is None:
            self._left_out.append((key, ready.reason))
            self._order.append(key)
            return
        sample = ready.sample
        self._record(self._container.make_room(sum(n_bytes(value) for value in ready.values.values())))
        label = UNLABELLED if sample.label is None else int(sample.label)
        about = {"group": sample.group, "label": label, "patient": sample.patient}
        placed = self._container.put(key, about, ready.values)
        self._rows.append(
            Row(
                key=key,
                patient=sample.patient,
                group=sample.group,
                label=label,
                shard=placed.shard,
                offset=placed.offset,
                bytes=placed.bytes,
                crc32c=placed.crc32c,
                file=placed.file,
                space=sample.space,
            )
        )
        self._order.append(key)
        self._seen.add(key)

    def _record(self, shards: list[Shard]) -> None:
        """Files that are complete, in the journal, with the samples that they hold."""
        if not shards:
            return
        self._shards += shards
        n_rows, n_skipped, n_order = self._recorded
        if self._resumable:
            self._journal.add(
                Block(
                    rows=self._rows[n_rows:],
                    shards=shards,
                    skipped=self._left_out[n_skipped:],
                    order=self._order[n_order:],
                )
            )
        self._recorded = (len(self._rows), len(self._left_out), len(self._order))

    def _finish(self) -> None:
        if self._met < self._found:
            raise DataError(
                f"the interrupted build of {str(self.out)!r} had {self._found} items, now there are {self._met}: the "
                f"raw data have changed; remove {str(self._journal.folder)!r} to start anew"
            )
        for key, reason in self._left_out:
            self.skipped.add(reason, key)
        if not self._rows:
            reasons = "".join(f"; {line}" for line in self.skipped.lines())
            raise DataError(f"no sample for {str(self.out)!r}: every one was skipped; check --raw{reasons}")
        samples, shards = self._container.finish(self._columns())
        self._shards += shards
        assert self._folds is not None, "split() was not called"
        folds, rule, seed = self._folds
        fields = {name: getattr(self._description, name) for name in Description.model_fields}
        manifest = Manifest(
            **fields,
            shards=count_samples(samples, self._shards),
            samples=samples,
            folds=folds,
            split_rule=rule,
            split_seed=seed,
        )
        check_consistency(manifest, f"the new shard set {str(self.out)!r}")
        with told(MANIFEST, self._journal.folder):
            write_manifest(manifest, self._journal.folder)
        self._journal.publish()
        self.manifest = manifest

    def _columns(self) -> Samples:
        rows, names = self._rows, list(self._description.modalities)
        tars, volumes = self._description.container == "wds", any(row.space is not None for row in self._rows)
        return Samples(
            key=[row.key for row in rows],
            patient=[row.patient for row in rows],
            group=[row.group for row in rows],
            label=[row.label for row in rows],
            shard=[row.shard for row in rows],
            offset=[row.offset for row in rows],
            bytes={name: [row.bytes[name] for row in rows] for name in names},
            crc32c={name: [row.crc32c[name] for row in rows] for name in names} if tars else {},
            file={} if tars else {name: [row.file[name] for row in rows] for name in names},
            space=[row.space for row in rows] if volumes else [],
        )
