"""The whole view of one run, and a line for each other one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from distkd.slurm.judge import duration
from distkd.slurm.status import Row
from distkd.top import sections as part
from distkd.top.facts import Facts
from distkd.top.fit import GAP, TWO_COLUMNS, Section, beside, fit
from distkd.top.marks import Marks

__all__ = ["view"]


def view(
    facts: Facts, others: Sequence[Row], width: int, height: int | None, marks: Marks, foot: str = ""
) -> list[Text]:
    """Lines of at most `width` cells.

    Args:
        others: runs beside the one that is shown.
        height: lines that there is room for; None: as many as it takes.
        foot: the last line.
    """
    last = [Text(foot, style="dim")] if foot else []
    room = None if height is None else max(1, height - len(last))
    top = [part.header(facts, width, marks), part.problems(facts, width)]
    if width < TWO_COLUMNS:
        lines = fit([*top, *_left(facts, width, marks), *_right(facts, width, marks), _others(others, width)], room)
    else:
        lines = _wide(facts, [*top], _others(others, width), width, room, marks)
    for line in lines:
        line.truncate(width)
    return lines + last


def _wide(facts: Facts, top: list[Section], below: Section, width: int, room: int | None, marks: Marks) -> list[Text]:
    half = (width - GAP) // 2
    if room is not None:
        below.cut(max(0, min(len(below.lines), room // 4)))
    above = fit(top, room)
    under = below.lines
    left = None if room is None else max(0, room - len(above) - len(under) - 2)
    columns = beside(
        fit(_left(facts, half, marks), left), fit(_right(facts, width - GAP - half, marks), left), half
    )  # fmt: skip
    lines = [*above, Text(), *columns, *([Text(), *under] if under else [])]
    return lines if room is None else lines[:room]


def _left(facts: Facts, width: int, marks: Marks) -> list[Section]:
    return [
        part.speed(facts, width, marks),
        part.phases(facts, width, marks),
        part.losses(facts, width, marks),
        part.kept(facts, width),
    ]


def _right(facts: Facts, width: int, marks: Marks) -> list[Section]:
    return [
        part.ranks(facts, width),
        part.banks(facts, width),
        part.agreement(facts, width, marks),
        part.other_gauges(facts, width),
    ]


def _others(rows: Sequence[Row], width: int) -> Section:
    lines = [Text("other runs", style="bold")] if rows else []
    for row in rows:
        words = [row.name, row.state]
        if row.step is not None and row.state != "done":
            words.append(f"step {row.step}/{row.total or '?'}")
        if row.eta_s is not None:
            words.append(f"ETA {duration(row.eta_s)}")
        if row.value is not None:
            words.append(f"{row.metric} {row.value:.4f}")
        lines.append(Text(" " + "  ".join(words), no_wrap=True))
    return Section(lines, 10, least=min(2, len(lines)))
