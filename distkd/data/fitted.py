"""What a modality's transform needs to know, fitted on the training samples of a fold: JSON-able, one class a kind."""

# Shapes: B samples, F features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from distkd.base import InputSpec
from distkd.data.augment import crop_size
from distkd.data.degrade import DegradedConfig, check_factor
from distkd.data.manifest import Modality, explain
from distkd.data.volumes import VolumeConfig, VolumeView, evaluation_box
from distkd.errors import CheckpointError, ConfigError, DataError

__all__ = [
    "DegradedInput",
    "Fitted",
    "ImageInput",
    "InfiniteRowsError",
    "VectorInput",
    "VolumeInput",
    "dump_inputs",
    "fit_degraded",
    "fit_image",
    "fit_vector",
    "fit_volume",
    "infinite_rows",
    "read_inputs",
]

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

    @property
    def looks(self) -> str:
        """What a model sees, in words; the statistics follow from the samples."""
        return f"{len(self.mean)} vector"


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

    @property
    def looks(self) -> str:
        """What a model sees, in words."""
        return f"{_times(self.spec.shape)} image with mean {self.mean} and std {self.std}"


class DegradedInput(_Fitted):
    """How a stored image becomes a coarser one."""

    kind: Literal["degraded"] = "degraded"
    of: str
    """The stored modality."""
    factor: int
    restore: bool
    image: ImageInput
    """The sharp image."""

    @property
    def spec(self) -> InputSpec:
        channels, height, width = self.image.spec.shape
        less = 1 if self.restore else self.factor
        return InputSpec("image", (channels, height // less, width // less))

    @property
    def looks(self) -> str:
        """What a model sees, in words."""
        back = ", restored" if self.restore else ""
        return f"{_times(self.spec.shape)} of {self.image.looks}, averaged by {self.factor}{back}"


class VolumeInput(_Fitted):
    """How a volume becomes numbers."""

    kind: Literal["volume"] = "volume"
    shape: tuple[int, int, int, int]
    """(channels, x, y, z) of the largest of the set."""
    view: VolumeView

    @property
    def spec(self) -> InputSpec:
        """Of training; in evaluation the size of volumes that are not cropped may be another."""
        x, y, z = self.shape[1:]
        return InputSpec(
            "volume", (self.shape[0], *(self.view.crop or evaluation_box(self.view, (x, y, z), (x, y, z)).made))
        )

    @property
    def looks(self) -> str:
        """What a model sees, in words."""
        return f"{_times(self.spec.shape)} volume, normalised: {self.view.normalise}"


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


Fitted = VectorInput | ImageInput | DegradedInput | VolumeInput

_Inputs = TypeAdapter(dict[str, Annotated[Fitted, Field(discriminator="kind")]])


class InfiniteRowsError(DataError):
    """Vectors hold infinite values; `row_R` are their places among those that were given."""

    def __init__(self, message: str, row_R: np.ndarray):
        super().__init__(message)
        self.row_R = row_R


def infinite_rows(raw_BF: np.ndarray) -> np.ndarray:
    """(R,) int64 places of the vectors that hold what float32 has no finite number for; NaN is a gap."""
    if raw_BF.dtype.kind != "f":
        return np.empty(0, dtype=np.int64)
    most = np.finfo(np.float32).max
    return np.flatnonzero(((raw_BF > most) | (raw_BF < -most)).any(axis=1))


def fit_vector(vector_BF: np.ndarray, features: list[str] | None = None) -> VectorInput:
    """Median without the gaps; mean and standard deviation (of the population) after filling them; 1 where it is 0.

    Raises:
        InfiniteRowsError: some vectors hold infinite values.
    """
    row_R = infinite_rows(vector_BF)
    if len(row_R):
        raise InfiniteRowsError(
            f"{len(row_R)} of {len(vector_BF)} vectors hold infinite values; leave a value out (NaN) where it is "
            "missing",
            row_R,
        )
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


def fit_degraded(config: DegradedConfig, *, name: str, image: ImageInput) -> DegradedInput:
    """A coarser copy of the image that `image` is the transform of.

    Raises:
        ConfigError: the factor does not divide what the model sees of it.
    """
    check_factor(image.crop, config.factor, name=name, of=config.of)
    return DegradedInput(of=config.of, factor=config.factor, restore=config.restore, image=image)


def fit_volume(modality: Modality, *, config: VolumeConfig) -> VolumeInput:
    """A volume's transform; it does not look at the samples.

    Raises:
        ConfigError: the volumes have fewer slices than the config uses.
    """
    channels, x, y, z = modality.shape
    view = VolumeView.model_validate({name: getattr(config, name) for name in VolumeView.model_fields})
    evaluation_box(view, (x, y, z), (x, y, z))
    return VolumeInput(shape=(channels, x, y, z), view=view)


def _each(values: Sequence[float], channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


def dump_inputs(inputs: Mapping[str, Fitted]) -> dict[str, Any]:
    """JSON-able; `read_inputs` gives them back."""
    return cast(dict[str, Any], _Inputs.dump_python(dict(inputs), mode="json"))


def read_inputs(content: Mapping[str, Any]) -> dict[str, Fitted]:
    """What `dump_inputs` wrote.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        return _Inputs.validate_python(content)
    except ValidationError as error:
        raise CheckpointError(
            f"preprocessing of the export is damaged: {explain(error)}; export the run again"
        ) from error
