"""Random changes of volumes after they are cut: a function of the key, the same bits wherever it is computed.

The transforms are those of the source (card `lckd`, section 1; batchgenerators). Geometry is one resampling by MONAI.
The rest is scipy, which the source calls too, and exactly rounded arithmetic: the torch form of several of MONAI's
(`AdjustContrast`, `RandSimulateLowResolution`) gives other bits with another number of threads, and so at another world
size; its `Rand` classes draw from a generator of 32 bits of seed, ours draw from the key.
"""

# Shapes: C channels, x y z voxels

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from distkd.base import StrictConfig
from distkd.data.augment import normal_noise
from distkd.errors import ConfigError
from distkd.ops.draws import fold_in, text_key, uniform, words

__all__ = ["VolumeAugmentConfig", "vary_volumes"]

Probability = Annotated[float, Field(ge=0, le=1)]
Range = tuple[PositiveFloat, PositiveFloat]


class VolumeAugmentConfig(StrictConfig):
    """Random changes of training crops, in this order; nothing is changed by default.

    A probability is drawn once for a sample; amounts are drawn for each channel where the text says so. The ranges are
    the source's, whose probabilities are: elastic, rotation, zoom, blur 0.2; noise 0.1; multiply, add, contrast, gamma
    0.15; low_resolution 0.25; flip 0.5.
    """

    elastic: Probability = 0.0
    """Voxels move by smoothed noise. This, rotation and zoom are one resampling; labels take the nearest voxel."""
    elastic_amplitude: tuple[Annotated[float, Field(ge=0)], PositiveFloat] = (0.0, 900.0)
    """Factor of the smoothed noise of -1..1, in voxels."""
    elastic_sigma: Range = (9.0, 13.0)
    """Standard deviation of the smoothing, in voxels."""
    rotation: Probability = 0.0
    """Turn about x, then y, then z."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 15.0
    """Largest of each of the three angles, either way."""
    zoom: Probability = 0.0
    """Isotropic, about the centre: half the time below 1 (larger structures), half above."""
    zoom_range: Range = (0.85, 1.25)
    interpolation: Literal["linear", "spline"] = "linear"
    """Of images in that resampling; cubic splines are the source's and take several times as long."""
    noise: Probability = 0.0
    """Normal noise with a standard deviation of 0..`noise_std`."""
    noise_std: PositiveFloat = 0.1
    blur: Probability = 0.0
    """Gaussian blur of half of the channels, each with its own standard deviation in voxels."""
    blur_sigma: Range = (0.5, 1.0)
    multiply: Probability = 0.0
    """Each channel is multiplied by a number of the range."""
    multiply_range: Range = (0.75, 1.25)
    add: Probability = 0.0
    """A normal number is added to half of the channels."""
    add_std: PositiveFloat = 0.1
    contrast: Probability = 0.0
    """Distances from each channel's mean are multiplied by a number of the range, half the time below 1, half above;
    the channel stays in its old range."""
    contrast_range: Range = (0.75, 1.25)
    low_resolution: Probability = 0.0
    """Half of the channels are made smaller by a factor of the range (nearest) and back (see `interpolation`)."""
    low_resolution_range: tuple[PositiveFloat, Annotated[float, Field(gt=0, le=1)]] = (0.5, 1.0)
    gamma: Probability = 0.0
    """Each channel, scaled to 0..1, to a power of the range, half the time below 1, half above; mean and standard
    deviation are restored."""
    gamma_range: Range = (0.7, 1.5)
    flip: tuple[Probability, Probability, Probability] = (0.0, 0.0, 0.0)
    """Mirror along x, y, z."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in type(self).model_fields:
            if not name.endswith(("_range", "_sigma", "_amplitude")):
                continue
            low, high = cast(tuple[float, float], getattr(self, name))
            both_sides = name in ("zoom_range", "contrast_range", "gamma_range")
            if low > high or (both_sides and not low <= 1 <= high):
                wanted = "the lower end first" + (", and 1 inside" if both_sides else "")
                raise ConfigError(f"data.volume.augment.{name}=({low}, {high}); give {wanted}")
        return self


@dataclass(frozen=True, slots=True)
class _Draws:
    """Numbers of one sample by name: another change that is switched on moves none of them."""

    key: Tensor

    def happens(self, name: str, probability: float) -> bool:
        return probability > 0 and self.numbers(f"{name}/happens", 1)[0] < probability

    def numbers(self, name: str, n: int) -> list[float]:
        drawn: list[float] = uniform(self.of(name), n, dtype=torch.float64).numpy().tolist()
        return drawn

    def of(self, name: str) -> Tensor:
        return fold_in(self.key, text_key(name))


def vary_volumes(
    images: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], config: VolumeAugmentConfig, key: Tensor
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Changed copies of a sample's crops; the arguments are left as they are.

    Args:
        images: (C, x, y, z) float32 by modality, normalised, of one size.
        targets: (x, y, z) label maps of the same size; moved like the images, nearest, type kept.
        key: int64, one number, of this view of the sample; the only source of randomness.

    Returns:
        Images and targets, contiguous. What happens to a modality does not depend on which others there are.

    Source: card `lckd`, section 1. Differences: rotation and zoom keep the centre in its place (the source's patch
    moves by half a voxel on each axis), labels are nearest, not a threshold of interpolated maps, and images are
    linear unless `interpolation` says spline.
    """
    draws = _Draws(key.reshape(()))
    made: dict[str, np.ndarray] = {
        name: np.array(values, dtype=np.float32, order="C") for name, values in images.items()
    }
    labels: dict[str, np.ndarray] = {name: np.array(values, order="C") for name, values in targets.items()}
    everything = [*made.values(), *labels.values()]
    assert len({values.shape[-3:] for values in everything}) <= 1, [values.shape for values in everything]
    if everything:
        size = cast(tuple[int, int, int], everything[0].shape[-3:])
        coordinates = _coordinates(config, draws, size)
        if coordinates is not None:
            made = {name: _resample(values, coordinates, config.interpolation) for name, values in made.items()}
            labels = {name: _resample(values[None], coordinates, "nearest")[0] for name, values in labels.items()}
    for name, values_Cxyz in made.items():
        _intensities(values_Cxyz, config, draws, name)
    mirrored = [u < probability for u, probability in zip(draws.numbers("flip", 3), config.flip, strict=True)]
    if any(mirrored):
        steps = (..., *(slice(None, None, -1 if mirror else 1) for mirror in mirrored))
        made = {name: np.ascontiguousarray(values[steps]) for name, values in made.items()}
        labels = {name: np.ascontiguousarray(values[steps]) for name, values in labels.items()}
    return made, labels


def _coordinates(config: VolumeAugmentConfig, draws: _Draws, size: tuple[int, int, int]) -> np.ndarray | None:
    """(3, x, y, z) places to read from, in voxels from the centre; None where nothing moves."""
    elastic = draws.happens("elastic", config.elastic)
    rotation = draws.happens("rotation", config.rotation)
    zoom = draws.happens("zoom", config.zoom)
    if not (elastic or rotation or zoom):
        return None
    from monai.transforms.utils import create_grid, create_rotate, create_scale

    place = np.asarray(create_grid(size, homogeneous=False, dtype=np.float32), dtype=np.float32)
    if elastic:
        place += _displacement(config, draws, size)
    matrix = np.eye(4)
    if rotation:
        most = math.radians(config.rotation_degrees)
        matrix = np.asarray(create_rotate(3, [most * (2 * u - 1) for u in draws.numbers("rotation", 3)]))
    if zoom:
        side, u = draws.numbers("zoom", 2)
        matrix = matrix @ np.asarray(create_scale(3, [_either_side(config.zoom_range, side, u)] * 3))
    # term by term: the bits of a matrix product may depend on the number of threads
    moved = np.empty_like(place)
    for axis in range(3):
        np.multiply(place[0], np.float32(matrix[axis, 0]), out=moved[axis])
        moved[axis] += place[1] * np.float32(matrix[axis, 1])
        moved[axis] += place[2] * np.float32(matrix[axis, 2])
    return moved


def _displacement(config: VolumeAugmentConfig, draws: _Draws, size: tuple[int, int, int]) -> np.ndarray:
    amount, width = draws.numbers("elastic", 2)
    amplitude = np.float32(_between(config.elastic_amplitude, amount))
    noise = words(draws.of("elastic/noise"), 3 * math.prod(size)).numpy().astype(np.float32)
    noise *= np.float32(2.0**-31)
    noise = noise.reshape(3, *size)
    sigma = _between(config.elastic_sigma, width)
    return np.stack([_ndimage().gaussian_filter(axis, sigma, mode="constant") * amplitude for axis in noise])


def _resample(values_Cxyz: np.ndarray, place: np.ndarray, how: Literal["nearest", "linear", "spline"]) -> np.ndarray:
    """Values at places in voxels from the centre, zero outside."""
    from monai.transforms.spatial.array import Resample

    resample = Resample(
        mode={"nearest": "nearest", "linear": "bilinear", "spline": 3}[how],
        padding_mode="constant" if how == "spline" else "zeros",
        dtype=np.float32,
    )
    made: Any = resample(torch.as_tensor(values_Cxyz.astype(np.float32)), grid=torch.as_tensor(place))
    return np.ascontiguousarray(np.asarray(made.numpy()), dtype=values_Cxyz.dtype)


def _intensities(values_Cxyz: np.ndarray, config: VolumeAugmentConfig, draws: _Draws, name: str) -> None:
    """The changes of brightness and sharpness of one modality, in place, channel by channel."""
    happens = {
        change: draws.happens(change, getattr(config, change))
        for change in ("noise", "blur", "multiply", "add", "contrast", "low_resolution", "gamma")
    }
    if not any(happens.values()):
        return
    noise_std = config.noise_std * draws.numbers("noise", 1)[0]
    for channel, values in enumerate(values_Cxyz):
        own = _Draws(draws.of(f"{name}/{channel}"))
        if happens["noise"]:
            values += np.float32(noise_std) * normal_noise(own.of("noise"), values.size).reshape(values.shape)
        if happens["blur"] and own.numbers("blur", 2)[0] < 0.5:
            _blur(values, _between(config.blur_sigma, own.numbers("blur", 2)[1]))
        if happens["multiply"]:
            values *= np.float32(_between(config.multiply_range, own.numbers("multiply", 1)[0]))
        if happens["add"] and own.numbers("add", 1)[0] < 0.5:
            values += np.float32(config.add_std) * normal_noise(own.of("add/amount"), 1)
        if happens["contrast"]:
            _stretch(values, _either_side(config.contrast_range, *own.numbers("contrast", 2)))
        if happens["low_resolution"] and own.numbers("low_resolution", 2)[0] < 0.5:
            factor = _between(config.low_resolution_range, own.numbers("low_resolution", 2)[1])
            _coarsen(values, factor, order=3 if config.interpolation == "spline" else 1)
        if happens["gamma"]:
            _gamma(values, _either_side(config.gamma_range, *own.numbers("gamma", 2)))


def _blur(values: np.ndarray, sigma: float) -> None:
    _ndimage().gaussian_filter(values, sigma, output=values)


def _stretch(values: np.ndarray, factor: float) -> None:
    low, high, mean = values.min(), values.max(), np.float32(values.mean(dtype=np.float64))
    values -= mean
    values *= np.float32(factor)
    values += mean
    np.clip(values, low, high, out=values)


def _coarsen(values: np.ndarray, factor: float, *, order: int) -> None:
    size = [max(1, round(n * factor)) for n in values.shape]
    ndimage = _ndimage()
    small: np.ndarray = ndimage.zoom(
        values, [m / n for m, n in zip(size, values.shape, strict=True)], order=0, mode="nearest", grid_mode=True
    )
    back = [n / m for n, m in zip(values.shape, small.shape, strict=True)]
    ndimage.zoom(small, back, order=order, mode="nearest", grid_mode=True, output=values)
    np.clip(values, small.min(), small.max(), out=values)  # splines overshoot


def _gamma(values: np.ndarray, gamma: float) -> None:
    low, mean, std = values.min(), values.mean(dtype=np.float64), values.std(dtype=np.float64)
    extent = values.max() - low
    values -= low
    values /= extent + np.float32(1e-7)
    np.power(values, np.float32(gamma), out=values)
    # what the power is scaled back by is undone by the moments
    new_mean, new_std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    values -= np.float32(new_mean)
    values *= np.float32(std / (new_std + 1e-8))
    values += np.float32(mean)


def _ndimage() -> Any:
    return import_module("scipy.ndimage")  # not at the top: whoever imports distkd would wait for it


def _between(ends: tuple[float, float], u: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * u


def _either_side(ends: tuple[float, float], side: float, u: float) -> float:
    """Half the time between the lower end and 1, half between 1 and the upper end."""
    return _between((ends[0], 1.0), u) if side < 0.5 else _between((1.0, ends[1]), u)
