"""The optimizers of the config, torch's or NVIDIA apex's, and the names under which their state is kept."""

# apex has no types, and its absence is the rule
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distkd.engines.protocol import Entry, OptimConfig
from distkd.errors import CheckpointError, ConfigError

__all__ = [
    "OPTIMIZER",
    "TRAINABLE",
    "Apex",
    "check_fields",
    "find_apex",
    "load_state",
    "make_optimizer",
    "saved_state",
    "state_entries",
    "under",
]

TRAINABLE, OPTIMIZER = "trainable/", "optimizer/"
"""Prefixes of the entries of a checkpoint."""

Apex = Literal["nvidia", "broken", "toolkit", "absent"]
"""What stands behind the name `apex`: NVIDIA's with its CUDA extensions, NVIDIA's without them, another package."""

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_FIELDS = {"adam": _MOMENTS, "adamw": _MOMENTS, "sgd": {"momentum_buffer"}}
"""What each optimizer remembers of a parameter."""

_APEX_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_MISSING: dict[Apex, str] = {
    "absent": "NVIDIA apex is not installed; build it from github.com/NVIDIA/apex",
    "toolkit": "the package `apex` that is installed is an unrelated web toolkit; pip uninstall apex, and build "
    "NVIDIA's from github.com/NVIDIA/apex",
    "broken": "the CUDA extensions of the NVIDIA apex that is installed are missing or do not fit this torch; build it "
    "again from github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1",
}


def find_apex() -> Apex:
    """Two packages share a name: NVIDIA's, which is built from source, and a web toolkit on the package index."""
    try:
        importlib.import_module("amp_C")  # the CUDA extension; only NVIDIA's has it
        importlib.import_module("apex.optimizers")
    except (ImportError, OSError, RuntimeError):  # a build for another torch fails in one of several ways
        spec = importlib.util.find_spec("apex")
        if spec is None:
            return "absent"
        folders = spec.submodule_search_locations or []
        return "broken" if any((Path(folder) / "optimizers").exists() for folder in folders) else "toolkit"
    return "nvidia"


def make_optimizer(
    config: OptimConfig, groups: Sequence[dict[str, Any]], *, apex: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of the config over these groups, whose parameters are where they stay.

    Args:
        apex: whether the engine can drive apex: it reads its state by `state_entries` and `load_state`.

    Raises:
        ConfigError: apex is asked for where it cannot be used.
    """
    groups = [dict(group) for group in groups]
    if _use_apex(config, groups, possible=apex):
        return _apex_optimizer(config, groups)
    # fused is the fastest for all three on CPU too: Adam 3 x, SGD 1.8 x over foreach for few small tensors, and more
    # for large ones
    how: dict[str, Any] = {"fused": config.fused != "none", "foreach": False}
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0], weight_decay=config.weight_decay, **how)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, **how)


def _use_apex(config: OptimConfig, groups: Sequence[dict[str, Any]], *, possible: bool) -> bool:
    if config.fused not in ("auto", "apex"):
        return False
    instead = "or use optim.fused=torch, which is as fast on most models"
    on_cuda = _on_cuda(groups)
    dtypes = {p.dtype for group in groups for p in group["params"]}
    if config.fused == "auto":
        return possible and on_cuda and dtypes <= _APEX_DTYPES and find_apex() == "nvidia"
    if not possible:
        raise ConfigError("optim.fused=apex works with engine.name=ddp only; use that, or optim.fused=torch")
    found = find_apex()
    if found != "nvidia":
        raise ConfigError(f"optim.fused=apex: {_MISSING[found]}; {instead}")
    if not on_cuda:
        raise ConfigError("optim.fused=apex needs CUDA, and the model is not on it; use optim.fused=auto or torch")
    if not dtypes <= _APEX_DTYPES:
        raise ConfigError("optim.fused=apex knows no float64; use optim.fused=torch, or engine.precision=fp32")
    return True


def _on_cuda(groups: Sequence[dict[str, Any]]) -> bool:
    return all(p.is_cuda for group in groups for p in group["params"])


def _apex_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    optimizers = importlib.import_module("apex.optimizers")
    if config.name == "sgd":
        return optimizers.FusedSGD(groups, lr=config.lr, momentum=config.betas[0], weight_decay=config.weight_decay)
    return optimizers.FusedAdam(
        groups,
        lr=config.lr,
        bias_correction=True,
        betas=config.betas,
        adam_w_mode=config.name == "adamw",
        weight_decay=config.weight_decay,
    )


def check_fields(config: OptimConfig, fields: Iterable[str]) -> None:
    """Whether saved fields belong to this optimizer.

    Raises:
        CheckpointError: they are another optimizer's.
    """
    found = set(fields)
    if found - _FIELDS[config.name]:
        raise CheckpointError(
            f"the checkpoint holds {', '.join(sorted(found))} of another optimizer than optim.name={config.name}, "
            f"which keeps {', '.join(sorted(_FIELDS[config.name]))}; train with the old one"
        )


def _counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """apex's Adam keeps one `step` for a group, torch's one for each parameter."""
    return "bias_correction" in optimizer.defaults


def state_entries(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[Entry]:
    """The state under torch's names, whichever optimizer keeps it.

    Args:
        names: `id` of a parameter to its name.
    """
    entries: list[Entry] = []
    for group in optimizer.param_groups:
        # apex's SGD has a buffer of zeros where torch's has none
        unused = {"momentum_buffer"} if group.get("momentum") == 0 else set[str]()
        for parameter in group["params"]:
            name = f"{OPTIMIZER}{names[id(parameter)]}/"
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            if _counts_by_group(optimizer) and state:
                count = lambda g=group: torch.tensor(float(g["step"]), dtype=torch.float32)  # noqa: E731
                entries.append(Entry(f"{name}step", 4, count))
            for field in sorted(state.keys() - unused):
                value = torch.as_tensor(state[field])
                entries.append(Entry(f"{name}{field}", value.nbytes, lambda v=value: v, steady=True))
    return entries


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those under a prefix by the rest of their names; no other one is read."""
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def saved_state(config: OptimConfig, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint has of the optimizer: name of a parameter to field to value.

    Raises:
        CheckpointError: it is another optimizer's.
    """
    fields_of: dict[str, dict[str, Tensor]] = {}
    for key, value in under(OPTIMIZER, tensors).items():
        name, _, field = key.rpartition("/")
        fields_of.setdefault(name, {})[field] = value
    check_fields(config, {field for fields in fields_of.values() for field in fields})
    return fields_of


def load_state(
    config: OptimConfig,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Go on from what `state_entries` of any kind of this optimizer gave.

    Args:
        parameters: by name.
        tensors: a checkpoint; what is not the optimizer's is passed over.

    Raises:
        CheckpointError: the state is another optimizer's or another model's.
    """
    fields_of = saved_state(config, tensors)
    strange = sorted(fields_of.keys() - parameters.keys())
    if strange:
        raise CheckpointError(f"the checkpoint's optimizer knows {', '.join(map(repr, strange))}, which learn no more")
    optimizer.state.clear()
    for group in optimizer.param_groups:
        _load_group(optimizer, group, {id(parameters[name]): fields for name, fields in fields_of.items()})


def _load_group(optimizer: torch.optim.Optimizer, group: dict[str, Any], fields_of: dict[int, Any]) -> None:
    steps: set[float] = set()
    for parameter in group["params"]:
        fields: dict[str, Tensor] = dict(fields_of.get(id(parameter), {}))
        step = fields.pop("step", None)
        for field, value in fields.items():
            # in the layout of the parameter: the fused kernels walk both as they lie in memory
            optimizer.state[parameter][field] = torch.empty_like(parameter.detach()).copy_(value)
        if step is not None and not _counts_by_group(optimizer):
            # torch's fused kernels want the counter beside the parameter, the others want it on the host
            device = parameter.device if group["fused"] else torch.device("cpu")
            optimizer.state[parameter]["step"] = step.to(device, torch.float32, copy=True)
        elif step is not None:
            steps.add(float(step))
    if len(steps) > 1:
        raise CheckpointError(
            f"the checkpoint's parameters have made {sorted(map(int, steps))} updates, and apex counts them for all "
            "together; use optim.fused=torch"
        )
    if steps:
        group["step"] = int(steps.pop())
