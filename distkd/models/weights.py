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


def load_weights(trunk: nn.Module, path: Path, *, name: str, without: Sequence[str] = ()) -> None:
    """Start a trunk from a weights file with the usual names.

    A trunk of one input channel takes the sum of the file's three.

    Args:
        name: of the network, for messages.
        without: beginnings of the names that are left out, such as those of the file's own classifier.

    Raises:
        CheckpointError: the file is missing, is a pickle that could run code, or is of another network.
    """
    state = {key: tensor for key, tensor in _read(path).items() if not key.startswith(tuple(without))}
    first, layer = next((key, m) for key, m in trunk.named_modules() if isinstance(m, nn.Conv2d))
    found = state.get(f"{first}.weight")
    if found is not None and found.dim() == 4 and layer.in_channels == 1 and found.shape[1] == 3:
        state[f"{first}.weight"] = found.sum(dim=1, keepdim=True)  # grey in all three channels gives the same values
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"weights file {path} is not of a {name} with {layer.in_channels} input channels: "
            f"{shorten(str(error), 300, placeholder=' ...')}"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of a file that is refused anyway
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"weights file {path} does not exist; leave `weights` out to start from random weights, or make the file "
            "as docs/models.md shows"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"weights file {path} is not a plain state dict: damaged, or a pickle that holds more than tensors, which "
            "is refused since reading it could run code; fetch it again, or save a state dict as .safetensors"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise CheckpointError(
            f"weights file {path} cannot be read, it may be cut short: {error}; fetch it again"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"weights file {path} does not hold a state dict of names and tensors, but a {type(state).__name__}"
        )
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"weights file {path} does not hold a state dict of names and tensors: {name!r} is a "
                f"{type(tensor).__name__}; save the state dict alone"
            )
    return state
