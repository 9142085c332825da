"""Half precision stays near float32, its scale leaves no trace, and all ranks leave out the same updates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkd.base import World
from distkd.data.loader import train_batches
from distkd.engines import DDPEngine, OptimConfig, Update
from distkd.engines.scaler import LossScale
from distkd.errors import NonFiniteError
from distkd.metrics.meters import Stopwatch
from distkd.train.job import assemble
from distkd.train.loop import train_step
from tests.engines.test_ddp import CPU, Line, Single, batch_of, loss_of, saved
from tests.laws.common import equal_up_to, law_config, settings_of

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

TOO_MUCH = 1e30
"""Times the loss: finite in float32 and beyond float16 at any scale."""


def engine_of(
    model: Line, world: World | None = None, *, scale: float | None = None, autocast: Any = None, **optim: Any
) -> tuple[DDPEngine, Any]:
    engine = DDPEngine(OptimConfig(**{"lr": 0.01, **optim}), world or World(), device=CPU, autocast=autocast)
    if scale is not None:
        engine.loss_scale = LossScale(scale)
    return engine, engine.wrap(model, [{"params": list(model.parameters())}])


def step(engine: DDPEngine, forward: Any, number: int, factor: float = 1.0) -> Update:
    engine.backward(loss_of(forward(batch_of(number).to(CPU, torch.float32))) * factor)
    return engine.step(1.0)


def scale_of(engine: DDPEngine) -> LossScale:
    assert engine.loss_scale is not None
    return engine.loss_scale


# near float32


def trace(
    world: World, *, config: dict[str, Any], n_steps: int = 4, scale: float = 256.0
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Scalars of the first steps and the weights after them; the scale starts where nothing overflows."""
    job = assemble(settings_of(config), world)
    job.method.trainable.train()
    if isinstance(job.engine, DDPEngine) and job.engine.loss_scale is not None:
        job.engine.loss_scale.value = scale
    batches = train_batches(job.dataset, job.plan, world, job.passes, 0)
    rows: list[dict[str, float]] = []
    for _ in range(n_steps):
        out, update = train_step(job, next(batches)[1], Stopwatch())
        assert update.applied
        scalars = {**out.parts, **out.gauges, "norm": update.norm}
        rows.append({name: float(value) for name, value in scalars.items()})
    batches.close()
    return rows, {name: tensor.clone() for name, tensor in job.method.trainable.state_dict().items()}


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("method", ["supervised", "logit_kd", "dc_distill"])
def test_half_precision_stays_near_float32(shards: Path, root: Path, method: str, precision: str):
    full, weights = trace(World(), config=law_config(method, shards, root, engine={"precision": "fp32"}))
    half, rounded = trace(World(), config=law_config(method, shards, root, engine={"precision": precision}))
    assert half != full
    for name, value in full[0].items():
        assert half[0][name] == pytest.approx(value, rel=0.05, abs=0.02), name
    for name, tensor in rounded.items():
        assert tensor.dtype == weights[name].dtype, name
        assert tensor.isfinite().all(), name
    equal_up_to(rounded, weights, 0.05)


@pytest.mark.parametrize("precision", HALF)
def test_agreement_is_computed_in_float32(shards: Path, root: Path, precision: str):
    """The scale reaches the trunk and not the cosines: they are those of float32 up to the rounding of the feature."""
    full, _ = trace(World(), config=law_config("dc_distill", shards, root, engine={"precision": "fp32"}), n_steps=1)
    config = law_config("dc_distill", shards, root, engine={"precision": precision})
    half, _ = trace(World(), config=config, n_steps=1)
    names = [name for name in full[0] if name.startswith(("weight/", "cosine/"))]
    assert len(names) == 4 + 10
    tolerance = {"bf16": 0.02, "fp16": 0.002}[precision]
    for name in names:
        assert half[0][name] == pytest.approx(full[0][name], abs=tolerance, rel=tolerance), name


def test_the_scale_changes_neither_losses_nor_agreement(shards: Path, root: Path):
    """Of two powers of two: what float16 bears at both is the same number, shifted."""
    config = law_config("dc_distill", shards, root, engine={"precision": "fp16"})
    (low,), (high,) = (trace(World(), config=config, n_steps=1, scale=scale)[0] for scale in (64.0, 256.0))
    norms = low.pop("norm"), high.pop("norm")
    assert low == high
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("precision", HALF)
def test_half_precision_is_inside_the_trunk_only(precision: str):
    """What the losses see is float32, branches included, and so are weights, gradients and the optimizer's state."""
    model = Single()
    engine, forward = engine_of(model, autocast=HALF[precision])
    inside: list[torch.dtype] = []
    model.trunk.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    out = forward(batch_of(0).to(CPU, torch.float32))
    assert inside == [HALF[precision]]
    for found in (out, out.branches["x"]):
        assert found.feature_BD.dtype == found.logits_BC.dtype == torch.float32
    engine.backward(loss_of(out))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert engine.step(1.0).norm.dtype == torch.float32
    assert {t.dtype for name, t in saved(engine).items() if not name.startswith("engine/")} == {torch.float32}


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_accumulation_in_float16_stays_near_one_big_batch(shards: Path, root: Path, micro_batch: int):
    found = [
        trace(
            World(),
            config=law_config(
                "supervised",
                shards,
                root,
                model={"norm": "group"},
                engine={"precision": "fp16"},
                batch={"global_batch": 16, "micro_batch": micro},
            ),
        )
        for micro in (None, micro_batch)
    ]
    (whole, weights), (parts, split) = found
    for one, other in zip(whole, parts, strict=True):
        assert other["norm"] == pytest.approx(one["norm"], rel=0.02)
    equal_up_to(split, weights, 0.01)


@pytest.mark.parametrize("method", ["supervised", "dc_distill"])
def test_float16_on_two_ranks_stays_near_one(ranks: Any, shards: Path, root: Path, method: str):
    config = law_config(method, shards, root, engine={"precision": "fp16"})
    alone, weights = trace(World(), config=config)
    first, second = ranks(2).run(trace, config=config)
    assert all(torch.equal(first[1][name], tensor) for name, tensor in second[1].items())
    # later steps choose other candidates where two are nearly equal
    assert first[0][0]["norm"] == pytest.approx(alone[0]["norm"], rel=0.01)
    for name, value in alone[0].items():
        if name.startswith(("weight/", "cosine/")):
            assert first[0][0][name] == second[0][0][name] == pytest.approx(value, abs=0.005, rel=0.005), name
    equal_up_to(first[1], weights, 0.02)


# the scale


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_scaled_float32_step_is_bit_equal(clip: float, passes: int):
    """A power of two changes the exponent alone: norms, clipped updates and state too."""
    found: list[tuple[list[float], dict[str, Tensor]]] = []
    for scale in (None, 2.0**16):
        engine, forward = engine_of(Single(), scale=scale, clip=clip)
        norms: list[float] = []
        for number in range(4):
            for part in range(passes):
                loss = loss_of(forward(batch_of(10 * number + part).to(CPU, torch.float32)))
                engine.backward(loss / passes)
            norms.append(engine.step(1.0).norm.item())
        engine.loss_scale = None
        found.append((norms, saved(engine)))
    (norms, plain), (again, scaled) = found
    assert norms == again
    for name, tensor in plain.items():
        assert torch.equal(tensor, scaled[name]), name


def test_an_overflow_leaves_everything_but_the_scale_as_it_was():
    model = Single()
    engine, forward = engine_of(model, autocast=torch.float16)
    assert scale_of(engine).value == 2.0**16
    step(engine, forward, 0)
    before = saved(engine)
    update = step(engine, forward, 1, factor=TOO_MUCH)
    assert not update.applied
    assert not update.norm.isfinite()
    assert [p.grad for p in model.parameters()] == [None] * 4
    after = saved(engine)
    assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == {
        "engine/loss_scale",
        "engine/good_steps",
    }
    assert (before["engine/loss_scale"].item(), before["engine/good_steps"].item()) == (2.0**16, 1)
    assert (after["engine/loss_scale"].item(), after["engine/good_steps"].item()) == (2.0**15, 0)


def test_the_scale_grows_after_good_steps_in_a_row():
    scale = LossScale(8.0, growth_every=3)
    values: list[float] = []
    for good in (True, True, False, True, True, True, True):
        scale.good() if good else scale.overflow()
        values.append(scale.value)
    assert values == [8, 8, 4, 4, 4, 8, 8]


def test_float16_that_overflows_at_any_scale_ends_the_run():
    model = Single()
    engine, forward = engine_of(model, autocast=torch.float16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(16):
        assert not step(engine, forward, number, factor=TOO_MUCH).applied
    with pytest.raises(NonFiniteError, match=r"overflow even with a loss scale of 1, .*; use engine\.precision=bf16"):
        step(engine, forward, 16, factor=TOO_MUCH)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("saved_before", range(6))
def test_a_resumed_scale_is_bit_equal(saved_before: int):
    """With an overflow before, at and after the checkpoint, and growth between them."""
    factors = [1.0, TOO_MUCH, 1.0, 1.0, TOO_MUCH, 1.0, 1.0]

    def fresh() -> tuple[DDPEngine, Any]:
        engine, forward = engine_of(Single(), autocast=torch.float16)
        scale_of(engine).growth_every = 2
        return engine, forward

    engine, forward = fresh()
    kept: dict[str, Tensor] = {}
    for number, factor in enumerate(factors):
        if number == saved_before:
            kept = saved(engine)
        assert step(engine, forward, number, factor).applied == (factor == 1.0)
    resumed, again = fresh()
    resumed.load(kept)
    for number, factor in enumerate(factors[saved_before:], saved_before):
        step(resumed, again, number, factor)
    expected = saved(engine)
    found = saved(resumed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert scale_of(resumed) == scale_of(engine)


def test_a_checkpoint_without_a_scale_starts_one_and_one_with_it_is_read_without():
    scaled, forward = engine_of(Single(), autocast=torch.float16)
    step(scaled, forward, 0, TOO_MUCH)
    plain, forward = engine_of(Single())
    step(plain, forward, 0)
    kept = saved(scaled)
    scaled.load(saved(plain))
    assert scale_of(scaled).value == 2.0**15
    plain.load(kept)
    assert "engine/loss_scale" not in saved(plain)


def _overflow_on(world: World, rank: int) -> tuple[list[bool], list[float], dict[str, Tensor]]:
    """Four steps; in the second the loss of one rank is beyond float16."""
    engine, forward = engine_of(Single(), world, autocast=torch.float16, clip=1.0)
    applied: list[bool] = []
    scales: list[float] = []
    for number in range(4):
        much = number == 1 and world.rank == rank
        update = step(engine, forward, 10 * number + world.rank, TOO_MUCH if much else 1.0)
        applied.append(update.applied)
        scales.append(scale_of(engine).value)
    return applied, scales, saved(engine)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_overflow_on_one_rank_is_left_out_on_all(ranks: Any, rank: int):
    first, second = ranks(2).run(_overflow_on, rank=rank)
    assert first[0] == second[0] == [True, False, True, True]
    assert first[1] == second[1] == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
    for name, tensor in first[2].items():
        assert torch.equal(second[2][name], tensor), name
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", ["supervised", "dc_distill"])
def test_a_first_step_that_is_left_out_leaves_no_trace(shards: Path, root: Path, method: str, precision: str):
    """Neither in weights nor in banks, normalisers and batch statistics; the next steps are finite."""
    config = law_config(method, shards, root, engine={"precision": precision}, run={"nonfinite": "skip"})
    job = assemble(settings_of(config), World())
    job.method.trainable.train()
    assert isinstance(job.engine, DDPEngine)
    before = {name: t.clone() for part in (job.method.trainable, job.method.state) for name, t in _named(part)}
    batches = train_batches(job.dataset, job.plan, World(), job.passes, 0)
    backward = job.engine.backward
    job.engine.backward = lambda loss: backward(loss * math.inf)  # type: ignore[method-assign]
    assert not train_step(job, next(batches)[1], Stopwatch())[1].applied
    for part in (job.method.trainable, job.method.state):
        for name, tensor in _named(part):
            assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    job.engine.backward = backward  # type: ignore[method-assign]
    if job.engine.loss_scale is not None:
        job.engine.loss_scale.value = 256.0
    for _ in range(2):
        out, update = train_step(job, next(batches)[1], Stopwatch())
        assert update.applied
        assert out.loss.isfinite()
    batches.close()


def _named(part: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return list(part.state_dict().items())


# leaving out in any precision


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_skip_leaves_out_what_is_not_finite(value: float, autocast: torch.dtype | None):
    model = Single()
    engine = DDPEngine(OptimConfig(lr=0.1), World(), device=CPU, autocast=autocast, skip=True)
    forward = engine.wrap(model, [{"params": list(model.parameters())}])
    assert step(engine, forward, 0).applied
    before = saved(engine)
    update = step(engine, forward, 1, factor=value)
    assert not update.applied
    assert not update.norm.isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved(engine).items())
    assert step(engine, forward, 2).applied


def test_without_skip_nobody_waits_for_the_norm(monkeypatch: pytest.MonkeyPatch):
    """The update is made whatever the gradient is; the guard of the loop reads the norm later."""
    engine, forward = engine_of(Single(), clip=1.0)
    engine.backward(loss_of(forward(batch_of(0).to(CPU, torch.float32))) * math.nan)

    def asked(self: Tensor) -> bool:
        raise AssertionError("a host sync")

    monkeypatch.setattr(Tensor, "__bool__", asked)
    assert engine.step(1.0).applied
