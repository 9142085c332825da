"""Weights, gradients and optimizer state spread over the ranks by torch's FSDP2 (`fully_shard`).

What losses use beyond the wrapped forward stays whole on every rank. FSDP gathers and scatters; norm, update and
checkpoints work on each rank's own rows as plain tensors, as DDP does on whole ones (`docs/decisions/0006-fsdp.md`).
"""

# torch.distributed leaves the types of its tensors out
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

# Shapes: N rows (first dimension) of a whole tensor, of which rank r holds r * ceil(N / size) and those after it

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from distkd.base import Batch, Forward, Outputs, World
from distkd.comm.world import all_gather_rows, all_reduce_sum
from distkd.engines.lost import transport
from distkd.engines.optimizer import OPTIMIZER, TRAINABLE, load_state, make_optimizer, state_entries, under
from distkd.engines.precision import float32_outputs
from distkd.engines.protocol import Entry, OptimConfig, Update
from distkd.errors import CheckpointError
from distkd.models.trunk import Trunk

__all__ = ["FSDPEngine"]

UNIT = 1 << 20
"""Parameters that are worth a collective of their own; smaller modules are gathered with what they are in."""

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class FSDPEngine:
    """Each rank holds its rows of the weights, of their gradients and of the optimizer's state.

    In a world of one nothing is spread, and this is the bare module.

    Args:
        skip: leave out updates whose gradient is not finite, at the price of one host sync a step.
    """

    def __init__(
        self,
        optim: OptimConfig,
        world: World,
        *,
        device: torch.device,
        autocast: torch.dtype | None = None,
        skip: bool = False,
    ):
        self.optim = optim
        self.world = world
        self.device = device
        self.autocast = autocast
        self.skip = skip
        self.sharded = world.size > 1
        # a forward waits for the rows of all; what the update exchanges goes through `comm`
        self.own_work: tuple[str, ...] = ("data", "optimizer") if self.sharded else ("data", "forward", "optimizer")
        self.is_whole = False

    def wrap(
        self, trainable: nn.Module, groups: Sequence[dict[str, Any]], *, outside: Sequence[nn.Parameter] = ()
    ) -> Forward:
        """The module that records the graph, float32 outputs whatever the precision of its forward.

        Every parameter of `trainable` except `outside` is replaced by this rank's rows; references to the old ones are
        no longer trained. Collectives: one all-gather per unit, as a rehearsal.
        """
        self.trainable = trainable
        given = dict(trainable.named_parameters())
        self.units: list[FSDPModule] = []
        self.hooks: list[_Hooks] = []
        if self.sharded:
            # FSDP cannot spread a scalar
            kept = {*outside, *(p for p in given.values() if p.dim() == 0)}
            self.units, self.hooks = _shard(trainable, kept, self.device)
        self.shards = _shards_of(trainable, given)
        name_of = {id(p): name for name, p in given.items()}
        optimized = [{**group, "params": [self._plain(name_of[id(p)], p) for p in group["params"]]} for group in groups]
        self.names = {id(self._plain(name, p)): name for name, p in given.items()}
        self.parameters: list[nn.Parameter] = [p for group in optimized for p in group["params"]]
        self.optimizer = make_optimizer(self.optim, optimized)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        return self._forward

    def _plain(self, name: str, given: nn.Parameter) -> nn.Parameter:
        """What the optimizer updates: this rank's rows, or the parameter itself where it is whole."""
        return self.shards[name].rows if name in self.shards else given

    def _forward(self, batch: Batch) -> Outputs:
        with transport("the gathering of weights", self.world):
            if self.autocast is None:
                return self.trainable(batch)
            with torch.autocast(self.device.type, self.autocast):
                out: Outputs = self.trainable(batch)
            return float32_outputs(out)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients in the last pass of a step only; until then each keeps whole ones."""
        if self.sharded:
            cast(FSDPModule, self.trainable).set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a pass; in the last one each rank gets the mean of its rows.

        Raises:
            LostRankError: another rank was gone when its gradient was needed.
        """
        with transport("the exchange of gradients", self.world):
            loss.backward()

    @torch.no_grad()
    def step(self, lr_scale: float) -> Update:
        """One update of every rank's rows.

        Collectives: one all-reduce, of the gradients of `outside` and a norm.
        """
        for shard in self.shards.values():
            shard.take_gradient()
        norm = self._exchange()
        if self.skip and not norm.isfinite():
            self.optimizer.zero_grad()
            return Update(norm, applied=False)
        if self.optim.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip, norm)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Update(norm)

    def _exchange(self) -> Tensor:
        """Average over ranks what FSDP was told to leave alone; the norm of the whole gradient."""
        rows, whole = self._gradients()
        if not self.sharded:
            return nn.utils.get_total_norm(whole)
        own = nn.utils.get_total_norm(rows) if rows else torch.zeros((), device=self.device)
        flat = all_reduce_sum(torch.cat([own.square().view(1), *(g.flatten() for g in whole)]), self.world)
        mean = flat[1:].div_(self.world.size)
        for gradient, part in zip(whole, mean.split([g.numel() for g in whole]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return torch.hypot(flat[0].sqrt(), torch.linalg.vector_norm(mean))

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of this rank's rows, and those of parameters that every rank holds whole."""
        rows: list[Tensor] = []
        whole: list[Tensor] = []
        for p in self.parameters:
            if p.grad is not None:
                (rows if self.names[id(p)] in self.shards else whole).append(p.grad)
        return rows, whole

    def traffic(self, passes: int, *, follows: bool) -> dict[str, int]:
        """Gradients of what is spread, once a step; a rank's rows in each pass, before the forward of a unit and,
        except for the outermost, before its backward; and once more where the weights become `whole`.

        Ranks with fewer rows, or none, fill up to what the first one has.
        """
        if not self.sharded:
            return {}
        rows: dict[str, int] = {}
        for name, shard in self.shards.items():
            each = torch.Size((_rows_of_each(shard.shape, self.world), *shard.shape[1:]))
            rows[name] = each.numel() * shard.rows.element_size()
        inner = {p for unit in self.units[:-1] for p in cast(nn.Module, unit).parameters()}
        once = sum(rows.values())
        again = sum(rows[name] for name, shard in self.shards.items() if shard.parameter in inner)
        learning = sum(rows[name] for name, shard in self.shards.items() if shard.parameter.requires_grad)
        return {"gradients": self.world.size * learning, "weights": passes * (once + again) + follows * once}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, parameters are plain whole tensors, to be read: what is written to the spread ones is lost.

        FSDP's hooks are off meanwhile, so ranks may run any number of forwards. Copy what has to live longer.

        Collectives: one all-gather per unit at the start, none inside.
        """
        if self.is_whole or not self.sharded:
            yield
            return
        try:
            with transport("the gathering of weights", self.world):
                for unit in self.units:
                    unit.unshard()
            self.is_whole = True
            with _without(self.hooks):
                yield
        finally:
            self.is_whole = False
            for unit in self.units:
                unit.reshard()

    def entries(self) -> list[Entry]:
        """Weights, buffers and the optimizer's state, by name; to read what is spread is an all-gather of it."""
        assert not self.is_whole
        entries = [
            self._entry(name, Entry(f"{TRAINABLE}{name}", tensor.nbytes, tensor.detach))
            for name, tensor in self._weights().items()
        ]
        for entry in state_entries(self.optimizer, self.names):
            # the count of updates is one number, equal on all ranks
            of_rows = not entry.name.endswith("/step")
            entries.append(self._entry(_parameter_of(entry.name), entry) if of_rows else entry)
        return entries

    def _entry(self, name: str, own: Entry) -> Entry:
        """The whole of what this rank has for a parameter."""
        shard = self.shards.get(name)
        if shard is None:
            return own
        nbytes = shard.shape.numel() * shard.rows.itemsize
        return Entry(own.name, nbytes, lambda: _gather(own.read(), shard.shape, self.world))

    def _weights(self) -> dict[str, Tensor]:
        """The state dict, with this rank's rows of what is spread."""
        state = self.trainable.state_dict(keep_vars=True)
        return {name: self.shards[name].rows if name in self.shards else tensor for name, tensor in state.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `entries`, of which every rank takes its part; no collective.

        Raises:
            CheckpointError: tensors are missing, or belong to another model or optimizer.
        """
        assert not self.is_whole
        targets = self._weights()
        shapes = {name: self.shards[name].shape if name in self.shards else t.shape for name, t in targets.items()}
        _check_weights(shapes, tensors)
        for name, target in targets.items():
            target.copy_(self._part(name, tensors[f"{TRAINABLE}{name}"]))
        parts = {key: self._part(_parameter_of(key), tensors[key]) for key in tensors if key.startswith(OPTIMIZER)}
        load_state(self.optim, self.optimizer, {self.names[id(p)]: p for p in self.parameters}, parts)

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor, all of it where it is not spread."""
        if name not in self.shards or whole.dim() == 0:
            return whole
        each = _rows_of_each(whole.shape, self.world)
        return whole[self.world.rank * each : (self.world.rank + 1) * each]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A parameter of which every rank holds some rows."""

    parameter: nn.Parameter
    """FSDP's DTensor, where gradients arrive."""
    rows: nn.Parameter
    """The same memory as a plain tensor; perhaps none at all on the last ranks."""
    shape: torch.Size
    """Of the whole."""

    def take_gradient(self) -> None:
        """Move what FSDP has scattered to the plain tensor."""
        gradient = cast("DTensor | None", self.parameter.grad)
        self.rows.grad = None if gradient is None else gradient.to_local()
        self.parameter.grad = None


@dataclass(frozen=True, slots=True)
class _Hooks:
    """A table of a module's hooks and which of them are FSDP's."""

    table: dict[int, Any]
    keys: set[int]


def _shard(
    trainable: nn.Module, kept: set[nn.Parameter], device: torch.device
) -> tuple[list[FSDPModule], list[_Hooks]]:
    """Spread a module over the ranks; what is gathered as one, innermost first, and the hooks that do it."""
    tables = [getattr(module, kind) for module in trainable.modules() for kind in _HOOKS]
    known = [set(table) for table in tables]
    # a mesh of its own over the group there is now: nothing of an earlier group of this process is found again
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    units = [*_units(trainable, kept), trainable]
    shards = [fully_shard(unit, mesh=mesh, ignored_params=kept) for unit in units]
    for shard in shards:
        shard.unshard()  # the last hooks are made the first time
        shard.reshard()
    added = (_Hooks(table, set(table) - before) for table, before in zip(tables, known, strict=True))
    return shards, [hooks for hooks in added if hooks.keys]


def _units(trainable: nn.Module, kept: set[nn.Parameter]) -> list[nn.Module]:
    """Modules below the root to be gathered each by itself, innermost first.

    Single layers are not among them: a parent may read a layer's weight without calling it, and then no hook gathers.
    """
    units: list[nn.Module] = []

    def left_over(module: nn.Module) -> set[nn.Parameter]:
        """Parameters that no unit below has."""
        rest = {p for p in module.parameters() if p not in kept}
        for below in module.called() if isinstance(module, Trunk) else module.children():
            rest -= set(below.parameters()) - left_over(below)
        is_called = type(module).forward is not nn.Module.forward  # a ModuleDict is not
        n_numbers = sum(p.numel() for p in rest)
        if n_numbers >= UNIT and any(True for _ in module.children()) and is_called and module is not trainable:
            units.append(module)
            return set()
        return rest

    left_over(trainable)
    return units


def _shards_of(trainable: nn.Module, given: Mapping[str, nn.Parameter]) -> dict[str, _Shard]:
    """By name, the parameters that FSDP has replaced."""
    shards: dict[str, _Shard] = {}
    with torch.no_grad():
        for name, p in trainable.named_parameters():
            if isinstance(p, DTensor):
                rows = nn.Parameter(p.to_local(), requires_grad=p.requires_grad)
                shards[name] = _Shard(cast(nn.Parameter, p), rows, given[name].shape)
    return shards


@contextmanager
def _without(hooks: Sequence[_Hooks]) -> Iterator[None]:
    """Take hooks out, and put them back in their places."""
    before = [dict(each.table) for each in hooks]
    for each in hooks:
        for key in each.keys:
            del each.table[key]
    try:
        yield
    finally:
        for each, old in zip(hooks, before, strict=True):
            now = dict(each.table)
            each.table.clear()
            each.table.update({key: hook for key, hook in old.items() if key in each.keys or key in now} | now)


def _rows_of_each(shape: torch.Size, world: World) -> int:
    return -(-shape[0] // world.size)


def _gather(rows: Tensor, shape: torch.Size, world: World) -> Tensor:
    """The whole tensor of every rank's rows. Collectives: one all-gather."""
    padded = rows.new_zeros(_rows_of_each(shape, world), *shape[1:])
    padded[: rows.shape[0]] = rows
    return all_gather_rows(padded, world)[: shape[0]]


def _parameter_of(key: str) -> str:
    """Whose state an entry of the optimizer is."""
    return key.removeprefix(OPTIMIZER).rpartition("/")[0]


def _check_weights(shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    found = {name: tensor.shape for name, tensor in under(TRAINABLE, tensors).items()}
    wrong = [f"missing {name}" for name in shapes if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in shapes]
    wrong += [
        f"size mismatch for {name}: {tuple(found[name])} in the checkpoint, {tuple(shape)} in the model"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        raise CheckpointError(f"the checkpoint does not fit this model: {'; '.join(wrong)}")
