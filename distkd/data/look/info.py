"""What is said of a shard set in words: the page of its numbers, and what was found when every byte was checked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence

from distkd.data.look.summary import ClassSummary, SpaceSummary, Summary, summary
from distkd.data.manifest import Manifest
from distkd.data.shardset import ShardSet
from distkd.data.verify import verify

__all__ = ["info", "size_words", "verified"]

_MAX_ROWS = 16
"""Of a table of combinations or of spaces on the page; JSON has all."""
_MAX_CLASS_LETTERS = 90
"""Of the class names as columns of the table of folds; the table of classes has them as rows."""


def info(shard_set: ShardSet) -> str:
    """Counts, folds, modalities, what is missing and what was excluded, as plain text."""
    found = summary(shard_set)
    what = {"wds": "tars", "zarr": "a zarr group"}[found.container]
    groups = f" in {_many(found.groups, 'group')}" if found.groups else ""
    without_crc = "" if len(found.checksums) > 1 else ", none of single values"
    lines = [
        f"{found.folder}: task {found.task!r}, classes {', '.join(found.class_names)}",
        f"{_many(found.samples, 'sample')} of {_many(found.patients, 'patient')}{groups}",
        f"{size_words(found.bytes)} in {_many(found.files, 'shard')}: {_extremes(found)}",
        f"format    {found.format_version}, {found.problem}, {what}",
        f"checksums {', '.join(found.checksums)}{without_crc}",
        f"source    {found.source}",
        f"licence   {found.licence}",
        "",
        *_modality_lines(found),
        *found.notes,
        *_combination_lines(found),
        *_space_lines(found.spaces),
        *_class_lines(found.classes),
        "",
        f"folds: {found.split_rule} (seed {found.split_seed})",
        *_fold_lines(found),
    ]
    if found.excluded:
        lines += ["", "excluded from the inputs:"]
        lines += [f"  {name}: {reason}" for name, reason in found.excluded.items()]
    return "\n".join(lines)


def verified(shard_set: ShardSet, threads: int | None = None) -> str:
    """Check every byte, with a bar where standard error is a terminal, and say what was checked.

    Raises:
        DataError: with all that was found wrong, the first few in words.
    """
    threads = threads or len(os.sched_getaffinity(0))
    start = time.perf_counter()
    found = verify(shard_set, lambda names: _bar(shard_set.manifest, names), threads)
    took_s = time.perf_counter() - start
    return (
        f"checked {_many(found.files, 'file')}, {size_words(found.bytes)}, {_many(found.samples, 'sample')} with "
        f"{_many(found.values, 'value')} in {took_s:.1f} s: {size_words(found.bytes / max(took_s, 1e-6))}/s, "
        f"{_many(threads, 'thread')}\n{shard_set.folder}: every byte is as the manifest says"
    )


def _bar(manifest: Manifest, names: Iterable[str]) -> Iterator[str]:
    """The names; a file counts as checked when the next one is asked for."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bytes_of = {shard.file: shard.bytes for shard in manifest.shards}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("checking", total=sum(bytes_of.values()))
        for name in names:
            yield name
            progress.advance(task, bytes_of[name])


def size_words(n_bytes: float) -> str:
    """1234567 as 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def _extremes(found: Summary) -> str:
    if found.smallest == found.largest:
        return found.largest.file
    ends = (found.smallest, found.largest)
    return ", ".join(
        f"{word} {shard.file} {size_words(shard.bytes)}"
        + (f" ({_many(shard.samples, 'sample')})" if shard.samples else "")
        for word, shard in zip(("smallest", "largest"), ends, strict=True)
    )


def _modality_lines(found: Summary) -> list[str]:
    header = ["modality", "role", "kind", "shape", "type", "codec", "chunk", "size", "ratio", "missing", "unit"]
    rows = [
        [
            name,
            modality.role,
            modality.kind,
            " x ".join(map(str, modality.shape)),
            modality.dtype,
            modality.codec + (f"+{modality.compression}" if modality.compression != "none" else ""),
            " x ".join(map(str, modality.chunk or ())),
            size_words(modality.bytes),
            f"{modality.ratio:.2f}" if modality.ratio and modality.kind != "vector" else "-",
            str(modality.missing),
            modality.unit,
        ]
        for name, modality in found.modalities.items()
    ]
    plain = {"role"} if all(modality.role == "input" for modality in found.modalities.values()) else set[str]()
    plain |= {"chunk"} if not any(modality.chunk for modality in found.modalities.values()) else set()
    kept = [column for column, name in enumerate(header) if name not in plain]
    lines = _table([header[column] for column in kept], [[row[column] for column in kept] for row in rows])
    for name, modality in found.modalities.items():
        if modality.role == "target":
            values = modality.values or range(len(found.class_names))
            pairs = ", ".join(f"{value} {word}" for value, word in zip(values, found.class_names, strict=True))
            lines.append(f"values of {name}: {pairs}")
    return lines


def _combination_lines(found: Summary) -> list[str]:
    names = [name for name, modality in found.modalities.items() if modality.role != "aux"]
    if len(found.combinations) == 1 and len(found.combinations[0].modalities) == len(names):
        return []
    rows = [
        [
            str(combination.samples),
            f"{combination.samples / found.samples:.1%}",
            *("x" if name in combination.modalities else "-" for name in names),
        ]
        for combination in found.combinations[:_MAX_ROWS]
    ]
    rest = found.combinations[_MAX_ROWS:]
    more = f"and {len(rest)} more combinations of {sum(c.samples for c in rest)} samples" if rest else ""
    return ["", "who has what:", *_table(["samples", "share", *names], rows), *([more] if more else [])]


def _space_lines(spaces: list[SpaceSummary]) -> list[str]:
    if not spaces:
        return []
    shapes = {space.shape for space in spaces}
    spacings = {space.spacing for space in spaces if space.spacing is not None}
    rows = [
        [
            str(space.samples),
            " x ".join(map(str, space.shape)),
            " x ".join(f"{mm:g}" for mm in space.spacing) if space.spacing else "unknown",
            space.orientation or "unknown",
        ]
        for space in spaces[:_MAX_ROWS]
    ]
    rest = spaces[_MAX_ROWS:]
    more = f"and {len(rest)} more spaces of {sum(space.samples for space in rest)} samples" if rest else ""
    found = f"{_many(len(shapes), 'shape')} {_ranges(shapes)} voxels"
    found += f", {_many(len(spacings), 'spacing')} {_ranges(spacings)} mm" if spacings else ", spacing unknown"
    return [
        "",
        f"spaces: {found}",
        *_table(["samples", "voxels", "mm", "axes"], rows),
        *([more] if more else []),
    ]


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _ranges(rows: Iterable[Sequence[float]]) -> str:
    axes = [(min(axis), max(axis)) for axis in zip(*rows, strict=True)]
    return " x ".join(f"{low:g}" if low == high else f"{low:g}..{high:g}" for low, high in axes)


def _class_lines(classes: list[ClassSummary]) -> list[str]:
    if not classes:
        return []
    total = sum(one.samples for one in classes)
    rows = [
        [one.name or "no label", str(one.samples), f"{one.samples / total:.1%}", str(one.patients)] for one in classes
    ]
    return ["", *_table(["class", "samples", "share", "patients"], rows)]


def _fold_lines(found: Summary) -> list[str]:
    wide = found.problem == "segmentation" or sum(len(name) + 2 for name in found.class_names) > _MAX_CLASS_LETTERS
    names = [] if wide else [*found.class_names, "no label"]
    rows = [
        [str(one.fold), one.split, str(one.patients), str(one.samples), *map(str, one.classes[: len(names)])]
        for one in found.splits
    ]
    return _table(["fold", "split", "patients", "samples", *names], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *rows]
    ]
