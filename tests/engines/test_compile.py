"""A compiled model is the same model: losses, masks, collectives and names, on one rank and on two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distkd.base import Batch, Outputs, World
from distkd.comm import world as comm
from distkd.data.loader import train_batches
from distkd.engines import DDPEngine, OptimConfig
from distkd.errors import ConfigError
from distkd.metrics.meters import Stopwatch
from distkd.models.dropout import KeyedAlphaDropout, KeyedDropout, dropout_keys
from distkd.train.job import assemble
from distkd.train.loop import train_step
from tests.engines.test_ddp import CPU, Single
from tests.laws.common import equal_up_to, law_config, settings_of

# torch's compiler uses parts of torch that torch has deprecated, and looks at what it warns of
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

N_STEPS = 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


def use_cache(cache: Path) -> None:
    """What is compiled goes to a folder of the test, by this process and no other."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.compiler.reset()


def config_of(method: str, shards: Path, root: Path, *, compile: bool, precision: str = "fp64") -> dict[str, Any]:
    # plain gradient descent: Adam makes a whole step of what is rounding only
    return law_config(
        method,
        shards,
        root,
        engine={"precision": precision, "compile": compile},
        optim={"name": "sgd", "betas": [0.0, 0.9], "lr": 0.05},
    )


def trace(world: World, *, config: dict[str, Any], cache: Path) -> tuple[list[float], dict[str, Tensor], list[int]]:
    """Losses, entries and collectives of the first steps."""
    use_cache(cache)
    job = assemble(settings_of(config), world)
    job.method.trainable.train()
    batches = train_batches(job.dataset, job.plan, world, job.passes, 0)
    losses: list[float] = []
    collectives: list[int] = []
    for _ in range(N_STEPS):
        before = comm.counts.total()
        out, _ = train_step(job, next(batches)[1], Stopwatch())
        losses.append(out.loss.item())
        collectives.append(comm.counts.total() - before)
    batches.close()
    torch.compiler.reset()
    return losses, {entry.name: entry.read().detach().clone() for entry in job.engine.entries()}, collectives


@pytest.mark.slow
@pytest.mark.parametrize("method, size", [("logit_kd", 1), ("dc_distill", 2)])
def test_compiled_equals_eager(ranks: Any, shards: Path, root: Path, cache: Path, method: str, size: int):
    """In float64, with dropout and with batch statistics over the ranks; and twice the same, bit for bit."""
    eager, compiled = (config_of(method, shards, root, compile=compile) for compile in (False, True))
    expected = ranks(size).run(trace, config=eager, cache=cache)
    found = ranks(size).run(trace, config=compiled, cache=cache)
    again = ranks(size).run(trace, config=compiled, cache=cache)
    for (losses, entries, collectives), (known, reference, counted) in zip(found, expected, strict=True):
        assert losses == pytest.approx(known, rel=1e-10)
        assert collectives == counted
        assert not [name for name in entries if "_orig_mod" in name]
        equal_up_to(entries, reference, 1e-9)
    for (losses, entries, _), (repeated, same, _) in zip(found, again, strict=True):
        assert losses == repeated
        assert all(torch.equal(tensor, same[name]) for name, tensor in entries.items())


class Dropping(nn.Module):
    """Nothing but dropout, of a size that is no multiple of a vector register."""

    def __init__(self, kind: type[KeyedDropout]):
        super().__init__()
        self.drop = kind(0.3)
        self.drop.salt = -0x1234_5678_9ABC_DEF0
        self.weight = nn.Parameter(torch.ones(5, 7))

    def forward(self, batch: Batch) -> Outputs:
        with dropout_keys(batch.key_B, "student"):
            return Outputs(self.drop(batch.inputs["x"] * self.weight), batch.inputs["x"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KeyedDropout, KeyedAlphaDropout])
def test_masks_are_those_of_eager(cache: Path, kind: type[KeyedDropout]):
    """Compiled, the hashing that wraps around 64 bits would write wrong masks, and beyond them."""
    use_cache(cache)
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x0123_4567_89AB_CDEF])
    batch = Batch(({"x": x},), {}, keys, keys, keys, keys)
    found: list[Tensor] = []
    for compile in (False, True):
        model = Dropping(kind)
        engine = DDPEngine(OptimConfig(), World(), device=CPU, compile=compile)
        out = engine.wrap(model, [{"params": [model.weight]}])(batch)
        found.append(out.feature_BD.detach())
        engine.backward(out.feature_BD.sum())
        assert model.weight.grad is not None
        found.append(model.weight.grad)
    torch.compiler.reset()
    for eager, compiled in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(compiled, eager)
    assert torch.equal(found[0] == found[0].min(), found[2] == found[2].min())
    assert torch.equal(found[0] == 0, found[2] == 0)


def _with_one_layer(shards: Path, root: Path, compile: bool, precision: str) -> dict[str, Any]:
    """What takes long is the C++ of each layer."""
    config = config_of("logit_kd", shards, root, compile=compile, precision=precision)
    config["model"]["encoders"]["path"]["widths"] = [8]
    return config


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_can_be_compiled(shards: Path, root: Path, cache: Path, precision: str):
    """Near eager, not equal: compiled code keeps more digits between two operations."""
    known, losses = (
        trace(World(), config=_with_one_layer(shards, root, compile, precision), cache=cache)[0]
        for compile in (False, True)
    )
    assert losses == pytest.approx(known, rel=0.02)


@pytest.mark.parametrize("compiler", [None, "/absent/g++"])
def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str | None):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if compiler is not None:
        monkeypatch.setenv("CXX", compiler)
    model = Single()
    engine = DDPEngine(OptimConfig(), World(), device=CPU, compile=True)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and '.*g\+\+' is not on PATH; .*compile=false"):
        engine.wrap(model, [{"params": list(model.parameters())}])
