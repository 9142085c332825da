"""The engine against torch written out: steps, accumulation, clipping, what it saves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distkd.base import Batch, Outputs, World
from distkd.comm.world import gather_objects
from distkd.engines import DDPEngine, OptimConfig, ddp
from distkd.engines.ddp import _total_norm
from distkd.errors import CheckpointError
from tests.laws.common import equal_up_to, law_config, run_steps

CPU = torch.device("cpu")


class Line(nn.Module):
    """A trunk and a head; the gradient of a loss is easy to write down."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.trunk, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, batch: Batch) -> Outputs:
        feature = self.trunk(batch.inputs["x"])
        return Outputs(feature, self.head(feature), {"x": Outputs(feature, self.head(feature))})


class Single(Line):
    """In float32."""

    def __init__(self) -> None:
        super().__init__()
        self.float()


def batch_of(number: int, n: int = 8) -> Batch:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    index = torch.arange(n)
    return Batch(({"x": x},), {"x": index >= 0}, index % 2, index, index, index)


def engine_of(model: nn.Module, world: World | None = None, **optim: Any) -> tuple[DDPEngine, Any]:
    engine = DDPEngine(OptimConfig(**{"lr": 0.1, **optim}), world or World(), device=CPU)
    return engine, engine.wrap(model, [{"params": list(model.parameters())}])


def loss_of(out: Outputs) -> Tensor:
    return out.logits_BC.square().mean()


def step(engine: DDPEngine, forward: Any, number: int, scale: float = 1.0) -> Tensor:
    engine.backward(loss_of(forward(batch_of(number))))
    return engine.step(scale).norm


def saved(engine: DDPEngine) -> dict[str, Tensor]:
    """A checkpoint in memory."""
    return {entry.name: entry.read().clone() for entry in engine.entries()}


# steps


@pytest.mark.parametrize(
    "optim, plain",
    [
        ({"name": "sgd", "betas": [0.0, 0.9]}, lambda p: torch.optim.SGD(p, lr=0.05)),
        ({"name": "sgd", "betas": [0.8, 0.9]}, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8)),
        ({"name": "adam", "weight_decay": 0.1}, lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1)),
        ({"name": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
        (
            {"name": "adam", "betas": [0.5, 0.9]},
            lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9)),
        ),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "betas"],
)
def test_steps_are_those_of_torch(optim: dict[str, Any], plain: Callable[..., torch.optim.Optimizer]):
    """At a scale of one half, on every parameter."""
    ours, theirs = Line(), Line()
    engine, forward = engine_of(ours, **optim)
    reference = plain(theirs.parameters())
    for number in range(4):
        norm = step(engine, forward, number, scale=0.5)
        reference.zero_grad()
        loss_of(theirs(batch_of(number))).backward()
        expected = torch.cat([p.grad.flatten() for p in theirs.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-12)
        reference.step()
    equal_up_to(ours.state_dict(), theirs.state_dict(), 1e-12)


def test_a_step_leaves_no_gradient_behind():
    model = Line()
    engine, forward = engine_of(model)
    step(engine, forward, 0)
    assert [p.grad for p in model.parameters()] == [None] * 4


def test_groups_keep_their_own_rates():
    model = Line()
    engine = DDPEngine(OptimConfig(name="sgd", betas=(0.0, 0.9), lr=0.1), World(), device=CPU)
    groups = [{"params": list(model.trunk.parameters()), "lr": 0.0}, {"params": list(model.head.parameters())}]
    forward = engine.wrap(model, groups)
    before = copy.deepcopy(model.state_dict())
    step(engine, forward, 0, scale=0.5)
    step(engine, forward, 1, scale=1.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("trunk"), name
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.0, 0.1]


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_clipping_bounds_the_update_and_reports_the_norm_before_it(clip: float):
    model = Line()
    engine, forward = engine_of(model, name="sgd", betas=[0.0, 0.9], lr=1.0, clip=clip)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(forward(batch_of(0))).backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = engine.step(1.0).norm
    total = torch.cat([g.flatten() for g in gradient]).norm()
    assert norm.item() == pytest.approx(total.item(), rel=1e-12)
    factor = min(1.0, clip / (total.item() + 1e-6)) if clip else 1.0
    for p, old, g in zip(model.parameters(), before, gradient, strict=True):
        torch.testing.assert_close(old - p.detach(), factor * g, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("few", [True, False])
def test_the_norm_is_torchs(few: bool):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 5, generator=generator).t(), torch.randn((), generator=generator), torch.zeros(0, 2)]
    expected = nn.utils.get_total_norm(gradients).item()
    assert _total_norm(gradients, few=few).item() == pytest.approx(expected, rel=1e-6)


def test_a_model_of_any_size_reports_its_norm(monkeypatch: pytest.MonkeyPatch):
    norms: list[float] = []
    for few in (0, 2**16):
        monkeypatch.setattr(ddp, "_FEW", few)
        engine, forward = engine_of(Line())
        norms.append(step(engine, forward, 0).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


# several ranks


def _on_ranks(world: World, passes: int) -> tuple[dict[str, Tensor], list[float], bool]:
    """Three steps on this rank's part of the batches, in some passes."""
    model = Line()
    engine, forward = engine_of(model, world, clip=0.05)
    norms: list[float] = []
    for number in range(3):
        whole = batch_of(number)
        for part in range(passes):
            n = 8 // (passes * world.size)
            first = (part * world.size + world.rank) * n
            view = {"x": whole.inputs["x"][first : first + n]}
            with engine.accumulate(last=part == passes - 1):
                mine = Batch((view,), {}, whole.label_B, whole.index_B, whole.sample_B, whole.key_B)
                engine.backward(loss_of(forward(mine)) / passes)
        norms.append(engine.step(1.0).norm.item())
    return model.state_dict(), norms, isinstance(engine.wrapped, DistributedDataParallel)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("passes", [1, 2])
def test_ranks_and_passes_are_one_big_batch(ranks: Any, size: int, passes: int):
    weights, norms, _ = _on_ranks(World(), 1)
    for found, seen, wrapped in ranks(size).run(_on_ranks, passes=passes):
        equal_up_to(found, weights, 1e-12)
        assert seen == pytest.approx(norms, rel=1e-10)
        assert wrapped == (size > 1)


def _exchanges(world: World, lasts: list[bool]) -> list[bool]:
    """Whether the ranks' gradients are equal after each backward."""
    model = Line()
    engine, forward = engine_of(model, world)
    found: list[bool] = []
    for last in lasts:
        with engine.accumulate(last=last):
            engine.backward(loss_of(forward(batch_of(10 + world.rank))))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append(len({tuple(each) for each in gather_objects(gradient.tolist(), world)}) == 1)
    return found


def test_gradients_are_exchanged_in_the_last_pass_alone(ranks: Any):
    for found in ranks(2).run(_exchanges, lasts=[False, False, True]):
        assert found == [False, False, True]


def test_one_process_has_nothing_to_exchange():
    model = Line()
    engine, _ = engine_of(model)
    assert engine.wrapped is model
    assert isinstance(engine.accumulate(last=False), nullcontext)


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize("method", ["supervised", "logit_kd", "dc_teacher"])
def test_accumulation_equals_one_big_batch(shards: Path, root: Path, method: str, micro_batch: int):
    """Of methods whose loss is a mean over samples, without batch statistics; dropout is drawn by sample."""
    whole, parts = (
        run_steps(
            World(),
            config=law_config(
                method, shards, root, model={"norm": "group"}, batch={"global_batch": 16, "micro_batch": micro}
            ),
            steps=4,
        )
        for micro in (None, micro_batch)
    )
    assert parts.samples == whole.samples
    assert parts.losses == pytest.approx(whole.losses, abs=1e-11)
    assert parts.backwards == [16 // micro_batch] * 4
    equal_up_to(parts.weights, whole.weights, 1e-9)
    equal_up_to(parts.state, whole.state, 1e-9)


# checkpoints


@pytest.mark.parametrize(
    "optim", [{"name": "adam"}, {"name": "adamw"}, {"name": "sgd"}, {"name": "sgd", "betas": [0, 0.9]}]
)
def test_what_is_saved_goes_on_bit_for_bit(optim: dict[str, Any]):
    whole, resumed = Line(), Line()
    engine, forward = engine_of(whole, **optim)
    kept: dict[str, Tensor] = {}
    for number in range(6):
        if number == 3:
            kept = saved(engine)
        step(engine, forward, number)
    for p in resumed.parameters():
        p.data.zero_()
    engine, forward = engine_of(resumed, **optim)
    engine.load(kept)
    for number in range(3, 6):
        step(engine, forward, number)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_entries_are_named_by_parameter_and_have_their_size():
    model = Line()
    engine, forward = engine_of(model)
    step(engine, forward, 0)
    names = [name for name, _ in model.named_parameters()]
    fields = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(entry.name for entry in engine.entries()) == sorted(
        [f"trainable/{name}" for name in names] + [f"optimizer/{name}/{field}" for name in names for field in fields]
    )
    for entry in engine.entries():
        assert entry.nbytes == entry.read().nbytes, entry.name


def test_a_checkpoint_of_another_model_is_refused():
    engine, forward = engine_of(Line())
    step(engine, forward, 0)
    kept = saved(engine)
    other = Line()
    other.head = nn.Linear(4, 3).double()
    engine, _ = engine_of(other)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit this model: .*size mismatch for head\.weight"):
        engine.load(kept)


def test_a_checkpoint_that_optimised_more_is_refused():
    engine, forward = engine_of(Line())
    step(engine, forward, 0)
    model = Line()
    other = DDPEngine(OptimConfig(), World(), device=CPU)
    other.wrap(model, [{"params": list(model.head.parameters())}])
    with pytest.raises(CheckpointError, match=r"knows 'trunk\.bias', 'trunk\.weight', which learn no more"):
        other.load(saved(engine))


@pytest.mark.parametrize("old, new", [("sgd", "adam"), ("adamw", "sgd")])
def test_a_checkpoint_of_another_optimizer_is_refused(old: str, new: str):
    engine, forward = engine_of(Line(), name=old)
    step(engine, forward, 0)
    kept = saved(engine)
    engine, _ = engine_of(Line(), name=new)
    with pytest.raises(
        CheckpointError, match=f"of another optimizer than optim.name={new}, which keeps .*; train with"
    ):
        engine.load(kept)
