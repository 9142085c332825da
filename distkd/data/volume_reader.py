"""One sample's volumes and label map, cut alike: only the chunks that a view touches are read."""

# Shapes: C channels, x y z voxels

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from torch import Tensor

from distkd.base import UNLABELLED
from distkd.data.shardset import ShardSet
from distkd.data.transform import Preprocess
from distkd.data.volume_augment import vary_volumes
from distkd.data.volumes import (
    Box,
    Points,
    Size,
    VolumeConfig,
    class_map,
    crop_box,
    evaluation_box,
    finish_target,
    read_points,
)
from distkd.errors import DataError, SampleError

__all__ = ["VolumeReader"]


class VolumeReader:
    """Views of the samples of a set with volumes.

    Args:
        names: the volumes that a model is given.
        target: the label map, if there is one.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        preprocess: Preprocess,
        names: Sequence[str],
        target: str | None,
        config: VolumeConfig,
    ):
        self._shard_set, self._preprocess, self._config = shard_set, preprocess, config
        self._names, self._target = list(names), target
        modalities = shard_set.manifest.modalities
        stored = np.array([modalities[name].shape[1:] for name in [*names, *([target] if target else [])]])
        self._stored = cast(Size, tuple(int(n) for n in stored.max(axis=0)))
        self._has = {name: shard_set.has(name) for name in [*names, *([target] if target else [])]}
        self._statistics = {name: f"{name}_stats" for name in names if f"{name}_stats" in modalities}
        self._points = f"{target}_points" if f"{target}_points" in modalities else None
        without = [name for name in names if name not in self._statistics]
        if config.normalise != "none" and without:
            raise DataError(
                f"data.volume.normalise={config.normalise} needs the stored statistics of {', '.join(without)}, which "
                f"{shard_set.place!r} does not have; build the shard set again, or set it to none"
            )
        if config.foreground and self._points is None:
            raise DataError(
                f"data.volume.foreground={config.foreground} needs the stored places of the label map's values, which "
                f"{str(shard_set.folder)!r} does not have; build the shard set again, or set it to 0"
            )

    def views(self, sample: int, keys: Sequence[Tensor | None]) -> list[dict[str, np.ndarray]]:
        """A view for each key, that of evaluation for None: (C, x, y, z) float32, the target (x, y, z) int64.

        What the sample lacks is left out.
        """
        space = self._shard_set.manifest.samples.space[sample]
        assert space is not None, sample
        statistics = {
            name: self._numbers(sample, aux) for name, aux in self._statistics.items() if self._has[name][sample]
        }
        points = self._places(sample) if self._config.foreground else None
        return [self._view(sample, space.shape, key, statistics, points) for key in keys]

    def _view(
        self, sample: int, shape: Size, key: Tensor | None, statistics: dict[str, np.ndarray], points: Points | None
    ) -> dict[str, np.ndarray]:
        if key is None:
            box = evaluation_box(self._config, shape, self._stored)
        else:
            box = crop_box(self._config, shape, self._stored, points, key)
        try:
            images = {
                name: self._preprocess.volume(
                    name,
                    self._shard_set.crop(sample, name, box.start, box.size),
                    box=box,
                    statistics=statistics.get(name),
                )
                for name in self._names
                if self._has[name][sample]
            }
            targets = self._target_of(sample, box)
        except SampleError:
            raise
        except DataError as error:  # values that no recipe would have stored
            key_of = self._shard_set.manifest.samples.key
            raise SampleError(f"sample {key_of[sample]!r} of {self._shard_set.place!r}: {error}", sample) from error
        if key is not None:
            images, targets = vary_volumes(images, targets, self._config.augment, key)
        return {**images, **targets}

    def _target_of(self, sample: int, box: Box) -> dict[str, np.ndarray]:
        if self._target is None or not self._has[self._target][sample]:
            return {}
        raw_xyz = self._shard_set.crop(sample, self._target, box.start, box.size)[0]
        return {self._target: finish_target(class_map(raw_xyz, self._values), box)}

    @property
    def _values(self) -> list[int]:
        assert self._target is not None
        manifest = self._shard_set.manifest
        return manifest.modalities[self._target].values or list(range(len(manifest.class_names)))

    def _places(self, sample: int) -> Points | None:
        if self._target is None or self._points is None or not self._has[self._target][sample]:
            return None
        return read_points(self._numbers(sample, self._points), self._values[1:])

    def _numbers(self, sample: int, aux: str) -> np.ndarray:
        found = self._shard_set.read(sample, (aux,))
        if aux not in found:
            key = self._shard_set.manifest.samples.key[sample]
            raise DataError(f"sample {key!r} lacks {aux!r}, which its volume needs; build the shard set again")
        return found[aux]

    def stack(self, views: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Views of samples as a batch, (B, ...) each; a sample that lacks a volume has zeros, a target no class."""
        made: dict[str, np.ndarray] = {}
        for name in self._has:
            found = {place: view[name] for place, view in enumerate(views) if name in view}
            shape = next((values.shape for values in found.values()), self._shape(name))
            blank = (UNLABELLED, np.int64) if name == self._target else (0, np.float32)
            made[name] = np.full((len(views), *shape), *blank)
            for place, values in found.items():
                made[name][place] = values
        return made

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a batch in which no sample has the volume."""
        view = self._config
        size = view.crop or evaluation_box(view, self._stored, self._stored).made
        return size if name == self._target else (self._shard_set.manifest.modalities[name].shape[0], *size)
