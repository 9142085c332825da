"""ResNet-18 (He et al. 2016) with the usual parameter names, so that ImageNet weights load; the pathology network."""

# Shapes: B samples, C channels, H x W pixels, F feature width

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distkd.errors import CheckpointError
from distkd.models.norm import Norm, linear_before_norm, make_norm

__all__ = ["ResNet18", "ResNetEncoder", "load_imagenet"]


def _conv3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1, self.bn1 = _conv3(before, after, stride), make_norm(norm, after, 2)
        self.conv2, self.bn2 = _conv3(after, after), make_norm(norm, after, 2)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), make_norm(norm, after, 2)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet18(nn.Module):
    """(B, C, H, W) to (B, 512): the trunk and its average pool, no classifier."""

    width = 512

    def __init__(self, channels: int = 3, *, norm: Norm = "sync"):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(norm, 64, 2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1, norm), BasicBlock(64, 64, 1, norm))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2, norm), BasicBlock(128, 128, 1, norm))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2, norm), BasicBlock(256, 256, 1, norm))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2, norm), BasicBlock(512, 512, 1, norm))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


class ResNetEncoder(nn.Module):
    """The pathology network up to its feature: ResNet-18, linear, norm, ReLU. (B, C, H, W) to (B, F), non-negative."""

    def __init__(self, channels: int, feature_dim: int, *, norm: Norm, weights: Path | None = None):
        super().__init__()
        self.trunk = ResNet18(channels, norm=norm)
        self.head = nn.Sequential(
            linear_before_norm(norm, self.trunk.width, feature_dim), make_norm(norm, feature_dim, 1), nn.ReLU()
        )
        if weights is not None:
            load_imagenet(self.trunk, weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def load_imagenet(trunk: ResNet18, path: Path) -> None:
    """Start from a weights file with the usual names; its classifier is ignored.

    A trunk of one input channel takes the sum of the file's three.

    Raises:
        CheckpointError: the file is missing, is a pickle that could run code, or is of another network.
    """
    state = {name: tensor for name, tensor in _read(path).items() if not name.startswith("fc.")}
    first = state.get("conv1.weight")
    if first is not None and first.dim() == 4 and trunk.conv1.in_channels == 1 and first.shape[1] == 3:
        state["conv1.weight"] = first.sum(dim=1, keepdim=True)  # grey in all three channels gives the same values
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"weights file {path} is not of a ResNet-18 with {trunk.conv1.in_channels} input channels and batch norm: "
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
            f"weights file {path} does not exist; leave `weights` out to start from random weights"
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
