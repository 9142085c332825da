"""`launch/train.py` with slow steps: DISTKD_TEST_WAITS has the seconds that each rank waits in its forward."""

from __future__ import annotations

import os
import runpy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distkd.base import Batch
from distkd.metrics.meters import Stopwatch
from distkd.train import loop
from distkd.train.job import Job

_STEP = loop.train_step


def _slow_step(job: Job, passes: Sequence[Batch], watch: Stopwatch) -> Any:
    with watch.phase("forward"):
        time.sleep(float(os.environ["DISTKD_TEST_WAITS"].split(",")[job.world.rank]))  # the injected fault
    return _STEP(job, passes, watch)


if __name__ == "__main__":
    loop.train_step = _slow_step
    runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")
