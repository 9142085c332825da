"""Images of whole batches made where the network computes: what `Preprocess.images` makes, sample by sample.

The host reads, checks and draws; stored pixels and a few numbers a sample travel. What depends on a draw is decided
before, so nothing here asks the device for a value. No matrix products: a device may round them as it likes.
"""

# Shapes: B samples, P those of B that have the image, R those of P that a step changes, H W rows and columns stored,
# h w those of the crop, C channels

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.data.augment import GREY, ImageDraw, corner, jitter_matrix, jitter_steps, warp_thetas
from distkd.data.fitted import DegradedInput, Fitted, ImageInput
from distkd.data.transform import Preprocess, unit_of

__all__ = ["ImageNumbers", "PendingImages", "StoredImages", "image_numbers", "sharp_images"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Warp:
    """A resampling of some samples."""

    row_R: Tensor
    theta_R23: Tensor


@dataclass(frozen=True, slots=True)
class _Jitter:
    """A change of colours, then a clamp to 0..1, of some samples."""

    row_R: Tensor
    matrix_RCC: Tensor
    grey_R: Tensor | None
    """How much of the mean grey is added; None where that is nothing."""


@dataclass(frozen=True, slots=True)
class ImageNumbers:
    """The draws of one view as numbers, on the host."""

    size: tuple[int, int]
    first_P2: Tensor
    """int64 row and column of the stored pixel that the crop begins with."""
    step_P2: Tensor
    """int64, -1 where it is mirrored."""
    whole: bool
    """Whether the crop of every sample is the stored image."""
    of_crop: bool
    """Whether warps read the crop, and not the stored image."""
    warps: list[_Warp]
    jitters: list[_Jitter]
    factor_PC: Tensor
    """Of the normalisation; it takes those that are not jittered from stored values to 0..1, too."""
    offset_C: Tensor


@dataclass(frozen=True, slots=True)
class StoredImages:
    """The images of one stored modality in a batch, and what is made of them."""

    pixel_PHWC: np.ndarray
    place_P: np.ndarray
    """Places in the batch."""
    n_samples: int
    inputs: list[tuple[dict[str, Fitted], list[ImageNumbers]]]
    """Inputs that share a sharp image, and its numbers in each view."""

    @staticmethod
    def of(
        preprocess: Preprocess,
        names: Sequence[str],
        pixel_PHWC: np.ndarray,
        place_P: np.ndarray,
        draws: Sequence[Sequence[ImageDraw]],
    ) -> StoredImages:
        """What `Preprocess.images` would make of `names`.

        Args:
            pixel_PHWC: from `Preprocess.checked`.
            draws: for each view those of the whole batch.
        """
        inputs: list[tuple[dict[str, Fitted], list[ImageNumbers]]] = []
        places: list[int] = place_P.tolist()
        for base, of_base in preprocess.by_sharp(names):
            numbers = [image_numbers(base, [draw_B[place] for place in places]) for draw_B in draws]
            inputs.append(({name: preprocess.inputs[name] for name in of_base}, numbers))
        return StoredImages(pixel_PHWC, place_P, len(draws[0]), inputs)

    def make(self, device: torch.device, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """For each view its inputs, (B, ...) of `dtype`; zeros where a sample has no image."""
        pixel_PHWC = torch.as_tensor(self.pixel_PHWC).to(device, non_blocking=True)
        views: list[dict[str, Tensor]] = [{} for _ in self.inputs[0][1]]
        for fitted, numbers in self.inputs:
            for view, of_view in zip(views, numbers, strict=True):
                if len(self.place_P):
                    made = _inputs(fitted, sharp_images(pixel_PHWC, of_view, dtype))
                else:
                    made = {name: pixel_PHWC.new_zeros((0, *x.spec.shape), dtype=dtype) for name, x in fitted.items()}
                view |= {name: self._spread(x) for name, x in made.items()}
        return views

    def _spread(self, made_P: Tensor) -> Tensor:
        if len(made_P) == self.n_samples:
            return made_P
        place_P = torch.as_tensor(self.place_P).to(made_P.device, non_blocking=True)
        return made_P.new_zeros((self.n_samples, *made_P.shape[1:])).index_copy_(0, place_P, made_P)


@dataclass(frozen=True, slots=True)
class PendingImages:
    """All images of a batch."""

    modalities: list[StoredImages]

    def make(self, device: torch.device, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """For each view every image, (B, ...) of `dtype` on `device`; each stored pixel is sent once."""
        made = [stored.make(device, dtype) for stored in self.modalities]
        return [{name: x for view in of_view for name, x in view.items()} for of_view in zip(*made, strict=True)]


def image_numbers(fitted: ImageInput, draw_P: Sequence[ImageDraw]) -> ImageNumbers:
    """What `sharp_images` needs to know of the draws; they come of one config."""
    channels, unit = fitted.shape[2], float(unit_of(fitted))
    first_P2 = np.array([_first(fitted, draw) for draw in draw_P], dtype=np.int64).reshape(-1, 2)
    step_P2 = np.array([(-1 if d.vflip else 1, -1 if d.hflip else 1) for d in draw_P], dtype=np.int64).reshape(-1, 2)
    warps = [
        _Warp(row_R, torch.as_tensor(np.stack(theta_R)))
        for row_R, theta_R in _in_turn([_thetas(fitted, draw) for draw in draw_P])
    ]
    steps_P = [jitter_steps(draw) for draw in draw_P]
    jitters: list[_Jitter] = []
    for row_R, step_R in _in_turn(steps_P):
        # the first step of a sample takes it from stored values to 0..1
        matrices, greys = zip(
            *(_scaled(jitter_matrix(step, channels, 1.0), 1.0 if jitters else unit) for step in step_R), strict=True
        )
        grey_R = torch.tensor(greys, dtype=torch.float64)
        jitters.append(_Jitter(row_R, torch.as_tensor(np.stack(matrices)), grey_R if any(greys) else None))
    factor_PC = np.array([[(1.0 if steps else unit) / std for std in fitted.std] for steps in steps_P])
    offset_C = [-mean / std for mean, std in zip(fitted.mean, fitted.std, strict=True)]
    return ImageNumbers(
        size=fitted.crop,
        first_P2=torch.as_tensor(first_P2),
        step_P2=torch.as_tensor(step_P2),
        whole=fitted.crop == fitted.shape[:2] and bool((step_P2 == 1).all()),
        of_crop=any(draw.successive for draw in draw_P),
        warps=warps,
        jitters=jitters,
        factor_PC=torch.as_tensor(factor_PC.reshape(-1, channels)),
        offset_C=torch.tensor(offset_C, dtype=torch.float64),
    )


def _thetas(fitted: ImageInput, draw: ImageDraw) -> list[np.ndarray]:
    return warp_thetas(fitted.shape, fitted.crop, draw) if draw.warps else []


def _first(fitted: ImageInput, draw: ImageDraw) -> tuple[int, int]:
    (top, left), (height, width) = corner(fitted.shape, fitted.crop, draw), fitted.crop
    return top + (height - 1) * draw.vflip, left + (width - 1) * draw.hflip


def _scaled(change: tuple[np.ndarray, float], unit: float) -> tuple[np.ndarray, float]:
    return change[0] * unit, change[1] * unit


def _in_turn(steps_P: Sequence[Sequence[T]]) -> Iterator[tuple[Tensor, list[T]]]:
    """First the samples that take a step at all with their first one, then those that take a second with that..."""
    for number in range(max(map(len, steps_P), default=0)):
        taken = [(row, steps[number]) for row, steps in enumerate(steps_P) if number < len(steps)]
        yield torch.tensor([row for row, _ in taken]), [step for _, step in taken]


def sharp_images(pixel_PHWC: Tensor, numbers: ImageNumbers, dtype: torch.dtype) -> Tensor:
    """(P, C, h, w) of `dtype` where the pixels are: cropped, mirrored, warped, jittered, normalised.

    Args:
        pixel_PHWC: stored values, of any type.
    """

    def here(x: Tensor) -> Tensor:
        return x.to(pixel_PHWC.device, dtype if x.is_floating_point() else x.dtype, non_blocking=True)

    cut_PhwC = pixel_PHWC
    if not numbers.whole:
        cut_PhwC = _cut(pixel_PHWC, here(numbers.first_P2), here(numbers.step_P2), numbers.size)
    made = _channels_first(cut_PhwC, dtype)
    for warp in numbers.warps:
        row_R = here(warp.row_R)
        source = _rows(made, row_R) if numbers.of_crop else _channels_first(_rows(pixel_PHWC, row_R), dtype)
        made = _with_rows(made, row_R, _resampled(source, here(warp.theta_R23), numbers.size))
    for jitter in numbers.jitters:
        row_R, grey_R = here(jitter.row_R), None if jitter.grey_R is None else here(jitter.grey_R)
        made = _with_rows(made, row_R, _jittered(_rows(made, row_R), here(jitter.matrix_RCC), grey_R))
    return made.mul_(here(numbers.factor_PC)[:, :, None, None]).add_(here(numbers.offset_C)[:, None, None])


def _inputs(fitted: Mapping[str, Fitted], sharp: Tensor) -> dict[str, Tensor]:
    """What is made of a sharp image: itself, and coarser copies."""
    made: dict[str, Tensor] = {}
    for name, copy in fitted.items():
        made[name] = sharp
        if isinstance(copy, DegradedInput) and copy.factor > 1:
            made[name] = F.avg_pool2d(sharp, copy.factor)
            if copy.restore:
                size = list(sharp.shape[2:])
                made[name] = F.interpolate(made[name], size=size, mode="bilinear", align_corners=True)
    return made


def _cut(pixel_PHWC: Tensor, first_P2: Tensor, step_P2: Tensor, size: tuple[int, int]) -> Tensor:
    row_Ph, column_Pw = (
        first_P2[:, axis, None] + step_P2[:, axis, None] * torch.arange(n, device=pixel_PHWC.device)
        for axis, n in enumerate(size)
    )
    place_P = torch.arange(len(pixel_PHWC), device=pixel_PHWC.device)
    return pixel_PHWC[place_P[:, None, None], row_Ph[:, :, None], column_Pw[:, None, :]]


def _channels_first(image_PHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, whatever the type."""
    return image_PHWC.permute(0, 3, 1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)


def _rows(x_P: Tensor, row_R: Tensor) -> Tensor:
    return x_P if len(row_R) == len(x_P) else x_P[row_R]


def _with_rows(x_P: Tensor, row_R: Tensor, changed_R: Tensor) -> Tensor:
    return changed_R if len(row_R) == len(x_P) else x_P.index_copy_(0, row_R, changed_R)


def _resampled(image_RCHW: Tensor, theta_R23: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, zeros outside; centres of pixels as `affine_grid` has them without aligned corners."""
    y_h, x_w = ((torch.arange(n, device=image_RCHW.device, dtype=image_RCHW.dtype) * 2 + 1) / n - 1 for n in size)
    theta = theta_R23[:, :, :, None, None]
    places = [theta[:, axis, 0] * x_w + (theta[:, axis, 1] * y_h[:, None] + theta[:, axis, 2]) for axis in (0, 1)]
    grid = torch.stack(places, dim=-1)
    return F.grid_sample(image_RCHW, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _jittered(image_RChw: Tensor, matrix_RCC: Tensor, grey_R: Tensor | None) -> Tensor:
    channels = image_RChw.shape[1]
    matrix = matrix_RCC[:, :, :, None, None]
    made = image_RChw[:, :1] * matrix[:, :, 0]
    for other in range(1, channels):
        made.addcmul_(image_RChw[:, other : other + 1], matrix[:, :, other])
    if grey_R is not None:
        mean_RC = image_RChw.mean(dim=(2, 3))
        weights = GREY if channels == 3 else [1 / channels] * channels
        mean_R = sum((weight * mean_RC[:, channel] for channel, weight in enumerate(weights)), torch.zeros_like(grey_R))
        made += (grey_R * mean_R)[:, None, None, None]
    return made.clamp_(0, 1)
