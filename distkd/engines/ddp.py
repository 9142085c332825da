"""Replicated weights under DistributedDataParallel; the bare module where there is one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

from distkd.base import Batch, Forward, Outputs, World
from distkd.engines.lost import transport
from distkd.engines.optimizer import TRAINABLE, load_state, make_optimizer, state_entries, under
from distkd.engines.precision import float32_outputs
from distkd.engines.protocol import Entry, OptimConfig, Update
from distkd.engines.scaler import LossScale
from distkd.errors import CheckpointError, ConfigError
from distkd.models.dropout import KeyedDropout
from distkd.models.norm import SyncBatchNorm

__all__ = ["DDPEngine"]

_FEW = 2**16
"""Numbers in all gradients, up to which their norm is taken of one copy."""


class DDPEngine:
    """Gradients are averaged over ranks while the backward runs; every rank applies the same update.

    Args:
        autocast: half precision of the model's forward; with float16 the loss is scaled, and an update whose gradient
            overflows is left out, at the price of one host sync a step.
        skip: leave out updates whose gradient is not finite in any precision, at the same price.
        compile: compile the model's forward with `torch.compile`.
    """

    sharded = False
    own_work: tuple[str, ...] = ("data", "forward", "optimizer")

    def __init__(
        self,
        optim: OptimConfig,
        world: World,
        *,
        device: torch.device,
        autocast: torch.dtype | None = None,
        skip: bool = False,
        compile: bool = False,
    ):
        self.optim = optim
        self.world = world
        self.device = device
        self.autocast = autocast
        self.skip = skip
        self.compile = compile
        self.loss_scale = LossScale() if autocast == torch.float16 else None

    def wrap(
        self, trainable: nn.Module, groups: Sequence[dict[str, Any]], *, outside: Sequence[nn.Parameter] = ()
    ) -> Forward:
        """The module that records the graph, float32 outputs whatever the precision of its forward.

        Raises:
            ConfigError: the optimizer or the compiler that the config asks for is not there.
        """
        self.trainable = trainable
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        # on the host the norm of each small tensor costs more than a copy of all of them
        self.few = self.device.type == "cpu" and sum(p.numel() for p in self.parameters) <= _FEW
        self.optimizer = make_optimizer(self.optim, groups, apex=True)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.wrapped: nn.Module = trainable
        if self.compile:
            # inside DDP, whose hooks stay as they are; the state dict is taken from `trainable`, which has no prefix
            self.wrapped = _compiled(trainable)
        if self.world.size > 1:
            # no broadcast of buffers: batch statistics are already equal, and banks are not in this module. Never
            # static_graph: it finds no tensor in a dataclass of outputs, and then silently exchanges no gradient
            self.wrapped = DistributedDataParallel(
                _Rehearsed(self.wrapped), forward_sync_buffers=False, gradient_as_bucket_view=True
            )
            self._settle_buckets()
        return self._forward

    def _settle_buckets(self) -> None:
        """Have DDP arrange its buckets before the first step of every attempt.

        It arranges them anew after its first backward, and where a gradient lies in a bucket decides in which order
        more than two ranks add it up: a resumed run would take one step in another arrangement than the uninterrupted.
        """
        with transport("the exchange of gradients", self.world):
            self.wrapped(None).backward()
        self._forget_gradients()

    def _forward(self, batch: Batch) -> Outputs:
        if self.autocast is None:
            return self.wrapped(batch)
        with torch.autocast(self.device.type, self.autocast):
            out: Outputs = self.wrapped(batch)
        return float32_outputs(out)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients in the last pass of a step only."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a pass; in the last one they are averaged over ranks.

        Raises:
            LostRankError: another rank was gone when its gradient was needed.
        """
        if self.loss_scale is not None:
            loss = loss * self.loss_scale.value
        with transport("the exchange of gradients", self.world):
            loss.backward()

    @torch.no_grad()
    def step(self, lr_scale: float) -> Update:
        """One update of every rank's weights.

        The gradients are reduced, so all ranks see the same norm and leave out the same updates without asking.

        Raises:
            NonFiniteError: float16 overflows whatever the scale; on all ranks.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = _total_norm(gradients, few=self.few) if gradients else torch.zeros((), device=self.device)
        unscale = 1.0
        if self.loss_scale is not None:
            unscale = 1 / self.loss_scale.value
            norm = norm * unscale
        # the one host sync of a step, and only where an update may be left out
        if (self.skip or self.loss_scale is not None) and not norm.isfinite():
            self._forget_gradients()
            if self.loss_scale is not None:
                self.loss_scale.overflow()
            return Update(norm, applied=False)
        if self.optim.clip:
            factor = (self.optim.clip / (norm + 1e-6)).clamp(max=1.0) * unscale
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        elif self.loss_scale is not None:
            torch._foreach_mul_(gradients, unscale)  # pyright: ignore[reportPrivateImportUsage]
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_scale
        self.optimizer.step()
        self._forget_gradients()
        if self.loss_scale is not None:
            self.loss_scale.good()
        return Update(norm)

    def _forget_gradients(self) -> None:
        """What `optimizer.zero_grad` does, without its bookkeeping."""
        for parameter in self.parameters:
            parameter.grad = None

    def traffic(self, passes: int, *, follows: bool) -> dict[str, int]:
        """Every gradient, once a step however many passes it has."""
        learning = [p for p in self.trainable.parameters() if p.requires_grad]
        return {"gradients": sum(p.nbytes for p in learning)} if self.world.size > 1 else {}

    def whole(self) -> AbstractContextManager[None]:
        """Weights are whole at any time."""
        return nullcontext()

    def entries(self) -> list[Entry]:
        """Weights, buffers, the optimizer's state and the scale of the loss, by name."""
        names = {id(p): name for name, p in self.trainable.named_parameters()}
        learning = set(names.values())
        weights = [
            Entry(f"{TRAINABLE}{name}", tensor.nbytes, lambda t=tensor: t, steady=name in learning)
            for name, tensor in cast("dict[str, Tensor]", self.trainable.state_dict()).items()
        ]
        scale = [] if self.loss_scale is None else self.loss_scale.entries()
        return weights + state_entries(self.optimizer, names) + scale

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `entries`; every rank has them all.

        Raises:
            CheckpointError: tensors are missing, or belong to another model or optimizer.
        """
        try:
            self.trainable.load_state_dict(under(TRAINABLE, tensors))
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint does not fit this model: {error}") from error
        learning = {id(p) for p in self.parameters}
        named = {name: p for name, p in self.trainable.named_parameters() if id(p) in learning}
        load_state(self.optim, self.optimizer, named, tensors)
        if self.loss_scale is not None:
            self.loss_scale.load(tensors)


class _Rehearsed(nn.Module):
    """The module; without a batch a zero, whose gradients are zeros and come last parameter first, as real ones do."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, batch: Batch | None) -> Any:
        if batch is not None:
            return self.module(batch)
        return torch.stack([p.flatten()[0] * 0.0 for p in self.module.parameters() if p.requires_grad]).sum()


def _total_norm(gradients: list[Tensor], *, few: bool) -> Tensor:
    """`nn.utils.get_total_norm` for gradients of one device and type, without looking for groups among them."""
    if few:
        return torch.linalg.vector_norm(_flatten_dense_tensors(gradients))
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore[reportPrivateImportUsage]


def _compiled(module: nn.Module) -> nn.Module:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"engine.compile needs a C++ compiler, and {compiler!r} is not on PATH; sudo apt-get install g++, or use "
            "engine.compile=false"
        )
    for layer in module.modules():
        # a collective is no part of a graph: the ranks meet in the order in which the code is written
        if isinstance(layer, SyncBatchNorm) and layer.world.size > 1:
            layer.forward = torch.compiler.disable(layer.forward)  # pyright: ignore[reportAttributeAccessIssue]
        # hashing wraps around 64 bits; written out in C++ by torch's compiler that is undefined, and g++ takes it for
        # leave to drop the end of the loop: wrong masks, and writes beyond the array (seen with torch 2.13)
        if isinstance(layer, KeyedDropout):
            layer.kept = torch.compiler.disable(layer.kept)  # pyright: ignore[reportAttributeAccessIssue]
    return cast(nn.Module, torch.compile(module))
