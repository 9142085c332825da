"""The sharded engine against DDP: the same steps, checkpoints that go both ways, weights that are really spread."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distkd import methods
from distkd.base import Batch, InputSpec, Outputs, World
from distkd.comm import world as comm
from distkd.data.loader import train_batches
from distkd.engines import DDPEngine, EngineConfig, OptimConfig, fsdp, make_engine
from distkd.engines.fsdp import FSDPEngine
from distkd.errors import CheckpointError, LostRankError
from distkd.metrics.meters import Stopwatch
from distkd.models.build import ModelConfig, build
from distkd.models.norm import linear_before_norm, make_norm, set_world
from distkd.train.job import assemble
from distkd.train.loop import train_step
from tests.laws.common import equal_up_to, law_config, settings_of

CPU = torch.device("cpu")


@contextmanager
def small_units(size: int = 30) -> Iterator[None]:
    """Units of few parameters, so that small models have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "UNIT", size)
        yield


# every method


@dataclass(slots=True)
class Trace:
    """What a rank saw and ended with."""

    losses: list[float] = field(default_factory=list[float])
    norms: list[float] = field(default_factory=list[float])
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    backwards: int = 0
    units: int = 0


def _run(world: World, config: dict[str, Any], steps: int, unit: int = 100) -> Trace:
    """The first steps of a run, whatever its engine."""
    trace = Trace()
    with small_units(unit):
        job = assemble(settings_of(config), world)
    trace.units = len(getattr(job.engine, "units", []))
    job.method.trainable.train()
    first = next(p for p in job.method.student.parameters() if p.dim() > 1)

    def count(_: Tensor) -> None:
        trace.backwards += 1

    first.register_post_accumulate_grad_hook(count)
    batches = train_batches(job.dataset, job.plan, world, job.passes, 0)
    for _ in range(steps):
        out, update = train_step(job, next(batches)[1], Stopwatch())
        trace.losses.append((comm.all_reduce_sum(out.loss.detach().clone().double(), world) / world.size).item())
        trace.norms.append(update.norm.item())
    batches.close()
    with job.engine.whole():
        trace.weights = {name: tensor.clone() for name, tensor in job.method.trainable.state_dict().items()}
    trace.state = {name: tensor.clone() for name, tensor in job.method.state.state_dict().items()}
    return trace


def _close(found: Trace, expected: Trace, tolerance: float = 1e-9) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=tolerance)
    assert found.norms == pytest.approx(expected.norms, abs=tolerance)
    equal_up_to(found.weights, expected.weights, tolerance)
    equal_up_to(found.state, expected.state, tolerance)


@pytest.mark.parametrize("method", methods.available())
def test_every_method_takes_the_steps_of_ddp_with_one_backward(ranks: Any, shards: Path, root: Path, method: str):
    configs = [law_config(method, shards, root, engine={"name": name}) for name in ("ddp", "fsdp")]
    plain, sharded = (ranks(2).run(_run, config=config, steps=10) for config in configs)
    assert [trace.units > 1 for trace in sharded] == [True, True]
    for trace in sharded:
        _close(trace, plain[0])
        assert trace.backwards == plain[0].backwards == 10


def test_a_network_of_several_units_takes_the_steps_of_ddp(ranks: Any, shards: Path, root: Path):
    """With units of the usual size, and rectifiers that work in place."""
    model = {"modalities": ["path"], "fusion": "auto", "encoders": {"path": {"name": "resnet18"}}}
    configs = [law_config("supervised", shards, root, model=model, engine={"name": name}) for name in ("ddp", "fsdp")]
    plain, sharded = (ranks(2).run(_run, config=config, steps=3, unit=fsdp.UNIT) for config in configs)
    for trace in sharded:
        assert trace.units == 5
        _close(trace, plain[0])


def test_four_ranks_take_the_steps_of_one(ranks: Any, shards: Path, root: Path):
    config = law_config("dc_distill", shards, root, engine={"name": "fsdp"})
    [alone] = ranks(1).run(_run, config=config, steps=6)
    assert alone.units == 0
    for trace in ranks(4).run(_run, config=config, steps=6):
        _close(trace, alone)


def test_accumulation_takes_the_steps_of_ddp(ranks: Any, shards: Path, root: Path):
    """In two passes, with a mean teacher, agreement weights and banks."""
    batch = {"global_batch": 16, "micro_batch": 4}
    configs = [law_config("dc_distill", shards, root, batch=batch, engine={"name": name}) for name in ("ddp", "fsdp")]
    plain, sharded = (ranks(2).run(_run, config=config, steps=4) for config in configs)
    for trace in sharded:
        _close(trace, plain[0])


def test_bfloat16_means_what_it_means_under_ddp(ranks: Any, shards: Path, root: Path):
    """Near float32, and nearer to DDP in bfloat16."""
    kinds = [("fsdp", "fp32"), ("fsdp", "bf16"), ("ddp", "bf16")]
    full, half, plain = (
        ranks(2).run(
            _run,
            config=law_config("supervised", shards, root, engine={"name": name, "precision": precision}),
            steps=6,
        )[0]
        for name, precision in kinds
    )
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    assert half.losses == pytest.approx(plain.losses, rel=1e-3)
    equal_up_to(half.weights, full.weights, 0.05)
    assert {t.dtype for t in half.weights.values()} == {torch.float32, torch.int64}


# a small model


class Net(nn.Module):
    """Blocks whose rows do not divide evenly, batch statistics, a scalar, and a head that the loss uses as well."""

    def __init__(self, world: World):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            blocks = [(3, 7), (7, 5)]
            self.trunk = nn.Sequential(
                *(
                    nn.Sequential(linear_before_norm("sync", a, b), make_norm("sync", b, 1), nn.Tanh())
                    for a, b in blocks
                )
            )
            self.head = nn.Linear(5, 2)
            self.gain = nn.Parameter(torch.tensor(1.5))
        self.double()
        set_world(self, world)

    def forward(self, batch: Batch) -> Outputs:
        feature = self.trunk(batch.inputs["x"]) * self.gain
        return Outputs(feature, self.head(feature))

    def loss(self, out: Outputs) -> Tensor:
        """Reads the head beyond the forward too, weights and outputs."""
        return out.logits_BC.square().mean() + self.head(out.feature_BD).abs().mean() + self.head.weight.abs().sum()


def batch_of(number: int, world: World, part: int = 0, passes: int = 1) -> Batch:
    """This rank's part of eight samples."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    n = 8 // (passes * world.size)
    first = (part * world.size + world.rank) * n
    index = torch.arange(n)
    return Batch(({"x": x[first : first + n]},), {"x": index >= 0}, index % 2, index, index, index)


def start(
    world: World, kind: str = "fsdp", *, skip: bool = False, groups: Sequence[dict[str, Any]] = (), **optim: Any
) -> tuple[Any, Any, Net]:
    """Engine, forward and model; `groups` name their parameters by what their names start with."""
    model = Net(world)
    engine = (FSDPEngine if kind == "fsdp" else DDPEngine)(
        OptimConfig(**{"lr": 0.1, **optim}), world, device=CPU, skip=skip
    )
    chosen = [
        {**group, "params": [p for key, p in model.named_parameters() if key.startswith(group["params"])]}
        for group in groups or [{"params": ""}]
    ]
    with small_units():
        return engine, engine.wrap(model, chosen, outside=list(model.head.parameters())), model


def step(engine: Any, forward: Any, model: Net, number: int, *, passes: int = 1, scale: float = 0.5) -> float:
    for part in range(passes):
        with engine.accumulate(last=part == passes - 1):
            out = forward(batch_of(number, engine.world, part, passes))
            engine.backward(model.loss(out) / passes)
    return engine.step(scale).norm.item()


def weights_of(engine: Any, model: nn.Module) -> dict[str, Tensor]:
    with engine.whole():
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saved(engine: Any) -> dict[str, Tensor]:
    """A checkpoint in memory."""
    return {entry.name: entry.read().clone() for entry in engine.entries()}


def _some_steps(
    world: World,
    kind: str = "fsdp",
    checkpoint: dict[str, Tensor] | None = None,
    numbers: Sequence[int] = range(4),
    passes: int = 1,
    **options: Any,
) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    engine, forward, model = start(world, kind, **options)
    if checkpoint is not None:
        engine.load(checkpoint)
    norms = [step(engine, forward, model, number, passes=passes) for number in numbers]
    return weights_of(engine, model), norms, saved(engine)


OPTIMS = {
    "sgd": {"name": "sgd", "betas": [0.0, 0.9], "clip": 0.5},
    "momentum": {"name": "sgd", "betas": [0.8, 0.9], "weight_decay": 0.1},
    "adam": {"name": "adam", "weight_decay": 0.1, "clip": 0.5},
    "adamw": {"name": "adamw", "weight_decay": 0.1},
    "not fused": {"name": "adam", "fused": "none"},
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("optim", OPTIMS)
def test_the_updates_and_norms_are_those_of_one_process(ranks: Any, size: int, optim: str):
    weights, norms, state = _some_steps(World(), "ddp", **OPTIMS[optim])
    for found, seen, also in ranks(size).run(_some_steps, **OPTIMS[optim]):
        equal_up_to(found, weights, 1e-11)
        assert seen == pytest.approx(norms, rel=1e-10)
        equal_up_to(also, state, 1e-11)


def test_norms_and_what_is_whole_are_bit_equal_on_all_ranks(ranks: Any):
    (weights, norms, _), (other, also, _) = ranks(2).run(_some_steps, **OPTIMS["adam"])
    assert norms == also
    assert all(torch.equal(tensor, other[name]) for name, tensor in weights.items())


def test_groups_keep_their_own_rates(ranks: Any):
    groups = [
        {"params": "trunk.0", "lr": 0.0},
        {"params": "trunk.1", "weight_decay": 0.2},
        {"params": ("head", "gain")},
    ]
    weights, _, _ = _some_steps(World(), "ddp", groups=groups)
    before = Net(World()).state_dict()
    for found, _, _ in ranks(2).run(_some_steps, groups=groups):
        equal_up_to(found, weights, 1e-11)
        assert torch.equal(found["trunk.0.0.weight"], before["trunk.0.0.weight"])


def _exchanges(world: World, lasts: list[bool]) -> list[tuple[bool, list[str]]]:
    """After each backward, whether rows of the mean have arrived, and which collectives ran."""
    engine, forward, model = start(world)
    found: list[tuple[bool, list[str]]] = []
    for last in lasts:
        with engine.accumulate(last=last):
            loss = model.loss(forward(batch_of(0, world)))
            with Collectives() as watched:
                engine.backward(loss)
        arrived = [shard.parameter.grad is not None for shard in engine.shards.values()]
        assert len(set(arrived)) == 1
        found.append((arrived[0], [name for name in watched.found if "reduce_scatter" in name]))
    return found


class Collectives(TorchDispatchMode):
    """Every operation of a process group, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_gradients_are_exchanged_in_the_last_pass_alone(ranks: Any):
    for found in ranks(2).run(_exchanges, lasts=[False, False, True]):
        assert [arrived for arrived, _ in found] == [False, False, True]
        assert [len(names) for _, names in found] == [0, 0, 2]  # one for each block


@pytest.mark.parametrize("size", [1, 2])
def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_by_all(ranks: Any, size: int):
    for before, after, applied in ranks(size).run(_spoilt):
        assert applied == [True, False, True]
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def _spoilt(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor], list[bool]]:
    engine, forward, model = start(world, skip=True)
    seen: list[dict[str, Tensor]] = []
    applied: list[bool] = []
    for number in range(3):
        loss = model.loss(forward(batch_of(number, world)))
        spoilt = number == 1 and world.rank == world.size - 1
        engine.backward(loss * torch.nan if spoilt else loss)
        applied.append(engine.step(1.0).applied)
        with engine.whole():
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return seen[0], seen[1], applied


# checkpoints


@pytest.mark.parametrize("optim", ["sgd", "momentum", "adam"])
def test_what_is_saved_goes_on_bit_for_bit(ranks: Any, optim: str):
    uninterrupted = ranks(2).run(_some_steps, numbers=range(6), **OPTIMS[optim])
    checkpoint = ranks(2).run(_some_steps, numbers=range(3), **OPTIMS[optim])[1][2]
    resumed = ranks(2).run(_some_steps, numbers=range(3, 6), checkpoint=checkpoint, **OPTIMS[optim])
    for found, expected in zip(resumed, uninterrupted, strict=True):
        for part in (0, 2):
            assert found[part].keys() == expected[part].keys()
            for name, tensor in expected[part].items():
                assert torch.equal(found[part][name], tensor), name


@pytest.mark.parametrize(
    "road",
    [
        [("fsdp", 2), ("fsdp", 1), ("fsdp", 4)],
        [("ddp", 2), ("fsdp", 2), ("ddp", 2)],
        [("fsdp", 4), ("ddp", 1), ("fsdp", 2)],
    ],
    ids=lambda road: "-".join(f"{name}{size}" for name, size in road),
)
def test_a_checkpoint_goes_on_under_another_engine_and_on_other_ranks(ranks: Any, road: list[tuple[str, int]]):
    weights, _, state = _some_steps(World(), "ddp", numbers=range(6), **OPTIMS["adam"])
    checkpoint: dict[str, Tensor] | None = None
    for leg, (kind, size) in enumerate(road):
        results = ranks(size).run(
            _some_steps, kind=kind, numbers=[2 * leg, 2 * leg + 1], checkpoint=checkpoint, **OPTIMS["adam"]
        )
        checkpoint = results[-1][2]
        assert list(checkpoint) == list(state)
    for found, _, _ in results:
        equal_up_to(found, weights, 1e-11)
    assert checkpoint is not None
    equal_up_to(checkpoint, state, 1e-11)


def _sizes(world: World, kind: str) -> list[tuple[str, int]]:
    engine, forward, model = start(world, kind)
    step(engine, forward, model, 0)
    sizes = [(entry.name, entry.nbytes) for entry in engine.entries()]
    assert [entry.read().nbytes for entry in engine.entries()] == [nbytes for _, nbytes in sizes]
    return sizes


def test_entries_have_the_names_and_sizes_of_ddp_in_the_same_order(ranks: Any):
    assert ranks(2).run(_sizes, kind="fsdp") == ranks(2).run(_sizes, kind="ddp")


def _refusal(world: World, checkpoint: dict[str, Tensor], **optim: Any) -> str:
    engine, _, model = start(world, **optim)
    before = weights_of(engine, model)
    try:
        engine.load(checkpoint)
    except CheckpointError as error:
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(engine, model).items())
        return str(error)
    return "no error"


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_of_another_model_is_refused(ranks: Any, size: int):
    _, _, checkpoint = _some_steps(World(), "ddp", numbers=[0])
    checkpoint["trainable/trunk.0.0.weight"] = torch.zeros(7, 4)
    checkpoint["trainable/tail"] = checkpoint.pop("trainable/gain")
    expected = (
        "the checkpoint does not fit this model: missing gain; unexpected tail; size mismatch for trunk.0.0.weight: "
        "(7, 4) in the checkpoint, (7, 3) in the model"
    )
    assert ranks(size).run(_refusal, checkpoint=checkpoint) == [expected] * size


def _other_optimizer(world: World, checkpoint: dict[str, Tensor]) -> None:
    start(world, **OPTIMS["momentum"])[0].load(checkpoint)


def test_a_checkpoint_of_another_optimizer_is_refused(ranks: Any):
    _, _, checkpoint = _some_steps(World(), "ddp", numbers=[0])
    with pytest.raises(
        CheckpointError, match=r"of another optimizer than optim\.name=sgd, which keeps momentum_buffer"
    ):
        ranks(2).run(_other_optimizer, checkpoint=checkpoint)


# whole weights


def _evaluations(world: World) -> dict[str, Any]:
    """Another number of forwards on each rank, between two steps, and before the first."""
    engine, forward, model = start(world)
    seen: dict[str, Any] = {"outputs": [], "collectives": [], "plain": []}
    for number in range(2):
        model.eval()
        with engine.whole(), engine.whole(), torch.no_grad():
            with Collectives() as watched:
                for _ in range(1 + 3 * world.rank):
                    out = model(batch_of(9, World()))
                seen["outputs"].append(out.logits_BC)
                seen["plain"].append({type(p) for p in model.parameters()})
                state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                copied = Net(World())
                copied.load_state_dict(state)
                seen["same"] = torch.equal(copied.eval()(batch_of(9, World())).logits_BC, out.logits_BC)
            seen["collectives"] += watched.found
        model.train()
        seen["spread"] = sum(isinstance(p, DTensor) for p in model.parameters())
        step(engine, forward, model, number)
    seen["weights"] = weights_of(engine, model)
    return seen


def test_whole_weights_need_no_collective_and_any_number_of_forwards(ranks: Any):
    weights, _, _ = _some_steps(World(), "ddp", numbers=range(2))
    first, second = ranks(2).run(_evaluations)
    for seen in (first, second):
        assert seen["collectives"] == []
        assert seen["plain"] == [{nn.Parameter}] * 2
        assert seen["same"]
        assert seen["spread"] == 8
        equal_up_to(seen["weights"], weights, 1e-11)
    assert all(torch.equal(a, b) for a, b in zip(first["outputs"], second["outputs"], strict=True))


def _borrowed(world: World) -> tuple[bool, bool, list[str]]:
    """Other weights put in while whole; hooks of others meanwhile."""
    engine, _, model = start(world)
    before = weights_of(engine, model)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items() if name.startswith("trunk.0.0")}
    called: list[str] = []
    early = model.trunk.register_forward_hook(lambda *_: called.append("early"))
    model.eval()
    with engine.whole():
        model.load_state_dict({**before, **zeros})
        put_in = torch.equal(model.get_parameter("trunk.0.0.weight"), zeros["trunk.0.0.weight"])
        model.trunk.register_forward_hook(lambda *_: called.append("late"))
        model(batch_of(0, World()))
        early.remove()
    model(batch_of(0, World()))
    after = weights_of(engine, model)
    return put_in, all(torch.equal(tensor, after[name]) for name, tensor in before.items()), called


def test_what_is_written_to_whole_weights_is_lost_and_hooks_of_others_are_kept(ranks: Any):
    assert ranks(2).run(_borrowed) == [(True, True, ["early", "late", "late"])] * 2


# what a rank holds


def _held(world: World) -> tuple[int, int, int, int, list[str]]:
    """Bytes of weights, of the optimizer's state, and of all of them whole; the types of the units."""
    config = ModelConfig(modalities=["path"], encoders={"path": {"name": "resnet18"}})  # type: ignore[dict-item]
    model = build(config, {"path": InputSpec("image", (3, 64, 64))}, 2, seed=0)
    set_world(model, world)
    engine = make_engine(EngineConfig(name="fsdp"), OptimConfig(), world, device=CPU)
    whole = sum(p.nbytes for p in model.parameters())
    forward = engine.wrap(model, [{"params": list(model.parameters())}])
    image = torch.randn(2, 3, 64, 64)
    index = torch.arange(2)
    out = forward(Batch(({"path": image},), {"path": index >= 0}, index, index, index, index))
    engine.backward(out.logits_BC.square().mean())
    assert isinstance(engine, FSDPEngine)
    gradients = sum(p.grad.to_local().nbytes for p in model.parameters() if isinstance(p.grad, DTensor))
    engine.step(1.0)
    weights = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    state = sum(t.nbytes for fields in engine.optimizer.state.values() for t in fields.values() if t.dim() > 0)
    return weights, gradients, state, whole, [type(unit).__name__ for unit in engine.units]


def test_each_rank_holds_its_share(ranks: Any):
    found = ranks(2).run(_held)
    for weights, gradients, state, whole, units in found:
        assert weights == gradients == pytest.approx(whole / 2, rel=0.001)
        assert state == 2 * weights
        assert units == ["FSDPBasicBlock"] * 3 + ["FSDPResNet18", "FSDPClassifier"]
    assert sum(weights for weights, *_ in found) == found[0][3]


@pytest.mark.parametrize(
    "encoder",
    [
        {"name": "vgg16"},
        *({"name": "monai", "backbone": name} for name in ("resnet18", "densenet121", "efficientnet-b4", "SEResNet50")),
    ],
    ids=lambda encoder: encoder.get("backbone", encoder["name"]),
)
def test_every_unit_is_called(encoder: dict[str, Any]):
    """A unit that its parent reads into without calling it would never gather its weights."""
    config = ModelConfig.model_validate({"modalities": ["path"], "encoders": {"path": encoder}})
    with torch.device("meta"):
        model = build(config, {"path": InputSpec("image", (3, 64, 64))}, 2, seed=0)
    called: set[nn.Module] = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    index = torch.arange(2)
    model(
        Batch(({"path": torch.zeros(2, 3, 64, 64, device="meta")},), {"path": index >= 0}, index, index, index, index)
    )
    units = fsdp._units(model, set())
    assert units
    assert [type(unit).__name__ for unit in units if unit not in called] == []


def _vgg_steps(world: World, engine: str) -> list[float]:
    model = build(
        ModelConfig.model_validate({"modalities": ["path"], "encoders": {"path": {"name": "vgg16"}}}),
        {"path": InputSpec("image", (1, 16, 16))},
        2,
        seed=0,
    )
    made = make_engine(EngineConfig(name=engine), OptimConfig(lr=1e-4), world, device=CPU)  # type: ignore[arg-type]
    forward = made.wrap(model, [{"params": list(model.parameters())}])
    index = torch.arange(2)
    image = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(world.rank))
    losses = []
    for _ in range(2):
        loss = forward(Batch(({"path": image},), {"path": index >= 0}, index, index, index, index)).logits_BC.square()
        made.backward(loss.mean())
        made.step(1.0)
        losses.append(loss.mean().item())
    return losses


def test_a_trunk_whose_layers_are_called_one_by_one_learns_as_under_ddp(ranks: Any):
    sharded, whole = (ranks(2).run(_vgg_steps, engine=engine) for engine in ("fsdp", "ddp"))
    assert sharded == [pytest.approx(losses, rel=1e-5) for losses in whole]
    assert whole[0][0] != whole[0][1]


def test_one_process_spreads_nothing():
    engine, _, model = start(World())
    assert not engine.sharded
    assert engine.units == []
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    copy.deepcopy(model)


def _left_alone(world: World, where: str) -> str:
    engine, forward, model = start(world)
    loss = model.loss(forward(batch_of(0, world)))
    if world.rank == 1:
        del engine, forward, model, loss
        gc.collect()  # a process that ends closes its connections; one that lives on keeps them in the engine's cycles
        return ""
    try:
        if where == "backward":
            engine.backward(loss)
        elif where == "forward":
            model.eval()  # batch statistics would notice first
            forward(batch_of(0, world))
        else:
            with engine.whole():
                pass
    except LostRankError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "where, what",
    [
        ("forward", "the gathering of weights"),
        ("whole", "the gathering of weights"),
        ("backward", "the exchange of gradients"),
    ],
)
def test_a_rank_that_has_gone_is_named_by_what_failed(ranks: Any, where: str, what: str):
    message, _ = ranks(2).run(_left_alone, where=where)
    assert message.startswith(f"rank 0 of 2: {what}")
    assert message.endswith("another rank died or stopped answering, start the run again to resume")
