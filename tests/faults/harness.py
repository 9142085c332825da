"""Seeded kills of real runs: a plan of whom to hit when, hits aimed by what a run leaves on disk, and their summary.

What is killed is a command line and a folder; nothing here imports the code that trains.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from launch.exit_code import noted_codes
from tests.launch import folders
from tests.launch.processes import PATIENCE_S, Launched, environment, ranks_command
from tests.launch.runs import Finish, write_config

__all__ = ["Deck", "Hit", "Kill", "Length", "length_of", "plan", "survive"]

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
OUTER = [
    ("training", "one"), ("training", "all"), ("training", "polite"),
    ("saving", "one"), ("saving", "all"), ("saving", "polite"),
    ("evaluating", "one"), ("evaluating", "all"), ("evaluating", "polite"),
    ("finishing", "one"), ("finishing", "all"), ("starting", "all"),
]  # fmt: skip
"""When, and whom: one rank or all processes by SIGKILL, one rank by a signal that asks for a stop."""
IN_PLACE = [("training", "one"), ("saving", "one"), ("evaluating", "one"), ("finishing", "one")]
"""Under a torchrun that starts the ranks again by itself."""
ROUNDS = 20
"""Runs of one trial before it gives up: a kill that came after the end is tried in a fresh run."""


@dataclass(frozen=True, slots=True)
class Length:
    """How long the run is, from its uninterrupted twin."""

    steps: int
    steps_per_epoch: int


@dataclass(frozen=True, slots=True)
class Kill:
    """One planned kill."""

    phase: str
    whom: str
    rank: int
    number: signal.Signals
    step: int
    """The phase is waited for from this step on."""
    delay_s: float
    """Waited beyond the moment that the phase is seen."""


@dataclass(slots=True)
class Hit:
    """A kill that met a living run, and what was seen of it afterwards."""

    kill: Kill
    where: str
    starts: int
    """Starts of the main rank before it."""
    newest: int | None = None
    """Newest complete checkpoint when all processes were gone; unknown where they came back at once."""
    resumed: int | None = None

    def __str__(self) -> str:
        kill = self.kill
        whom = "all processes" if kill.whom == "all" else f"rank {kill.rank}"
        after = "" if self.resumed is None else f", resumed from step {self.resumed}"
        return f"{kill.number.name} to {whom}, aimed at {kill.phase} from step {kill.step}, met {self.where}{after}"


class Deck:
    """Deals the combinations in a shuffled order, each once before any comes again."""

    def __init__(self, seed: int, cards: Sequence[tuple[str, str]]):
        self.random = random.Random(f"deck {seed}")
        self.cards = list(cards)
        self.left: list[tuple[str, str]] = []

    def deal(self, number: int) -> list[tuple[str, str]]:
        dealt: list[tuple[str, str]] = []
        for _ in range(number):
            if not self.left:
                self.left = self.random.sample(self.cards, len(self.cards))
            dealt.append(self.left.pop())
        return dealt


def plan(seed: str, cards: Sequence[tuple[str, str]], ranks: int, length: Length) -> list[Kill]:
    """The kills of one run in the order of their steps; a function of its arguments alone."""
    draw = random.Random(seed)
    last = length.steps - length.steps_per_epoch // 2  # a polite stop needs some steps left
    kills: list[Kill] = []
    for phase, whom in cards:
        step = draw.randrange(1, last)
        if phase == "evaluating":
            step = draw.randrange(1, length.steps // length.steps_per_epoch) * length.steps_per_epoch
        elif phase == "finishing":
            step = length.steps
        # long enough to meet any moment of the phase, short enough to stay in it
        longest = {"training": 0.1, "saving": 0.01, "evaluating": 0.02, "finishing": 0.08, "starting": 6.0}[phase]
        number = draw.choice(POLITE) if whom == "polite" else signal.SIGKILL
        kills.append(Kill(phase, whom, draw.randrange(ranks), number, step, draw.uniform(0, longest)))
    return sorted(kills, key=lambda kill: kill.step)


def length_of(folder: Path) -> Length:
    """Of a finished run that wrote a line of metrics at the end of each epoch."""
    validated = [line["step"] for line in folders.metrics(folder) if "val" in line]
    return Length(folders.last_line(folder)["step"], validated[0])


def survive(
    config: dict[str, Any],
    place: Path,
    *,
    kills: Sequence[Kill],
    ranks: int,
    in_place: bool,
    whole: Path,
    finish: Finish,
    tell: Callable[[Hit], None],
) -> list[Hit]:
    """Kill runs of one config as planned until every kill met a living run.

    Each run ends bit for bit as `whole`, and goes on from the newest complete checkpoint after each kill.
    """
    hits: list[Hit] = []
    missed = list(kills)
    for number in range(ROUNDS):
        trial = Trial(config, place / f"run-{number}", ranks, length_of(whole), finish)
        found = trial.restarted_in_place(missed) if in_place else trial.restarted_from_outside(missed)
        for hit in found:
            tell(hit)
            assert hit.newest in (None, hit.resumed), f"{hit}, but a checkpoint of step {hit.newest} was complete"
        hits += found
        assert not (words := folders.differences(trial.folder, whole)), "\n".join(words)
        missed = [kill for kill in missed if all(hit.kill is not kill for hit in found)]
        if not missed:
            return hits
    raise AssertionError(f"{len(missed)} kills came after the end in each of {ROUNDS} runs: {missed}")


class Trial:
    """One run folder on its way through some kills."""

    def __init__(self, config: dict[str, Any], place: Path, ranks: int, length: Length, finish: Finish):
        place.mkdir(parents=True)
        self.place, self.ranks, self.length = place, ranks, length
        self.finish = lambda: finish(config, place, ranks)
        self.config, self.folder = write_config(config, place)
        self.notes = self.place
        self.logs = count()

    def restarted_from_outside(self, kills: Sequence[Kill]) -> list[Hit]:
        """One start per kill, then on to the end; the kills that met a living run."""
        hits: list[Hit] = []
        for kill in kills:
            with self.launch() as run:
                hit = self.strike(kill, run)
                code = run.wait()
            if hit is None or folders.outcome(self.folder).get("state") == "done":
                assert hit or code == 0, run.said()
                continue
            self.look_at_the_remains(kill, code, run.said())
            hit.newest = folders.newest_step(self.folder)
            hits.append(hit)
        self.finish()
        return self.with_resumed(hits)

    def restarted_in_place(self, kills: Sequence[Kill]) -> list[Hit]:
        """One start for all kills, its torchrun brings the ranks back; the kills that met a living run."""
        with self.launch(max_restarts=len(kills)) as run:
            hits = [self.strike(kill, run) for kill in kills]
            assert run.wait() == 0, run.said()
        # no start after it: the run was over, all but the good-bye of the ranks
        landed = self.with_resumed([hit for hit in hits if hit is not None])
        return [hit for hit in landed if hit.resumed is not None]

    def with_resumed(self, hits: list[Hit]) -> list[Hit]:
        starts = folders.starts(self.folder)
        for hit in hits:
            hit.resumed = starts[hit.starts]["step"] if hit.starts < len(starts) else None
        return hits

    def launch(self, max_restarts: int = 0) -> Launched:
        number = next(self.logs)
        self.notes = self.place / f"codes-{number}"
        self.notes.mkdir()
        command = ranks_command(self.config, ranks=self.ranks, max_restarts=max_restarts)
        self.starts = len(folders.starts(self.folder))
        return Launched(command, self.place / f"log-{number}", environment(DISTKD_NOTES=str(self.notes)))

    def strike(self, kill: Kill, run: Launched) -> Hit | None:
        """Wait for the moment, then kill; None where the run ended first."""
        if kill.phase != "starting":
            if not _until(lambda: len(folders.starts(self.folder)) > self.starts, run):
                return None
            if not _until(lambda: len(run.ranks()) == self.ranks, run):
                return None
        members, ranks = list(run.members()), run.ranks()
        if not _until(lambda: self.is_at(kill), run, poll_s=0.001):
            return None
        time.sleep(kill.delay_s)  # the random part of the moment
        if run.process.poll() is not None:
            return None
        starts = len(folders.starts(self.folder))  # torchrun may bring the ranks back before anybody looks again
        if kill.whom == "all":
            run.kill([run.process.pid, *members])
            run.kill()  # whoever was started since
            starts = len(folders.starts(self.folder))
        else:
            try:
                os.kill(ranks[kill.rank], kill.number)
            except ProcessLookupError:
                return None
        hit = Hit(kill, self.where(), starts=starts)
        self.starts = hit.starts
        return hit

    def is_at(self, kill: Kill) -> bool:
        """Whether the run has come to the moment that the kill waits for."""
        if kill.phase == "starting":
            return True
        if kill.phase == "saving":
            return any(name >= f".step-{kill.step:08d}" for name in folders.partials(self.folder))
        if kill.phase == "finishing":
            return (self.folder / "checkpoints" / f"step-{kill.step:08d}").exists()
        line = folders.last_line(self.folder)
        if kill.phase == "evaluating":
            return line["step"] >= kill.step and self.is_evaluating(line)
        return line["step"] >= kill.step

    def is_evaluating(self, line: dict[str, Any]) -> bool:
        """After the last line of an epoch and before that of its validation."""
        return line["step"] > 0 and line["step"] % self.length.steps_per_epoch == 0 and "val" not in line

    def where(self) -> str:
        """What the run was doing, as far as its folder tells."""
        line = folders.last_line(self.folder)
        if partials := folders.partials(self.folder):
            return f"it saving step {int(partials[-1].split('.')[1].removeprefix('step-'))}"
        if len(folders.starts(self.folder)) == self.starts:
            return "it starting"
        if (self.folder / "checkpoints" / f"step-{self.length.steps:08d}").exists():
            return "it finishing"
        doing = "evaluating" if self.is_evaluating(line) else "training"
        return f"it {doing} after step {line['step']}"

    def look_at_the_remains(self, kill: Kill, code: int, said: str) -> None:
        """What the users and their scripts find after a kill."""
        outcome = folders.outcome(self.folder)
        if kill.whom == "polite":
            assert code == 3 if self.ranks == 1 else code != 0
            # torchrun may end a rank that has nothing left to do but to note its code
            assert noted_codes(self.notes) == {3}, said
            assert outcome["state"] == "interrupted", said
            assert folders.newest_step(self.folder) == outcome["step"]
        elif kill.whom == "one" and self.ranks > 1:
            assert code != 0
            witness = 0 if kill.rank else 1
            event = folders.events(self.folder, witness)[-1]
            assert (event["event"], event["kind"]) == ("failed", "lost_rank"), said
            assert event["message"].startswith(f"rank {witness} of {self.ranks}: "), event
            assert kill.rank == 0 or (outcome["state"], outcome["kind"]) == ("failed", "lost_rank")


def _until(condition: Callable[[], bool], run: Launched, *, poll_s: float = 0.01) -> bool:
    """Poll until the condition holds; False where the run ended first."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if run.process.poll() is not None:
            return False
        assert time.monotonic() < end, f"the run did not get there:\n{run.said()}"
        time.sleep(poll_s)
    return True
