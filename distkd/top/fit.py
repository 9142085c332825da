"""What of the sections a screen has room for: the less important ones give way first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

__all__ = ["GAP", "TWO_COLUMNS", "Section", "beside", "fit"]

TWO_COLUMNS = 124
"""Width from which on two columns have room for their tables."""
GAP = 3
"""Cells between them."""
_SECONDARY = 7
"""Sections from this rank on are left out before any other one is cut."""


@dataclass(slots=True)
class Section:
    """Lines that belong together."""

    lines: list[Text]
    rank: int
    """0 is the most important one."""
    least: int = 1
    """Lines without which it says nothing."""
    enough: int = 40
    """Lines above which it gives way to all others, and that it has where there is no end."""

    hidden: int = 0
    """Lines that were cut."""

    def cut(self, n_lines: int) -> None:
        """Keep so many lines, the last of which says how many are missing."""
        if n_lines >= len(self.lines):
            return
        whole = self.lines[:-1] if self.hidden else self.lines
        kept = whole[: max(0, n_lines - 1)]
        self.hidden += len(whole) - len(kept)
        self.lines = [*kept, Text(f"  {self.hidden} more", style="dim")] if n_lines > 0 else []

    def give(self, n_lines: int, least: int) -> int:
        """Give away so many lines, but keep `least`; returns how many it was."""
        before = len(self.lines)
        if n_lines > 0 and before > least:
            self.cut(max(least, before - n_lines))
        return before - len(self.lines)


def fit(sections: Sequence[Section], height: int | None) -> list[Text]:
    """The sections in their order, with an empty line between them where there is room.

    Args:
        height: None where there is no end.
    """
    kept = [section for section in sections if section.lines]
    if height is None:
        for section in kept:
            section.cut(section.enough)
    else:
        kept = _shrunk(kept, height)
    total = sum(len(section.lines) for section in kept)
    spaced = height is None or total + len(kept) - 1 <= height
    lines: list[Text] = []
    for section in kept:
        if lines and spaced:
            lines.append(Text())
        lines += section.lines
    return lines if height is None else lines[:height]


def _shrunk(sections: list[Section], height: int) -> list[Section]:
    kept = list(sections)
    over = sum(len(section.lines) for section in kept) - height
    least_first = sorted(kept, key=lambda section: -section.rank)
    for section in least_first:
        over -= section.give(over, section.enough)
    for group in (
        [section for section in least_first if section.rank >= _SECONDARY],
        [section for section in least_first if section.rank < _SECONDARY],
    ):
        for section in group:
            over -= section.give(over, section.least)
        for section in group:
            if over > 0 and section.rank > 0:
                kept.remove(section)
                over -= len(section.lines)
    return kept


def beside(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    """Two columns as lines; `width` is that of the left one."""
    lines: list[Text] = []
    for i in range(max(len(left), len(right))):
        line = left[i].copy() if i < len(left) else Text()
        if i < len(right):
            line.truncate(width, pad=True)
            line.append(" " * GAP)
            line.append_text(right[i])
        lines.append(line)
    return lines
