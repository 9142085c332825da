"""Random changes of an input as functions of a key: the same key gives the same change, in any batch, on any rank.

Only exactly rounded arithmetic and table look-ups touch the values: the result of numpy's other functions may depend
on where in an array a value stands, and so on the batch.
"""

# Shapes: B samples, F features, H height, W width, C channels

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distkd.base import StrictConfig
from distkd.ops.draws import fold_in, text_key, uniform

__all__ = ["AugmentConfig", "ImageDraw", "crop_image", "crop_size", "image_draws", "jitter_matrix", "vary_vectors"]

Probability = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, lt=1)]

GREY = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma of red, green, blue."""

_TO_YIQ = np.array([GREY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)

_NORMAL_BITS = 16


class AugmentConfig(StrictConfig):
    """How training samples are varied; nothing is by default. Evaluation takes the centre crop and no more."""

    hflip: Probability = 0.0
    """Probability of mirroring left and right."""
    vflip: Probability = 0.0
    """Probability of mirroring top and bottom."""
    crop: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] = 1.0
    """Side of a random square crop: up to 1 a share of the image's side, above 1 pixels; one for all or per modality.
    Its relative position is the same in all images of a sample. Sets the model's input size, in evaluation too."""
    brightness: Amount = 0.0
    """Images are multiplied by 1 - amount .. 1 + amount."""
    contrast: Amount = 0.0
    """Distances from the mean grey are multiplied by 1 - amount .. 1 + amount."""
    saturation: Amount = 0.0
    """Distances from each pixel's grey are multiplied by 1 - amount .. 1 + amount; colour images only."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Colours are turned around the grey axis by -amount .. amount of a full turn; colour images only."""
    vector_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of normal noise on vectors, in standard deviations of each column."""
    vector_dropout: Amount = 0.0
    """Probability that a vector's value is replaced by its column's training mean."""


@dataclass(frozen=True, slots=True)
class ImageDraw:
    """One view's random numbers, shared by all images of the sample."""

    top: float
    """Relative position of the crop, 0 <= top <= 1; 0.5 is the centre."""
    left: float
    hflip: bool
    vflip: bool
    brightness: float
    contrast: float
    saturation: float
    hue: float


CENTRE = ImageDraw(top=0.5, left=0.5, hflip=False, vflip=False, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0)


def image_draws(config: AugmentConfig, key_B: Tensor) -> list[ImageDraw]:
    """The draws of each view key."""
    u_B8: list[list[float]] = uniform(fold_in(key_B, text_key("image")), 8, dtype=torch.float64).numpy().tolist()
    return [
        ImageDraw(
            top=u[0],
            left=u[1],
            hflip=u[2] < config.hflip,
            vflip=u[3] < config.vflip,
            brightness=1 + config.brightness * (2 * u[4] - 1),
            contrast=1 + config.contrast * (2 * u[5] - 1),
            saturation=1 + config.saturation * (2 * u[6] - 1),
            hue=config.hue * (2 * u[7] - 1),
        )
        for u in u_B8
    ]


def crop_size(crop: float | dict[str, float], modality: str, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels of a modality's own grid; larger than the image where the config asks for that."""
    value = crop.get(modality, 1.0) if isinstance(crop, dict) else crop
    if value > 1:
        return round(value), round(value)
    return max(1, round(value * height)), max(1, round(value * width))


def crop_image(image_HWC: np.ndarray, size: tuple[int, int], draw: ImageDraw) -> np.ndarray:
    """A view of the pixels: nothing is copied."""
    height, width = size
    # rounded, not floored: a coarse and a fine copy of a scene are then cut at one place, up to half a coarse pixel
    top = int(draw.top * (image_HWC.shape[0] - height) + 0.5)
    left = int(draw.left * (image_HWC.shape[1] - width) + 0.5)
    cut = image_HWC[top : top + height, left : left + width]
    return cut[:: -1 if draw.vflip else 1, :: -1 if draw.hflip else 1]


def jitter_matrix(draw: ImageDraw, channels: int, mean_grey: float) -> tuple[np.ndarray, float]:
    """Brightness, contrast, saturation and hue in this order as one matrix (C, C) and one offset.

    Args:
        mean_grey: of the crop before any change.
    """
    scale = draw.brightness * draw.contrast
    offset = draw.brightness * (1 - draw.contrast) * mean_grey
    if channels != 3:
        return np.eye(channels) * scale, offset
    grey = np.tile(np.array(GREY), (3, 1))
    saturate = draw.saturation * np.eye(3) + (1 - draw.saturation) * grey
    # both steps leave grey as it is, so the offset passes through unchanged
    return _turn(draw.hue) @ saturate * scale, offset


def _turn(hue: float) -> np.ndarray:
    """Rotation of colours around the grey axis by a share of a full turn, keeping the luma (the YIQ form)."""
    if hue == 0:
        return np.eye(3)
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    return _FROM_YIQ @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _TO_YIQ


def vary_vectors(vector_BF: np.ndarray, config: AugmentConfig, modality: str, key_B: Tensor) -> np.ndarray:
    """Noise, then dropout, on standardised vectors; each row depends on its own key only."""
    key_B = fold_in(key_B, text_key(modality))
    n_features = vector_BF.shape[1]
    if config.vector_noise:
        u_BF = uniform(fold_in(key_B, 0), n_features, dtype=torch.float64).numpy()
        normal_BF = _normal_table()[(u_BF * (1 << _NORMAL_BITS)).astype(np.int64)]
        vector_BF = vector_BF + np.float32(config.vector_noise) * normal_BF
    if config.vector_dropout:
        kept_BF = uniform(fold_in(key_B, 1), n_features, dtype=torch.float64).numpy() >= config.vector_dropout
        vector_BF = np.where(kept_BF, vector_BF, np.float32(0))
    return vector_BF


@lru_cache(maxsize=1)
def _normal_table() -> np.ndarray:
    """Quantiles of the standard normal distribution at 2^16 equally likely places, float32, |x| < 4.4."""
    n, normal = 1 << _NORMAL_BITS, NormalDist()
    return np.array([normal.inv_cdf((place + 0.5) / n) for place in range(n)], dtype=np.float32)
