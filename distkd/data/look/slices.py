"""Volumes as people look at them: which slice, how it is turned, and what of it is worth the grey.

Pictures follow the radiological convention: as if the patient were seen from the feet (axial) or from the front
(coronal), so the patient's right is at the left of the picture. Anterior is up in axial slices, superior in the others;
sagittal ones have anterior at the left. The affine says which voxel axis is which, to the nearest where it is oblique;
without one nothing does, and the slices are those of the array, its rows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distkd.data.manifest import Space

__all__ = ["AXES", "PLANES", "Plane", "View", "class_numbers", "colour_map", "overlay", "view_of", "window"]

# Shapes: C channels, XYZ voxels in the order of the file, H W pixels of a picture, K classes


Three = tuple[int, int, int]


@dataclass(frozen=True)
class Plane:
    """World axes, 0 to the patient's left-right, 1 posterior-anterior, 2 inferior-superior; or those of the array."""

    name: str
    normal: int
    row: int
    column: int
    letters: tuple[str, str]
    """At the left and at the top of the picture."""

    def at(self, number: int) -> str:
        """The slice's name."""
        return f"{self.name}{'' if any(self.letters) else ','} {number}"


PLANES = (
    Plane("axial", normal=2, row=1, column=0, letters=("R", "A")),
    Plane("coronal", normal=1, row=2, column=0, letters=("R", "S")),
    Plane("sagittal", normal=0, row=2, column=1, letters=("A", "S")),
)
AXES = (
    Plane("axis 0", normal=0, row=1, column=2, letters=("", "")),
    Plane("axis 1", normal=1, row=0, column=2, letters=("", "")),
    Plane("axis 2", normal=2, row=0, column=1, letters=("", "")),
)
"""Of a volume that nothing places in the patient."""


@dataclass(frozen=True)
class View:
    """How the voxels of a sample lie in the patient."""

    axes: tuple[int, int, int]
    """Voxel axis along each world axis."""
    ascending: tuple[bool, bool, bool]
    """Whether its numbers grow to the right, to anterior, to superior."""
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    planes: tuple[Plane, ...] = PLANES

    def slice_number(self, plane: Plane, weight_XYZ: np.ndarray | None) -> int:
        """Of the slice with the largest sum of the weights, else of the middle one."""
        axis = self.axes[plane.normal]
        if weight_XYZ is None or not weight_XYZ.any():
            return self.shape[axis] // 2
        others = tuple(other for other in range(3) if other != axis)
        return int(np.argmax(weight_XYZ.sum(axis=others)))

    def box(self, plane: Plane, number: int) -> tuple[Three, Three]:
        """Start and size of the slice, in voxels of the file."""
        start, size = [0, 0, 0], list(self.shape)
        start[self.axes[plane.normal]], size[self.axes[plane.normal]] = number, 1
        return (start[0], start[1], start[2]), (size[0], size[1], size[2])

    def turn(self, plane: Plane, slab_XYZ: np.ndarray) -> np.ndarray:
        """(H, W) picture of a slice one voxel thick."""
        flat_RAS = slab_XYZ.transpose(self.axes)
        picture = flat_RAS.take(0, axis=plane.normal)
        if plane.row > plane.column:
            picture = picture.T
        # rows go down and columns to the right: away from anterior, superior, right
        rows = slice(None, None, -1 if self.ascending[plane.row] else 1)
        columns = slice(None, None, -1 if self.ascending[plane.column] else 1)
        return picture[rows, columns]

    def pixel_aspect(self, plane: Plane) -> float:
        """Height of a pixel by its width."""
        return self.spacing[self.axes[plane.row]] / self.spacing[self.axes[plane.column]]

    def picture_aspect(self, plane: Plane) -> float:
        """Height of the picture by its width."""
        return self.pixel_aspect(plane) * self.shape[self.axes[plane.row]] / self.shape[self.axes[plane.column]]


def view_of(space: Space) -> View:
    """From the affine; without one the planes are those of the array, and voxels are as long along each axis."""
    import nibabel

    if space.affine is None:
        x, y, z = space.spacing or (1.0, 1.0, 1.0)
        return View((0, 1, 2), (False, False, False), space.shape, (x, y, z), AXES)
    axes, ascending = [0, 1, 2], [True, True, True]
    found = np.asarray(nibabel.io_orientation(np.array(space.affine)))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    for voxel_axis, (world_axis, sign) in enumerate(found.tolist()):
        axes[int(world_axis)], ascending[int(world_axis)] = voxel_axis, sign > 0
    return View(
        axes=(axes[0], axes[1], axes[2]),
        ascending=(ascending[0], ascending[1], ascending[2]),
        shape=space.shape,
        spacing=space.spacing or (1.0, 1.0, 1.0),
    )


def window(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Black and white: 1st and 99th percentile of the nonzero values of one sequence's slices."""
    shown = np.concatenate([array[np.isfinite(array) & (array != 0)].ravel() for array in values])
    if not len(shown):
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(shown.astype(np.float64), (1, 99)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def class_numbers(raw: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Raw values of a target as numbers of classes, int16; -1 for a value that no class has."""
    numbers = np.full(raw.shape, -1, dtype=np.int16)
    for number, value in enumerate(values):
        numbers[raw == value] = number
    return numbers


def colour_map(n_classes: int) -> np.ndarray:
    """(K, 3) colours in 0..1, row 0 for the background: few that the colour-blind tell apart, or a range of many."""
    from matplotlib import colormaps

    few = np.array([(0, 0, 0), (213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167)]) / 255
    if n_classes <= len(few):
        return few[:n_classes]
    many = colormaps["turbo"](np.linspace(0.05, 0.95, n_classes - 1))[:, :3]
    return np.concatenate([few[:1], many])


def overlay(class_HW: np.ndarray, colour_K3: np.ndarray) -> np.ndarray:
    """(H, W, 4) picture over a grey one: every class but 0 as a tint with its outline, voxels of no class in white."""
    painted = np.zeros((*class_HW.shape, 4), dtype=np.float32)
    marked = class_HW != 0
    painted[marked, :3] = np.concatenate([colour_K3, np.ones((1, 3))])[class_HW[marked]]
    padded = np.pad(class_HW, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.any([neighbour != class_HW for neighbour in neighbours], axis=0)
    painted[marked, 3] = 0.25
    painted[marked & edge, 3] = 0.9
    return painted
