"""What engines say of their traffic, against the bytes that torch's collectives are handed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distkd.base import World
from distkd.comm import world as comm
from distkd.data.loader import train_batches
from distkd.engines import fsdp
from distkd.engines.ddp import DDPEngine
from distkd.metrics.meters import Stopwatch
from distkd.metrics.table import OWN_WORK, PHASES
from distkd.train.job import assemble
from distkd.train.loop import train_step
from tests.laws.common import law_config, settings_of

_INPUTS = ("input_tensors", "input_tensor", "input", "inputs", "tensors")
_NORM = 16
"""Bytes of a norm, which no engine counts."""


class _Handed(TorchDispatchMode):
    """Bytes that collectives are handed, those of `distkd.comm` left out."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter[str]()
        self.is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and not self.is_paused:
            given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | (kwargs or {})
            handed = next(given[name] for name in _INPUTS if name in given)
            what = "weights" if "gather" in func._schema.name else "gradients"
            self.bytes[what] += sum(t.nbytes for t in tree_leaves(handed) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def _step(world: World, config: dict[str, Any], keep_whole: int = 0) -> tuple[dict[str, int], dict[str, int], int]:
    """What is told, what was handed over in the third step, and the passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "UNIT", 30)
        if config["engine"]["name"] == "deepspeed":
            from distkd.engines.deepspeed import DeepSpeedEngine

            patch.setattr(DeepSpeedEngine, "keep_whole", keep_whole)
        job = assemble(settings_of(config), world)
        job.method.trainable.train()
        batches = train_batches(job.dataset, job.plan, world, job.passes)
        for _ in range(2):  # in the first one engines look around
            train_step(job, next(batches)[1], Stopwatch())
        handed = _Handed()
        with handed, comm.observed(handed.paused):
            train_step(job, next(batches)[1], Stopwatch())
        batches.close()
    assert set(job.engine.own_work) <= set(PHASES)
    return job.engine.traffic(job.passes, follows=job.method.follows_weights), dict(handed.bytes), job.passes


def _told_and_handed(
    ranks: Any, shards: Path, root: Path, method: str, engine: dict[str, Any], keep_whole: int = 0
) -> list[tuple[dict[str, int], dict[str, int]]]:
    config = law_config(method, shards, root, engine=engine, data={"threads": 0}, batch={"micro_batch": 4})
    found = ranks(2).run(_step, config=config, keep_whole=keep_whole)
    assert [passes for *_, passes in found] == [2, 2]
    return [(told, handed) for told, handed, _ in found]


METHODS = ["supervised", "dc_distill"]  # the weights of the second one are followed after each step


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_every_byte_is_told(ranks: Any, shards: Path, root: Path, method: str, name: str):
    for told, handed in _told_and_handed(ranks, shards, root, method, {"name": name}):
        assert told == handed
        assert set(told) == ({"gradients"} if name == "ddp" else {"gradients", "weights"})


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_all_is_told_where_deepspeed_keeps_weights_whole(ranks: Any, shards: Path, root: Path, method: str, stage: int):
    engine = {"name": "deepspeed", "zero_stage": stage, "precision": "fp32"}
    for told, handed in _told_and_handed(ranks, shards, root, method, engine):
        assert told.keys() == handed.keys()
        assert told.get("weights") == handed.get("weights")
        assert 0 <= handed["gradients"] - told["gradients"] <= _NORM


@needs_deepspeed
@pytest.mark.parametrize("keep_whole", [0, 300])
@pytest.mark.parametrize("method", METHODS)
def test_where_deepspeed_spreads_weights_they_are_told_about(
    ranks: Any, shards: Path, root: Path, method: str, keep_whole: int
):
    engine = {"name": "deepspeed", "zero_stage": 3, "precision": "fp32"}
    for told, handed in _told_and_handed(ranks, shards, root, method, engine, keep_whole):
        assert 0 <= handed["gradients"] - told["gradients"] <= _NORM
        assert handed["weights"] <= told["weights"] <= 1.25 * handed["weights"]


def test_files_that_do_not_name_own_work_are_read_as_those_of_whole_weights():
    assert DDPEngine.own_work == OWN_WORK
