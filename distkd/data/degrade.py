"""A sharp image seen at a coarser resolution: what a student of inter-resolution distillation is given.

Both views come from one stored sample, after the same random changes. Averages and interpolation are linear with
weights that sum to 1, so it makes no difference whether values are normalised before or after.
"""

# Shapes: C channels, H height, W width

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from distkd.base import StrictConfig
from distkd.data.manifest import Name
from distkd.errors import ConfigError

__all__ = ["DegradedConfig", "check_factor", "degrade", "restore_size"]


class DegradedConfig(StrictConfig):
    """A modality that is not stored but made of a stored image."""

    of: Name
    """The stored modality."""
    factor: PositiveInt
    """Side of the squares of pixels that are averaged: 2, 4, 8 make 5x, 2.5x, 1.25x of a slide at 10x."""
    restore: bool = True
    """Interpolate back to the sharp size, as the source does: maps of teacher and student then have one size, and the
    student saves nothing. Without it the student sees, and computes on, the small image."""


def degrade(image_CHW: np.ndarray, factor: int, *, restore: bool) -> np.ndarray:
    """Averages of `factor` x `factor` pixels, then bilinear to the old size where `restore` says so.

    Args:
        image_CHW: float32 or float64; height and width are multiples of the factor.

    Returns:
        (C, H, W), or (C, H / factor, W / factor). The same bits with any number of threads.

    Source: card `inter-resolution-at-plus`, section 2 (align_corners is true there).
    """
    if factor == 1:
        return image_CHW
    small = F.avg_pool2d(_tensor(image_CHW), factor)[0].numpy()
    return restore_size(small, (image_CHW.shape[1], image_CHW.shape[2])) if restore else small


def restore_size(small_CHW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear to (height, width), corners onto corners."""
    small = _tensor(small_CHW)
    # not `interpolate`: its bits depend on the number of threads, and so on the world size
    grid = _corner_grid(size, small.dtype)
    return F.grid_sample(small, grid, mode="bilinear", padding_mode="border", align_corners=True)[0].numpy()


def check_factor(size: tuple[int, int], factor: int, *, name: str, of: str) -> None:
    """The image divides into whole squares.

    Raises:
        ConfigError: it does not.
    """
    if size[0] % factor or size[1] % factor:
        nearest = " x ".join(str(n - n % factor) for n in size)
        raise ConfigError(
            f"data.degraded.{name}.factor={factor} does not divide {of!r} of {size[0]} x {size[1]} px; "
            f"set data.augment.crop so that it has {nearest}, or use another factor"
        )


@lru_cache(maxsize=8)
def _corner_grid(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return F.affine_grid(torch.eye(2, 3, dtype=dtype)[None], [1, 1, *size], align_corners=True)


def _tensor(image_CHW: np.ndarray) -> Tensor:
    if not image_CHW.flags.writeable:
        image_CHW = image_CHW.copy()
    return torch.as_tensor(np.ascontiguousarray(image_CHW))[None]
