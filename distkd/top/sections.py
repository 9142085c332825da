"""The parts of the view, each from the facts of one run: lines of text that fit a width."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from distkd.metrics.jsonl import number
from distkd.slurm.judge import duration
from distkd.slurm.status import RUNNING
from distkd.top.facts import SLOW_RANK, Facts, Ranks
from distkd.top.fit import Section
from distkd.top.marks import Cell, Marks, Trends, change, milliseconds, percent, short, table
from distkd.top.wrong import is_silent, wrong

__all__ = ["agreement", "banks", "header", "kept", "losses", "other_gauges", "phases", "problems", "ranks", "speed"]

_COLOURS = {"running": "green", "evaluating": "green", "starting": "green", "failed": "bold red", "lost": "bold red",
            "interrupted": "yellow", "cancelled": "yellow"}  # fmt: skip
_HEADINGS = {"data": "data", "forward": "forw", "backward": "backw", "collective": "coll", "optimizer": "optim",
             "checkpoint": "ckpt"}  # fmt: skip
_STALE_S = 60.0
_TREND = 8
"""Cells that a trend needs to be seen."""
_RANKS = 14
"""Lines for the slowest ranks, of many; all are in the output for scripts."""


def header(facts: Facts, width: int, marks: Marks) -> Section:
    """Which run, how far, for how long still, on what."""
    row = facts.row
    first = Text(no_wrap=True)
    first.append(row.name, style="bold")
    about = [facts.setting("method", "name")]
    about += [f"{word} {n}" for word, n in _numbers(facts).items() if n is not None]
    first.append("  " + ", ".join(str(word) for word in about if word is not None))
    first.append("  ")
    first.append(row.state, style=_COLOURS.get(row.state, "cyan"))
    ago = ""
    if row.news_age_s is not None and facts.lines and row.state in RUNNING:
        ago = f"last line {duration(row.news_age_s)} ago"
    lines = [first, *_progress(facts, width, marks)]
    ranks = "" if facts.world_size is None else f"{facts.world_size} rank{'s' if facts.world_size > 1 else ''}"
    device = f"{ranks} ({facts.device})" if ranks and facts.device else ranks
    job = row.jobs[0] if row.jobs else None
    queue = "" if job is None else f"job {job.job} {job.state}".strip()
    left = f"{duration(job.time_left_s)} left" if job is not None and job.time_left_s is not None and job.state else ""
    attempt = f"attempt {facts.attempt}" if facts.attempt is not None else ""
    where = [attempt, device, queue, left, facts.nodes, ago]
    lines.append(Text(", ".join(word for word in where if word), style="dim", no_wrap=True))
    return Section(_cut(lines, width), 0, least=3)


def _numbers(facts: Facts) -> dict[str, object]:
    return {"fold": facts.setting("data", "fold"), "seed": facts.setting("run", "seed")}


def _progress(facts: Facts, width: int, marks: Marks) -> list[Text]:
    row = facts.row
    if row.step is None and not row.total:
        return [Text(_beginning(facts))]
    step = row.step or 0
    words = [f"step {step}/{row.total or '?'}"]
    epoch, epochs = number(facts.line.get("epoch")), number(facts.setting("run", "epochs"))
    if epoch is not None:
        words.append(f"epoch {epoch + 1:.0f}" + (f"/{epochs:.0f}" if epochs is not None else ""))
    if row.eta_s and row.finish is not None and not is_silent(facts):  # with none left it should be there: silent, too
        words.append(f"ETA {duration(row.eta_s)} ({_clock(row.finish, facts.now)})")
    elif row.ended is not None and row.state not in RUNNING:
        words.append(f"ended {duration(max(0.0, facts.now - row.ended))} ago")
    said = ", ".join(words)
    line = Text(no_wrap=True)
    if row.total:
        share = min(1.0, step / row.total)
        room = max(4, min(40, width - len(said) - 8))
        line.append(marks.bar(share, room), style="green" if row.state in (*RUNNING, "done") else "yellow")
        line.append(f" {percent(share):>5}  ")
    line.append(said)
    lines = [line]
    if not facts.lines:
        lines.append(Text(_beginning(facts)))
    return lines


def _beginning(facts: Facts) -> str:
    if facts.row.state not in RUNNING:
        return "it has not begun" if facts.started is None else ""
    if facts.started is None:
        return "it is being started: packages, data, the teacher"
    every = facts.setting("run", "log_every")
    first = f"at step {facts.first_step + int(every)} at the latest" if isinstance(every, int) else "soon"
    return f"began {duration(max(0.0, facts.now - facts.started))} ago; its first line comes {first}"


def _clock(at: float, now: float) -> str:
    same_day = time.localtime(at)[:3] == time.localtime(now)[:3]
    return time.strftime("%H:%M" if same_day else "%a %d %b %H:%M", time.localtime(at))


def problems(facts: Facts, width: int) -> Section:
    """What is wrong and what to do; nothing where all is well."""
    style = "bold red" if facts.row.state in ("failed", "lost") else "yellow"
    lines: list[Text] = []
    for words in wrong(facts):
        wrapped = textwrap.wrap(words, max(20, width - 3)) or [words]
        lines += [Text(("!  " if i == 0 else "   ") + part, style=style) for i, part in enumerate(wrapped)]
    return Section(lines, 1, least=min(3, len(lines)))


def speed(facts: Facts, width: int, marks: Marks) -> Section:
    """Samples per second, now and on the whole."""
    now = facts.samples_per_s
    if now is None:
        return Section([], 2)
    line = Text(no_wrap=True)
    line.append("speed", style="bold")
    line.append(f"  {short(now)} samples/s")
    overall = facts.samples_per_s_overall
    if overall is not None:
        line.append(f", {short(overall)} over the attempt", style="dim")
    steps = "" if facts.row.steps_per_s is None else f", {facts.row.steps_per_s:.3g} steps/s"
    room = width - line.cell_len - 2
    if room - len(steps) >= _TREND:
        line.append(steps, style="dim")
        room -= len(steps)
    if room >= _TREND:
        line.append("  " + marks.spark([i.samples_per_s for i in facts.intervals], min(40, room)), style="cyan")
    return Section(_cut([line], width), 2)


def phases(facts: Facts, width: int, marks: Marks) -> Section:
    """What a step is made of on the main rank."""
    seconds = facts.phases_s
    total = sum(seconds.values())
    if not total:
        return Section([], 3)
    step_s = facts.step_s
    head = ("step", milliseconds(step_s or total) + " ms", "", "")
    rest = (step_s or 0.0) - total
    if step_s and rest > 0.03 * step_s:  # logging, the copy for a checkpoint, other processes
        seconds = {**seconds, "other": rest}
        total += rest
    room = max(6, min(40, width - 32))
    rows: list[list[Cell]] = [
        [f" {phase}", f"{milliseconds(s)} ms", percent(s / total), (marks.bar(s / total, room), "cyan")]
        for phase, s in seconds.items()
        if s >= 1e-3 * total or phase == "data"
    ]
    return Section(table(head, rows, width), 3, least=1)


def losses(facts: Facts, width: int, marks: Marks) -> Section:
    """Each loss with its trend; beside it the teacher's, its weight, and its agreement with the task."""
    line, gauges = facts.line, facts.mapping("gauges")
    if not line:
        return Section([], 4)
    names = list(facts.mapping("parts"))
    head = ("loss", "now", "change", "trend", "teacher", "weight", "cosine")
    totals = [number(each.get("loss")) for each in facts.lines]
    trends = [totals]
    rows: list[list[Cell]] = [[" total", *_now(totals), "", "", ""]]
    for name in names:
        values = [number((each.get("parts") or {}).get(name)) for each in facts.lines]
        others = (gauges.get(f"teacher/{name}"), gauges.get(f"weight/{name}"), _with_task(gauges, name))
        trends.append(values)
        rows.append([f" {name}", *_now(values), *("" if x is None else short(x) for x in others)])
    lines = table(head, rows, width, Trends(3, trends, marks))
    return Section(_cut(lines, width), 4, least=min(len(lines), 3))


def _now(values: Sequence[float | None]) -> list[Cell]:
    now = values[-1]
    return [("not finite", "bold red") if now is None else short(now), change(values), ""]


def _with_task(gauges: dict[str, float | None], name: str) -> float | None:
    pairs = (f"cosine/{name}|task", f"cosine/task|{name}", f"cosine_with_task/{name}")
    return next((gauges[pair] for pair in pairs if pair in gauges), None)


def kept(facts: Facts, width: int) -> Section:
    """The optimizer, validation scores, checkpoints."""
    lines: list[Text] = []
    row = facts.row
    if facts.line:
        lines.append(_optimizer(facts.line))
    if row.metric is not None and facts.vals:
        last = facts.vals[-1]
        line = Text(no_wrap=True)
        line.append("val", style="bold")
        line.append(f"  {row.metric} {short(number(last['val'].get(row.metric)))} at step {last.get('step')}")
        best = facts.best
        entries = [] if best is None else [(f", best {short(best[1])} at step {best[0]}", "")]
        others = [f"{k} {short(number(v))}" for k, v in last["val"].items() if k != row.metric]
        entries += [((", " if i else "; ") + words, "dim") for i, words in enumerate(others)]
        _append_whole(line, entries, width)
        lines.append(line)
    line = Text("checkpoint", style="bold", no_wrap=True)
    if facts.checkpoint is not None:
        at = facts.checkpoint
        wrote = "" if at.seconds is None else f", written in {at.seconds:.2g} s"
        line.append(f"  step {at.step}, {duration(max(0.0, facts.now - at.time))} old{wrote}", style="not bold")
        lines.append(line)
    elif facts.lines:
        line.append("  none yet", style="not bold")
        lines.append(line)
    return Section(_cut(lines, width), 5, least=len(lines))


def _append_whole(line: Text, entries: Sequence[tuple[str, str]], width: int) -> None:
    """As many of the entries, each with its style, as fit in full, and a sign that there are more."""
    more = " ..."
    for i, (words, style) in enumerate(entries):
        rest = len(more) if i < len(entries) - 1 else 0
        if line.cell_len + len(words) + rest > width:
            line.append(more if line.cell_len + len(more) <= width else "", style="dim")
            return
        line.append(words, style=style)


def _optimizer(newest: dict[str, Any]) -> Text:
    words = [f"{word} {short(number(newest.get(key)))}" for key, word in (("lr", "lr"), ("grad_norm", "grad norm"))]
    for key, unit in (("skipped", "steps left out"), ("replaced", "samples replaced")):
        if newest.get(key):
            words.append(f"{newest[key]} {unit}")
    line = Text("optimizer", style="bold", no_wrap=True)
    line.append(f"  {', '.join(words)}", style="not bold")
    return line


def ranks(facts: Facts, width: int) -> Section:
    """Slowest ranks first, or why they are not known."""
    found = facts.ranks
    if found is None:
        return Section(_without_ranks(facts), 6)
    with_phases = [phase for phase in _HEADINGS if any(phase in rank.phases for rank in found.ranks)]
    head = ("rank", "x median", *(_HEADINGS[phase] for phase in with_phases), "queue", "GPU")
    rows: list[list[Cell]] = []
    for rank in found.ranks:
        index = rank.straggler_index
        is_slow = index is not None and index >= SLOW_RANK and len(found.ranks) > 1
        memory = rank.gpu_memory_bytes
        rows.append([
            f" {rank.rank}",
            ("" if index is None else f"{index:.2f}", "yellow" if is_slow else ""),
            *(milliseconds(rank.phases.get(phase)) for phase in with_phases),
            "" if rank.queue is None else str(rank.queue),
            "" if memory is None else f"{memory / 2**30:.1f} GiB",
        ])  # fmt: skip
    lines = table(head, rows, width)
    notes = (f"  ms a step, slowest of {len(rows)} first", "  ms a step") if len(rows) > 1 else ("  ms a step",)
    lines[0].append(next((note for note in notes if lines[0].cell_len + len(note) <= width), ""), style="dim")
    stale = _age_of(found, facts)
    if stale:
        lines.insert(1, Text(f" {stale}", style="yellow"))
    return Section(_cut(lines, width), 6, least=min(len(lines), 3), enough=_RANKS)


def _without_ranks(facts: Facts) -> list[Text]:
    if not facts.lines or (facts.world_size or 1) < 2:
        return []
    timings = facts.line.get("timings") or {}
    slowest, index = number(timings.get("straggler_rank")), number(timings.get("straggler_index"))
    if slowest is None or index is None:
        return []
    line = Text("rank", style="bold", no_wrap=True)
    line.append(
        f"  {slowest:.0f} is the slowest, a step {index:.2f}x as long; no ranks.json tells of all", style="not bold"
    )
    return [line]


def _age_of(found: Ranks, facts: Facts) -> str:
    """Words for numbers that are not those of the newest line."""
    if found.time is None:
        return ""
    if facts.started is not None and found.time < facts.started:
        return "of an attempt before this one"
    newest = number(facts.line.get("time"))
    if newest is None or newest - found.time <= _STALE_S + 3 * (facts.gap_s or 0.0):
        return ""
    return f"of step {found.step}, {duration(newest - found.time)} older than the last line"


def agreement(facts: Facts, width: int, marks: Marks) -> Section:
    """Cosines between distillation losses, conflicts first; those with the task stand beside the losses."""
    gauges = facts.mapping("gauges")
    parts = facts.mapping("parts")
    shown = {f"cosine/{name}|task" for name in parts} | {f"cosine/task|{name}" for name in parts}
    pairs = {name: v for name, v in gauges.items() if name.startswith("cosine/") and name not in shown}
    rows: list[list[Cell]] = []
    trends: list[list[float | None]] = []
    for name, value in sorted(pairs.items(), key=lambda pair: 2.0 if pair[1] is None else pair[1]):
        values = [number((each.get("gauges") or {}).get(name)) for each in facts.lines]
        style = "yellow" if value is not None and value < 0 else ""
        trends.append(values)
        rows.append([" " + name.removeprefix("cosine/").replace("|", " with "), (short(value), style), ""])
    lines = table(("agreement", "cosine", "trend"), rows, width, Trends(2, trends, marks)) if rows else []
    return Section(lines, 8, least=2)


def banks(facts: Facts, width: int) -> Section:
    """State of the memory banks."""
    found: dict[str, dict[str, float | None]] = {}
    for name, value in facts.mapping("gauges").items():
        kind, _, rest = name.partition("/")
        bank, _, what = rest.rpartition("/")
        if kind == "bank" and bank:
            found.setdefault(bank, {})[what] = value
    rows: list[list[Cell]] = []
    for bank, values in found.items():
        unwritten = values.get("unwritten_ratio")
        cells = ["" if (v := values.get(what)) is None else short(v) for what in ("staleness_steps", "norm_drift")]
        rows.append([f" {bank}", cells[0], "" if unwritten is None else percent(unwritten), cells[1]])
    head = ("bank", "steps old", "unwritten", "norm drift")
    return Section(table(head, rows, width) if rows else [], 7, least=1)


def other_gauges(facts: Facts, width: int) -> Section:
    """Numbers of the method that have no place of their own."""
    parts = facts.mapping("parts")
    rows: list[list[Cell]] = []
    for name, value in facts.mapping("gauges").items():
        kind, _, rest = name.partition("/")
        has_place = kind in ("cosine", "bank") or (kind in ("weight", "teacher", "cosine_with_task") and rest in parts)
        if not has_place:
            rows.append([f" {name}", short(value)])
    return Section(table(("method", "value"), rows, width) if rows else [], 9, least=2)


def _cut(lines: Sequence[Text], width: int) -> list[Text]:
    for line in lines:
        line.truncate(width)
    return list(lines)
