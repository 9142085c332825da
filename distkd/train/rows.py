"""Memory banks in checkpoints, rows and when they were written: whole, or a part for each rank that held one.

Row n of a bank that was sharded over W ranks is row n // W of part n mod W, so any layout can be read into any other.
"""

# Shapes: L rows of a part, C rows of a chunk, X what belongs to a row: D numbers, or a single one without a dimension

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distkd.engines import Entry
from distkd.errors import CheckpointError
from distkd.memory.bank import MemoryBank

__all__ = ["Rows", "bank_rows", "fill_rows", "has_rows", "is_part", "part_name", "rows_entry"]

_PART = re.compile(r"/part-(\d{5})-of-(\d{5})$")
_CHUNK = 1 << 16
"""Rows that are read at a time."""


class Rows(NamedTuple):
    """A tensor with an entry for each row of a bank that is here."""

    bank: MemoryBank
    rows_LX: Tensor


def bank_rows(state: nn.Module) -> dict[str, Rows]:
    """What banks keep for each of their rows, by its name in the state dict."""
    found: dict[str, Rows] = {}
    for name, bank in state.named_modules():
        if isinstance(bank, MemoryBank):
            dot = f"{name}." if name else ""
            found[f"{dot}rows_ND"] = Rows(bank, bank.rows_ND)
            found[f"{dot}written_N"] = Rows(bank, bank.written_N)
    return found


def part_name(name: str, bank: MemoryBank) -> str:
    """The name of this rank's rows in a checkpoint."""
    return name if bank.parts == 1 else f"{name}/part-{bank.part:05d}-of-{bank.parts:05d}"


def is_part(name: str) -> bool:
    return _PART.search(name) is not None


def rows_entry(name: str, rows: Rows) -> Entry:
    """This rank's rows as a part of a checkpoint: they change after the update and until the next one."""
    bank, rows_LX = rows
    return Entry(part_name(name, bank), rows_LX.nbytes, lambda: rows_LX, steady=True, local=bank.parts > 1)


def has_rows(name: str, names: Iterator[str] | list[str]) -> bool:
    """Whether a checkpoint with these names has any of the rows, whole or in parts."""
    return bool(_sources(name, names))


def fill_rows(rows: Rows, name: str, names: Iterator[str] | list[str], read: Callable[[str, slice], Tensor]) -> None:
    """Put the rows of a checkpoint into a bank, whichever way either is laid out.

    Args:
        rows: are replaced.
        name: of the rows when they are whole.
        names: all names of the checkpoint.
        read: some rows of a tensor by its name.

    Raises:
        CheckpointError: rows are missing, or there are more or fewer of them than the bank has.
    """
    bank, rows_LX = rows
    sources = _sources(name, names)
    if not sources:
        raise CheckpointError(f"the checkpoint has no rows {name!r}")
    filled = 0
    for source, (part, parts) in sources.items():
        if parts == bank.parts and part != bank.part:
            continue
        filled += _fill_from(rows, source, part, parts, read)
    if filled != len(rows_LX):
        raise CheckpointError(
            f"the checkpoint has {filled} of the {len(rows_LX)} rows of {name!r} that belong to this rank: it was "
            "written for another number of training samples, or a part of it is missing"
        )


def _sources(name: str, names: Iterator[str] | list[str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for candidate in names:
        if candidate == name:
            found[candidate] = (0, 1)
        elif (match := _PART.search(candidate)) and candidate[: match.start()] == name:
            found[candidate] = (int(match[1]), int(match[2]))
    return found


def _fill_from(rows: Rows, source: str, part: int, parts: int, read: Callable[[str, slice], Tensor]) -> int:
    bank, rows_LX = rows
    filled = first = 0
    while len(rows_CX := read(source, slice(first, first + _CHUNK))):
        if rows_CX.shape[1:] != rows_LX.shape[1:]:
            raise CheckpointError(f"rows {source!r} have width {rows_CX.shape[1]}, the bank has {rows_LX.shape[1]}")
        row_C = part + parts * torch.arange(first, first + len(rows_CX))
        mine_C = row_C % bank.parts == bank.part
        if row_C[-1] >= bank.n_rows:
            raise CheckpointError(f"rows {source!r} are more than the {bank.n_rows} training samples of this run")
        place_C = row_C[mine_C].div(bank.parts, rounding_mode="floor").to(rows_LX.device)
        rows_LX[place_C] = rows_CX[mine_C].to(rows_LX)
        filled += len(place_C)
        first += len(rows_CX)
    return filled
