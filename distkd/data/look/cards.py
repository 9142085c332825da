"""What the picture of a shard set shows of one sample: pixels, slices with the target on them, curves, words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.look.sheet import Card, Curve, Legend, Panel, Picture, Words, title_letters
from distkd.data.look.slices import AXES, PLANES, View, class_numbers, colour_map, overlay, view_of, window
from distkd.data.manifest import SPLITS, Modality
from distkd.data.shardset import ShardSet

__all__ = ["CardMaker", "even_rows"]

# Shapes: H W pixels, C channels, XYZ voxels in the order of the file, F values of a vector, K classes

T = TypeVar("T")

_MAX_COLUMNS = 8
"""Panels of a card side by side."""
_MAX_WORDS = 8
"""Named values of a vector that are written out; more are a curve."""
_HEIGHTS = (0.4, 1.4)
"""Lowest and highest panel, by its width."""
_CURVE_HEIGHT = 0.6
_MISSING = Words(["missing"], centred=True)


class CardMaker:
    """Makes the cards of a set; `cards` reads what is drawn and nothing else."""

    def __init__(self, shard_set: ShardSet, fold: int | None):
        self._set, self._manifest, self._fold = shard_set, shard_set.manifest, fold
        modalities = self._manifest.modalities
        self._target = next((name for name, one in modalities.items() if one.role == "target"), None)
        inputs = [name for name, one in modalities.items() if one.role == "input"]
        if self._target is not None and not any(self._lies_on(name) for name in inputs):
            inputs.append(self._target)  # on itself
        inputs = inputs or list(modalities)
        volumes = [name for name in inputs if modalities[name].kind == "volume"]
        self._left_out = [name for name in modalities if name not in (*inputs, self._target)]
        self._of_volumes = even_rows(volumes, _MAX_COLUMNS)
        self._of_others = even_rows([name for name in inputs if name not in volumes], _MAX_COLUMNS)
        self._colour_K3 = colour_map(len(self._manifest.class_names))
        self._odd_values: set[int] = set()
        """Of the target, where no class has them."""
        spaces = [space for space in self._manifest.samples.space if space is not None]
        self._placed = not spaces or any(space.affine is not None for space in spaces)
        """Whether anything says which voxel axis is which of the patient."""
        self._split_of: dict[str, str] = {}
        if fold is not None:
            for split in SPLITS:
                self._split_of |= dict.fromkeys(self._manifest.folds[fold].patients(split), split)

    @property
    def panels(self) -> tuple[int, int]:
        """Columns and rows of every card."""
        rows = [*self._of_volumes, *self._of_others]
        return max(map(len, rows)), len(self._of_volumes) * len(PLANES) + len(self._of_others)

    def cards(self, samples: Sequence[int]) -> dict[int, Card]:
        """By sample; curves of one modality have one scale."""
        vectors = {
            name: self._vectors(name, samples) for row in self._of_others for name in row if self._is_vector(name)
        }
        return {sample: self._card(sample, vectors) for sample in samples}

    def row_heights(self, samples: Sequence[int]) -> list[float]:
        """Of the rows of a card, by the width of a panel: what the highest picture needs."""
        spaces = self._manifest.samples.space
        views = [view_of(space) for sample in samples if spaces and (space := spaces[sample]) is not None]
        planes = [
            max((view.picture_aspect(view.planes[place]) for view in views), default=1.0)
            for place in range(len(PLANES))
        ]
        others = [max(self._height(name) for name in row) for row in self._of_others]
        low, high = _HEIGHTS
        return [min(max(height, low), high) for height in [*planes * len(self._of_volumes), *others]]

    def legend(self) -> Legend:
        """Colours of the target's classes; the background has none."""
        if self._target is None:
            return Legend([])
        pairs = zip(self._manifest.class_names[1:], self._colour_K3[1:].tolist(), strict=True)
        return Legend([(name, (red, green, blue)) for name, (red, green, blue) in pairs])

    def notes(self) -> list[str]:
        """How to read the picture; call it after `cards`."""
        notes: list[str] = []
        if self._of_volumes:
            which = (
                f"with the largest area of {self._target}, else the middle ones" if self._target else "in the middle"
            )
            turned = (
                "; radiological view: R is the patient's right" if self._placed else "; no affine, so no patient's axes"
            )
            notes.append(
                f"slices {which}, numbered as in the file{turned}; grey from the 1st to the 99th percentile of the "
                "nonzero voxels drawn"
            )
        if self._odd_values:
            values = ", ".join(map(str, sorted(self._odd_values)[:5]))
            notes.append(f"white: values of {self._target} that no class has ({values})")
        if self._left_out:
            notes.append(f"not drawn, as no model is given them: {', '.join(self._left_out)}")
        return notes

    def _lies_on(self, name: str) -> bool:
        """Whether the target can be painted over that modality."""
        assert self._target is not None
        target, other = self._manifest.modalities[self._target], self._manifest.modalities[name]
        if target.kind != other.kind:
            return False
        return target.kind == "volume" or target.shape[:2] == other.shape[:2]

    def _is_vector(self, name: str) -> bool:
        return self._manifest.modalities[name].kind == "vector"

    def _height(self, name: str) -> float:
        modality = self._manifest.modalities[name]
        return _CURVE_HEIGHT if modality.kind == "vector" else modality.shape[0] / modality.shape[1]

    def _read(self, sample: int, name: str) -> np.ndarray | None:
        return self._set.read(sample, (name,)).get(name)

    def _vectors(self, name: str, samples: Sequence[int]) -> dict[int, np.ndarray]:
        found = {sample: self._read(sample, name) for sample in samples}
        return {sample: values for sample, values in found.items() if values is not None}

    def _card(self, sample: int, vectors: dict[str, dict[int, np.ndarray]]) -> Card:
        names: list[str] = []
        rows: list[list[Panel]] = []
        if self._of_volumes:
            names, rows = self._volume_rows(sample)
        class_HW = self._image_classes(sample)
        for row in self._of_others:
            rows.append(
                [
                    _vector_panel(name, self._manifest.modalities[name], vectors[name], sample)
                    if name in vectors
                    else self._image_panel(sample, name, class_HW)
                    for name in row
                ]
            )
            names.append("")
        return Card(self._title(sample), rows, names if self._of_volumes else ())

    def _title(self, sample: int) -> list[str]:
        """The key, and below it in as few lines as it takes: class, patient, split, a missing target."""
        columns = self._manifest.samples
        key, patient, label = columns.key[sample], columns.patient[sample], columns.label[sample]
        parts: list[str] = []
        if self._manifest.problem == "classification":
            parts.append("no label" if label == UNLABELLED else self._manifest.class_names[label])
        if patient != key:
            parts.append(patient if patient.lower().startswith("patient") else f"patient {patient}")
        if self._fold is not None:
            parts.append(f"fold {self._fold}: {self._split_of.get(patient, 'not used')}")
        if self._target is not None and columns.bytes[self._target][sample] is None:
            parts.append(f"no {self._target}")
        side = bool(self._of_volumes)
        return _packed(key, parts, title_letters(self.panels[0], side=side))

    def _classes(self, raw: np.ndarray) -> np.ndarray:
        """Of a target; what no class has is remembered."""
        assert self._target is not None
        values = self._manifest.modalities[self._target].values or range(len(self._manifest.class_names))
        numbers = class_numbers(raw, values)
        self._odd_values.update(np.unique(raw[numbers < 0]).tolist())
        return numbers

    def _volume_rows(self, sample: int) -> tuple[list[str], list[list[Panel]]]:
        space = self._manifest.samples.space[sample]
        if space is None:
            rows = [[Panel(_MISSING, name) for name in group] for group in self._of_volumes for _ in PLANES]
            return [plane.name for plane in (PLANES if self._placed else AXES)] * len(self._of_volumes), rows
        view = view_of(space)
        raw = self._read(sample, self._target) if self._target is not None else None
        class_XYZ = None if raw is None else self._classes(raw[0])
        numbers = [view.slice_number(plane, None if class_XYZ is None else class_XYZ != 0) for plane in view.planes]
        row_names = [plane.at(number) for plane, number in zip(view.planes, numbers, strict=True)]
        tints = None if class_XYZ is None else self._tints(view, numbers, class_XYZ)
        rows: list[list[Panel]] = []
        for group in self._of_volumes:
            columns = [self._slices(sample, name, view, numbers, tints) for name in group]
            rows += [list(row) for row in zip(*columns, strict=True)]
        return row_names * len(self._of_volumes), rows

    def _tints(self, view: View, numbers: list[int], class_XYZ: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for plane, number in zip(view.planes, numbers, strict=True):
            start, size = view.box(plane, number)
            x, y, z = (slice(a, a + n) for a, n in zip(start, size, strict=True))
            found.append(overlay(view.turn(plane, class_XYZ[x, y, z]), self._colour_K3))
        return found

    def _slices(
        self, sample: int, name: str, view: View, numbers: list[int], tints: list[np.ndarray] | None
    ) -> list[Panel]:
        """A panel for each plane; the caption is above the first."""
        n_channels = self._manifest.modalities[name].shape[0]
        caption = name if n_channels == 1 else f"{name}, channel 0 of {n_channels}"
        if self._manifest.samples.bytes[name][sample] is None:
            return [Panel(_MISSING, caption), *[Panel(_MISSING)] * (len(PLANES) - 1)]
        pictures = [
            view.turn(plane, self._set.crop(sample, name, *view.box(plane, number))[0])
            for plane, number in zip(view.planes, numbers, strict=True)
        ]
        limits = window(pictures)
        return [
            Panel(
                Picture(
                    _grey(picture, limits),
                    None if tints is None else tints[place],
                    view.pixel_aspect(plane),
                    plane.letters,
                ),
                "" if place else caption,
            )
            for place, (plane, picture) in enumerate(zip(view.planes, pictures, strict=True))
        ]

    def _image_classes(self, sample: int) -> np.ndarray | None:
        if self._target is None or self._manifest.modalities[self._target].kind != "image":
            return None
        raw = self._read(sample, self._target)
        return None if raw is None else self._classes(raw[:, :, 0])

    def _image_panel(self, sample: int, name: str, class_HW: np.ndarray | None) -> Panel:
        values_HWC = self._read(sample, name)
        if values_HWC is None:
            return Panel(_MISSING, name)
        fits = class_HW is not None and class_HW.shape == values_HWC.shape[:2]
        tint = overlay(class_HW, self._colour_K3) if class_HW is not None and fits else None
        return Panel(Picture(_pixels(values_HWC, self._manifest.modalities[name]), tint), name)


def even_rows(members: Sequence[T], most: int, wanted: int = 0) -> list[list[T]]:
    """Rows of equal length but for the last, none longer than `most`; as long as those of `wanted` members."""
    if not members:
        return []
    total = max(len(members), wanted)
    length = -(-total // -(-total // most))
    return [list(members[start : start + length]) for start in range(0, len(members), length)]


def _vector_panel(name: str, modality: Modality, vectors: dict[int, np.ndarray], sample: int) -> Panel:
    values_F = vectors.get(sample)
    if values_F is None:
        return Panel(_MISSING, name)
    if modality.features is not None and len(values_F) <= _MAX_WORDS:
        pairs = zip(modality.features, values_F.tolist(), strict=True)
        return Panel(
            Words([f"{_short(word, 18)} {'missing' if value != value else f'{value:.4g}'}" for word, value in pairs]),
            name,
        )
    n_missing = int(np.isnan(values_F).sum())
    caption = f"{name}, {n_missing} of {len(values_F)} missing" if n_missing else name
    if n_missing == len(values_F):
        return Panel(Words(["all values missing"], centred=True), name)
    known = np.concatenate([one[np.isfinite(one)] for one in vectors.values()])
    low, high = np.percentile(known.astype(np.float64), (1, 99)).tolist()  # one outlier would flatten all curves
    return Panel(Curve(values_F, (low, high)), caption)


def _pixels(values_HWC: np.ndarray, modality: Modality) -> np.ndarray:
    """Colours of an image of bytes as they are; other numbers between their percentiles."""
    shown = values_HWC[:, :, :3] if values_HWC.shape[2] >= 3 else values_HWC[:, :, 0]
    if modality.dtype == "uint8" and modality.role == "input":
        return shown.astype(np.float32) / 255
    return _grey(shown, window([shown]))


def _grey(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    low, high = limits
    return np.clip((values.astype(np.float32) - low) / (high - low), 0, 1)


def _packed(key: str, parts: Iterable[str], n_letters: int) -> list[str]:
    lines = [_short(key, n_letters)]
    for part in parts:
        if len(lines) > 1 and len(lines[-1]) + 2 + len(part) <= n_letters:
            lines[-1] += f", {part}"
        else:
            lines.append(_short(part, n_letters))
    return lines


def _short(text: str, n_letters: int) -> str:
    """Without its middle, if it is long: keys differ at their ends."""
    if len(text) <= n_letters:
        return text
    head = (n_letters - 3) // 2
    return f"{text[:head]}...{text[len(text) - (n_letters - 3 - head) :]}"
