"""What each role's model looked at: the images of a few samples with its map laid over them, role beside role.

Reads the `eval/<split>.attention.npz` of one run a role and shows the samples that all of them have.
"""

# Shapes: N samples, C classes, h x w places of a map, H x W pixels

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from distkd.errors import DataError
from distkd.report.plots import INK, Panel, wrapped
from distkd.report.roles import Role
from distkd.report.runs import Run
from distkd.report.study import Study

__all__ = ["Attention", "Views", "about_views", "attention_panels", "find_views", "overlay", "read_attention"]

FORMAT = 1
_FIELDS = ("class_names", "modality", "size", "key", "label", "predicted", "probability", "image", "maps")

_CELL = 1.35
"""Inches a side of one picture."""
_GAP, _BAR, _LINE = 0.08, 0.4, 0.12
"""In sides of a picture: between two, for the scale on the right, for a line of text."""
_PIXELS = 192
"""A side of what is drawn into the page."""
_ROOM = 0.9 * _CELL
"""Inches of words; a picture is a little smaller than its cell where a title stands above the row."""
_LETTERS = 7.5
"""Points of the words around a picture."""
_AT_MOST = 8
"""Lines above a picture."""
_RIGHT, _WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"


@dataclass(frozen=True)
class Attention:
    """`eval/<split>.attention.npz`."""

    class_names: list[str]
    modality: str
    size: tuple[int, int]
    """(height, width) of what the model saw; the stored images may be smaller."""
    key: list[str]
    label_N: np.ndarray
    predicted_N: np.ndarray
    probability_N: np.ndarray
    """Of the predicted class."""
    image: np.ndarray
    """uint8, (N, H, W) of grey, (N, H, W, 3) of colour."""
    maps_NChw: np.ndarray
    """0..1 by the least and the largest value over all classes and places of a sample."""


@dataclass(frozen=True)
class Views:
    """What the section shows, or why it shows nothing."""

    shown: list[tuple[Role, Run, Attention]]
    keys: list[str]
    """Samples that all of them have, in the order of the first."""
    note: str = ""


def read_attention(path: Path) -> Attention:
    """Reads the maps of one run.

    Raises:
        DataError: the file is damaged, of a newer version, or not what its name says.
    """
    split = path.name.removesuffix(".attention.npz")
    again = f"write it again with `distkd eval {path.parent.parent} --split {split}`, or remove it"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            raw = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); {again}") from error
    if raw.get("format", np.array(FORMAT)) > FORMAT:
        raise DataError(f"{path} has format {raw['format']}, this version reads up to {FORMAT}; update distkd")
    missing = [name for name in _FIELDS if name not in raw]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; {again}")
    if not _fits(raw):
        shapes = ", ".join(f"{name} {raw[name].dtype} {raw[name].shape}" for name in _FIELDS)
        raise DataError(f"{path} holds {shapes}, which do not fit together; {again}")
    return Attention(
        class_names=[str(name) for name in raw["class_names"]],
        modality=str(raw["modality"]),
        size=(int(raw["size"][0]), int(raw["size"][1])),
        key=[str(key) for key in raw["key"]],
        label_N=raw["label"],
        predicted_N=raw["predicted"],
        probability_N=raw["probability"],
        image=raw["image"],
        maps_NChw=np.nan_to_num(raw["maps"].astype(np.float32)).clip(0, 1),
    )


def _fits(raw: Mapping[str, np.ndarray]) -> bool:
    kinds = {"class_names": "U", "key": "U", "label": "iu", "predicted": "iu", "probability": "f", "maps": "f"}
    if any(raw[name].dtype.kind not in kind for name, kind in kinds.items()) or raw["image"].dtype != np.uint8:
        return False
    if raw["key"].ndim != 1 or raw["class_names"].ndim != 1 or raw["size"].shape != (2,):
        return False
    n, c, image, maps = len(raw["key"]), len(raw["class_names"]), raw["image"], raw["maps"]
    return (
        all(raw[name].shape == (n,) for name in ("label", "predicted", "probability"))
        and all(((raw[name] >= 0) & (raw[name] < c)).all() for name in ("label", "predicted"))
        and (image.ndim == 3 or image.shape[3:] == (3,))
        and maps.ndim == 4
        and len(image) == n
        and maps.shape[:2] == (n, c)
    )


def find_views(study: Study) -> Views | None:
    """One run of each role that has maps, of the lowest fold and seed that all of these roles have; None without any.

    Raises:
        DataError: a file is damaged.
    """
    found = [(role, _with_maps(role, study.split)) for role, _ in study.counted]
    found = [(role, runs) for role, runs in found if runs]
    if not found:
        return None
    units = set[tuple[int, int]].intersection(*({run.unit for run in runs} for _, runs in found))
    folds = set[int].intersection(*({run.fold for run in runs} for _, runs in found))
    if units:
        chosen = [(role, next(run for run in runs if run.unit == min(units))) for role, runs in found]
    elif folds:  # a teacher of one seed has students of several
        chosen = [(role, next(run for run in runs if run.fold == min(folds))) for role, runs in found]
    else:
        return Views([], [], "No fold has maps of all roles, so there are no common samples to show.")
    shown = [(role, run, read_attention(_path(run, study.split))) for role, run in chosen]
    common = set[str].intersection(*(set(attention.key) for _, _, attention in shown))
    keys = [key for key in shown[0][2].key if key in common]
    note = "" if keys else "The runs' maps are of different samples, so there is nothing to compare."
    return Views(shown, keys, note)


def _path(run: Run, split: str) -> Path:
    return run.folder / "eval" / f"{split}.attention.npz"


def _with_maps(role: Role, split: str) -> list[Run]:
    return sorted((run for run in role.counted if _path(run, split).is_file()), key=lambda run: run.unit)


@dataclass(frozen=True)
class _Cell:
    """One picture with the words above and below it."""

    above: list[str]
    pixels: np.ndarray
    below: str = ""
    bold: bool = False


def attention_panels(views: Views | None) -> list[Panel]:
    """One row of pictures for each sample."""
    return [] if views is None else [_panel(views, key) for key in views.keys]


def _panel(views: Views, key: str) -> Panel:
    first = views.shown[0][2]
    cells = _cells(views, key)
    n_lines = max(len(cell.above) for cell in cells)
    head, foot = (n_lines + 0.6) * _LINE, 3.1 * _LINE
    width = len(cells) * (1 + _GAP) + _BAR

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        for number, cell in enumerate(cells):
            left = number * (1 + _GAP)
            _picture(axes, cell.pixels, left)
            words = "\n".join(cell.above)
            weight = "bold" if cell.bold else "normal"
            axes.text(left, -0.4 * _LINE, words, va="bottom", fontsize=_LETTERS, fontweight=weight, linespacing=1.25)
            axes.text(left, 1 + 0.3 * _LINE, cell.below, va="top", fontsize=_LETTERS, linespacing=1.25)
        _scale(axes, width - _BAR + 0.04)
        axes.set_xlim(0, width)
        axes.set_ylim(1 + foot, -head)
        axes.set_aspect("equal")

    label = first.class_names[int(first.label_N[first.key.index(key)])]
    height = _CELL * (head + 1 + foot)
    return Panel(f"label {label}, sample {key}", draw, width=_CELL * width + 0.2, height=height + 0.2)


def _cells(views: Views, key: str) -> list[_Cell]:
    """An input wherever it is another one than before, and each role's overlay."""
    cells: list[_Cell] = []
    before: np.ndarray | None = None
    for role, _, attention in views.shown:
        n = attention.key.index(key)
        image, label, predicted = attention.image[n], int(attention.label_N[n]), int(attention.predicted_N[n])
        if before is None or not np.array_equal(image, before):
            size = " x ".join(map(str, reversed(attention.size)))
            cells.append(_Cell([*_lines(f"input {attention.modality}"), f"{size} px"], _enlarged(image)))
        before = image
        said = f"{_RIGHT if predicted == label else _WRONG} {attention.class_names[predicted]}"
        share = f" {attention.probability_N[n]:.2f}"
        while len(wrapped(said + share, _ROOM, size=_LETTERS)) > 1:
            said = f"{said.removesuffix('...')[:-1]}..."
        map_hw = attention.maps_NChw[n, label]
        below = f"{said}{share}\nmap {map_hw.shape[1]} x {map_hw.shape[0]}"
        cells.append(_Cell(_lines(role.title, bold=True), overlay(image, map_hw), below, bold=True))
    return cells


def _lines(text: str, *, bold: bool = False) -> list[str]:
    lines = wrapped(text, _ROOM, size=_LETTERS, bold=bold)
    return lines if len(lines) <= _AT_MOST else [*lines[: _AT_MOST - 1], "..."]


def _enlarged(image: np.ndarray) -> np.ndarray:
    """RGB of 0..1 whose longer side is that of a drawing; a coarse image keeps its pixels as squares."""
    view = Image.fromarray(image).convert("RGB")
    scale = _PIXELS / max(view.size)
    size = (max(1, round(view.width * scale)), max(1, round(view.height * scale)))
    how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
    return np.asarray(view.resize(size, how)) / 255


def overlay(image: np.ndarray, map_hw: np.ndarray) -> np.ndarray:
    """The image in grey, tinted by the map: RGB of 0..1. The tint grows lighter with the map, for any colour vision."""
    rgb_HW3 = _enlarged(image)
    grey_HW1 = rgb_HW3.mean(axis=2, keepdims=True)
    smooth = Image.fromarray(map_hw.astype(np.float32)).resize(grey_HW1.shape[1::-1], Image.Resampling.BICUBIC)
    tint_HW3 = mpl.colormaps["viridis"](np.asarray(smooth).clip(0, 1))[:, :, :3]
    return 0.45 * grey_HW1 + 0.55 * tint_HW3


def _picture(axes: Axes, pixels: np.ndarray, left: float) -> None:
    """In the middle of its square."""
    height, width = pixels.shape[0] / max(pixels.shape[:2]), pixels.shape[1] / max(pixels.shape[:2])
    x, y = left + (1 - width) / 2, (1 - height) / 2
    axes.imshow(pixels, extent=(x, x + width, y + height, y))


def _scale(axes: Axes, left: float) -> None:
    """The tint from 0 at the bottom to 1 at the top."""
    ramp = mpl.colormaps["viridis"](np.linspace(1, 0, _PIXELS))[:, None, :3]
    axes.imshow(0.45 + 0.55 * ramp, extent=(left, left + 0.06, 1, 0), aspect="auto")
    for value in (0, 1):
        axes.text(left + 0.09, 1 - value, f"{value}", va="center", fontsize=7.5, color=INK)


def about_views(views: Views, study: Study) -> list[str]:
    """What one sees, what it is not, and of which runs it is: a paragraph each."""
    seen = (
        "What each model goes by when it looks for the label's class: the image as the model saw it, and the same in "
        "grey under the tint of its map. The map (AT+) adds up what speaks for that class at each place; 0 and 1 are "
        "the least and the largest value over all classes and places of the picture, so each picture has a scale of "
        "its own, and one that stays dark has its evidence for another class. It shows the evidence that the linear "
        "head uses; it is no segmentation, and no proof that the model would fail without that place."
    )
    below = (
        "Below each picture the predicted class with its probability, ticked where it is right, and how many places "
        "the map has before it is drawn at the image's size. The samples were chosen by their keys and patients alone, "
        "not by how a model does on them."
    )
    words = [seen, below]
    if any(len(run.modalities) > 1 for _, run, _ in views.shown):
        words.append("A model of several inputs predicts from all of them; its map is that of its image's own head.")
    units = {run.unit for _, run, _ in views.shown}
    of = ", ".join(f"{role.title} {run.name}" for role, run, _ in views.shown)
    words.append(f"Runs: {of}." if len(units) > 1 else "Runs: fold {}, seed {}.".format(*units.pop()))
    absent = [role.title for role, _ in study.counted if role not in [shown for shown, _, _ in views.shown]]
    if absent:
        words[-1] += f" No maps: {', '.join(absent)} (no pooled head on an image, or not evaluated since it has one)."
    return words
