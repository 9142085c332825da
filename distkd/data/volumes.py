"""Volumes: numbers stored beside them, which part of one a sample shows, and how it becomes a model's input.

Axes are those of the file, (x, y, z) of NIfTI. The cards of the brain tumour methods write (D, H, W) = (z, x, y): their
crop of 80 x 160 x 160 is (160, 160, 80) here. Random changes of what was cut are in `volume_augment`.
"""

# Shapes: C channels, x y z voxels, V raw values of a label map, n points of each

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from distkd.base import StrictConfig
from distkd.data.volume_augment import VolumeAugmentConfig
from distkd.errors import ConfigError, DataError
from distkd.ops.draws import fold_in, text_key, uniform
from distkd.ops.permutation import distinct

__all__ = [
    "STATISTICS",
    "Box",
    "Normalise",
    "Points",
    "VolumeConfig",
    "VolumeView",
    "class_map",
    "crop_box",
    "evaluation_box",
    "finish_image",
    "finish_target",
    "foreground_points",
    "normalise_crop",
    "read_points",
    "volume_statistics",
]

Size = tuple[int, int, int]
Normalise = Literal["none", "zscore_nonzero", "lckd"]
Probability = Annotated[float, Field(ge=0, le=1)]

STATISTICS = ("background", "clip", "mean", "std", "maximum")
"""What `volume_statistics` counts, in order: names for the columns of the stored vector."""

_ENOUGH = 50
"""Voxels that a bin of the histogram has to hold for its value not to be clipped."""

_MOST_BINS = 1 << 16


class VolumeView(StrictConfig):
    """What of a volume a model is given, random changes apart; it travels with an exported model."""

    crop: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Voxels (x, y, z) of what the model sees; without it the whole volume."""
    evaluate: Literal["crop", "whole"] = "crop"
    """Evaluation sees the centre crop, or all of it; matters where `crop` is set."""
    slices: tuple[NonNegativeInt, PositiveInt] | None = None
    """First z and the one behind the last that are used; only without a crop."""
    resize: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Whole volumes are brought to this size; only without a crop."""
    interpolation: Literal["nearest", "linear"] = "nearest"
    """How `resize` makes images. Nearest takes voxel floor(i n / m); label maps are always nearest."""
    normalise: Normalise = "zscore_nonzero"
    """`lckd`: bright outliers clipped, then the z-score over all voxels that are not background, which becomes 0.
    `zscore_nonzero`: the same without clipping the values themselves. `none`: as stored."""

    @model_validator(mode="after")
    def _one_geometry(self) -> Self:
        if self.crop is not None and (self.slices is not None or self.resize is not None):
            which = "slices" if self.slices is not None else "resize"
            raise ConfigError(
                f"data.volume has crop and {which}; a crop is cut from the volume as it is stored: leave one out"
            )
        if self.slices is not None and self.slices[0] >= self.slices[1]:
            raise ConfigError(f"data.volume.slices={self.slices} is empty; give the first and the one behind the last")
        return self


class VolumeConfig(VolumeView):
    """How volumes are cut, normalised and varied. All modalities and the target of a sample are cut alike."""

    foreground: Probability = 0.0
    """Probability that one of `regions`, or anywhere, is drawn to centre the crop on."""
    regions: dict[str, Annotated[list[int], Field(min_length=1)]] = Field(default_factory=dict)
    """Raw values of the target that make up each region: {et: [4], wt: [1, 2, 4], tc: [1, 4]}."""
    anywhere: bool = True
    """A random place is one more choice beside the regions, so that a foreground of 0.5 with three regions centres
    0.375 of the crops on one, as the source does; without it 0.5 of them."""
    margin: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] = (0, 0, 0)
    """Voxels at both ends that a crop at a random place leaves out, where the volume is large enough."""
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """The crop's size is multiplied by a number of this range, then brought back to `crop`: linear, labels nearest."""
    scale_probability: Probability = 0.0
    augment: VolumeAugmentConfig = VolumeAugmentConfig()
    """Random changes of training crops."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"data.volume.scale={self.scale} is empty; give the lower end first")
        if self.foreground and not self.regions:
            raise ConfigError(
                f"data.volume.foreground={self.foreground} needs data.volume.regions: raw values by name, such as "
                "{wt: [1, 2, 4]}"
            )
        if self.crop is None and (self.foreground or self.scale_probability):
            which = "foreground" if self.foreground else "scale_probability"
            raise ConfigError(f"data.volume.{which} is about crops; set data.volume.crop, or leave it out")
        return self


@dataclass(frozen=True, slots=True)
class Box:
    """The part of a volume to read, and what it stands for."""

    start: Size
    size: Size
    full: Size
    """`size`, or more where the volume ends before: the rest is background."""
    made: Size
    """What the model is given, resampled if it is not `full`."""
    interpolation: Literal["nearest", "linear"] = "linear"
    """Of images where they are resampled."""


Points = Mapping[int, tuple[int, np.ndarray]]
"""Raw value to (how many voxels have it, int (n, 3) places of some of them)."""


def volume_statistics(volume: np.ndarray) -> np.ndarray:
    """`STATISTICS` of a whole volume, float64 (5,), for `normalise_crop`.

    The background is the value of the first corner. Values are clipped at the highest of int(max) histogram bins that
    holds 50 voxels; mean and standard deviation (of the population) are those of the clipped voxels that differ from
    the background.

    Raises:
        DataError: it holds values that are not finite.

    Source: card `lckd`, section 1. Its bins are those of whole numbers from 0 on; here the clip value is the bin's
    lower edge, which is the same there and right elsewhere. A volume without a bin of 50, such as one of 0..1, is not
    clipped.
    """
    values = volume.reshape(-1)
    _check_finite(values)
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    clip, n_bins = high, min(int(high), _MOST_BINS)
    if n_bins > 0 and high > low:
        counts, edges = np.histogram(values, bins=n_bins, range=(low, high))
        enough = np.flatnonzero(counts >= _ENOUGH)
        clip = float(edges[enough[-1]]) if len(enough) else high
    np.minimum(values, clip, out=values)
    background = float(values[0])
    inside = values[values != background]
    mean, std = (float(inside.mean()), float(inside.std())) if len(inside) else (0.0, 0.0)
    return np.array([background, clip, mean, std, high])


def foreground_points(target: np.ndarray, values: Sequence[int], n: int, key: Tensor) -> np.ndarray:
    """Places of each raw value in a label map: a crop can then be centred on one without reading the map.

    Args:
        target: (x, y, z) or (1, x, y, z) whole numbers.
        values: raw values to look for, as a rule all but the background.
        n: places kept of each.
        key: int64, one number; the only source of randomness.

    Returns:
        int32 (V * (1 + 3 n),): for each value how many voxels have it, then n places (x, y, z): drawn without
        replacement, repeated in turn where there are fewer, -1 where there is none. `read_points` takes it apart.
    """
    shape = target.shape[-3:]
    flat = target.reshape(-1)
    rows = np.full((len(values), 1 + 3 * n), -1, dtype=np.int32)
    for row, value in zip(rows, values, strict=True):
        places = np.flatnonzero(flat == value)
        row[0] = len(places)
        if len(places):
            own = fold_in(key.reshape(1), fold_in(torch.tensor(text_key("points")), int(value)))
            chosen = places[distinct(own, min(n, len(places)), len(places))[0].numpy()]
            row[1:] = np.stack(np.unravel_index(np.resize(chosen, n), shape), axis=1).reshape(-1)
    return rows.reshape(-1)


def read_points(stored: np.ndarray, values: Sequence[int]) -> Points:
    """What `foreground_points` stored for the same values."""
    if len(values) == 0 or len(stored) % len(values) or (len(stored) // len(values)) % 3 != 1:
        raise DataError(
            f"{len(stored)} stored numbers are not the foreground points of {len(values)} label values; "
            "build the shard set again"
        )
    rows = stored.reshape(len(values), -1)
    return {value: (int(row[0]), row[1:].reshape(-1, 3)) for value, row in zip(values, rows, strict=True)}


def evaluation_box(view: VolumeView, shape: Size, stored: Size) -> Box:
    """The centre crop, or all of a volume of this shape.

    Args:
        stored: the largest volume of the set, to which smaller ones are filled up, unless they are resized.

    Raises:
        ConfigError: the volume has fewer slices than the config uses.
    """
    if view.crop is None or view.evaluate == "whole":
        return _whole(view, shape, stored)
    return _place([(n - c) // 2 for n, c in zip(shape, view.crop, strict=True)], view.crop, shape, view.crop)


def crop_box(config: VolumeConfig, shape: Size, stored: Size, points: Points | None, key: Tensor) -> Box:
    """A training sample's part of a volume of this shape: a function of the key.

    Args:
        points: of its target; None where it has none, and the crop is then anywhere.
        key: int64, one number, of this view of the sample.

    Source: card `lckd`, section 1.
    """
    if config.crop is None:
        return _whole(config, shape, stored)
    u: list[float] = uniform(fold_in(key.reshape(()), text_key("crop")), 9, dtype=torch.float64).numpy().tolist()
    low, high = config.scale
    factor = low + (high - low) * u[1] if u[0] < config.scale_probability else 1.0
    size = [max(1, int(c * factor)) for c in config.crop]
    centre = _centre(config, points, u[3:6]) if u[2] < config.foreground else None
    if centre is not None:
        start = [int(c) - s // 2 for c, s in zip(centre, size, strict=True)]
    else:
        start = [
            _anywhere(n, s, margin, draw) for n, s, margin, draw in zip(shape, size, config.margin, u[6:9], strict=True)
        ]
    return _place(start, size, shape, config.crop)


def _anywhere(n: int, size: int, margin: int, draw: float) -> int:
    """A start in [margin, n - margin - size], or without the margin where that is empty."""
    first, last = (margin, n - margin - size) if n - 2 * margin >= size else (0, max(0, n - size))
    return first + int(draw * (last - first + 1))


def _centre(config: VolumeConfig, points: Points | None, u: Sequence[float]) -> np.ndarray | None:
    """A random voxel of a random region; None for anywhere, and where the region does not occur."""
    regions = list(config.regions.values())
    choice = int(u[0] * (len(regions) + config.anywhere))
    if points is None or choice == len(regions):
        return None
    unknown = [value for value in regions[choice] if value not in points]
    if unknown:
        raise ConfigError(
            f"data.volume.regions has the value {unknown[0]}, the stored foreground points are of {sorted(points)}; "
            "use these"
        )
    rank = u[1] * sum(points[value][0] for value in regions[choice])
    for value in regions[choice]:
        count, places = points[value]
        if rank < count:
            return places[int(u[2] * len(places))]
        rank -= count
    return None


def _place(start: Sequence[int], size: Sequence[int], shape: Size, made: Size) -> Box:
    """The box moved into the volume; where it is larger, all of that axis."""
    inside = [min(s, n) for s, n in zip(size, shape, strict=True)]
    moved = [min(max(0, first), n - s) for first, s, n in zip(start, inside, shape, strict=True)]
    return Box(cast(Size, tuple(moved)), cast(Size, tuple(inside)), cast(Size, tuple(size)), made)


def _whole(view: VolumeView, shape: Size, stored: Size) -> Box:
    """All of a volume that the config uses."""
    first, end = view.slices or (0, shape[2])
    if end > shape[2]:
        raise ConfigError(
            f"data.volume.slices={view.slices} of a volume of {shape[2]} slices; its end can be {shape[2]} at most"
        )
    size = (shape[0], shape[1], end - first)
    if view.resize is not None:
        return Box((0, 0, first), size, size, view.resize, view.interpolation)
    depth = size[2] if view.slices else max(shape[2], stored[2])
    full = (max(shape[0], stored[0]), max(shape[1], stored[1]), depth)
    return Box((0, 0, first), size, full, full)


def normalise_crop(values: np.ndarray, statistics: np.ndarray | None, how: Normalise) -> np.ndarray:
    """Float32 of stored values, which may be any part of the volume that the statistics are of.

    Args:
        statistics: `volume_statistics` of the whole volume; not needed for `none`.

    Raises:
        DataError: values that are not finite.
    """
    _check_finite(values)
    made = values.astype(np.float32)
    if how == "none":
        return made
    assert statistics is not None, how
    assert len(statistics) == len(STATISTICS), statistics
    background, clip, mean, std, _ = (np.float32(number) for number in statistics)
    if how == "lckd":
        np.minimum(made, clip, out=made)
    outside = made == background
    made -= mean
    made /= std if std > 0 else np.float32(1)
    made[outside] = 0
    return made


def finish_image(cut_Cxyz: np.ndarray, box: Box) -> np.ndarray:
    """A normalised part of a volume as a model is given it: filled up with 0, then resampled, float32."""
    cut_Cxyz = _fill(cut_Cxyz, box)
    if box.full == box.made:
        return cut_Cxyz
    return _linear(cut_Cxyz, box.made) if box.interpolation == "linear" else _nearest(cut_Cxyz, box.made, 0.0)


def finish_target(cut_xyz: np.ndarray, box: Box) -> np.ndarray:
    """The same part of a label map: filled up with 0, nearest voxels, same type."""
    cut_xyz = _fill(cut_xyz, box)
    if box.full == box.made:
        return cut_xyz
    # where images are taken between voxels, a label's place is the middle of a voxel, otherwise its first corner
    return _nearest(cut_xyz, box.made, 0.5 if box.interpolation == "linear" else 0.0)


def class_map(target: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Raw label values as classes, int64: the position of each in `values`.

    Raises:
        DataError: a value that is not listed.
    """
    order = np.argsort(values)
    place = np.searchsorted(values, target, sorter=order).clip(max=len(values) - 1)
    classes = order[place]
    wrong = np.asarray(values)[classes] != target
    if wrong.any():
        found = np.unique(target[wrong]).tolist()
        raise DataError(f"the label map holds {found}, the values of its classes are {list(values)}; mend the map")
    return classes


def _fill(cut: np.ndarray, box: Box) -> np.ndarray:
    """Zeros behind the end of the volume."""
    lead = cut.ndim - 3
    assert cut.shape[lead:] == box.size, (cut.shape, box)
    if box.size == box.full:
        return cut
    return np.pad(cut, [(0, 0)] * lead + [(0, f - s) for f, s in zip(box.full, box.size, strict=True)])


def _nearest(values: np.ndarray, size: Size, place: float) -> np.ndarray:
    """Voxel floor((i + place) n / m) on each axis."""
    lead = values.ndim - 3
    index = [((np.arange(m) + place) * n / m).astype(np.int64) for n, m in zip(values.shape[lead:], size, strict=True)]
    return values[(..., *np.ix_(*index))]


def _linear(values_Cxyz: np.ndarray, size: Size) -> np.ndarray:
    """Trilinear about voxel centres, zeros outside, as the source's; unlike `interpolate`, bits know no threads."""
    values = torch.as_tensor(np.array(values_Cxyz, dtype=np.float32, order="C"))[None]
    same = torch.eye(3, 4)[None]
    grid = F.affine_grid(same, [1, values.shape[1], *size], align_corners=False)
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].numpy()


def _check_finite(values: np.ndarray) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        found = int(np.count_nonzero(~np.isfinite(values)))
        raise DataError(
            f"the volume holds {found} of {values.size} values that are not finite (NaN or infinite); mend the file"
        )
