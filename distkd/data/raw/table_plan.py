"""What a table becomes: its rows, its files looked at, and the modalities, classes and folds of the shard set."""

# Shapes: H W C of an image, C X Y Z of a volume

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from distkd.base import UNLABELLED
from distkd.data.manifest import Fold, Modality, Space
from distkd.data.progress import track
from distkd.data.raw.nifti import Frame, same_affine
from distkd.data.raw.table import Roles, Row, TableOptions, read_cells, read_roles, read_rows
from distkd.data.raw.table_files import Facts, Stored, load_labels, look
from distkd.data.raw.table_folds import make_folds
from distkd.data.raw.table_labels import class_names
from distkd.data.raw.table_notes import add_notes
from distkd.data.raw.table_problems import Problems
from distkd.data.raw.volume_parts import input_parts, target_parts
from distkd.errors import DataError

__all__ = ["Plan", "examine", "space_of"]


@dataclass
class Plan:
    """What a table becomes."""

    table: Path
    roles: Roles
    rows: list[Row]
    labels: list[int]
    folds: list[Fold] = field(default_factory=list[Fold])
    rule: str = ""
    modalities: dict[str, Modality] = field(default_factory=dict[str, Modality])
    names: list[str] = field(default_factory=list[str])
    """Of the classes."""
    facts: dict[Path, Facts] = field(default_factory=dict[Path, Facts])
    stored: dict[str, Stored] = field(default_factory=dict[str, Stored])
    """Of images: how the files are kept."""


def examine(table: Path, options: TableOptions, problems: Problems, *, seed: int, every_value: bool) -> Plan:
    """What the table becomes; what is wrong with it goes to `problems`.

    Args:
        every_value: read the files to their ends; otherwise their headers alone.

    Raises:
        DataError: the table cannot be read at all, or the classes of its target are not named.
    """
    header, cells, decimal_comma = read_cells(table, problems)
    roles = read_roles(header, cells, options, problems)
    names, label_of = list(options.classes), dict[str, int]()
    if roles.is_segmentation and (len(set(names)) < max(2, len(names)) or "" in names):
        # without them every label map would seem to be wrong
        raise DataError(
            f"table {str(table)!r} has a target, which needs --classes: the names of its values 0, 1, 2... in order, "
            "the background first, such as --classes background,tumour"
        )
    rows = read_rows(cells, roles, table.parent, problems, decimal_comma=decimal_comma)
    is_labelled = not roles.is_segmentation and "label" in roles.columns
    if is_labelled:
        names, label_of = class_names(rows, options, problems)
    plan = Plan(table, roles, rows, [label_of.get(row.label, UNLABELLED) for row in rows], names=names)
    stratum = [0] * len(rows) if roles.is_segmentation else plan.labels
    if "patient" in roles.columns and rows and (is_labelled or roles.is_segmentation):
        plan.folds, plan.rule = make_folds(rows, stratum, roles, options, seed, problems)
    plan.facts = _look_at_files(plan, options.threads, every_value, problems)
    _describe(plan, options, problems)
    add_notes(plan, problems)
    return plan


def _look_at_files(plan: Plan, threads: int, every_value: bool, problems: Problems) -> dict[Path, Facts]:
    jobs: dict[Path, tuple[int, str, str]] = {}
    for row in plan.rows:
        for name, path in row.files.items():
            jobs.setdefault(path, (row.line, *plan.roles.files[name]))

    def one(path: Path) -> Facts | DataError:
        try:
            facts = look(path, every_value=every_value)
            if every_value and jobs[path][2] == "target":
                load_labels(path, len(plan.names))
        except DataError as error:
            return error
        return facts

    facts: dict[Path, Facts] = {}
    with ThreadPoolExecutor(threads) as pool:
        for path, found in zip(jobs, track(_ahead(pool, one, list(jobs)), "files", total=len(jobs)), strict=True):
            if isinstance(found, DataError):
                problems.add(str(found), row=jobs[path][0], column=jobs[path][1])
            else:
                facts[path] = found
    return facts


def _ahead(
    pool: ThreadPoolExecutor, one: Callable[[Path], Facts | DataError], paths: list[Path]
) -> Iterator[Facts | DataError]:
    """Results in order, with few of them waiting, so that a long table costs no memory."""
    items = iter(paths)
    while block := list(islice(items, 256)):
        yield from pool.map(one, block)


def _describe(plan: Plan, options: TableOptions, problems: Problems) -> None:
    """The modalities of the plan; files that do not fit together are problems."""
    kinds: dict[str, str] = {}
    for name, (column, kind) in plan.roles.files.items():
        found = [(row, plan.facts[path]) for row in plan.rows if (path := row.files.get(name)) in plan.facts]
        if not found:
            problems.add("no file of it can be used, expected at least one; fill it in or remove it", column=column)
            continue
        wanted = "volume" if kind == "target" else kind or found[0][1].kind
        for row, facts in found:
            if facts.kind != wanted:
                problems.add(f"it is a {facts.kind}, expected a {wanted} as in the others", row=row.line, column=column)
        found = [(row, facts) for row, facts in found if facts.kind == wanted]
        kinds[name] = wanted
        if wanted == "image":
            plan.modalities[name] = _image(plan, name, column, found, options, problems)
        elif wanted == "vector":
            sizes = _one_shape([(row, facts.shape) for row, facts in found], column, "numbers", problems)
            plan.modalities[name] = Modality(kind="vector", dtype="float32", shape=sizes, codec="npy")
        else:
            plan.modalities |= _volume(plan, name, column, kind == "target", found, options, problems)
    for name, columns in plan.roles.numbers.items():
        if columns:
            plan.modalities[name] = Modality(
                kind="vector", dtype="float32", shape=(len(columns),), codec="npy", features=plan.roles.features(name)
            )
    if "volume" in kinds.values():
        _check_frames(plan, problems)
        images = [name for name, kind in kinds.items() if kind == "image"]
        if images:
            problems.add(f"images ({', '.join(images)}) beside volumes; a set holds one of the two: make two tables")
    if options.container == "zarr" or "volume" in kinds.values():
        plan.modalities = {n: m.model_copy(update={"codec": "zarr"}) for n, m in plan.modalities.items()}


def _image(
    plan: Plan, name: str, column: str, found: list[tuple[Row, Facts]], options: TableOptions, problems: Problems
) -> Modality:
    sides = [(row, facts.shape[:2]) for row, facts in found]
    size = options.size or _one_shape(
        sides, column, "px (height x width)", problems, "; or bring all to one with --size H,W"
    )
    ways: set[Stored] = {facts.stored for _, facts in found}
    channels = {facts.shape[2] for _, facts in found}
    as_it_is = len(ways) == 1 and len(channels) == 1 and all(side == tuple(size) for _, side in sides)
    stored: Stored = ways.pop() if as_it_is else "again"
    plan.stored[name] = stored
    codec = "jpg" if stored == "jpg" else "png"
    unit = "sRGB" if max(channels) == 3 else "grey level"
    return Modality(kind="image", dtype="uint8", shape=(size[0], size[1], max(channels)), codec=codec, unit=unit)


def _volume(
    plan: Plan,
    name: str,
    column: str,
    is_target: bool,
    found: list[tuple[Row, Facts]],
    options: TableOptions,
    problems: Problems,
) -> dict[str, Modality]:
    (channels,) = _one_shape([(row, facts.shape[:1]) for row, facts in found], column, "channels", problems)
    x, y, z = np.max([facts.shape[1:] for _, facts in found], axis=0).tolist()
    if is_target:
        if channels != 1:
            problems.add(f"the label maps have {channels} channels, expected 1", column=column)
        return target_parts(name, (1, x, y, z), range(max(2, len(plan.names))), options.compression)
    dtype = np.result_type(*{facts.dtype for _, facts in found}).name
    dtype = "float32" if dtype == "float64" else dtype
    return input_parts(name, dtype, (channels, x, y, z), options.compression, "")  # pyright: ignore[reportArgumentType]


def _one_shape(
    found: Sequence[tuple[Row, tuple[int, ...]]], column: str, unit: str, problems: Problems, way_out: str = ""
) -> tuple[int, ...]:
    """The shape that most have; the others are problems."""
    common = Counter(shape for _, shape in found).most_common(1)[0][0]
    for row, shape in found:
        if shape != common:
            problems.add(
                f"{' x '.join(map(str, shape))} {unit}, most have {' x '.join(map(str, common))}; mend it{way_out}",
                row=row.line,
                column=column,
            )
    return common


def space_of(plan: Plan, row: Row) -> Space | None:
    """Of a row's volumes: that of a NIfTI file, if there is one; an npy file does not know where it lies."""
    spaces = [space for path in row.files.values() if (space := plan.facts[path].space) is not None]
    return min(spaces, key=lambda space: space.affine is None, default=None)


def _check_frames(plan: Plan, problems: Problems) -> None:
    """The volumes of a sample have one shape, and its NIfTI files one affine."""
    for row in plan.rows:
        spaces = {
            name: space
            for name, path in row.files.items()
            if path in plan.facts and (space := plan.facts[path].space) is not None
        }
        first, *others = sorted(spaces, key=lambda name: spaces[name].affine is None) or [""]
        for other in others:
            one, two = spaces[first], spaces[other]
            if one.shape != two.shape:
                problems.add(f"{first} has {one.shape} voxels, {other} has {two.shape}; register them", row=row.line)
            elif not _same_place(one, two):
                problems.add(f"{first} and {other} have different affines; register them", row=row.line)


def _same_place(one: Space, two: Space) -> bool:
    """As far as the files know."""
    if one.affine is None or two.affine is None or one.spacing is None or two.spacing is None:
        return True
    return same_affine(Frame(one.shape, one.affine, one.spacing, ""), Frame(two.shape, two.affine, two.spacing, ""))
