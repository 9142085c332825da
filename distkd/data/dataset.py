"""A fold of a shard set as batches: which samples, what of them, in which random view."""

# Shapes: B samples of a batch, N rows of the training set, S samples of the manifest, F features

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints
from torch import Tensor

from distkd.base import UNLABELLED, Batch, InputSpec, StrictConfig
from distkd.data.augment import CENTRE, AugmentConfig, image_draws
from distkd.data.manifest import MANIFEST, SPLITS, Split, check_modality
from distkd.data.splits import check_classes, split_numbers
from distkd.data.transform import Preprocess, fit_image, fit_vector
from distkd.data.wds import ShardSet
from distkd.errors import ConfigError, DataError
from distkd.ops.draws import fold_in, integer_key, text_key

__all__ = ["DataConfig", "Dataset", "choose_labelled"]


class DataConfig(StrictConfig):
    """Which shard set, which part of it, and how samples are varied."""

    shards: Path | None = None
    """Folder of a shard set; with `make` it is where the set is made if it is not there yet."""
    make: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")] | None = None
    """Recipe of the repository's `shards/` folder that makes the set from what the repository holds."""
    fold: NonNegativeInt = 0
    """Number of the fold."""
    labelled: PositiveInt | None = None
    """Training samples that keep their label, by class shares and seed; the others are distilled only. None: all."""
    views: PositiveInt = 1
    """Independently augmented copies of each training sample; a method may ask for more."""
    augment: AugmentConfig = AugmentConfig()
    image_mean: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5,)
    """Subtracted from images of 0..1; one value, or one per channel."""
    image_std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5,)
    """Divisor of images after the mean is subtracted; one value, or one per channel."""
    threads: NonNegativeInt = 2
    """Threads that decode, beside the one that prepares the next batches; 0 does all of it in the training thread."""
    cache_mib: NonNegativeInt = 1024
    """Decoded samples kept in memory: a modality is, if all of it fits into what is left; smallest first."""


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
        for name in self.modalities:
            if check_modality(manifest, name).kind == "volume":
                raise DataError(f"modality {name!r} is a volume, which this loader cannot read; use vectors and images")
        self._of_split = {split: split_numbers(manifest, config.fold, split) for split in SPLITS}
        if len(self._of_split["train"]) == 0:
            raise DataError(
                f"fold {config.fold} of {str(shard_set.folder)!r} has no training samples; choose another data.fold"
            )
        check_classes(manifest, config.fold)
        self._label_S = np.array(manifest.samples.label, dtype=np.int64)
        self._row_S = np.full(len(shard_set), -1, dtype=np.int64)
        self._row_S[self._of_split["train"]] = np.arange(len(self._of_split["train"]))
        self._has = {name: shard_set.has(name) for name in self.modalities}
        self._cache = _Cache(shard_set, self.modalities, config.cache_mib << 20)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = -1
        self.train_label_N = self._hide_labels()
        """Labels of the training set, int64 in the order of `index_B`; -1 where unknown or hidden."""
        self.preprocess = self._fit()

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

    def describe(self, sample: int) -> dict[str, Any]:
        """Key, patient, group and label of a sample, as the manifest has them."""
        columns = self.shard_set.manifest.samples
        return {
            "key": columns.key[sample],
            "patient": columns.patient[sample],
            "group": columns.group[sample],
            "label": columns.label[sample],
        }

    def provenance(self) -> dict[str, Any]:
        """Where the samples come from, JSON-able, for the record of a run."""
        manifest = self.shard_set.manifest
        content = (self.folder / MANIFEST).read_bytes()
        return {
            "folder": str(self.folder),
            "manifest_sha256": hashlib.sha256(content).hexdigest(),
            "task": manifest.task,
            "source": manifest.source,
            "licence": manifest.licence,
            "split_rule": manifest.split_rule,
            "fold": self.fold,
            "samples": {split: len(numbers) for split, numbers in self._of_split.items()},
            "labelled": int((self.train_label_N != UNLABELLED).sum()),
        }

    def batch(
        self,
        samples: Sequence[int] | np.ndarray,
        *,
        epoch: int,
        train: bool,
        step: int = 0,
        progress: float = 0.0,
    ) -> Batch:
        """Some samples on the CPU, float32.

        Args:
            samples: numbers in the manifest.
            train: augmented views and hidden labels; otherwise one view, centre crops, every label.

        Raises:
            DataError: a sample cannot be read.
        """
        sample_B = np.array(samples, dtype=np.int64)  # a copy: the batch shares its memory
        key_B = fold_in(torch.tensor(integer_key(self.seed, epoch)), torch.as_tensor(sample_B))
        row_B = self._row_S[sample_B]
        label_B = self._label_S[sample_B]
        if train:
            label_B = np.where(row_B >= 0, self.train_label_N[row_B], label_B)
        view_keys = [fold_in(key_B, view) for view in range(self.config.views)] if train else [None]
        made = {name: self._make(name, sample_B, view_keys) for name in self.modalities}
        return Batch(
            views=tuple({name: torch.as_tensor(made[name][view]) for name in made} for view in range(len(view_keys))),
            present={name: torch.as_tensor(has_S[sample_B]) for name, has_S in self._has.items()},
            label_B=torch.as_tensor(label_B),
            index_B=torch.as_tensor(row_B),
            sample_B=torch.as_tensor(sample_B),
            key_B=key_B,
            seed=self.seed,
            step=step,
            epoch=epoch,
            progress=progress,
        )

    def _make(self, name: str, sample_B: np.ndarray, view_keys: Sequence[Tensor | None]) -> list[np.ndarray]:
        """One modality of a batch, an array (B, ...) per view; zeros where a sample lacks it."""
        spec = self.preprocess.inputs[name].spec
        has_B = self._has[name][sample_B]
        views = [np.zeros((len(sample_B), *spec.shape), dtype=np.float32) for _ in view_keys]
        if spec.kind == "vector":
            if has_B.any():
                raw_BF = self._read_all(name, sample_B[has_B])
                for view_BF, key_B in zip(views, view_keys, strict=True):
                    key_B = None if key_B is None else key_B[torch.as_tensor(has_B)]
                    view_BF[has_B] = self.preprocess.vectors(name, raw_BF, augment=self.config.augment, key_B=key_B)
            return views
        draws = [None if key_B is None else image_draws(self.config.augment, key_B) for key_B in view_keys]

        def one(place: int) -> None:
            raw = self._cache.read(name, int(sample_B[place]))
            for view, draw_B in zip(views, draws, strict=True):
                view[place] = self.preprocess.image(name, raw, CENTRE if draw_B is None else draw_B[place])

        self._each(one, np.flatnonzero(has_B).tolist())
        return views

    def _read_all(self, name: str, samples: np.ndarray) -> np.ndarray:
        """Stored values of samples that all have the modality, (B, ...)."""
        missing = self._cache.missing(name, samples)
        if len(missing) == 0 and (table := self._cache.table(name)) is not None:
            return table[samples]
        modality = self.shard_set.manifest.modalities[name]
        raw = np.empty((len(samples), *modality.shape), dtype=modality.dtype)

        def one(place: int) -> None:
            raw[place] = self._cache.read(name, int(samples[place]))

        self._each(one, range(len(samples)))
        return raw

    def _each(self, work: Callable[[int], None], items: Iterable[int]) -> None:
        if self.config.threads == 0:
            for item in items:
                work(item)
            return
        if self._pool is None or self._pool_process != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(self.config.threads, thread_name_prefix="distkd-decode")
            self._pool_process = os.getpid()
        for _ in self._pool.map(work, items):
            pass

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

    def _fit(self) -> Preprocess:
        manifest, config = self.shard_set.manifest, self.config
        unknown = (
            set(config.augment.crop) - set(self.modalities) if isinstance(config.augment.crop, dict) else set[str]()
        )
        if unknown - set(manifest.modalities):
            raise ConfigError(
                f"data.augment.crop names {sorted(unknown)}; the modalities are {sorted(manifest.modalities)}"
            )
        inputs: dict[str, Any] = {}
        for name in self.modalities:
            modality = manifest.modalities[name]
            numbers = self._of_split["train"][self._has[name][self._of_split["train"]]]
            if len(numbers) == 0:
                raise DataError(f"no training sample of fold {self.fold} has modality {name!r}; leave it out")
            if modality.kind == "vector":
                inputs[name] = fit_vector(self._read_all(name, numbers), modality.features)
            else:
                inputs[name] = fit_image(
                    modality, name=name, crop=config.augment.crop, mean=config.image_mean, std=config.image_std
                )
        return Preprocess(inputs)


def choose_labelled(label_N: np.ndarray, sample_N: np.ndarray, n_labelled: int, seed: int) -> np.ndarray:
    """(N,) bool: which training samples keep their label.

    Each class gets its share, rounded up for the first; within a class a hash of (seed, sample) decides. A smaller
    number chooses a subset of what a larger one does.

    Raises:
        DataError: there are not that many labels.
    """
    known = np.flatnonzero(label_N != UNLABELLED)
    if n_labelled > len(known):
        raise DataError(
            f"data.labelled={n_labelled}, the fold has {len(known)} labelled training samples; "
            "use at most that, or leave it out"
        )
    key = fold_in(torch.tensor(integer_key(seed, text_key("labelled"))), torch.as_tensor(sample_N[known])).numpy()
    share = np.empty(len(known))
    for label in np.unique(label_N[known]):
        members = np.flatnonzero(label_N[known] == label)
        share[members[np.argsort(key[members])]] = np.arange(len(members)) / len(members)
    order = np.lexsort((label_N[known], share))
    kept_N = np.zeros(len(label_N), dtype=bool)
    kept_N[known[order[:n_labelled]]] = True
    return kept_N


class _Cache:
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

    def table(self, name: str) -> np.ndarray | None:
        return self._table.get(name)

    def missing(self, name: str, samples: np.ndarray) -> np.ndarray:
        """Those of the samples that are not in memory."""
        filled = self._filled.get(name)
        return samples if filled is None else samples[~filled[samples]]

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
