"""Law 3: one traversal of the trunk and no more collectives than stated, whatever the number of losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distkd import methods
from distkd.base import World
from distkd.data.loader import train_batches
from distkd.metrics.meters import Stopwatch
from distkd.train.job import assemble
from distkd.train.loop import train_step
from tests.laws.common import law_config, run_steps, settings_of

# (all-reduces, all-gathers) of a step beyond DDP's gradient buckets, where no layer shares batch statistics
COLLECTIVES = {"dc_distill": (1, 1)}


@pytest.mark.parametrize("method", methods.available())
def test_trunk_is_traversed_once_and_collectives_are_counted(ranks, shards: Path, root: Path, method: str):
    config = law_config(method, shards, root, model={"norm": "group"})
    for trace in ranks(2).run(run_steps, config=config, steps=4):
        assert trace.backwards == [1] * 4
        reduces, gathers = COLLECTIVES.get(method, (0, 0))
        for counts in trace.counts[1:]:  # the first step also measures the banks' normalisers
            assert counts.get("all_reduce_sum", 0) == reduces
            assert counts.get("all_gather_rows", 0) == gathers
            assert sum(counts.values()) == reduces + gathers


@pytest.mark.parametrize("method", methods.available())
def test_no_step_asks_the_device(shards: Path, root: Path, method: str, monkeypatch: pytest.MonkeyPatch):
    job = assemble(settings_of(law_config(method, shards, root)), World())
    job.method.trainable.train()
    batches = train_batches(job.dataset, job.plan, World(), 1, 0)
    train_step(job, next(batches)[1], Stopwatch())  # the first step may measure what is frozen afterwards
    _, passes = next(batches)
    batches.close()
    asked: list[str] = []
    own_code = Path(methods.__file__).parents[1]

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            import sys

            if Path(sys._getframe(1).f_code.co_filename).is_relative_to(own_code):
                asked.append(name)
            return original(self, *args, **kwargs)

        return method_

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    train_step(job, passes, Stopwatch())
    assert asked == []
