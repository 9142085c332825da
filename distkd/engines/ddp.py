"""Replicated weights under DistributedDataParallel; the bare module where there is one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distkd.base import Batch, Forward, Outputs, World
from distkd.engines.protocol import OptimConfig
from distkd.errors import CheckpointError, LostRankError

__all__ = ["DDPEngine"]

WEIGHTS, OPTIMIZER = "trainable.safetensors", "optimizer.safetensors"
_TRANSPORTS = ("gloo", "NCCL", "ncclComm")
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_FIELDS = {"adam": _MOMENTS, "adamw": _MOMENTS, "sgd": {"momentum_buffer"}}
"""What each optimizer remembers of a parameter."""


class DDPEngine:
    """Gradients are averaged over ranks while the backward runs; every rank applies the same update."""

    def __init__(self, optim: OptimConfig, world: World, *, device: torch.device, autocast: torch.dtype | None = None):
        self.optim = optim
        self.world = world
        self.device = device
        self.autocast = autocast

    def wrap(self, trainable: nn.Module, groups: Sequence[dict[str, Any]]) -> Forward:
        """The module that records the graph, float32 outputs whatever the precision of its forward."""
        self.trainable = trainable
        self.names = {id(p): name for name, p in trainable.named_parameters()}
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = _optimizer(self.optim, groups)
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
        return _in_float32(out)

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
    def step(self, lr_scale: float) -> Tensor:
        """One update; returns the norm of the averaged gradient before clipping, equal on all ranks, on the device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.optim.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip, norm)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        """Weights and optimizer by parameter name; called on the main rank only, every rank holds the same."""
        save_file({k: v.contiguous() for k, v in self.trainable.state_dict().items()}, folder / WEIGHTS)
        state: dict[str, Tensor] = {}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                state[f"{self.names[id(parameter)]}/{key}"] = torch.as_tensor(value).contiguous()
        save_file(state, folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Continue from `save`; every rank reads.

        Raises:
            CheckpointError: tensors are missing, or belong to another model.
        """
        try:
            self.trainable.load_state_dict(load_file(folder / WEIGHTS, device=str(self.device)))
        except RuntimeError as error:
            raise CheckpointError(f"checkpoint {folder} does not fit this model: {error}") from error
        by_name = {self.names[id(p)]: p for p in self.parameters}
        saved = load_file(folder / OPTIMIZER, device=str(self.device))
        fields = {key.rpartition("/")[2] for key in saved}
        if fields - _FIELDS[self.optim.name]:
            raise CheckpointError(
                f"checkpoint {folder} holds {', '.join(sorted(fields))} of another optimizer than optim.name="
                f"{self.optim.name}, which keeps {', '.join(sorted(_FIELDS[self.optim.name]))}; train with the old one"
            )
        for key, value in saved.items():
            name, _, field = key.rpartition("/")
            # torch keeps Adam's step counter on the host unless the optimizer is fused or capturable
            self.optimizer.state[by_name[name]][field] = value.cpu() if field == "step" else value


def _optimizer(config: OptimConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    groups = [dict(group) for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.betas[0], weight_decay=config.weight_decay, foreach=True
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, foreach=True)


def _in_float32(out: Outputs) -> Outputs:
    branches = {name: _in_float32(branch) for name, branch in out.branches.items()}
    return replace(out, feature_BD=out.feature_BD.float(), logits_BC=out.logits_BC.float(), branches=branches)
