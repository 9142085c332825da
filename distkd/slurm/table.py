"""The rows of `distkd status` on a terminal, in a log file and for scripts, once or again and again."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distkd.errors import DataError
from distkd.slurm.find import shown
from distkd.slurm.judge import duration
from distkd.slurm.queue import ended, queued
from distkd.slurm.status import RUNNING, Row, look
from distkd.slurm.unbegun import unbegun

__all__ = ["plain", "run"]

_HEADINGS = ("run", "state", "step", "rate", "ETA", "news", "val", "job")
_WIDE = 120
"""Columns of a terminal that has room for every cell on one line."""
_COLOURS = {"running": "green", "evaluating": "green", "starting": "green", "failed": "bold red", "lost": "bold red",
            "interrupted": "yellow", "cancelled": "yellow", "done": "dim"}  # fmt: skip


def run(
    paths: Sequence[Path],
    *,
    as_json: bool = False,
    every_s: float | None = None,
    everything: bool = False,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Print the table; with `every_s` again and again until nothing runs or waits, or Ctrl-C.

    Raises:
        DataError: there is no run at or below any of the paths.
    """
    console = Console()
    try:
        while True:
            queue = queued()
            now = clock()
            notes: list[str] = []
            try:
                rows = look(paths, queue, now, ended=ended, warn=notes.append)
            except DataError as error:  # there may be jobs by hand that came to nothing
                raise DataError("\n".join([str(error), *unbegun(paths, [], queue, now)])) from error
            notes = [*unbegun(paths, [row.folder for row in rows], queue, now), *notes]
            if as_json:
                print("".join(f"distkd: {note}\n" for note in notes), end="", file=sys.stderr)
                print(json.dumps([row.for_scripts() for row in rows], indent=None if every_s else 1), flush=True)
            elif console.is_terminal:
                if every_s:
                    console.clear()
                _draw(console, rows, now, everything=everything, unasked=queue is None)
                for note in notes:
                    console.print(note, markup=False, highlight=False, soft_wrap=True)
            else:
                lines = plain(rows, now, everything=everything, unasked=queue is None)
                print("\n".join([*lines, *notes]), flush=True)
            if every_s is None or not any(row.is_active for row in rows):
                return 0
            sleep(every_s)
            if not as_json and not console.is_terminal:
                print(flush=True)
    except KeyboardInterrupt:
        if every_s is None:
            raise
        return 0


def plain(rows: Sequence[Row], now: float, *, everything: bool = False, unasked: bool = False) -> list[str]:
    """Aligned lines, one a run and below it what to do, for a log file.

    Args:
        everything: a line for each run; otherwise runs of a study that are in the same state share one.
        unasked: the queue could not be asked.
    """
    groups = _grouped(rows, everything=everything)
    table = [_HEADINGS, *(_cells(group, now) for group in groups)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    advice = ["", *(group[0].advice for group in groups)]
    said = [[line.rstrip(), *([f"    -> {words}"] if words else [])] for line, words in zip(lines, advice, strict=True)]
    return [*chain.from_iterable(said), *_below(rows, unasked=unasked)]


def _draw(console: Console, rows: Sequence[Row], now: float, *, everything: bool, unasked: bool) -> None:
    groups = _grouped(rows, everything=everything)
    lines = [_cells(group, now) for group in groups]
    shown = [i for i in range(len(_HEADINGS)) if any(cells[i] for cells in lines)]
    title = f"distkd status, {time.strftime('%H:%M:%S', time.localtime(now))}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i in shown:
        table.add_column(_HEADINGS[i], overflow="fold", no_wrap=i in (0, 1, 5))
    for group, cells in zip(groups, lines, strict=True):
        if console.width < _WIDE:
            cells = (cells[0], *(re.sub(r", | (?=\(|\d\.\d{4})", "\n", cell) for cell in cells[1:]))
        colour = _COLOURS.get(group[0].state, "cyan")
        table.add_row(*(f"[{colour}]{escape(cells[i])}[/]" if i == 1 else escape(cells[i]) for i in shown))
    console.print(table)
    for group in groups:
        if group[0].advice:
            console.print(
                f"{escape(_name(group))} [cyan]-> {escape(group[0].advice)}[/]", highlight=False, soft_wrap=True
            )
    for line in _below(rows, unasked=unasked):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _below(rows: Sequence[Row], *, unasked: bool) -> list[str]:
    """Counts, and what is to be said of all runs together."""
    states = [row.state for row in rows]
    lines = [", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))]
    if unasked and any(row.jobs for row in rows):
        lines.append("the queue cannot be asked (no squeue, or no answer): all of this is from files alone")
    stale = [shown(row.folder) for row in rows if row.stale_targets]
    if stale:
        command = f"python -m distkd.metrics.targets --remove {' '.join(stale)}"
        runs = "1 run that does" if len(stale) == 1 else f"{len(stale)} runs that do"
        lines.append(f"Prometheus still asks ranks of {runs} not run: {command}")
    return lines


def _grouped(rows: Sequence[Row], *, everything: bool) -> list[list[Row]]:
    """Runs that share a line: those of a study that are in the same state, with the same to say of them."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        alone = everything or row.state in RUNNING
        groups.setdefault(row.folder if alone else (_study(row.name), row.state, _anonymous(row)), []).append(row)
    return list(groups.values())


def _study(name: str) -> str:
    """`mmd-student-fold3-seed0` is one of `mmd-student-fold*-seed*`."""
    return re.sub(r"(?<![a-z])(fold|seed|f|s)([-_=]?)\d+(?![a-z0-9])", r"\1\2*", name, flags=re.IGNORECASE)


def _anonymous(row: Row) -> str:
    """Its advice without the ids of its own jobs."""
    ids = {name for job in row.jobs for name in (job.job, *job.after)}
    return re.sub(r"\d+(_\d+)?", lambda found: "" if found[0] in ids else found[0], row.advice)


def _cells(group: Sequence[Row], now: float) -> tuple[str, ...]:
    row = group[0]
    if len(group) > 1:
        return (_name(group), row.state, f"{len(group)} runs", "", "", _news(group), _mean(group), _jobs(group))
    return (row.name, row.state, _step(row), _rate(row), _eta(row, now), _news(group), _mean(group), _jobs(group))


def _name(group: Sequence[Row]) -> str:
    return group[0].name if len(group) == 1 else _study(group[0].name)


def _step(row: Row) -> str:
    if row.step is None:
        return ""
    if not row.total:
        return f"{row.step} of ?"
    return f"{row.step}/{row.total} ({100 * row.step // row.total} %)"


def _rate(row: Row) -> str:
    if row.steps_per_s is None:
        return ""
    samples = "" if row.samples_per_s is None else f", {_short(row.samples_per_s)} samples/s"
    return f"{_short(row.steps_per_s)} steps/s{samples}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _eta(row: Row, now: float) -> str:
    if row.eta_s is None or row.finish is None:
        return ""
    at = time.localtime(row.finish)
    same_day = at[:3] == time.localtime(now)[:3]
    return f"{duration(row.eta_s)}, {time.strftime('%H:%M' if same_day else '%a %d %b %H:%M', at)}"


def _news(group: Sequence[Row]) -> str:
    ages = [row.news_age_s for row in group if row.news_age_s is not None]
    return f"{duration(min(ages))} ago" if ages else ""


def _mean(group: Sequence[Row]) -> str:
    values = [row.value for row in group if row.value is not None]
    if not values:
        return ""
    spread = f" ({min(values):.4f} to {max(values):.4f})" if min(values) < max(values) else ""
    return f"{group[0].metric} {fmean(values):.4f}{spread}"


def _jobs(group: Sequence[Row]) -> str:
    if len(group) > 1:
        ids = [row.jobs[0].job for row in group if row.jobs]
        return ids[0] if len(ids) == 1 else f"{ids[0]} .. {ids[-1]}" if ids else ""
    found: list[str] = []
    for job in group[0].jobs:
        words = [f"{job.job} {job.state}".strip() + (f" ({job.reason})" if job.reason else "")]
        if job.time_left_s is not None and not job.pends:
            words.append(f"{duration(job.time_left_s)} left")
        if job.restarts:
            words.append(f"restarted {job.restarts}x")
        found.append(", ".join(words))
    return "; ".join(found)
