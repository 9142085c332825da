"""Pretrained weights from a local file: .safetensors, or a plain state dict as .pth; no pickle that could run code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distkd.errors import CheckpointError

__all__ = ["load_weights"]


_WRAPPER = "module."
"""Before all names of what was saved from a `DistributedDataParallel`."""

_SHOWN = 3
"""Names of a file in a message."""


def load_weights(trunk: nn.Module, path: Path, *, name: str, without: Sequence[str] = (), key: str = "") -> None:
    """Start a trunk from a weights file with the usual names, or with `module.` before all of them.

    A trunk of one input channel takes the sum of the file's three.

    Args:
        name: of the network, for messages.
        without: beginnings of the names that are left out, such as those of the file's own classifier.
        key: of the config, that names the file, for messages.

    Raises:
        CheckpointError: the file is missing, is a pickle that could run code, or is of another network.
    """
    file = f"{key}: weights file {path}" if key else f"weights file {path}"
    state = {part: tensor for part, tensor in _read(path, file, key).items() if not part.startswith(tuple(without))}
    first, layer = next((part, m) for part, m in trunk.named_modules() if isinstance(m, nn.Conv2d))
    found = state.get(f"{first}.weight")
    if found is not None and found.dim() == 4 and layer.in_channels == 1 and found.shape[1] == 3:
        state[f"{first}.weight"] = found.sum(dim=1, keepdim=True)  # grey in all three channels gives the same values
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{file} is not of a {name} with {layer.in_channels} input channels: {_difference(trunk, state, error)}"
        ) from error


def _difference(trunk: nn.Module, state: dict[str, Tensor], error: RuntimeError) -> str:
    expected = trunk.state_dict()
    missing, spare = (
        [name for name in of if name not in others and not name.endswith("num_batches_tracked")]
        for of, others in ((expected, state), (state, expected))
    )
    if missing:
        return f"it holds {_few(spare or list(state))}; missing: {_few(missing)}"
    if spare:
        return f"it also holds {_few(spare)}"
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            return f"{name} is of shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
    return shorten(str(error), 300, placeholder=" ...")


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + rest


def _read(path: Path, file: str, key: str) -> dict[str, Tensor]:
    if path.is_dir():
        raise CheckpointError(f"{file} is a folder; name the file in it")
    state = _checked(path, file, key)
    if all(name.startswith(_WRAPPER) for name in state):
        return {name.removeprefix(_WRAPPER): tensor for name, tensor in state.items()}
    return state


def _checked(path: Path, file: str, key: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of a file that is refused anyway
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        without = f"with --{key} null" if key else "without a file"
        raise CheckpointError(
            f"{file} does not exist; make it as docs/models.md shows, or start from random weights {without}"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is not a plain state dict: damaged, or a pickle that holds more than tensors, which "
            "is refused since reading it could run code; fetch it again, or save a state dict as .safetensors"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise CheckpointError(f"{file} cannot be read, it may be cut short: {error}; fetch it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} does not hold a state dict of names and tensors, but a {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file} does not hold a state dict of names and tensors: {name!r} is a "
                f"{type(tensor).__name__}; save the state dict alone"
            )
    return state
