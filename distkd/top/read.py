"""Reading a run folder again and again: what has not changed is not read twice, what is damaged says nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distkd.allocation import read_jobs
from distkd.metrics.jsonl import number
from distkd.metrics.table import OWN_WORK
from distkd.slurm.status import Row
from distkd.top.facts import Checkpoint, Facts, Interval, Rank, Ranks
from distkd.top.follow import Follower

__all__ = ["Reader", "intervals_of"]

_EVENTS_BYTES = 2**18


class Reader:
    """Of one run folder; keeps what it has read of its logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metrics = Follower(folder / "metrics.jsonl")
        self._events = Follower(folder / "events" / "rank-00000.jsonl", size=_EVENTS_BYTES)
        self._kept: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def read(self, row: Row, now: float) -> Facts:
        """Everything that the folder says.

        Args:
            row: what `distkd status` says of it at the same time.
            now: seconds of the epoch.
        """
        trouble = ""
        try:
            self._metrics.read()
            self._events.read()
        except OSError as error:  # the next reading may go well; meanwhile what was read stays
            trouble = f"cannot read {self.folder}: {error.strerror or error}"
        about = self._mapping(self.folder / "environment.json")
        config = self._mapping(self.folder / "config.yaml")
        start = next((event for event in reversed(self._events.lines) if event.get("event") == "start"), {})
        started = number(about.get("started")) or number(start.get("time"))
        since = started or 0.0
        events = [event for event in self._events.lines if (number(event.get("time")) or 0.0) >= since]
        first_step, attempt, world_size = (_whole(start.get(name)) for name in ("step", "attempt", "world_size"))
        size = _whole(about.get("world_size"))
        lines = self._metrics.lines
        return Facts(
            row=row,
            now=now,
            config=config,
            world_size=world_size if size is None else size,
            device=str(about["device"]) if "device" in about else None,
            attempt=attempt,
            nodes=self._nodes(row),
            started=started,
            first_step=first_step or 0,
            lines=[line for line in lines if _is_training(line)],
            vals=[line for line in lines if isinstance(line.get("val"), dict)],
            intervals=intervals_of(lines, since, first_step),
            best=self._best(row.metric),
            checkpoint=self._checkpoint(events),
            events=events,
            ranks=_ranks(self._mapping(self.folder / "ranks.json")),
            trouble=trouble,
        )

    def _mapping(self, path: Path) -> dict[str, Any]:
        """A JSON or YAML file, read again where it has changed; empty where it is missing or damaged."""
        try:
            state = path.stat()
            stamp = state.st_mtime_ns, state.st_size
            kept = self._kept.get(path)
            if kept is not None and kept[0] == stamp:
                return kept[1]
            content = path.read_bytes()
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            value = yaml.load(content, loader) if path.suffix == ".yaml" else json.loads(content)
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        found = value if isinstance(value, dict) else {}
        self._kept[path] = stamp, found
        return found

    def _nodes(self, row: Row) -> str:
        if row.jobs and row.jobs[0].nodes:
            return row.jobs[0].nodes
        if not row.jobs:
            return ""
        try:
            known = [line for line in read_jobs(self.folder) if str(line.get("job")) == row.jobs[0].job]
        except OSError:
            return ""
        return str(next((line["nodes"] for line in reversed(known) if line.get("nodes")), ""))

    def _newest(self) -> tuple[Path, float] | None:
        """Folder of the last whole checkpoint, and when it became that."""
        latest = self.folder / "checkpoints" / "latest"
        try:
            name, time = latest.read_text().strip(), latest.stat().st_mtime
        except (OSError, ValueError):
            return None
        return (latest.with_name(name), time) if name.startswith("step-") else None

    def _checkpoint(self, events: Sequence[dict[str, Any]]) -> Checkpoint | None:
        newest = self._newest()
        if newest is None or not newest[0].name.removeprefix("step-").isdigit():
            return None
        # the event comes when all ranks know of it, which is when the next one is due
        written = [event for event in events if event.get("event") == "checkpoint"]
        seconds = number(written[-1].get("seconds")) if written else None
        return Checkpoint(int(newest[0].name.removeprefix("step-")), newest[1], seconds)

    def _best(self, metric: str | None) -> tuple[int, float] | None:
        """Of the lines that were read, and of the last checkpoint, which knows the whole run."""
        found = [
            (int(line["step"]), value)
            for line in self._metrics.lines
            if isinstance(line.get("val"), dict) and "step" in line and metric is not None
            if (value := number(line["val"].get(metric))) is not None
        ]
        newest = self._newest()
        kept = None if newest is None else self._mapping(newest[0] / "meta.json").get("best")
        if isinstance(kept, dict) and (value := number(kept.get("value"))) is not None:
            found.insert(0, (_whole(kept.get("step")) or 0, value))
        return max(found, key=lambda at: at[1], default=None)


def intervals_of(lines: Sequence[dict[str, Any]], since: float, first_step: int | None) -> list[Interval]:
    """Of the lines from `since` on, the first one of an attempt being without time and samples: it has the start.

    Args:
        first_step: steps that lay behind the run when its present attempt began.
    """
    found: list[Interval] = []
    before: dict[str, Any] | None = None
    begun: float | None = None
    for line in lines:
        time, step = number(line.get("time")), _whole(line.get("step"))
        if step is None or (time is not None and time < since):
            continue
        if _is_training(line):
            start = before["step"] if before is not None else first_step
            if start is not None and start < step:
                seconds = time - begun if before is not None and time is not None and begun is not None else None
                found.append(Interval(line, step - start, seconds, _difference(before, line)))
            before = line
        begun = time
    return found


def _is_training(line: dict[str, Any]) -> bool:
    return "loss" in line or "timings" in line


def _difference(before: dict[str, Any] | None, line: dict[str, Any]) -> float | None:
    old, new = number((before or {}).get("samples")), number(line.get("samples"))
    return None if old is None or new is None else new - old


def _ranks(found: dict[str, Any]) -> Ranks | None:
    listed = found.get("ranks")
    if not isinstance(listed, list):
        return None
    ranks = [_rank(each) for each in listed if isinstance(each, dict) and _whole(each.get("rank")) is not None]
    ranks.sort(key=lambda rank: (-(rank.straggler_index or 0.0), rank.rank))
    said = found.get("own_work")
    own_work = tuple(phase for phase in OWN_WORK if phase in said) if isinstance(said, list) else OWN_WORK
    return Ranks(_whole(found.get("step")), number(found.get("time")), ranks, own_work) if ranks else None


def _rank(each: dict[str, Any]) -> Rank:
    phases = each.get("phases")
    timed = phases.items() if isinstance(phases, dict) else ()
    return Rank(
        rank=int(each["rank"]),
        straggler_index=number(each.get("straggler_index")),
        phases={str(name): seconds for name, value in timed if (seconds := number(value)) is not None},
        queue=_whole(each.get("queue")),
        gpu_memory_bytes=number(each.get("gpu_memory_bytes")),
    )


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)
