"""ResNet-18 (He et al. 2016) with the usual parameter names, so that ImageNet weights load; the pathology network."""

from __future__ import annotations

from torch import Tensor, nn

from distkd.models.norm import Norm, make_norm
from distkd.models.trunk import Stage, Trunk, chain

__all__ = ["ResNet18"]


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


class ResNet18(Trunk):
    """The usual trunk without its classifier, stem and four layers as stages; the map is non-negative."""

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

    def stages(self) -> list[Stage]:
        stem = chain((self.conv1, self.bn1, self.relu, self.maxpool))
        return [stem, self.layer1, self.layer2, self.layer3, self.layer4]
