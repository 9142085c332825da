"""What is wrong with a run, in words, and what to do about it; most urgent first."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from distkd.metrics.jsonl import number
from distkd.slurm.judge import duration
from distkd.slurm.status import RUNNING
from distkd.top.facts import SLOW_RANK, Facts

__all__ = ["is_silent", "wrong"]

_SILENT_S = 30.0
_WAITING_SHARE = 0.3
"""Share of a step that may be spent on waiting for data."""
_DROP = 0.6
_MANY = 12
"""Intervals from which on one may speak of how fast a run usually is."""

_HELP = {
    "data": "its disk or its cores are slow or shared: more data.threads, or data.scratch to read from its own disk",
    "forward": "its device is slow or shared: look at clocks, temperature and other processes there, or leave it out",
    "optimizer": "its device is slow or shared: look at clocks, temperature and other processes there, or leave it out",
}
_HELP_CPU = "its cores are shared: look for other processes on them, and whether each rank has cores of its own"
_READINGS = 3
"""So many times in a row it is the same rank: of short steps, any one is the slowest now and then."""


def wrong(facts: Facts) -> list[str]:
    """Sentences; none where all is well."""
    words = [facts.row.advice] if facts.row.advice else []
    if facts.trouble:
        words.append(facts.trouble)
    if facts.row.state not in RUNNING:
        return words
    return words + _silent(facts) + _losses(facts) + _checkpoints(facts) + _slow_rank(facts) + _slow(facts)


def is_silent(facts: Facts) -> bool:
    """Whether a run that goes on should have been heard of since."""
    age_s, gap_s = facts.row.news_age_s, facts.gap_s
    if facts.row.state not in RUNNING or facts.row.state == "evaluating" or age_s is None or gap_s is None:
        return False
    return age_s > max(_SILENT_S, 3 * gap_s)


def _silent(facts: Facts) -> list[str]:
    age_s, gap_s = facts.row.news_age_s, facts.gap_s
    if facts.row.advice or age_s is None or gap_s is None or not is_silent(facts):
        return []
    before = f"before, lines came every {duration(gap_s)} or sooner"
    return [f"no news for {duration(age_s)}; {before}: a long validation, or a rank that hangs, or it was killed"]


def _losses(facts: Facts) -> list[str]:
    line, words = facts.line, []
    if line and number(line.get("loss")) is None:
        words.append(f"the loss is not finite, or every step was left out, since the line before step {line['step']}")
    recent = facts.lines[-20:]
    counts = [number(each.get("skipped")) or 0 for each in recent]
    left_out = int(counts[-1] - counts[0]) if counts else 0
    if left_out > 0:
        steps = int(recent[-1]["step"] - recent[0]["step"])
        words.append(f"{left_out} of the last {steps} steps were left out, since a gradient was not finite")
    return words


def _checkpoints(facts: Facts) -> list[str]:
    written = [event for event in facts.events if event.get("event") in ("checkpoint", "checkpoint_failed")]
    if written and written[-1].get("event") == "checkpoint_failed":
        last = written[-1]
        return [f"checkpoint of step {last.get('step')} could not be written: {last.get('reason')}; make room"]
    times = [time for event in written[-10:] if (time := number(event.get("time"))) is not None]
    if len(times) < 3 or facts.checkpoint is None:
        return []
    usual_s = max(after - before for before, after in pairwise(times))
    age_s = facts.now - facts.checkpoint.time
    if age_s <= 60 + 3 * usual_s:
        return []
    return [f"the last checkpoint is {duration(age_s)} old; before, one came every {duration(usual_s)} or sooner"]


def _slow_rank(facts: Facts) -> list[str]:
    found = _straggler(facts)
    if found is None:
        return []
    number_of, index = found
    words = f"rank {number_of} makes a step {index:.2f}x as long, all wait for it"
    ranks = facts.ranks
    if ranks is not None and not ranks.own_work:
        return []
    slow = None if ranks is None else next((rank for rank in ranks.ranks if rank.rank == number_of), None)
    phase = None if ranks is None or slow is None else ranks.excess(slow)
    if ranks is None or slow is None or phase is None or (facts.started or 0.0) > (ranks.time or 0.0):
        return [words]
    own_s, usual_s = slow.phases.get(phase, 0.0), ranks.median_s(phase)
    times = f"{1000 * own_s:.3g} ms a step in {phase!r}, the median {1000 * usual_s:.3g} ms"
    help = _HELP_CPU if facts.device == "cpu" and phase != "data" else _HELP[phase]
    return [f"{words}: {times}; {help}"]


def _straggler(facts: Facts) -> tuple[int, float] | None:
    """A rank that was slow in each of the last readings, and how slow it was in the middle one of them."""
    if (facts.world_size or 2) < 2:
        return None
    readings: list[tuple[float, float]] = []
    for line in facts.lines[-10 * _READINGS :]:
        timings = line.get("timings") or {}
        rank, index = number(timings.get("straggler_rank")), number(timings.get("straggler_index"))
        if rank is not None and index is not None and (number(line.get("time")) or 0.0) >= (facts.started or 0.0):
            readings.append((rank, index))
    last = readings[-_READINGS:]
    if len(last) < _READINGS or len({rank for rank, _ in last}) > 1 or min(index for _, index in last) < SLOW_RANK:
        return None
    return int(last[0][0]), median(index for _, index in last)


def _slow(facts: Facts) -> list[str]:
    words: list[str] = []
    phases = facts.phases_s
    total, data = sum(phases.values()), phases.get("data", 0.0)
    if total and data / total > _WAITING_SHARE:
        share = f"{100 * data / total:.0f} % of a step"
        words.append(f"steps wait for data for {share}: more data.threads, data.cache_mib, or data.scratch")
    speeds = [speed for interval in facts.intervals if (speed := interval.samples_per_s) is not None]
    now = facts.samples_per_s
    if len(speeds) >= _MANY and now is not None and now < _DROP * median(speeds):
        words.append(f"{now:.3g} samples/s now, {median(speeds):.3g} before: other work on the nodes, or a slow disk")
    return words
