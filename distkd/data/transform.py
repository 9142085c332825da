"""Stored values to what a model receives, fitted on the training samples of a fold; it travels with the exported model.

Vectors: gaps filled by the training median, then standardised. Images: cropped, to 0..1, then (x - mean) / std; or made
coarser after that. Volumes: a part of it, normalised by the statistics of the whole, then brought to the model's size.
"""

# Shapes: B samples, F features, H height, W width, C channels, x y z voxels

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
from torch import Tensor

from distkd.base import InputSpec
from distkd.data.augment import (
    CENTRE,
    GREY,
    AugmentConfig,
    ImageDraw,
    crop_image,
    image_draws,
    jitter_matrix,
    jitter_steps,
    vary_vectors,
    warp_image,
)
from distkd.data.degrade import degrade, restore_size
from distkd.data.fitted import (
    DegradedInput,
    Fitted,
    ImageInput,
    InfiniteRowsError,
    VectorInput,
    VolumeInput,
    dump_inputs,
    fit_degraded,
    fit_image,
    fit_vector,
    fit_volume,
    read_inputs,
)
from distkd.data.manifest import closest
from distkd.data.volumes import Box, evaluation_box, finish_image, normalise_crop, volume_statistics
from distkd.errors import DataError

__all__ = [
    "AugmentConfig",
    "DegradedInput",
    "Fitted",
    "ImageInput",
    "InfiniteRowsError",
    "Preprocess",
    "VectorInput",
    "VolumeInput",
    "fit_degraded",
    "fit_image",
    "fit_vector",
    "fit_volume",
    "unit_of",
]


class Preprocess:
    """The transforms of some modalities, by name."""

    def __init__(self, inputs: Mapping[str, Fitted]):
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

    def source(self, name: str) -> str:
        """The stored modality that an input is made of: itself, unless it is a degraded copy."""
        fitted = self._input(name)
        return fitted.of if isinstance(fitted, DegradedInput) else name

    def only(self, modalities: Iterable[str]) -> Preprocess:
        """The transforms of some of the modalities, in that order."""
        return Preprocess({name: self._input(name) for name in modalities})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives an equal transform back."""
        return dump_inputs(self.inputs)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The transform that `to_dict` wrote.

        Raises:
            CheckpointError: it is something else.
        """
        return cls(read_inputs(content))

    def apply(
        self,
        raw: Mapping[str, np.ndarray],
        *,
        augment: AugmentConfig | None = None,
        key_B: Tensor | None = None,
    ) -> dict[str, np.ndarray]:
        """One sample as the model sees it, float32: (F,) of vectors, (C, H, W) of images, (C, x, y, z) of volumes.

        Args:
            raw: stored values, NaN for gaps in a vector, whole volumes; modalities may be left out, unknown ones are
                an error. A degraded copy is made of what stands under its own name, or else of its source's.
            augment: with the view's `key_B` (1,), a random view; without, the view of evaluation. Volumes are always
                as in evaluation.

        Raises:
            DataError: a shape, a type, an infinity or a name that the transform was not fitted for.
        """
        made: dict[str, np.ndarray] = {}
        draw = CENTRE if augment is None or key_B is None else image_draws(augment, key_B)[0]
        for name, values in self._by_input(raw).items():
            fitted = self._input(name)
            if isinstance(fitted, VectorInput):
                made[name] = self.vectors(name, values[None], augment=augment, key_B=key_B)[0]
            elif isinstance(fitted, VolumeInput):
                made[name] = self.volume(name, values)
            else:
                made[name] = self.image(name, values, draw)
        return made

    def _by_input(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raw values by the input that they are for."""
        copies = {
            name: raw[fitted.of]
            for name, fitted in self.inputs.items()
            if isinstance(fitted, DegradedInput) and name not in raw and fitted.of in raw
        }
        used = {self.source(name) for name in copies}
        return {name: values for name, values in raw.items() if name in self.inputs or name not in used} | copies

    def vectors(
        self, name: str, raw_BF: np.ndarray, *, augment: AugmentConfig | None = None, key_B: Tensor | None = None
    ) -> np.ndarray:
        """(B, F) float32 of stored vectors, all at once.

        Raises:
            InfiniteRowsError: some of them are infinite, stored or standardised; it says which rows.
            DataError: a shape or a type that the transform was not fitted for.
        """
        median_F, mean_F, std_F = self._vectors[name]
        if raw_BF.shape[1:] != mean_F.shape or raw_BF.dtype.kind not in "fiub":
            raise DataError(
                f"{name!r} has {raw_BF.dtype} values of shape {raw_BF.shape[1:]}, "
                f"expected numbers of shape {mean_F.shape}"
            )
        values = raw_BF.astype(np.float64)
        values = np.where(np.isnan(values), median_F, values)
        with np.errstate(over="ignore"):  # what is too large comes out infinite, too
            made = ((values - mean_F) / std_F).astype(np.float32)
        if np.isinf(made).any():
            raise InfiniteRowsError(
                f"{name!r} holds infinite values; leave a value out (NaN) where it is missing",
                np.flatnonzero(np.isinf(made).any(axis=1)),
            )
        return made if augment is None or key_B is None else vary_vectors(made, augment, name, key_B)

    def image(self, name: str, raw_HWC: np.ndarray, draw: ImageDraw = CENTRE) -> np.ndarray:
        """(C, H, W) float32 of a stored image; an (H, W) array is taken for one channel.

        A degraded copy is made of the sharp image; one that is as coarse already is only brought to its size.
        """
        fitted = self._input(name)
        if isinstance(fitted, DegradedInput):
            return self._degraded(name, fitted, raw_HWC, draw)
        assert isinstance(fitted, ImageInput), name
        return _image(name, fitted, raw_HWC, draw)

    def images(self, names: Iterable[str], raw_HWC: np.ndarray, draw: ImageDraw = CENTRE) -> dict[str, np.ndarray]:
        """What `image` makes of one stored image for several inputs, sharp and degraded; the sharp one is made once."""
        made: dict[str, np.ndarray] = {}
        for base, of_base in self.by_sharp(names):
            image = _image(of_base[0], base, raw_HWC, draw)
            for name in of_base:
                copy = self._input(name)
                made[name] = (
                    degrade(image, copy.factor, restore=copy.restore) if isinstance(copy, DegradedInput) else image
                )
        return made

    def by_sharp(self, names: Iterable[str]) -> list[tuple[ImageInput, list[str]]]:
        """Inputs by the sharp image that they are made of, which most often is one."""
        found: list[tuple[ImageInput, list[str]]] = []
        for name in names:
            fitted = self._input(name)
            base = fitted.image if isinstance(fitted, DegradedInput) else fitted
            assert isinstance(base, ImageInput), name
            known = next((of_base for of, of_base in found if of == base), None)
            if known is None:
                found.append((base, [name]))
            else:
                known.append(name)
        return found

    def checked(self, names: Iterable[str], raw_HWC: np.ndarray) -> np.ndarray:
        """(H, W, C) of a stored image that several inputs are made of elsewhere.

        Raises:
            DataError: a shape, a type or values that the transform was not fitted for.
        """
        for base, of_base in self.by_sharp(names):
            raw_HWC = _checked(of_base[0], base, raw_HWC)
        return raw_HWC

    def _degraded(self, name: str, fitted: DegradedInput, raw_HWC: np.ndarray, draw: ImageDraw) -> np.ndarray:
        coarse = _coarse(fitted)
        if coarse is not None and coarse.shape[:2] == raw_HWC.shape[:2]:
            small = _image(name, coarse, raw_HWC, draw)
            return restore_size(small, fitted.image.crop) if fitted.restore else small
        return degrade(_image(name, fitted.image, raw_HWC, draw), fitted.factor, restore=fitted.restore)

    def volume(
        self, name: str, raw_Cxyz: np.ndarray, *, box: Box | None = None, statistics: np.ndarray | None = None
    ) -> np.ndarray:
        """(C, x, y, z) float32 of a stored volume; an (x, y, z) array is taken for one channel.

        Args:
            raw_Cxyz: the whole volume, or with `box` what was read of it.
            box: from `crop_box` or `evaluation_box`; without it the view of evaluation is cut here.
            statistics: `volume_statistics` of the whole volume; counted here where the whole is given.

        Raises:
            DataError: a shape or a type that the transform was not fitted for, values that are not finite, no
                statistics of a volume that is normalised by them.
        """
        fitted = self._input(name)
        assert isinstance(fitted, VolumeInput), name
        if raw_Cxyz.ndim == 3:
            raw_Cxyz = raw_Cxyz[None]
        channels = fitted.shape[0]
        fits = raw_Cxyz.ndim == 4 and len(raw_Cxyz) == channels and raw_Cxyz.dtype.kind in "fiu"
        if not fits or (box is not None and raw_Cxyz.shape[1:] != box.size):
            wanted = (
                f"(channels, x, y, z) with {channels} channel{'s' * (channels > 1)}"
                if box is None
                else f"shape {(channels, *box.size)}"
            )
            raise DataError(f"{name!r} is {raw_Cxyz.dtype} of shape {raw_Cxyz.shape}, expected a volume of {wanted}")
        try:
            return _volume(fitted, raw_Cxyz, box, statistics)
        except DataError as error:
            raise DataError(f"{name!r}: {error}") from error

    def _input(self, name: str) -> Fitted:
        if name not in self.inputs:
            raise DataError(f"no preprocessing for modality {name!r}{closest(name, self.inputs)}")
        return self.inputs[name]


def _image(name: str, fitted: ImageInput, raw_HWC: np.ndarray, draw: ImageDraw) -> np.ndarray:
    raw_HWC = _checked(name, fitted, raw_HWC)
    cut_HWC = (warp_image if draw.warps else crop_image)(raw_HWC, fitted.crop, draw)
    return _to_model(cut_HWC, fitted, draw)


def _checked(name: str, fitted: ImageInput, raw_HWC: np.ndarray) -> np.ndarray:
    if raw_HWC.ndim == 2:
        raw_HWC = raw_HWC[:, :, None]
    if raw_HWC.shape != fitted.shape or raw_HWC.dtype.kind not in "fiu":
        raise DataError(
            f"{name!r} is {raw_HWC.dtype} of shape {raw_HWC.shape}, expected an image of shape {fitted.shape} "
            "(height, width, channels)"
        )
    if raw_HWC.dtype.kind == "f" and not np.isfinite(raw_HWC).all():
        raise DataError(f"{name!r} holds values that are not finite; mend the image")
    return raw_HWC


def _coarse(fitted: DegradedInput) -> ImageInput | None:
    """The transform of an image that was taken at the coarse resolution, if the stored one divides into its pixels."""
    (height, width, channels), factor = fitted.image.shape, fitted.factor
    if factor == 1 or height % factor or width % factor:
        return None
    crop = (fitted.image.crop[0] // factor, fitted.image.crop[1] // factor)
    return fitted.image.model_copy(update={"shape": (height // factor, width // factor, channels), "crop": crop})


def _volume(fitted: VolumeInput, raw_Cxyz: np.ndarray, box: Box | None, statistics: np.ndarray | None) -> np.ndarray:
    if statistics is None and fitted.view.normalise != "none":
        if box is not None:
            raise DataError(
                f"data.volume.normalise={fitted.view.normalise} needs the stored statistics of the whole volume; build "
                "the shard set with them, or set it to none"
            )
        statistics = volume_statistics(raw_Cxyz)
    if box is None:
        _, x, y, z = raw_Cxyz.shape
        stored = (fitted.shape[1], fitted.shape[2], fitted.shape[3])
        box = evaluation_box(fitted.view, (x, y, z), stored)
        inside = tuple(slice(first, first + n) for first, n in zip(box.start, box.size, strict=True))
        raw_Cxyz = raw_Cxyz[(slice(None), *inside)]
    return finish_image(normalise_crop(raw_Cxyz, statistics, fitted.view.normalise), box)


def unit_of(fitted: ImageInput) -> np.float32:
    """What stored values are multiplied by to lie in 0..1."""
    return np.float32(1 / fitted.full_scale)


def _to_model(cut_HWC: np.ndarray, fitted: ImageInput, draw: ImageDraw) -> np.ndarray:
    """Jitter, clamp, normalise; channel by channel, so that no value depends on another pixel's place."""
    channels = cut_HWC.shape[2]
    unit = unit_of(fitted)
    made = np.array(cut_HWC.transpose(2, 0, 1), dtype=np.float32, order="C")
    if not draw.jitters:  # nothing leaves 0..1, so there is nothing to clamp
        for channel in range(channels):
            _scale(made[channel], float(unit) / fitted.std[channel], -fitted.mean[channel] / fitted.std[channel])
        return made
    if draw.order:
        for step in jitter_steps(draw):
            made = _jitter(made, step, unit, _mean_grey(made.transpose(1, 2, 0)) * float(unit))
            unit = np.float32(1)
    else:
        made = _jitter(made, draw, unit, _mean_grey(cut_HWC) / fitted.full_scale)
    for channel in range(channels):
        _scale(made[channel], 1 / fitted.std[channel], -fitted.mean[channel] / fitted.std[channel])
    return made


def _jitter(source_CHW: np.ndarray, draw: ImageDraw, unit: np.float32, mean_grey: float) -> np.ndarray:
    """Changed colours in 0..1 of stored values times `unit`."""
    channels = len(source_CHW)
    matrix, offset = jitter_matrix(draw, channels, mean_grey)
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
