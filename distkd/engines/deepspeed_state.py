"""Where DeepSpeed keeps the parts of a tensor, and how they become whole again: the layouts of ZeRO 0 to 3.

ZeRO flattens parameters into long vectors, of which each rank updates one part; the optimizer keeps its state for those
vectors. Here a parameter's part is found by name, so that a checkpoint has the same tensors as under any other engine.
DeepSpeed's own checkpoint files are not used: those of stages 1 to 3 cannot be read at another number of ranks.
"""

# DeepSpeed and torch.distributed are not typed
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distkd.base import World
from distkd.comm.world import all_reduce_sum
from distkd.errors import CheckpointError

__all__ = ["Part", "check_shapes", "fill_state", "optimizer_parts", "shape_of", "weight_part", "whole"]


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one parameter: `length` numbers from `start` of it, at `offset` of the vector `flat`."""

    flat: Tensor
    """What the optimizer updates, and keys its state by."""
    offset: int
    start: int
    length: int
    shape: torch.Size
    """Of the whole parameter."""

    def of(self, flat: Tensor) -> Tensor:
        """This rank's numbers in a vector that is laid out as `flat`: the weights, or a moment of them."""
        return flat.detach()[self.offset : self.offset + self.length]

    def write(self, flat: Tensor, value: Tensor) -> None:
        """Put this rank's numbers of the whole tensor `value` into a vector that is laid out as `flat`."""
        self.of(flat).copy_(value.reshape(-1)[self.start : self.start + self.length])


def shape_of(tensor: Tensor) -> torch.Size:
    """Shape of the whole parameter; stage 3 leaves an empty one in its place between uses."""
    return getattr(tensor, "ds_shape", tensor.shape)


def optimizer_parts(optimizer: Any, stage: int, names: Mapping[int, str], world: World) -> dict[str, Part]:
    """Name to this rank's part of each optimized parameter, stages 1 to 3.

    Args:
        optimizer: DeepSpeed's wrapper of the optimizer.
        stage: of ZeRO.
        names: id of a parameter to its name.
        world: this rank and how many there are.
    """
    groups = optimizer.fp16_groups if stage == 3 else optimizer.bit16_groups
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    found: dict[str, Part] = {}
    for group, flat in zip(groups, flats, strict=True):
        for p in group:
            if stage == 3:
                _, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
                start, length = _own_range(p, world)
            elif p._hp_mapping is None:  # pyright: ignore[reportPrivateUsage]
                offset = start = length = 0
            else:
                own, of_whole = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address  # pyright: ignore[reportPrivateUsage]
                offset, start, length = own.start, of_whole.start, own.numel
            found[names[id(p)]] = Part(flat, offset, start, length, shape_of(p))
    return found


def weight_part(p: Any, world: World) -> Part:
    """This rank's part of a weight at stage 3; `flat` is where it is gathered from."""
    start, length = _own_range(p, world)
    return Part(p.ds_tensor, 0, start, length, shape_of(p))


def _own_range(p: Any, world: World) -> tuple[int, int]:
    """Stage 3 cuts each parameter into equal parts; the last ones may be padding."""
    width = p.ds_tensor.ds_numel
    start = min(width * world.rank, p.ds_numel)
    return start, min(width, p.ds_numel - start)


def whole(part: Part, flat: Tensor, world: World) -> Tensor:
    """The whole tensor, of which this rank has a part in `flat`.

    Collectives: one all-reduce of the whole tensor. It sums bits, where all ranks but one have zeros: a sum of floats
    would lose the sign of a zero.
    """
    found = flat.new_zeros(part.shape.numel())
    found[part.start : part.start + part.length] = part.of(flat)
    all_reduce_sum(found.view(torch.int32), world)
    return found.view(part.shape)


def fill_state(
    optimizer: torch.optim.Optimizer, parts: Mapping[str, Part], saved: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Give the optimizer the state that whole tensors describe.

    Args:
        optimizer: torch's own, as DeepSpeed drives it.
        parts: name of a parameter to this rank's part.
        saved: name of a parameter to field to value; every parameter, or none where no step was taken yet.

    Raises:
        CheckpointError: the parameters have not been updated equally often, or a tensor has another shape.
    """
    optimizer.state.clear()
    if not saved:
        return
    if saved.keys() != parts.keys() or len({int(fields["step"]) for fields in saved.values() if "step" in fields}) > 1:
        raise CheckpointError(
            "the checkpoint's parameters were not all updated equally often, and ZeRO counts their updates together; "
            "go on with engine.name=ddp"
        )
    for name, part in parts.items():
        state = optimizer.state[part.flat]
        for field, value in saved[name].items():
            if field == "step":
                state[field] = value.to(_device_of_step(optimizer, part.flat), copy=True)
            else:
                _check_shape(f"{name}/{field}", value.shape, part.shape)
                part.write(state.setdefault(field, torch.zeros_like(part.flat.detach())), value)


def _device_of_step(optimizer: torch.optim.Optimizer, flat: Tensor) -> torch.device:
    """torch keeps Adam's step counter on the host unless the optimizer is fused or capturable."""
    group = optimizer.param_groups[0]
    return flat.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


def check_shapes(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whether these are the weights and buffers of the model, which may be spread over ranks.

    Raises:
        CheckpointError: they are another model's.
    """
    own = {name: shape_of(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for text, names in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys())):
        if names:
            raise CheckpointError(f"the checkpoint does not fit this model: {text} {', '.join(sorted(names))}")
    for name, shape in own.items():
        _check_shape(name, weights[name].shape, shape)


def _check_shape(name: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise CheckpointError(
            f"the checkpoint does not fit this model: size mismatch for {name}: {tuple(found)} in the checkpoint, "
            f"{tuple(expected)} in the model"
        )
