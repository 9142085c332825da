"""DeepSpeed's ZeRO: optimizer state, gradients and weights spread over ranks that `comm.world.init` has made meet.

Its own launcher, its mixed precision and its checkpoint files are not used: half precision is torch's autocast inside
the wrapped forward and checkpoints have the tensors of every other engine, so that a run can change engine.

What a step costs beyond DDP: the host waits for the device once, to see whether the gradient is finite. At stage 0 the
exchange of gradients begins when the backward has ended. At stages 1 to 3 the ranks exchange the updated weights; at 2
and 3 gradients are exchanged in every pass, not in the last alone; at 3 each forward and backward gathers the weights,
set going by hooks in Python on each module.
"""

# DeepSpeed is not typed
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from distkd.base import Batch, Forward, Outputs, World
from distkd.engines.deepspeed_setup import import_quietly, join
from distkd.engines.deepspeed_state import Part, check_shapes, fill_state, optimizer_parts, weight_part, whole
from distkd.engines.lost import transport
from distkd.engines.optimizer import (
    OPTIMIZER,
    TRAINABLE,
    load_state,
    make_optimizer,
    saved_state,
    state_entries,
    under,
)
from distkd.engines.precision import float32_outputs
from distkd.engines.protocol import Entry, OptimConfig, Update
from distkd.errors import ConfigError

__all__ = ["DeepSpeedEngine"]

_NEVER = 1 << 31
_BUCKET = 500_000_000
_REUSE = 1_000_000_000
"""Numbers up to which DeepSpeed keeps at stage 3 what a forward has gathered for its backward: its default."""


class DeepSpeedEngine:
    """ZeRO 0 to 3 in float32; an update whose gradient is not finite is left out.

    Args:
        stage: 0 replicates as DDP does; 1 spreads the optimizer's state, 2 gradients too, 3 weights too.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """

    keep_whole = 100_000
    """Parameters of at most this many numbers stay whole on every rank at stage 3: gathering them would cost more."""

    def __init__(
        self,
        optim: OptimConfig,
        world: World,
        *,
        device: torch.device,
        stage: int,
        autocast: torch.dtype | None = None,
    ):
        self.optim = optim
        self.world = world
        self.device = device
        self.stage = stage
        self.autocast = autocast
        self.sharded = stage == 3
        # stages 1 to 3 exchange weights in the update, 3 in each forward as well
        self.own_work: tuple[str, ...] = ("data", "forward", "optimizer")[: {0: 3, 3: 1}.get(stage, 2)]
        self._hooks: list[_Hook] = []
        self._is_whole = False
        import_quietly(device)

    def wrap(
        self, trainable: nn.Module, groups: Sequence[dict[str, Any]], *, outside: Sequence[nn.Parameter] = ()
    ) -> Forward:
        """The module that records the graph, float32 outputs whatever the precision of its forward.

        Collectives: a broadcast of every parameter, and a few more.

        Raises:
            ConfigError: a parameter is a scalar, which DeepSpeed cannot spread.
        """
        for name, p in trainable.named_parameters():
            if p.dim() == 0:
                raise ConfigError(
                    f"parameter {name!r} is a scalar, which DeepSpeed cannot send; give it the shape (1,), or use "
                    "engine.name=ddp"
                )
        self.trainable = trainable
        self.names = {id(p): name for name, p in trainable.named_parameters()}
        root = _Root(trainable, self.device, self.autocast)
        optimizer = make_optimizer(self.optim, groups)
        deepspeed = import_quietly(self.device)
        join(self.world, self.device)
        with warnings.catch_warnings(), self._calls("the set-up of DeepSpeed"):
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=self._config(trainable))
            self.optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
            if self.sharded:
                self._keep_whole(root, outside)
        # its hooks on the weights keep it, and them, alive for good
        weakref.finalize(self, self.engine.destroy).atexit = False
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        return self._forward

    def _config(self, trainable: nn.Module) -> dict[str, Any]:
        numbers = sum(p.numel() for p in trainable.parameters())
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # losses come divided by the passes
            "gradient_clipping": self.optim.clip if self.stage else 0.0,  # its default is 1.0; stage 0: see `step`
            "steps_per_print": _NEVER,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": max(1, min(_BUCKET, numbers)),  # stage 3 allocates all of it
                "stage3_param_persistence_threshold": self.keep_whole,
            },
        }

    def _keep_whole(self, root: nn.Module, outside: Sequence[nn.Parameter]) -> None:
        """Hold what losses use outside whole, and unhook modules that have nothing to be gathered.

        Heads are then plain modules, wherever they are called. Hooks on modules above would do nothing but look for
        tensors in what goes in and out, which here are no tensors.
        """
        kept: list[Any] = self.engine.optimizer.persistent_parameters
        for p in outside:
            if not p.ds_persist:  # pyright: ignore[reportAttributeAccessIssue]
                p.ds_persist = True  # pyright: ignore[reportAttributeAccessIssue]
                kept.append(p)
        self._gather_kept()
        self.spread: list[Any] = [p for p in root.parameters() if not p.ds_persist]  # pyright: ignore[reportAttributeAccessIssue]
        owner = {id(table): module for module in root.modules() for table in _hook_tables(module)}
        offload = self.engine.optimizer.parameter_offload
        for handle in [*offload.forward_hooks, *offload.backward_hooks]:
            table = handle.hooks_dict_ref()
            if any(not p.ds_persist for p in owner[id(table)].parameters(recurse=False)):  # pyright: ignore[reportAttributeAccessIssue]
                self._hooks.append((table, handle.id, table[handle.id]))
            else:
                handle.remove()

    def _gather_kept(self) -> None:
        kept: list[Any] = self.engine.optimizer.persistent_parameters
        if kept:
            kept[0].all_gather(kept)

    def _forward(self, batch: Batch) -> Outputs:
        with self._calls("the gathering of weights"):
            out = _as_outputs(self.engine(batch))
        return out if self.autocast is None else float32_outputs(out)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Stages 0 and 1 exchange gradients in the last pass of a step only, 2 and 3 in every pass."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a pass.

        Raises:
            LostRankError: another rank was gone when its gradient or its weights were needed.
        """
        with self._calls("the exchange of gradients"):
            self.engine.backward(loss)

    @torch.no_grad()
    def step(self, lr_scale: float) -> Update:
        """One update, each rank of its part; left out where the gradient is not finite.

        Collectives: at stages 1 to 3 the norm and the updated weights.
        """
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_scale
        if self.stage == 0:
            return self._replicated_step()
        with self._calls("the update of the weights"):
            self.engine.step()
            applied = self.engine.was_step_applied()
            if self.sharded and not applied:
                self._gather_kept()  # DeepSpeed forgets that when it skips
        return Update(torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device), applied)

    def _replicated_step(self) -> Update:
        """Stage 0 knows no norm and clips as torch does; and it would apply what is not finite."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        applied = bool(norm.isfinite())
        if applied:
            if self.optim.clip:
                nn.utils.clip_grads_with_norm_(parameters, self.optim.clip, norm)
            with self._calls("the update of the weights"):
                self.engine.step()
        self.engine.zero_grad()
        return Update(norm, applied)

    def traffic(self, passes: int, *, follows: bool) -> dict[str, int]:
        """Gradients once a step, at stages 2 and 3 in every pass; at 1 and 2 a rank's part of the weights after each
        update; but for a few bytes of the norm.

        At stage 3 the weights are about right, from above: what is spread is gathered in each pass, twice where the
        model is too large to be kept for its backward, and once more where the weights become `whole`; DeepSpeed finds
        some of it still gathered. What is kept whole is gathered after each update.
        """
        if self.world.size == 1:
            return {}
        weights: list[Any] = list(self.trainable.parameters())
        learning = [p for p in weights if p.requires_grad]
        if not self.sharded:
            found = {"gradients": sum(p.nbytes for p in learning) * (passes if self.stage == 2 else 1)}
            if self.stage:
                groups = self.engine.optimizer.parallel_partitioned_bit16_groups
                found["weights"] = sum(parts[self.world.rank].nbytes for parts in groups)
            return found
        spread = {id(p) for p in self.spread}
        times = follows + passes * (1 if sum(p.ds_numel for p in self.spread) <= _REUSE else 2)
        parts = {id(p): p.ds_tensor.ds_numel * p.element_size() for p in weights}
        return {
            "gradients": passes * self.world.size * sum(parts[id(p)] for p in learning),
            "weights": sum(size * (times if key in spread else 1) for key, size in parts.items()),
        }

    @contextmanager
    def whole(self) -> Iterator[None]:
        """At stage 3 all weights are gathered, and modules run as plain ones; what is written to them is lost.

        Collectives: one gathering of all weights at stage 3.
        """
        if not self.sharded or self._is_whole:
            yield
            return
        with self._calls("the gathering of weights"):
            if self.spread:
                self.spread[0].all_gather(self.spread)
        # an evaluation takes another number of forwards on each rank, so nothing may be gathered on the way
        tables = {id(table): (table, dict(table)) for table, _, _ in self._hooks}
        for table, number, _ in self._hooks:
            del table[number]
        self._is_whole = True
        try:
            yield
        finally:
            self._is_whole = False
            for table, before in tables.values():
                added = dict(table)
                table.clear()
                table.update({**before, **added})
            if self.spread:
                self.spread[0].partition(self.spread)

    def entries(self) -> list[Entry]:
        """Weights, buffers and the optimizer's state, by name.

        Collectives: none here; each `read` of what is spread is one all-reduce of the whole tensor.
        """
        state = self.trainable.state_dict(keep_vars=True)
        found = [self._weight(name, tensor) for name, tensor in state.items()]
        if self.stage == 0:
            return found + state_entries(self.optimizer, self.names)
        for name, part in self._parts().items():
            for field, value in sorted(self.optimizer.state.get(part.flat, {}).items()):
                label = f"{OPTIMIZER}{name}/{field}"
                if field == "step":
                    found.append(_entry(label, torch.as_tensor(value)))
                else:
                    nbytes = part.shape.numel() * value.element_size()
                    found.append(Entry(label, nbytes, lambda part=part, flat=value: whole(part, flat, self.world)))
        return found

    def _weight(self, name: str, tensor: Any) -> Entry:
        if not hasattr(tensor, "ds_tensor"):
            return _entry(f"{TRAINABLE}{name}", tensor.detach())
        part = weight_part(tensor, self.world)
        nbytes = part.shape.numel() * tensor.element_size()
        return Entry(f"{TRAINABLE}{name}", nbytes, lambda: whole(part, part.flat, self.world))

    def _parts(self) -> dict[str, Part]:
        return optimizer_parts(self.engine.optimizer, self.stage, self.names, self.world)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `entries` of any engine; every rank has them all. No collective.

        Raises:
            CheckpointError: tensors are missing, or belong to another model or optimizer.
        """
        weights = under(TRAINABLE, tensors)
        check_shapes(self.trainable, weights)
        for name, tensor in self.trainable.state_dict(keep_vars=True).items():
            self._set_weight(tensor, weights[name])
        if self.stage == 0:
            learning = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            named = {name: p for name, p in self.trainable.named_parameters() if id(p) in learning}
            load_state(self.optim, self.optimizer, named, tensors)
            return
        self.engine.optimizer.refresh_fp32_params()
        fill_state(self.optimizer, self._parts(), saved_state(self.optim, tensors))

    def _set_weight(self, tensor: Any, value: Tensor) -> None:
        if hasattr(tensor, "ds_tensor"):
            part = weight_part(tensor, self.world)
            part.write(part.flat, value)
            if not tensor.ds_persist:
                return
        tensor.detach().copy_(value)

    @contextmanager
    def _calls(self, what: str) -> Iterator[None]:
        """Around DeepSpeed: its use of what torch renamed is not the user's concern, and lost ranks get a name."""
        with warnings.catch_warnings(), transport(what, self.world):
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", module=r"deepspeed\.")
            yield


class _Root(nn.Module):
    """What DeepSpeed wraps: dictionaries of tensors come out, where it can find them."""

    def __init__(self, model: nn.Module, device: torch.device, autocast: torch.dtype | None):
        super().__init__()
        self.model = model
        self.kind = device.type
        self.autocast = autocast

    def forward(self, batch: Batch) -> dict[str, Any]:
        # in here, because DeepSpeed switches off an autocast that is around it
        with torch.autocast(self.kind, self.autocast, enabled=self.autocast is not None):
            return _as_dict(self.model(batch))


def _as_dict(out: Outputs) -> dict[str, Any]:
    found = {field.name: getattr(out, field.name) for field in fields(out)}
    return {**found, "branches": {name: _as_dict(branch) for name, branch in out.branches.items()}}


def _as_outputs(found: dict[str, Any]) -> Outputs:
    return Outputs(**{**found, "branches": {name: _as_outputs(each) for name, each in found["branches"].items()}})


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.nbytes, lambda: tensor)


_Hook = tuple[dict[int, Any], int, Any]
"""A module's table of hooks, the key in it, and the hook."""


def _hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_pre_hooks, module._forward_hooks]  # pyright: ignore[reportPrivateUsage, reportReturnType]
