"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere; main rank only."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress"]

_QUIET_S = 10.0
"""Seconds between two plain lines: a log file of a long run stays readable."""


class Progress:
    """Position, loss and last validation of one run."""

    def __init__(self, name: str, total: int, done: int, plan: str = ""):
        self.name, self.total, self.done = name, total, done
        self.loss = self.validation = ""
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.spoken = time.monotonic()
        self.bar: Bar | None = None
        if plan:
            self._say(plan)
        if done:
            self._say(f"resumed after step {done} of {total}")
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.fields[news]}"), console=self.console, transient=True)
            self.task = self.bar.add_task(escape(name), total=total, completed=done, news="")
            self.bar.start()

    def update(self, step: int, *, loss: float) -> None:
        self.done, self.loss = step, f"loss {loss:.4f}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, news=f"{self.loss}  {self.validation}")
        elif time.monotonic() - self.spoken > _QUIET_S:
            self._say(f"step {step}/{self.total}  {self.loss}  {self.validation}")

    def validated(self, metric: str, value: float | None) -> None:
        self.validation = f"val {metric} " + ("undefined" if value is None else f"{value:.4f}")

    def scored(self, split: str, metrics: dict[str, float], metric: str) -> None:
        """What a split gave; `metric` is the one that selects."""
        shown = dict.fromkeys(("accuracy", "balanced_accuracy", "auc_macro", metric))
        self._say(f"{split}: " + "  ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _say(self, text: str) -> None:
        self.console.print(f"[bold]{escape(self.name)}[/bold]  {escape(text)}")
        self.spoken = time.monotonic()
