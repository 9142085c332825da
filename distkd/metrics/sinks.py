"""Where the records of a run go: always to `metrics.jsonl`, and to TensorBoard and W&B where that is asked for.

Only the main rank has sinks. Those that are asked for never stop a training: one that fails is left out from there on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from distkd.errors import ConfigError
from distkd.metrics.jsonl import MetricsWriter
from distkd.metrics.tensorboard import TensorBoard
from distkd.metrics.wandb import WeightsAndBiases

__all__ = ["Ending", "Sink", "SinkConfig", "Sinks", "check_sinks", "open_sinks"]

log = logging.getLogger(__name__)

Ending = Literal["done", "interrupted", "failed"]


class SinkConfig(Protocol):
    """What is read here of the section `metrics`."""

    @property
    def tensorboard(self) -> bool: ...

    @property
    def wandb(self) -> str | None: ...


class Sink(Protocol):
    """Takes the records of one attempt in order; any method may raise anything."""

    @property
    def name(self) -> str:
        """As a warning calls it."""
        ...

    def truncate_after(self, step: int) -> None:
        """Before the first record: later steps, which an earlier attempt has written, are about to come again."""
        ...

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a line of `metrics.jsonl`, with `step` and `time`; floats may be NaN."""
        ...

    def score(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        """Take what the exported student has reached on a split."""
        ...

    def close(self, state: Ending) -> None:
        """Let go of files and threads; nothing is called afterwards, nor after a method that has raised."""
        ...


class Sinks:
    """All sinks of a run as one.

    Args:
        lines: `metrics.jsonl`; what it raises is raised.
        others: those that may fail.
    """

    def __init__(self, lines: MetricsWriter, others: list[Sink]):
        self._lines, self._others = lines, others

    def truncate_after(self, step: int) -> None:
        self._lines.truncate_after(step)
        self._each(lambda sink: sink.truncate_after(step))

    def write(self, record: Mapping[str, Any]) -> None:
        self._lines.write(record)
        self._each(lambda sink: sink.write(record))

    def score(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        """What the exported student has reached on a split; it is in `eval/` and so not in `metrics.jsonl`."""
        self._each(lambda sink: sink.score(step, split, metrics))

    def close(self, state: Ending) -> None:
        self._lines.close()
        self._each(lambda sink: sink.close(state))

    def _each(self, act: Callable[[Sink], None]) -> None:
        self._others = [sink for sink in self._others if _goes_on(sink.name, lambda sink=sink: act(sink))]


def check_sinks(config: SinkConfig) -> None:
    """Refuse a sink whose package is missing, on every rank and before anything is computed.

    Raises:
        ConfigError: it is.
    """
    for name, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb is not None)):
        found = find_spec(name) if wanted else None
        # W&B leaves folders `wandb` where it is used, which Python takes for packages without code
        if wanted and (found is None or found.origin is None):
            raise ConfigError(
                f"metrics.{name} needs a package that is not installed; pip install 'distkd[{name}]', or leave "
                f"metrics.{name} out"
            )


def open_sinks(
    config: SinkConfig, folder: Path, *, step: int, run: str, method: str, settings: Mapping[str, Any]
) -> Sinks:
    """All sinks that the config asks for, cut back to where the run goes on.

    Args:
        config: the section `metrics`.
        folder: of the run; it exists.
        step: behind the run.
        run: its name.
        method: its method's name.
        settings: the resolved config.
    """
    wanted: dict[str, Callable[[], Sink]] = {}
    if config.tensorboard:
        wanted[TensorBoard.name] = lambda: TensorBoard(folder / "tensorboard")
    if (project := config.wandb) is not None:
        wanted[WeightsAndBiases.name] = lambda: WeightsAndBiases(
            folder, project, run=run, method=method, settings=settings
        )
    lines = MetricsWriter(folder / "metrics.jsonl")
    others: list[Sink] = []
    for name, make in wanted.items():
        _goes_on(name, lambda make=make: others.append(make()))
    sinks = Sinks(lines, others)
    sinks.truncate_after(step)
    return sinks


def _goes_on(name: str, act: Callable[[], None]) -> bool:
    """Whether it did what it was asked for; if not, the user is told."""
    try:
        act()
    except Exception as error:  # noqa: BLE001 - a library's network, disk or fault: none is a reason to stop
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        log.warning(
            "%s gets no more records: %s (%s); the run and its metrics.jsonl go on", name, reason, type(error).__name__
        )
        return False
    return True
