"""What is wrong with a table, all of it at once and no flood: what many rows have in common is said once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Problems", "first_few"]

_SHOWN = 3
"""Rows that are named of those with one problem."""
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?")
"""What differs between two rows with one problem: cells, paths and numbers."""

Kind = tuple[str | None, bool, str]


@dataclass
class Problems:
    """All that is wrong with a table; a person mends it in one go."""

    _found: dict[Kind, list[tuple[int | None, str]]] = field(default_factory=dict[Kind, list[tuple[int | None, str]]])
    _notes: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, text: str, *, row: int | None = None, column: str | None = None) -> None:
        kind = (column, row is None, _PARTICULAR.sub("#", text))
        self._found.setdefault(kind, []).append((row, text))

    def note(self, text: str, *, about: str | None = None) -> None:
        """What is allowed and may be meant otherwise; once for what it is about."""
        self._notes.setdefault(about or text, f"note: {text}")

    @property
    def count(self) -> int:
        """Of all problems, those that are not shown included."""
        return sum(map(len, self._found.values()))

    @property
    def notes(self) -> list[str]:
        return list(self._notes.values())

    @property
    def lines(self) -> list[str]:
        return [line for line, _ in self.grouped()]

    def grouped(self) -> list[tuple[str, int]]:
        """Lines in the order in which their first problem was found, and how many problems each is about."""
        return [line for (column, _, _), found in self._found.items() for line in _lines(column, found)]


def first_few(items: Iterable[object]) -> str:
    """The first of them, and how many there are beyond."""
    words = list(map(str, items))
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _lines(column: str | None, found: list[tuple[int | None, str]]) -> list[tuple[str, int]]:
    rows = [row for row, _ in found if row is not None]
    if len({text for _, text in found}) == 1:
        where = f"row{'' if len(rows) == 1 else 's'} {first_few(rows)}" if rows else ""
        return [(_line(where, column, found[0][1]), len(found))]
    shown = [(_line("" if row is None else f"row {row}", column, text), 1) for row, text in found[:_SHOWN]]
    more = len(found) - len(shown)
    if more:
        shown[-1] = (f"{shown[-1][0]}; and {more} more like {'these' if len(shown) > 1 else 'this'}", 1 + more)
    return shown


def _line(where: str, column: str | None, text: str) -> str:
    place = ", ".join(part for part in (where, "" if column is None else f"column {column!r}") if part)
    return f"{place}: {text}" if place else text
