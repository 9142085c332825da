"""Law 3: one traversal of the trunk and no more collectives than stated, whatever the number of losses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distkd import methods
from distkd.base import World
from distkd.data.loader import train_batches
from distkd.engines import compiler
from distkd.memory.bank import Normaliser
from distkd.metrics.meters import Stopwatch
from distkd.train.job import assemble
from distkd.train.loop import train_step
from tests.laws.common import law_config, run_steps, settings_of

# (all-reduces, all-gathers) of a step beyond DDP's gradient buckets, where no layer shares batch statistics
COLLECTIVES = {"at_plus": (1, 0), "crd": (0, 1), "dc_distill": (1, 1), "prototype_kd": (0, 1), "rrd": (0, 1)}


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


class Asked(TorchDispatchMode):
    """Notes whatever makes the host wait for a device, where our own code is what asked for it."""

    WAITING = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> Asked:
        # these do not go through the dispatcher, or look like any copy there
        self.originals = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy")}
        for name, original in self.originals.items():

            def watched(
                tensor: torch.Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any
            ) -> Any:
                self.note(name)
                return original(tensor, *args, **kwargs)

            setattr(torch.Tensor, name, watched)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, original)

    def note(self, name: str) -> None:
        if place := self.asker():
            self.found.append(f"{name} in {place}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in self.WAITING or masks:
            self.note(name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def asker() -> str | None:
        """The innermost place outside of torch, if it is ours."""
        own_code, frame = Path(methods.__file__).parents[1], sys._getframe(3)
        torch_code = (Path(torch.__file__).parent, Path(compiler.__file__))  # and what stands in for a part of it
        while frame is not None and any(Path(frame.f_code.co_filename).is_relative_to(code) for code in torch_code):
            frame = frame.f_back
        ours = frame is not None and Path(frame.f_code.co_filename).is_relative_to(own_code)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if ours else None


@pytest.mark.parametrize("method", methods.available())
def test_no_step_asks_the_device(shards: Path, root: Path, method: str):
    job = assemble(settings_of(law_config(method, shards, root)), World())
    job.method.trainable.train()
    batches = train_batches(job.dataset, job.plan, World(), 1, 0)
    train_step(job, next(batches)[1], Stopwatch())  # the first step may measure what is frozen afterwards
    _, passes = next(batches)
    batches.close()
    with Asked() as asked:
        train_step(job, passes, Stopwatch())
    assert asked.found == []


def test_the_watch_tells_our_code_from_others():
    with Asked() as asked:
        torch.ones(2)[0].item()
        Normaliser().look()
    assert len(asked.found) == 1
    assert "memory/bank.py" in asked.found[0]


def test_the_watch_sees_every_way_of_asking(monkeypatch: pytest.MonkeyPatch):
    """Else the test above could not fail."""
    # ruff: noqa: PLW0108 - a method is looked up when it is watched
    monkeypatch.setattr(Asked, "asker", staticmethod(lambda: "here"))
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    ways: list[Callable[[], Any]] = [
        x[0].item, lambda: x.tolist(), lambda: x.cpu(), lambda: x.numpy(), lambda: bool(mask[0]), lambda: float(x[1]),
        lambda: int(x[1]), lambda: x[mask], mask.nonzero, lambda: torch.nonzero(mask), lambda: x.masked_select(mask),
        x.unique, lambda: x.__setitem__(mask, 0.0),
    ]  # fmt: skip
    for way in ways:
        with Asked() as asked:
            way()
        assert asked.found, way
