"""Some samples of a shard set as one picture to look at: images, slices of volumes with the target on them, curves."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.look.cards import CardMaker, even_rows
from distkd.data.look.sheet import FORMATS, Sheet, draw
from distkd.data.manifest import Manifest
from distkd.data.shardset import ShardSet
from distkd.errors import DataError

__all__ = ["Shown", "show"]

_MAX_COLUMNS, _MAX_ROWS = 12, 12
"""Panels that a page has side by side and one below the other."""
_SHOWN = 5
"""How many of many names a message has."""


@dataclass(frozen=True)
class Shown:
    """What `show` made."""

    path: Path
    samples: list[int]
    left_out: list[str]
    """What did not fit, in words; they stand below the picture, too."""


def show(
    shard_set: ShardSet,
    out: Path,
    *,
    per_class: int = 4,
    keys: Sequence[str] | None = None,
    fold: int | None = None,
) -> Shown:
    """A png or jpg with a card per sample; of volumes three slices each, of which nothing but their chunks is read.

    The slices are those with the largest area of the target, else the middle ones. A page holds so much and no more;
    what does not fit is said.

    Args:
        out: `.png` is added where it has no ending.
        per_class: samples of each class: one of each combination of modalities, complete ones and other patients first.
        keys: these samples, in this order, instead.
        fold: say of each sample in which split of this fold it is.

    Raises:
        DataError: unknown keys or fold, damaged bytes, or the file cannot be written.
    """
    out = _picture(out)
    manifest = shard_set.manifest
    if fold is not None and not 0 <= fold < len(manifest.folds):
        raise DataError(f"fold {fold} is not in {shard_set.place!r}, which has folds 0..{len(manifest.folds) - 1}")
    groups = _chosen(manifest, per_class) if keys is None else {UNLABELLED: _numbers(shard_set, keys)}
    maker = CardMaker(shard_set, fold)
    rows, notes = _arranged(groups, manifest, *maker.panels)
    drawn = [sample for row in rows for sample in row]
    cards = maker.cards(drawn)
    sheet = Sheet(
        title=f"{manifest.task}: {len(drawn)} of {manifest.n_samples} samples of {manifest.n_patients} patients",
        cards=[[cards[sample] for sample in row] for row in rows],
        row_heights=maker.row_heights(drawn),
        legend=maker.legend(),
        notes=[*notes, *maker.notes()],
    )
    draw(sheet, out)
    return Shown(out, drawn, notes)


def _picture(out: Path) -> Path:
    """Where the picture goes."""
    if out.is_dir():
        raise DataError(f"cannot write the picture {str(out)!r}: it is a folder; choose another place with --output")
    out = out if out.suffix else out.with_name(f"{out.name}.png")
    if out.suffix.lower() not in FORMATS:
        raise DataError(
            f"cannot write the picture {str(out)!r}: unknown kind {out.suffix!r}, expected {', '.join(FORMATS)}; "
            "choose another name with --output"
        )
    return out


# which samples


def _chosen(manifest: Manifest, per_class: int) -> dict[int, list[int]]:
    """Samples of each class: each combination of modalities once if there is room, then of different patients first."""
    labels = np.array(manifest.samples.label)
    columns = [column for name, column in manifest.samples.bytes.items() if manifest.modalities[name].role != "aux"]
    absent = [tuple(column[i] is None for column in columns) for i in range(manifest.n_samples)]
    patients = manifest.samples.patient
    chosen: dict[int, list[int]] = {}
    for label in range(UNLABELLED, len(manifest.class_names)):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: (sum(absent[i]), i))
        found: list[int] = []
        for combination in list(dict.fromkeys(absent[i] for i in members))[:per_class]:
            found.append(_fresh([i for i in members if absent[i] == combination], patients, found)[0])
        found += _fresh([i for i in members if i not in set(found)], patients, found)[: per_class - len(found)]
        if found:
            chosen[label] = sorted(found, key=lambda i: (sum(absent[i]), i))
    return chosen


def _fresh(samples: Sequence[int], patients: Sequence[str], before: Sequence[int]) -> list[int]:
    """The samples, those first whose patient none before them has."""
    met = {patients[i] for i in before}
    first: list[int] = []
    again: list[int] = []
    for i in samples:
        (again if patients[i] in met else first).append(i)
        met.add(patients[i])
    return [*first, *again]


def _numbers(shard_set: ShardSet, keys: Sequence[str]) -> list[int]:
    number_of = {key: number for number, key in enumerate(shard_set.manifest.samples.key)}
    unknown = [key for key in dict.fromkeys(keys) if key not in number_of]
    if unknown:
        near = difflib.get_close_matches(unknown[0], number_of, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{shard_set.place!r} has no sample {_some(map(repr, unknown))}{hint}; it has "
            f"{len(number_of)} samples, such as {_some(list(map(repr, number_of))[:3])}"
        )
    if not keys:
        raise DataError("no samples to show; name their keys")
    return [number_of[key] for key in dict.fromkeys(keys)]


def _arranged(
    groups: dict[int, list[int]], manifest: Manifest, n_columns: int, n_rows: int
) -> tuple[list[list[int]], list[str]]:
    """Rows of the page, and what of the groups does not fit; a row for each group where all of them fit so."""
    most, max_rows = max(1, _MAX_COLUMNS // n_columns), max(1, _MAX_ROWS // n_rows)
    capacity = most * max_rows
    wanted = max(map(len, groups.values()))
    notes: list[str] = []
    if len(groups) > 1:
        for each in range(wanted, 0, -1):
            rows = [row for members in groups.values() for row in even_rows(members[:each], most, wanted=each)]
            if len(rows) <= max_rows:
                if each < wanted:
                    notes = [
                        f"only {each} of each class instead of {wanted}: the page is full; name others by their keys"
                    ]
                return rows, notes
        left = list(groups)[capacity:]
        if left:
            words = _some("no label" if label == UNLABELLED else manifest.class_names[label] for label in left)
            classes = f"{len(left)} class{'' if len(left) == 1 else 'es'} ({words})"
            notes.append(f"without {classes}: the page is full; name samples by their keys")
        if wanted > 1:
            notes.append(f"only 1 of each class instead of {wanted}: the page is full; name others by their keys")
        flat = [members[0] for members in list(groups.values())[:capacity]]
        return even_rows(flat, most), notes
    members = next(iter(groups.values()))
    if len(members) > capacity:
        notes = [f"only {capacity} of {len(members)} samples: the page is full; name the others in a second call"]
    return even_rows(members[:capacity], most), notes


def _some(words: Iterable[str]) -> str:
    found = list(words)
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
