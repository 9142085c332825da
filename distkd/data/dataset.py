"""A fold of a shard set as batches: which samples, what of them, in which random view."""

# Shapes: B samples of a batch, N rows of the training set, S samples of the manifest, F features

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distkd.base import UNLABELLED, Batch, InputSpec
from distkd.data.augment import CENTRE, ImageDraw, image_draws
from distkd.data.cache import Cache
from distkd.data.config import DataConfig
from distkd.data.manifest import MANIFEST, SPLITS, Split, check_modality, closest
from distkd.data.on_device import PendingImages, StoredImages
from distkd.data.remote.stream import samples_of_shards
from distkd.data.shardset import ShardSet
from distkd.data.splits import check_classes, choose_labelled, split_numbers
from distkd.data.transform import (
    Fitted,
    InfiniteRowsError,
    Preprocess,
    VectorInput,
    fit_degraded,
    fit_image,
    fit_vector,
    fit_volume,
)
from distkd.data.unreadable import Unreadable
from distkd.data.volume_reader import VolumeReader
from distkd.errors import ConfigError, DataError, SampleError
from distkd.ops.draws import fold_in, integer_key

__all__ = ["DataConfig", "Dataset", "Spare"]

_FIT_BLOCK = 1 << 12

Spare = Callable[[int, int], int]
"""(place in the batch, attempt from 1 on) to the sample that stands in for one that cannot be read."""


class Dataset:
    """What a run sees of a shard set; equal on every rank.

    Raises:
        DataError: modality unknown or excluded, no such fold, a class absent from a split, too few labels.
    """

    def __init__(self, shard_set: ShardSet, config: DataConfig, modalities: Sequence[str], seed: int):
        self.shard_set, self.config, self.seed = shard_set, config, seed
        manifest = shard_set.manifest
        self.modalities = list(dict.fromkeys(modalities))
        if not self.modalities:
            raise ConfigError(f"no modality is asked for; name some of {', '.join(sorted(manifest.modalities))}")
        self._source = {name: self._source_of(name) for name in self.modalities}
        """Modality to the stored one that it is made of."""
        self._of_split = {split: split_numbers(manifest, config.fold, split) for split in SPLITS}
        if len(self._of_split["train"]) == 0:
            raise DataError(
                f"fold {config.fold} of {shard_set.place!r} has no training samples; choose another data.fold"
            )
        if manifest.problem == "classification":
            check_classes(manifest, config.fold)
        self._label_S = np.array(manifest.samples.label, dtype=np.int64)
        self._row_S = np.full(len(shard_set), -1, dtype=np.int64)
        self._row_S[self._of_split["train"]] = np.arange(len(self._of_split["train"]))
        self._has = {name: shard_set.has(source) for name, source in self._source.items()}
        cached = [name for name in self._source.values() if manifest.modalities[name].kind != "volume"]
        self._cache = Cache(shard_set, cached, 0 if config.streams else config.cache_mib << 20)
        self.unreadable = Unreadable(config.on_error, len(shard_set), config.max_skipped)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = -1
        self.train_label_N = self._hide_labels()
        """Labels of the training set, int64 in the order of `index_B`; -1 where unknown or hidden."""
        self.preprocess = self._fit()
        self._volumes = self._volume_reader()

    @property
    def folder(self) -> Path:
        return self.shard_set.folder

    @property
    def fold(self) -> int:
        return self.config.fold

    @property
    def task(self) -> str:
        return self.shard_set.manifest.task

    @property
    def class_names(self) -> list[str]:
        return self.shard_set.manifest.class_names

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_specs(self) -> dict[str, InputSpec]:
        """What models receive of each modality."""
        return self.preprocess.specs

    def split_samples(self, split: Split) -> np.ndarray:
        """Numbers in the manifest of a split's samples, ascending; of `train` the row order of memory banks.

        Raises:
            ConfigError: no such split.
        """
        if split not in self._of_split:
            raise ConfigError(f"unknown split {split!r}; available: {', '.join(SPLITS)}")
        return self._of_split[split]

    def samples_of_shards(self, split: Split) -> list[np.ndarray]:
        """Numbers in the manifest of a split's samples, by the shard that they lie in."""
        return samples_of_shards(self.shard_set.manifest, self.split_samples(split))

    def describe(self, sample: int) -> dict[str, Any]:
        """Key, patient, group and label of a sample, as the manifest has them."""
        columns = self.shard_set.manifest.samples
        return {
            "key": columns.key[sample],
            "patient": columns.patient[sample],
            "group": columns.group[sample],
            "label": columns.label[sample],
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest: equal for sets with the same samples in the same places."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Where the samples come from, JSON-able, for the record of a run."""
        manifest = self.shard_set.manifest
        return {
            "folder": self.shard_set.place,
            "manifest_sha256": self.digest,
            "task": manifest.task,
            "source": manifest.source,
            "licence": manifest.licence,
            "split_rule": manifest.split_rule,
            "fold": self.fold,
            "samples": {split: len(numbers) for split, numbers in self._of_split.items()},
            "labelled": int((self.train_label_N != UNLABELLED).sum()),
        }

    @property
    def failures(self) -> int:
        """How often this process failed to read a sample or to fetch a shard, repeated attempts included."""
        return self.unreadable.failures + self.shard_set.failures

    def batch(
        self,
        samples: Sequence[int] | np.ndarray,
        *,
        epoch: int,
        train: bool,
        step: int = 0,
        progress: float = 0.0,
        spare: Spare | None = None,
    ) -> Batch:
        """Some samples on the CPU, float32; with `data.transform_on: device` their images are pending.

        Args:
            samples: numbers in the manifest.
            train: augmented views and hidden labels; otherwise one view, centre crops, every label.
            spare: what stands in for samples that cannot be read, with `data.on_error: skip`; without it they are
                left out, and the batch is smaller.

        Raises:
            SampleError: a sample cannot be read, and none is to be skipped.
            DataError: more than `data.max_skipped` of this batch cannot be read, or nothing is left to stand in.
        """
        bad: set[int] = set()
        while True:
            # a copy: the batch shares its memory
            sample_B, replaced = self._readable(np.array(samples, dtype=np.int64), spare, bad)
            try:
                made = self._batch(sample_B, epoch=epoch, train=train, step=step, progress=progress)
            except SampleError as error:
                self.unreadable.add(error)
                bad.add(error.sample)
                self.unreadable.check(len(bad))
                continue
            if spare is not None:
                self.unreadable.replaced += replaced
            return made

    def _readable(self, sample_B: np.ndarray, spare: Spare | None, bad: set[int]) -> tuple[np.ndarray, int]:
        """The samples with those that cannot be read replaced or left out, and how many these are."""
        if not bad:
            return sample_B, 0
        bad_B = np.isin(sample_B, list(bad))
        places = np.flatnonzero(bad_B)
        if spare is None:
            return sample_B[~bad_B], len(places)
        for place in places.tolist():
            attempts = range(1, len(self.shard_set) + 1)
            found = next((sample for attempt in attempts if (sample := spare(place, attempt)) not in bad), None)
            if found is None:
                raise DataError(
                    f"no sample of the training split of fold {self.fold} can be read in place of "
                    f"{self.describe(int(sample_B[place]))['key']!r}; run `distkd shards verify {self.folder}`"
                )
            sample_B[place] = found
        return sample_B, len(places)

    def _batch(self, sample_B: np.ndarray, *, epoch: int, train: bool, step: int, progress: float) -> Batch:
        key_B = fold_in(torch.tensor(integer_key(self.seed, epoch)), torch.as_tensor(sample_B))
        row_B = self._row_S[sample_B]
        label_B = self._label_S[sample_B]
        if train:
            label_B = np.where(row_B >= 0, self.train_label_N[row_B], label_B)
        view_keys = [fold_in(key_B, view) for view in range(self.config.views)] if train else [None]
        views = self._views(sample_B, view_keys)
        pending = self._pending(sample_B, view_keys) if self.config.transform_on == "device" else None
        return Batch(
            views=tuple({name: torch.as_tensor(view[name]) for name in self._has if name in view} for view in views),
            present={name: torch.as_tensor(has_S[sample_B]) for name, has_S in self._has.items()},
            label_B=torch.as_tensor(label_B),
            index_B=torch.as_tensor(row_B),
            sample_B=torch.as_tensor(sample_B),
            key_B=key_B,
            seed=self.seed,
            step=step,
            epoch=epoch,
            progress=progress,
            pending=pending,
        )

    def _views(self, sample_B: np.ndarray, view_keys: Sequence[Tensor | None]) -> list[dict[str, np.ndarray]]:
        """For each key every modality that the host makes, (B, ...); zeros where a sample lacks it."""
        views: list[dict[str, np.ndarray]] = [{} for _ in view_keys]
        for name in self.modalities:
            if self.preprocess.inputs[name].spec.kind == "vector":
                self._add_vectors(views, name, sample_B, view_keys)
        if self.config.transform_on == "host":
            for source, names in self._images().items():
                self._add_images(views, source, names, sample_B, view_keys)
        if self._volumes is not None:
            self._add_volumes(self._volumes, views, sample_B, view_keys)
        return views

    def _images(self) -> dict[str, list[str]]:
        """Inputs that are images, by the stored one that they are made of."""
        found: dict[str, list[str]] = {}
        for name in self.modalities:
            if self.preprocess.inputs[name].spec.kind == "image":
                found.setdefault(self._source[name], []).append(name)
        return found

    def _draws(self, view_keys: Sequence[Tensor | None], n_samples: int) -> list[list[ImageDraw]]:
        """For each key the draws of the batch."""
        return [
            [CENTRE] * n_samples if key_B is None else image_draws(self.config.augment, key_B) for key_B in view_keys
        ]

    def _pending(self, sample_B: np.ndarray, view_keys: Sequence[Tensor | None]) -> PendingImages | None:
        """The images as they are stored, to be made where the batch goes."""
        draws = self._draws(view_keys, len(sample_B))
        stored = [self._stored(source, names, sample_B, draws) for source, names in self._images().items()]
        return PendingImages(stored) if stored else None

    def _stored(
        self, source: str, names: Sequence[str], sample_B: np.ndarray, draws: Sequence[Sequence[ImageDraw]]
    ) -> StoredImages:
        """One stored image, and what is to be made of it."""
        place_P = np.flatnonzero(self._has[names[0]][sample_B])
        modality = self.shard_set.manifest.modalities[source]
        pixel_PHWC = np.empty((len(place_P), *modality.shape), dtype=modality.dtype)

        def one(number: int) -> None:
            raw = self._cache.read(source, int(sample_B[place_P[number]]))
            pixel_PHWC[number] = self.preprocess.checked(names, raw)

        self._each(one, range(len(place_P)))
        return StoredImages.of(self.preprocess, names, pixel_PHWC, place_P, draws)

    def _add_vectors(
        self, views: list[dict[str, np.ndarray]], name: str, sample_B: np.ndarray, view_keys: Sequence[Tensor | None]
    ) -> None:
        has_B = self._has[name][sample_B]
        raw_BF = self._read_all(name, sample_B[has_B]) if has_B.any() else None
        for view, key_B in zip(views, view_keys, strict=True):
            view[name] = np.zeros((len(sample_B), *self.preprocess.inputs[name].spec.shape), dtype=np.float32)
            if raw_BF is not None:
                key_B = None if key_B is None else key_B[torch.as_tensor(has_B)]
                try:
                    made_BF = self.preprocess.vectors(name, raw_BF, augment=self.config.augment, key_B=key_B)
                except InfiniteRowsError as error:
                    raise self._infinite(name, int(sample_B[has_B][error.row_R[0]]), error) from error
                view[name][has_B] = made_BF

    def _add_images(
        self,
        views: list[dict[str, np.ndarray]],
        source: str,
        names: Sequence[str],
        sample_B: np.ndarray,
        view_keys: Sequence[Tensor | None],
    ) -> None:
        """All that is made of one stored image: the image itself, and coarser copies."""
        for view in views:
            for name in names:
                view[name] = np.zeros((len(sample_B), *self.preprocess.inputs[name].spec.shape), dtype=np.float32)
        draws = self._draws(view_keys, len(sample_B))

        def one(place: int) -> None:
            raw = self._cache.read(source, int(sample_B[place]))
            for view, draw_B in zip(views, draws, strict=True):
                for name, image in self.preprocess.images(names, raw, draw_B[place]).items():
                    view[name][place] = image

        self._each(one, np.flatnonzero(self._has[names[0]][sample_B]).tolist())

    def _add_volumes(
        self,
        reader: VolumeReader,
        views: list[dict[str, np.ndarray]],
        sample_B: np.ndarray,
        view_keys: Sequence[Tensor | None],
    ) -> None:
        made: list[list[dict[str, np.ndarray]]] = [[] for _ in sample_B]

        def one(place: int) -> None:
            keys = [None if key_B is None else key_B[place] for key_B in view_keys]
            made[place] = reader.views(int(sample_B[place]), keys)

        self._each(one, range(len(sample_B)))
        for number, view in enumerate(views):
            view |= reader.stack([of_sample[number] for of_sample in made])

    def _read_all(self, name: str, samples: np.ndarray) -> np.ndarray:
        """Stored values of samples that all have the modality, (B, ...)."""
        if (table := self._cache.filled(name, samples)) is not None:
            return table[samples]
        modality = self.shard_set.manifest.modalities[name]
        raw = np.empty((len(samples), *modality.shape), dtype=modality.dtype)
        self.shard_set.read_rows(name, samples, raw)
        return raw

    def _each(self, work: Callable[[int], None], items: Iterable[int]) -> None:
        pool = self._threads()
        for _ in map(work, items) if pool is None else pool.map(work, items):
            pass

    def _threads(self) -> ThreadPoolExecutor | None:
        if self.config.threads == 0:
            return None
        if self._pool is None or self._pool_process != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(self.config.threads, thread_name_prefix="distkd-decode")
            self._pool_process = os.getpid()
        return self._pool

    def _infinite(self, name: str, sample: int, error: InfiniteRowsError) -> SampleError:
        return SampleError(f"{self.shard_set.where(sample, name)}: {error}", sample)

    def _fit_vector(self, name: str, samples: np.ndarray, features: list[str] | None) -> VectorInput:
        while True:
            raw_BF, samples = self._read_readable(name, samples)
            try:
                return fit_vector(raw_BF, features)
            except InfiniteRowsError as error:
                for row in error.row_R:
                    self.unreadable.add(self._infinite(name, int(samples[row]), error))
                samples = np.delete(samples, error.row_R)

    def _read_readable(self, name: str, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of the samples that can be read, where unreadable ones may be skipped, and which these are."""
        kept: list[np.ndarray] = []
        parts: list[np.ndarray] = []
        for first in range(0, len(samples), _FIT_BLOCK):  # a block alone is read again without its bad samples
            part = samples[first : first + _FIT_BLOCK]
            while len(part):
                try:
                    parts.append(self._read_all(name, part))
                    kept.append(part)
                    break
                except SampleError as error:
                    self.unreadable.add(error)
                    part = part[part != error.sample]
        if not parts:
            raise DataError(
                f"{name!r} of no training sample of fold {self.fold} can be read; run `distkd shards verify "
                f"{self.folder}`"
            )
        return np.concatenate(parts), np.concatenate(kept)

    def _hide_labels(self) -> np.ndarray:
        numbers = self._of_split["train"]
        label_N = self._label_S[numbers].copy()
        if self.config.labelled is None:
            return label_N
        kept_N = choose_labelled(label_N, numbers, self.config.labelled, self.seed)
        absent = [name for label, name in enumerate(self.class_names) if label not in set(label_N[kept_N].tolist())]
        if absent:
            raise DataError(
                f"data.labelled={self.config.labelled} leaves no label of class {', '.join(map(repr, absent))} in fold "
                f"{self.fold}; use at least {self.n_classes}"
            )
        return np.where(kept_N, label_N, UNLABELLED)

    def _source_of(self, name: str) -> str:
        """The stored modality of that name, or the one that a degraded copy of that name is made of."""
        manifest, degraded = self.shard_set.manifest, self.config.degraded
        if name in degraded and name in manifest.modalities:
            raise ConfigError(f"data.degraded makes {name!r}, which the shard set stores; give the copy another name")
        source = degraded[name].of if name in degraded else name
        if name in degraded and source not in manifest.modalities and source not in manifest.excluded:
            images = [stored for stored, of in manifest.modalities.items() if (of.kind, of.role) == ("image", "input")]
            raise ConfigError(f"data.degraded.{name}.of: unknown modality {source!r}{closest(source, images)}")
        if source not in manifest.modalities and source not in manifest.excluded and degraded:
            raise ConfigError(
                f"unknown modality {source!r}{closest(source, [*manifest.modalities, *degraded])} (data.degraded "
                f"makes {', '.join(degraded)})"
            )
        modality = check_modality(manifest, source)
        if modality.role != "input":
            raise ConfigError(f"modality {name!r} is a {modality.role} of the shard set, no input; use another")
        if name in degraded and modality.kind != "image":
            raise ConfigError(
                f"data.degraded.{name}.of={source} is a {modality.kind}, only an image has coarser copies"
            )
        return source

    def _fit(self) -> Preprocess:
        manifest, config = self.shard_set.manifest, self.config
        cropped = set(config.augment.crop) if isinstance(config.augment.crop, dict) else set[str]()
        if cropped - set(manifest.modalities):
            raise ConfigError(
                f"data.augment.crop names {sorted(cropped)}; the modalities are {sorted(manifest.modalities)}"
            )
        inputs: dict[str, Fitted] = {}
        for name, source in self._source.items():
            modality = manifest.modalities[source]
            numbers = self._of_split["train"][self._has[name][self._of_split["train"]]]
            if len(numbers) == 0:
                raise DataError(f"no training sample of fold {self.fold} has modality {name!r}; leave it out")
            if modality.kind == "vector":
                if config.streams:  # not every shard, before the first step
                    numbers = np.concatenate(self.samples_of_shards("train"))
                    numbers = numbers[self._has[name][numbers]][: config.stream.fit_samples]
                inputs[name] = self._fit_vector(name, numbers, modality.features)
            elif modality.kind == "volume":
                inputs[name] = fit_volume(modality, config=config.volume)
            else:
                image = fit_image(
                    modality, name=source, crop=config.augment.crop, mean=config.image_mean, std=config.image_std
                )
                copy = config.degraded.get(name)
                inputs[name] = image if copy is None else fit_degraded(copy, name=name, image=image)
        return Preprocess(inputs)

    def _volume_reader(self) -> VolumeReader | None:
        """Of the volumes and, in a segmentation, of the label map, which is a modality of every batch then."""
        manifest = self.shard_set.manifest
        names = [name for name in self.modalities if self.preprocess.inputs[name].spec.kind == "volume"]
        if not names:
            return None
        target = next((name for name, modality in manifest.modalities.items() if modality.role == "target"), None)
        if target is not None:
            self._has[target] = self.shard_set.has(target)
        return VolumeReader(self.shard_set, self.preprocess, names, target, self.config.volume)
