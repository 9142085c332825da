"""The records of a run for TensorBoard: `<run>/tensorboard/`, one event file an attempt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distkd.metrics.scalars import Scalars

__all__ = ["TensorBoard"]

_FLUSH_S = 10
"""How old a point may be that a reader does not see."""


class TensorBoard:
    """Writes the scalars of each record at its step and time, on a thread of TensorBoard's own.

    Raises:
        OSError: the file cannot be made, or an earlier write has failed.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # loads a second's worth of packages

        self._open = lambda step: SummaryWriter(folder, purge_step=step + 1, flush_secs=_FLUSH_S)
        folder.mkdir(parents=True, exist_ok=True)
        self._scalars = Scalars()
        self._writer: SummaryWriter | None = None

    def truncate_after(self, step: int) -> None:
        """Tell readers to forget the points of later steps, which an earlier attempt has left in its own file."""
        self._scalars = Scalars(step)
        self._writer = self._open(step)

    def write(self, record: Mapping[str, Any]) -> None:
        self._write(record["time"], record["step"], self._scalars.of(record))

    def score(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        known = {f"final/{split}/{name}": value for name, value in metrics.items() if value is not None}
        self._write(time.time(), step, known)

    def close(self, state: str = "done") -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, wall_time: float, step: int, values: Mapping[str, float]) -> None:
        assert self._writer is not None, "`truncate_after` comes first"
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=wall_time)
