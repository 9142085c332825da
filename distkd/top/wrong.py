"""What is wrong with a run, in words, and what to do about it; most urgent first."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from distkd.slurm.judge import duration
from distkd.slurm.status import RUNNING
from distkd.top.facts import Facts, number

__all__ = ["wrong"]

_SILENT_S = 30.0
_SLOW_RANK = 1.25
"""Times the median's own work from which on a rank is worth a word."""
_SLOW_SHARE = 0.05
"""Share of a step that it must cost; of very short steps a rank has a slow one now and then."""
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


def wrong(facts: Facts) -> list[str]:
    """Sentences; none where all is well."""
    words = [facts.row.advice] if facts.row.advice else []
    if facts.trouble:
        words.append(facts.trouble)
    if facts.row.state not in RUNNING:
        return words
    return words + _silent(facts) + _losses(facts) + _checkpoints(facts) + _slow_rank(facts) + _slow(facts)


def _silent(facts: Facts) -> list[str]:
    age_s, gap_s = facts.row.news_age_s, facts.gap_s
    if facts.row.advice or age_s is None or gap_s is None or facts.row.state == "evaluating":
        return []
    if age_s <= max(_SILENT_S, 3 * gap_s):
        return []
    before = f"before, lines came every {duration(gap_s)} or sooner"
    return [f"no news for {duration(age_s)}; {before}: a long validation, or a rank that hangs"]


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
    ranks = facts.ranks
    if ranks is None or len(ranks.ranks) < 2 or (facts.started or 0.0) > (ranks.time or 0.0):
        return []
    slowest = ranks.ranks[0]
    index, phase = slowest.straggler_index or 0.0, ranks.excess(slowest)
    if index < _SLOW_RANK or phase is None:
        return []
    own_s, usual_s = slowest.phases.get(phase, 0.0), ranks.median_s(phase)
    step_s = sum(slowest.phases.values())
    if own_s - usual_s < _SLOW_SHARE * step_s:
        return []
    times = f"{1000 * own_s:.3g} ms a step in {phase!r}, the median {1000 * usual_s:.3g} ms"
    return [f"rank {slowest.rank} takes {index:.2f}x the median's time, all wait for it: {times}; {_HELP[phase]}"]


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
