"""Replicated weights under DistributedDataParallel; the bare module where there is one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distkd.base import Batch, Forward, Outputs, World
from distkd.engines.optimizer import OPTIMIZER, TRAINABLE, check_fields, make_optimizer
from distkd.engines.precision import float32_outputs
from distkd.engines.protocol import Entry, OptimConfig, Update
from distkd.errors import CheckpointError, LostRankError

__all__ = ["DDPEngine"]

_TRANSPORTS = ("gloo", "NCCL", "ncclComm")


class DDPEngine:
    """Gradients are averaged over ranks while the backward runs; every rank applies the same update.

    Args:
        skip: leave out updates whose gradient is not finite, at the price of one host sync a step.
    """

    sharded = False

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

    def wrap(
        self, trainable: nn.Module, groups: Sequence[dict[str, Any]], *, outside: Sequence[nn.Parameter] = ()
    ) -> Forward:
        """The module that records the graph, float32 outputs whatever the precision of its forward."""
        self.trainable = trainable
        self.names = {id(p): name for name, p in trainable.named_parameters()}
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = make_optimizer(self.optim, groups)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.wrapped: nn.Module = trainable
        if self.world.size > 1:
            # no broadcast of buffers: batch statistics are already equal, and banks are not in this module
            self.wrapped = DistributedDataParallel(trainable, forward_sync_buffers=False, gradient_as_bucket_view=True)
        return self._forward

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
        try:
            loss.backward()
        except RuntimeError as error:
            # DDP exchanges gradients by itself, and its failures have no type of their own
            if self.world.size > 1 and any(word in str(error) for word in _TRANSPORTS):
                raise LostRankError(
                    f"rank {self.world.rank} of {self.world.size}: the exchange of gradients failed: {error}; another "
                    "rank died or stopped answering, start the run again to resume"
                ) from error
            raise

    @torch.no_grad()
    def step(self, lr_scale: float) -> Update:
        """One update of every rank's weights."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
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

    def whole(self) -> AbstractContextManager[None]:
        """Weights are whole at any time."""
        return nullcontext()

    def entries(self) -> list[Entry]:
        """Weights, buffers and the optimizer's state, by name."""
        tensors = {f"{TRAINABLE}{name}": tensor for name, tensor in self.trainable.state_dict().items()}
        for parameter, values in self.optimizer.state.items():
            for field, value in values.items():
                tensors[f"{OPTIMIZER}{self.names[id(parameter)]}/{field}"] = torch.as_tensor(value)
        return [Entry(name, tensor.nbytes, lambda t=tensor: t) for name, tensor in tensors.items()]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `entries`; every rank has them all.

        Raises:
            CheckpointError: tensors are missing, or belong to another model or optimizer.
        """
        weights = {name.removeprefix(TRAINABLE): t for name, t in tensors.items() if name.startswith(TRAINABLE)}
        try:
            self.trainable.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint does not fit this model: {error}") from error
        by_name = {self.names[id(p)]: p for p in self.parameters}
        saved = {name.removeprefix(OPTIMIZER): t for name, t in tensors.items() if name.startswith(OPTIMIZER)}
        check_fields(self.optim, {key.rpartition("/")[2] for key in saved})
        for key, value in saved.items():
            name, _, field = key.rpartition("/")
            # torch keeps Adam's step counter on the host unless the optimizer is fused or capturable
            on_host = field == "step"
            self.optimizer.state[by_name[name]][field] = value.clone() if on_host else value.to(self.device, copy=True)
