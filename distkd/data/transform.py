"""Stored values to what a model receives, fitted on the training samples of a fold; it travels with the exported model.

Vectors: gaps filled by the training median, then standardised. Images: cropped, to 0..1, then (x - mean) / std.
"""

# Shapes: B samples, F features, H height, W width, C channels

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from distkd.base import InputSpec
from distkd.data.augment import (
    CENTRE,
    GREY,
    AugmentConfig,
    ImageDraw,
    crop_image,
    crop_size,
    image_draws,
    jitter_matrix,
    vary_vectors,
)
from distkd.data.manifest import Modality, closest, explain
from distkd.errors import CheckpointError, ConfigError, DataError

__all__ = ["AugmentConfig", "ImageInput", "Preprocess", "VectorInput", "fit_image", "fit_vector"]


_TINY_SHARE, _TINY = 1e-12, 1e-30
"""A column that varies by less than this, of its size or at all, is constant."""


class _Fitted(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class VectorInput(_Fitted):
    """Statistics of a vector modality's columns over the training samples."""

    kind: Literal["vector"] = "vector"
    median: list[float]
    mean: list[float]
    std: list[float]
    features: list[str] | None = None

    @property
    def spec(self) -> InputSpec:
        return InputSpec("vector", (len(self.mean),))


class ImageInput(_Fitted):
    """How an image modality becomes numbers."""

    kind: Literal["image"] = "image"
    shape: tuple[int, int, int]
    """(height, width, channels) as stored."""
    crop: tuple[int, int]
    """(height, width) of what the model sees."""
    full_scale: float
    """Stored value that means 1."""
    mean: list[float]
    std: list[float]

    @property
    def spec(self) -> InputSpec:
        return InputSpec("image", (self.shape[2], *self.crop))


_Inputs = TypeAdapter(dict[str, Annotated[VectorInput | ImageInput, Field(discriminator="kind")]])


def fit_vector(vector_BF: np.ndarray, features: list[str] | None = None) -> VectorInput:
    """Median without the gaps; mean and standard deviation (of the population) after filling them; 1 where it is 0."""
    values = vector_BF.astype(np.float64)
    gaps = np.isnan(values)
    known = ~gaps.all(axis=0)
    median = np.zeros(values.shape[1])
    if known.any():
        median[known] = np.nanmedian(values[:, known], axis=0)
    values = np.where(gaps, median, values)
    std = values.std(axis=0)
    # not std == 0: the mean of equal values may round, and squares of tiny differences vanish
    constant = std <= np.maximum(_TINY_SHARE * np.abs(values).max(axis=0), _TINY)
    std = np.where(constant, 1.0, std)
    return VectorInput(median=median.tolist(), mean=values.mean(axis=0).tolist(), std=std.tolist(), features=features)


def fit_image(
    modality: Modality, *, name: str, crop: float | dict[str, float], mean: Sequence[float], std: Sequence[float]
) -> ImageInput:
    """An image's transform; it does not look at the samples.

    Raises:
        ConfigError: the crop is larger than the image, or mean and std do not fit its channels.
    """
    height, width, channels = modality.shape
    size = crop_size(crop, name, height, width)
    if size[0] > height or size[1] > width:
        raise ConfigError(
            f"data.augment.crop asks for {size[0]} x {size[1]} px of {name!r}, which has {height} x {width}; "
            "use a share up to 1 or fewer pixels"
        )
    for field, values in (("image_mean", mean), ("image_std", std)):
        if len(values) not in (1, channels):
            raise ConfigError(
                f"data.{field} has {len(values)} values, {name!r} has {channels} channels; give 1 or {channels}"
            )
    full_scale = float(np.iinfo(modality.dtype).max) if modality.dtype.startswith(("u", "i")) else 1.0
    return ImageInput(
        shape=(height, width, channels),
        crop=size,
        full_scale=full_scale,
        mean=_each(mean, channels),
        std=_each(std, channels),
    )


def _each(values: Sequence[float], channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


class Preprocess:
    """The transforms of some modalities, by name."""

    def __init__(self, inputs: Mapping[str, VectorInput | ImageInput]):
        self.inputs = dict(inputs)
        self._vectors = {
            name: tuple(np.array(column, dtype=np.float64) for column in (fitted.median, fitted.mean, fitted.std))
            for name, fitted in self.inputs.items()
            if isinstance(fitted, VectorInput)
        }

    @property
    def specs(self) -> dict[str, InputSpec]:
        """What a model receives of each modality."""
        return {name: fitted.spec for name, fitted in self.inputs.items()}

    def only(self, modalities: Iterable[str]) -> Preprocess:
        """The transforms of some of the modalities, in that order."""
        return Preprocess({name: self._input(name) for name in modalities})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives an equal transform back."""
        return cast(dict[str, Any], _Inputs.dump_python(self.inputs, mode="json"))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The transform that `to_dict` wrote.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            return cls(_Inputs.validate_python(content))
        except ValidationError as error:
            raise CheckpointError(
                f"preprocessing of the export is damaged: {explain(error)}; export the run again"
            ) from error

    def apply(
        self,
        raw: Mapping[str, np.ndarray],
        *,
        augment: AugmentConfig | None = None,
        key_B: Tensor | None = None,
    ) -> dict[str, np.ndarray]:
        """One sample as the model sees it, float32: (F,) of vectors, (C, H, W) of images.

        Args:
            raw: stored values, NaN for gaps in a vector; modalities may be left out, unknown ones are an error.
            augment: with the view's `key_B` (1,), a random view; without, the view of evaluation.

        Raises:
            DataError: a shape, a type, an infinity or a name that the transform was not fitted for.
        """
        made: dict[str, np.ndarray] = {}
        draws = None if augment is None or key_B is None else image_draws(augment, key_B)
        for name, values in raw.items():
            fitted = self._input(name)
            if isinstance(fitted, ImageInput):
                made[name] = self.image(name, values, CENTRE if draws is None else draws[0])
            else:
                made[name] = self.vectors(name, values[None], augment=augment, key_B=key_B)[0]
        return made

    def vectors(
        self, name: str, raw_BF: np.ndarray, *, augment: AugmentConfig | None = None, key_B: Tensor | None = None
    ) -> np.ndarray:
        """(B, F) float32 of stored vectors, all at once."""
        median_F, mean_F, std_F = self._vectors[name]
        if raw_BF.shape[1:] != mean_F.shape or raw_BF.dtype.kind not in "fiub":
            raise DataError(
                f"{name!r} has {raw_BF.dtype} values of shape {raw_BF.shape[1:]}, "
                f"expected numbers of shape {mean_F.shape}"
            )
        values = raw_BF.astype(np.float64)
        if np.isinf(values).any():
            raise DataError(f"{name!r} holds infinite values; leave a value out (NaN) where it is missing")
        values = np.where(np.isnan(values), median_F, values)
        made = ((values - mean_F) / std_F).astype(np.float32)
        return made if augment is None or key_B is None else vary_vectors(made, augment, name, key_B)

    def image(self, name: str, raw_HWC: np.ndarray, draw: ImageDraw = CENTRE) -> np.ndarray:
        """(C, H, W) float32 of a stored image; an (H, W) array is taken for one channel."""
        fitted = self._input(name)
        assert isinstance(fitted, ImageInput), name
        if raw_HWC.ndim == 2:
            raw_HWC = raw_HWC[:, :, None]
        if raw_HWC.shape != fitted.shape or raw_HWC.dtype.kind not in "fiu":
            raise DataError(
                f"{name!r} is {raw_HWC.dtype} of shape {raw_HWC.shape}, expected an image of shape {fitted.shape} "
                "(height, width, channels)"
            )
        if raw_HWC.dtype.kind == "f" and not np.isfinite(raw_HWC).all():
            raise DataError(f"{name!r} holds values that are not finite; mend the image")
        return _to_model(crop_image(raw_HWC, fitted.crop, draw), fitted, draw)

    def _input(self, name: str) -> VectorInput | ImageInput:
        if name not in self.inputs:
            raise DataError(f"no preprocessing for modality {name!r}{closest(name, self.inputs)}")
        return self.inputs[name]


def _to_model(cut_HWC: np.ndarray, fitted: ImageInput, draw: ImageDraw) -> np.ndarray:
    """Jitter, clamp, normalise; channel by channel, so that no value depends on another pixel's place."""
    channels = cut_HWC.shape[2]
    unit = np.float32(1 / fitted.full_scale)
    source_CHW = np.ascontiguousarray(cut_HWC.transpose(2, 0, 1), dtype=np.float32)
    if draw.brightness == draw.contrast == draw.saturation == 1.0 and draw.hue == 0.0:
        made = source_CHW  # nothing leaves 0..1, so there is nothing to clamp
        for channel in range(channels):
            _scale(made[channel], float(unit) / fitted.std[channel], -fitted.mean[channel] / fitted.std[channel])
        return made
    matrix, offset = jitter_matrix(draw, channels, _mean_grey(cut_HWC) / fitted.full_scale)
    made = np.empty_like(source_CHW)
    for channel in range(channels):
        out = made[channel]
        np.multiply(source_CHW[0], np.float32(matrix[channel, 0] * unit), out=out)
        for other in range(1, channels):
            if matrix[channel, other]:
                out += source_CHW[other] * np.float32(matrix[channel, other] * unit)
        out += np.float32(offset)
        np.maximum(out, 0, out=out)
        np.minimum(out, 1, out=out)
        _scale(out, 1 / fitted.std[channel], -fitted.mean[channel] / fitted.std[channel])
    return made


def _scale(values: np.ndarray, factor: float, offset: float) -> None:
    values *= np.float32(factor)
    values += np.float32(offset)


def _mean_grey(cut_HWC: np.ndarray) -> float:
    # of whole numbers the sum is exact, whatever its order
    kind = np.int64 if cut_HWC.dtype.kind in "iu" else np.float64
    sums = [float(cut_HWC[:, :, channel].sum(dtype=kind)) for channel in range(cut_HWC.shape[2])]
    weights = GREY if len(sums) == 3 else [1 / len(sums)] * len(sums)
    return sum(weight * total for weight, total in zip(weights, sums, strict=True)) / (
        cut_HWC.shape[0] * cut_HWC.shape[1]
    )
