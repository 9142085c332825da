"""A shard set for people: a page of numbers, and a picture of some samples."""

# matplotlib types many arguments partly
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.manifest import SPLITS, Manifest, Modality
from distkd.data.splits import split_numbers
from distkd.data.wds import ShardSet
from distkd.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["info", "missing_notes", "show"]

_TELLING = 0.2
"""Difference of two classes' shares of missing values above which missing itself tells the class."""


def info(shard_set: ShardSet) -> str:
    """Counts, folds, modalities, what is missing and what was excluded, as plain text."""
    manifest = shard_set.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{shard_set.folder}: task {manifest.task!r}, classes {', '.join(manifest.class_names)}",
        f"{manifest.n_samples} samples of {manifest.n_patients} patients",
        f"{size / 1e6:.1f} MB in {len(manifest.shards)} shards",
        f"source   {manifest.source}",
        f"licence  {manifest.licence}",
        "",
        *_table(["modality", "kind", "shape", "type", "codec", "MB", "missing", "unit"], _modality_rows(shard_set)),
        *missing_notes(manifest),
        "",
        f"folds: {manifest.split_rule} (seed {manifest.split_seed})",
        *_table(["fold", "split", "patients", "samples", *manifest.class_names, "no label"], _fold_rows(manifest)),
    ]
    if manifest.excluded:
        lines += ["", "excluded from the inputs:"]
        lines += [f"  {name}: {reason}" for name, reason in manifest.excluded.items()]
    return "\n".join(lines)


def missing_notes(manifest: Manifest) -> list[str]:
    """A warning for modalities that classes lack so unequally that a model may learn this in place of the values."""
    labels = np.array(manifest.samples.label)
    named_by: dict[str, list[str]] = {}
    for name, places in manifest.samples.bytes.items():
        absent = np.array([place is None for place in places])
        shares = {
            class_name: float(absent[labels == label].mean())
            for label, class_name in enumerate(manifest.class_names)
            if (labels == label).any()
        }
        if shares and max(shares.values()) - min(shares.values()) > _TELLING:
            found = ", ".join(f"{class_name} {share:.0%}" for class_name, share in shares.items())
            named_by.setdefault(found, []).append(name)
    return [
        f"note: {', '.join(names)} missing unequally ({found}): that tells the class; compare models on pairs only"
        for found, names in named_by.items()
    ]


def show(shard_set: ShardSet, out: Path, *, per_class: int = 4) -> Path:
    """A PNG with some samples of each class, a row per class and modality: images as they are, vectors as curves.

    Returns:
        `out`.

    Raises:
        DataError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no window, no global state
    from matplotlib.figure import Figure

    manifest = shard_set.manifest
    names = list(manifest.modalities)
    chosen = _chosen(manifest, per_class)
    rows = [(label, name) for label in chosen for name in names]
    figure = Figure(figsize=(1.9 * per_class + 1, 1.5 * len(rows) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), per_class, squeeze=False)
    for row, (label, name) in enumerate(rows):
        modality = manifest.modalities[name]
        for column in range(per_class):
            ax: Axes = axes[row, column]
            ax.set_xticks([])
            ax.set_yticks([])
            if column < len(chosen[label]):
                sample = chosen[label][column]
                _draw(ax, shard_set.read(sample, (name,)).get(name), modality)
                if row % len(names) == 0:
                    ax.set_title(manifest.samples.key[sample], fontsize=7)
            else:
                ax.set_axis_off()
        class_name = "no label" if label == UNLABELLED else manifest.class_names[label]
        axes[row, 0].set_ylabel(f"{class_name}\n{name}", fontsize=8)
    figure.suptitle(f"{manifest.task}: {manifest.n_samples} samples of {manifest.n_patients} patients", fontsize=9)
    try:
        figure.savefig(out, format="png", dpi=110)
    except OSError as error:
        raise DataError(f"cannot write the picture {str(out)!r}: {error}; choose another place") from error
    return out


def _chosen(manifest: Manifest, per_class: int) -> dict[int, list[int]]:
    """Samples of each class, of different patients and, where there are enough, with all modalities."""
    labels = np.array(manifest.samples.label)
    columns = manifest.samples.bytes.values()
    n_missing = np.array([sum(column[i] is None for column in columns) for i in range(manifest.n_samples)])
    chosen: dict[int, list[int]] = {}
    for label in range(UNLABELLED, len(manifest.class_names)):
        members = np.flatnonzero(labels == label)
        first_of: dict[str, int] = {}
        for i in members[np.argsort(n_missing[members], kind="stable")].tolist():
            first_of.setdefault(manifest.samples.patient[i], i)
        if first_of:
            chosen[label] = list(first_of.values())[:per_class]
    return chosen


def _draw(ax: Axes, values: np.ndarray | None, modality: Modality) -> None:
    if values is None:
        ax.text(0.5, 0.5, "missing", ha="center", va="center", fontsize=8, transform=ax.transAxes)
    elif modality.kind == "vector":
        ax.plot(values, linewidth=0.6)
    elif modality.kind == "image":
        full = np.iinfo(modality.dtype).max if modality.dtype.startswith(("u", "i")) else 1.0
        shown = values[:, :, :3] if values.shape[2] >= 3 else values[:, :, 0]
        ax.imshow(np.clip(shown / full, 0, 1), cmap="gray", vmin=0, vmax=1)
    else:
        ax.imshow(values[0, :, :, values.shape[3] // 2], cmap="gray")


def _modality_rows(shard_set: ShardSet) -> list[list[str]]:
    manifest = shard_set.manifest
    rows: list[list[str]] = []
    for name, modality in manifest.modalities.items():
        places = manifest.samples.bytes[name]
        size = sum(place[1] for place in places if place is not None)
        shape = " x ".join(map(str, modality.shape))
        missing = sum(place is None for place in places)
        rows.append(
            [
                name,
                modality.kind,
                shape,
                modality.dtype,
                modality.codec,
                f"{size / 1e6:.1f}",
                str(missing),
                modality.unit,
            ]
        )
    return rows


def _fold_rows(manifest: Manifest) -> list[list[str]]:
    labels = np.array(manifest.samples.label)
    rows: list[list[str]] = []
    for number, fold in enumerate(manifest.folds):
        for split in SPLITS:
            of_split = labels[split_numbers(manifest, number, split)]
            counts = [int((of_split == label).sum()) for label in [*range(len(manifest.class_names)), UNLABELLED]]
            rows.append([str(number), split, str(len(fold.patients(split))), str(len(of_split)), *map(str, counts)])
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *rows]
    ]
