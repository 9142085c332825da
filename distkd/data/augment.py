"""Random changes of an input as functions of a key: the same key gives the same change, in any batch, on any rank.

Only exactly rounded arithmetic and table look-ups touch the values: the result of numpy's other functions may depend
on where in an array a value stands, and so on the batch; that of some of torch's (`interpolate`) on the number of
threads, and so on the world size. `grid_sample` of one image is the same bits with any number of threads.
"""

# Shapes: B samples, F features, H height, W width, C channels

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from statistics import NormalDist
from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from distkd.base import StrictConfig
from distkd.errors import ConfigError
from distkd.ops.draws import counted, fold_in, text_key, uniform

__all__ = [
    "AugmentConfig",
    "ImageDraw",
    "corner",
    "crop_image",
    "crop_size",
    "image_draws",
    "jitter_matrix",
    "jitter_steps",
    "normal_noise",
    "vary_vectors",
    "warp_image",
    "warp_thetas",
]

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
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Images are turned about the crop's centre by -rotation .. rotation degrees."""
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Images are enlarged about the crop's centre by a factor of this range, the same in both directions."""
    shift: tuple[Amount, Amount] = (0.0, 0.0)
    """Images are moved by up to these shares of the crop's width and height, either way."""
    affine_probability: Probability = 1.0
    """Of each of rotation, scale and shift, drawn one by one."""
    warps: Literal["composed", "successive"] = "composed"
    """Rotation, scale and shift as one bilinear resampling, which reads around the crop where the image goes on; or
    each as one of its own, of what the one before left of the crop (the source's way: blurs up to three times). Zeros
    outside."""
    brightness: Amount = 0.0
    """Images are multiplied by 1 - amount .. 1 + amount."""
    contrast: Amount = 0.0
    """Distances from the mean grey are multiplied by 1 - amount .. 1 + amount."""
    saturation: Amount = 0.0
    """Distances from each pixel's grey are multiplied by 1 - amount .. 1 + amount; colour images only."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Colours are turned around the grey axis by -amount .. amount of a full turn; colour images only."""
    jitter_probability: Probability = 1.0
    """Of changing brightness, contrast, saturation and hue, all four."""
    jitter_order: Literal["fixed", "random"] = "fixed"
    """`fixed`: all at once, then clamped to 0..1; without clamping in between, no order would differ from another.
    `random`: brightness, contrast and saturation in an order drawn for each sample, then hue, clamped after each. The
    source draws one order for a batch, which would make a view depend on the batch that it is in."""
    vector_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of normal noise on vectors, in standard deviations of each column."""
    vector_dropout: Amount = 0.0
    """Probability that a vector's value is replaced by its column's training mean."""

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"data.augment.scale={self.scale} is empty; give the lower end first")
        return self


Colour = Literal["brightness", "contrast", "saturation", "hue"]

_ORDERS: tuple[tuple[Colour, ...], ...] = tuple(
    (*order, "hue") for order in permutations(("brightness", "contrast", "saturation"))
)


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
    angle: float = 0.0
    """Degrees, from the x axis towards the y axis, which points down."""
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    """Shares of the crop's width and height."""
    successive: bool = False
    """Angle, scale and shift as a resampling each."""
    order: tuple[Colour, ...] = ()
    """Of the steps of the jitter; empty: all at once."""

    @property
    def warps(self) -> bool:
        return self.angle != 0.0 or self.scale != 1.0 or self.shift != (0.0, 0.0)

    @property
    def jitters(self) -> bool:
        return not self.brightness == self.contrast == self.saturation == 1.0 or self.hue != 0.0


CENTRE = ImageDraw(top=0.5, left=0.5, hflip=False, vflip=False, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0)


def image_draws(config: AugmentConfig, key_B: Tensor) -> list[ImageDraw]:
    """The draws of each view key."""
    u_B: list[list[float]] = uniform(fold_in(key_B, text_key("image")), 17, dtype=torch.float64).numpy().tolist()
    return [_image_draw(config, u) for u in u_B]


def _image_draw(config: AugmentConfig, u: list[float]) -> ImageDraw:
    jitter = 1.0 if u[15] < config.jitter_probability else 0.0
    turned, scaled, shifted = (u[place] < config.affine_probability for place in (8, 10, 12))
    low, high = config.scale
    return ImageDraw(
        top=u[0],
        left=u[1],
        hflip=u[2] < config.hflip,
        vflip=u[3] < config.vflip,
        brightness=1 + jitter * config.brightness * (2 * u[4] - 1),
        contrast=1 + jitter * config.contrast * (2 * u[5] - 1),
        saturation=1 + jitter * config.saturation * (2 * u[6] - 1),
        hue=jitter * config.hue * (2 * u[7] - 1),
        angle=config.rotation * (2 * u[9] - 1) if turned else 0.0,
        scale=low + (high - low) * u[11] if scaled else 1.0,
        shift=(config.shift[0] * (2 * u[13] - 1), config.shift[1] * (2 * u[14] - 1)) if shifted else (0.0, 0.0),
        successive=config.warps == "successive",
        order=_ORDERS[int(u[16] * len(_ORDERS))] if config.jitter_order == "random" else (),
    )


def crop_size(crop: float | dict[str, float], modality: str, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels of a modality's own grid; larger than the image where the config asks for that."""
    value = crop.get(modality, 1.0) if isinstance(crop, dict) else crop
    if value > 1:
        return round(value), round(value)
    return max(1, round(value * height)), max(1, round(value * width))


def crop_image(image_HWC: np.ndarray, size: tuple[int, int], draw: ImageDraw) -> np.ndarray:
    """A view of the pixels: nothing is copied."""
    (height, width), (top, left) = size, corner(image_HWC.shape, size, draw)
    cut = image_HWC[top : top + height, left : left + width]
    return cut[:: -1 if draw.vflip else 1, :: -1 if draw.hflip else 1]


def corner(shape: tuple[int, ...], size: tuple[int, int], draw: ImageDraw) -> tuple[int, int]:
    """Row and column of the crop's first pixel, before it is mirrored."""
    # rounded, not floored: a coarse and a fine copy of a scene are then cut at one place, up to half a coarse pixel
    return int(draw.top * (shape[0] - size[0]) + 0.5), int(draw.left * (shape[1] - size[1]) + 0.5)


def warp_image(image_HWC: np.ndarray, size: tuple[int, int], draw: ImageDraw) -> np.ndarray:
    """The crop, mirrored, turned, scaled, shifted, in this order; bilinear between pixels, zeros outside.

    Returns:
        Float32 (height, width, C), in the units of the image, a copy.
    """
    made = crop_image(image_HWC, size, draw) if draw.successive else image_HWC
    for theta in warp_thetas(image_HWC.shape, size, draw):
        made = _sample(made, theta, size)
    return made


def warp_thetas(shape: tuple[int, ...], size: tuple[int, int], draw: ImageDraw) -> list[np.ndarray]:
    """From where each resampling takes its pixels: (2, 3) of (x, y, 1), counted in half sides from the centres.

    One of the stored image of `shape`, mirrored by it, too; or, where they are successive, one of the mirrored crop for
    each of angle, scale and shift that changes something.
    """
    if not draw.successive:
        return [_theta(_crop_to_image(shape, size, draw) @ _inverse(draw, size), shape, size)]
    still = replace(draw, angle=0.0, scale=1.0, shift=(0.0, 0.0))
    steps = (replace(still, angle=draw.angle), replace(still, scale=draw.scale), replace(still, shift=draw.shift))
    return [_theta(_inverse(step, size), size, size) for step in steps if step.warps]


def _inverse(draw: ImageDraw, size: tuple[int, int]) -> np.ndarray:
    """From where a pixel of the result comes: 3 x 3, in pixels (x, y, 1) from the crop's centre."""
    height, width = size
    cos, sin = (f(math.radians(draw.angle)) / draw.scale for f in (math.cos, math.sin))
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    back = np.array([[1, 0, -draw.shift[0] * width], [0, 1, -draw.shift[1] * height], [0, 0, 1]])
    return turn @ back


def _crop_to_image(shape: tuple[int, ...], size: tuple[int, int], draw: ImageDraw) -> np.ndarray:
    """From the crop's centre to the image's: 3 x 3, in pixels, mirrored as drawn."""
    (height, width), (top, left) = size, corner(shape, size, draw)
    x, y = left + width / 2 - shape[1] / 2, top + height / 2 - shape[0] / 2
    return np.array([[-1 if draw.hflip else 1, 0, x], [0, -1 if draw.vflip else 1, y], [0, 0, 1]])


def _theta(source: np.ndarray, shape: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """`source` (3 x 3, in pixels from the centres of result and image) in half sides, as torch counts."""
    return np.diag([2 / shape[1], 2 / shape[0]]) @ source[:2] @ np.diag([size[1] / 2, size[0] / 2, 1])


def _sample(image_HWC: np.ndarray, theta: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = torch.as_tensor(np.array(image_HWC.transpose(2, 0, 1), dtype=np.float32, order="C"))[None]
    grid = F.affine_grid(torch.tensor(theta, dtype=torch.float32)[None], [1, 1, *size], align_corners=False)
    made = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return made[0].numpy().transpose(1, 2, 0)


def jitter_steps(draw: ImageDraw) -> list[ImageDraw]:
    """The jitter's factors one at a time, in the order drawn, or all at once; what changes nothing is left out."""
    if not draw.order:
        return [draw] if draw.jitters else []
    plain = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    steps = [replace(draw, order=(), **{**plain, name: getattr(draw, name)}) for name in draw.order]
    return [step for step in steps if step.jitters]


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


def normal_noise(key: Tensor, n: int) -> np.ndarray:
    """`n` standard normal numbers of one key, float32; 16 random bits each, so four cost one hash."""
    bits = counted(key.reshape(()), -(-n // 4)).view(torch.int16)[:n].numpy()
    return _normal_table()[bits.astype(np.int32) + (1 << (_NORMAL_BITS - 1))]


@lru_cache(maxsize=1)
def _normal_table() -> np.ndarray:
    """Quantiles of the standard normal distribution at 2^16 equally likely places, float32, |x| < 4.4."""
    n, normal = 1 << _NORMAL_BITS, NormalDist()
    return np.array([normal.inv_cdf((place + 0.5) / n) for place in range(n)], dtype=np.float32)
