"""Networks for images from timm and MONAI, by their libraries' names, cut before the global pool.

What is adapted to the laws of this project: batch norm, dropout, stochastic depth, and what is left over of the
classifier. Nothing is downloaded: weights come from a local file.
"""

# Shapes: B samples, C input channels, H x W pixels, K channels of the map of h x w places

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distkd.errors import ConfigError
from distkd.models.dropout import KeyedDropout, dropout_keys
from distkd.models.norm import Norm, SyncBatchNorm, make_norm
from distkd.models.trunk import Stage, Trunk, chain
from distkd.models.weights import load_weights

__all__ = ["Backbone", "Library", "adopt", "backbone"]

Library = Literal["timm", "monai"]

_LARGEST = 512
"""Pixels a side up to which is looked for images that a network does take."""


class Backbone(Trunk):
    """The trunk of another library's network, whose classifier is gone.

    Batch norm is this project's (`adopt`). Dropout follows the keys of the samples. Stochastic depth and drop-connect
    have rate 0, and a network that draws from the global generator all the same is refused. Every parameter has a part
    in the map: those that have none are dropped.
    """

    def __init__(self, network: nn.Module, title: str, without: Sequence[str]):
        """`without`: beginnings of the names in a weights file that belong to the classifier."""
        super().__init__()
        self.network = network
        self.title = title
        self.without = list(without)

    def load(self, path: Path, *, key: str = "") -> None:
        """Start from a weights file with the library's names, which the config has as `key`."""
        load_weights(self.network, path, name=self.title, without=self.without, key=key)


class TimmTrunk(Backbone):
    """What `forward_features` gives, as one stage: no earlier map is handed out."""

    channels_last = False

    def stages(self) -> list[Stage]:
        return [self._features]

    def _features(self, x: Tensor) -> Tensor:
        x = cast(Any, self.network).forward_features(x)
        return x.permute(0, 3, 1, 2).contiguous() if self.channels_last and x.dim() == 4 else x


class MonaiTrunk(Backbone):
    """A classifier of MONAI up to its pool, in the stages of its family."""

    def __init__(self, network: nn.Module, title: str, without: Sequence[str], cut: Callable[[Any], list[Stage]]):
        super().__init__(network, title, without)
        self.cut = cut

    def stages(self) -> list[Stage]:
        return self.cut(self.network)


def backbone(library: Library, name: str, shape: Sequence[int], *, norm: Norm, weights: bool, where: str) -> Backbone:
    """A network of another library for images of `shape` (C, H, W), with random weights.

    Args:
        norm: what takes the place of batch norm.
        weights: pretrained ones will be loaded, which a group norm in the place of batch norm cannot use.
        where: section of the config, for messages.

    Raises:
        ConfigError: the library is missing or has no such network, or the network cannot serve: no map, images too
            small, layers that break the laws.
    """
    trunk = (_timm if library == "timm" else _monai)(name, shape, where)
    replaced = adopt(trunk.network, norm, f"{where}: {trunk.title}")
    if weights and replaced and norm != "sync":
        raise ConfigError(f"{where}.weights were trained with batch norm; set model.norm=sync, not {norm}")
    seen = _look_at(trunk, shape, where)
    width = getattr(trunk.network, "num_features", None)
    if isinstance(trunk, TimmTrunk) and len(seen.shape) == 4 and width == seen.shape[3] and width != seen.shape[1]:
        trunk.channels_last = True
        seen = _look_at(trunk, shape, where)
    if len(seen.shape) != 4:
        raise ConfigError(
            f"{where}: {trunk.title} makes no map of an image but features of shape (B, "
            f"{', '.join(map(str, seen.shape[1:]))}); use a convolutional network such as convnext_tiny or resnet50"
        )
    if seen.draws:
        raise ConfigError(
            f"{where}: {trunk.title} draws from the global generator in training ({', '.join(sorted(seen.draws))}), so "
            "ranks would not train one model; use another backbone"
        )
    trunk.width = seen.shape[1]
    trunk.without += [f"{path}." for path in _drop_unused(trunk.network, seen)]
    left = _look_at(trunk, shape, where).unused if seen.unused else []
    if left:
        raise ConfigError(
            f"{where}: {trunk.title} has parameters that have no part in its map: {', '.join(left[:3])}; use another "
            "backbone"
        )
    return trunk


# the laws


class _BatchNormAct(SyncBatchNorm):
    """Batch norm with the dropout and activation that timm puts into the same layer."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class _GroupNormAct(nn.GroupNorm):
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def adopt(network: nn.Module, norm: Norm, title: str) -> int:
    """Bring a library's network under this project's laws, in place.

    Every batch norm becomes a `SyncBatchNorm` with its weights, or a group norm; every dropout with a rate becomes
    `KeyedDropout`; stochastic depth, drop-block and drop-connect get rate 0.

    Returns:
        How many batch norms were replaced.

    Raises:
        ConfigError: a layer with batch statistics of another kind.
    """
    replaced = 0
    for parent in list(network.modules()):
        for rate in ("drop_prob", "drop_connect_rate"):
            if isinstance(getattr(parent, rate, None), float):
                setattr(parent, rate, 0.0)
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, SyncBatchNorm):  # pyright: ignore[reportPrivateUsage]
                setattr(parent, name, _ours(layer, norm, title))
                replaced += 1
            elif type(layer) is nn.Dropout and layer.p > 0:
                setattr(parent, name, KeyedDropout(layer.p))
    for layer in network.modules():
        if hasattr(layer, "running_var") and not isinstance(layer, SyncBatchNorm):
            raise _no_norm(layer, title)
    return replaced


def _ours(layer: nn.modules.batchnorm._BatchNorm, norm: Norm, title: str) -> nn.Module:  # pyright: ignore[reportPrivateUsage]
    plain = type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not layer.affine or layer.running_var is None or layer.momentum is None:
        raise _no_norm(layer, title)
    if not plain and not (hasattr(layer, "act") and hasattr(layer, "drop")):
        raise _no_norm(layer, title)
    if norm == "sync":
        new = (SyncBatchNorm if plain else _BatchNormAct)(layer.num_features, layer.eps, layer.momentum)
        new.load_state_dict({name: t for name, t in layer.state_dict().items() if name in new.state_dict()})
    else:
        like = cast(nn.GroupNorm, make_norm(norm, layer.num_features, 2))
        new = like if plain else _GroupNormAct(like.num_groups, like.num_channels)
        new.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    if isinstance(new, _BatchNormAct | _GroupNormAct):
        new.drop, new.act = cast(nn.Module, layer.drop), cast(nn.Module, layer.act)
    return new


def _no_norm(layer: nn.Module, title: str) -> ConfigError:
    return ConfigError(
        f"{title} has batch statistics that cannot be shared between ranks, in a layer {type(layer).__name__}; use "
        "another backbone"
    )


class _Seen(NamedTuple):
    """What a pass over two images shows."""

    shape: tuple[int, ...]
    unused: list[str]
    """Parameters without a gradient."""
    draws: set[str]
    """Operations that take from the global generator."""
    called: set[str]
    """Paths of the modules that ran."""


class _Draws(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
            has_rate = any(a.name == "dropout_p" for a in func._schema.arguments)
            if not has_rate or given.get("dropout_p", 0.0) > 0:  # attention counts as random even without dropout
                self.found.add(str(func.overloadpacket.__name__))
        return func(*args, **kwargs)


def _look_at(trunk: Backbone, shape: Sequence[int], where: str) -> _Seen:
    """One pass in training mode, without computing: shapes alone, on a copy without values."""
    try:
        return _pass(trunk, shape)
    except Exception as error:
        taken = _taken(trunk, shape)
        size = " x ".join(map(str, shape[1:]))
        advice = f"it takes {taken[0]} x {taken[1]} px" if taken else "use another backbone"
        raise ConfigError(
            f"{where}: {trunk.title} makes no map of images of {size} px: {_first_line(error)}; {advice}"
        ) from error


def _pass(trunk: Backbone, shape: Sequence[int]) -> _Seen:
    empty: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in trunk.parameters()}
    empty |= {id(b): b.to("meta") for b in trunk.buffers()}
    probe = copy.deepcopy(trunk, empty).train()
    called: set[str] = set()
    for path, module in probe.network.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    keys = torch.zeros(2, dtype=torch.int64, device="meta")
    with torch.enable_grad(), dropout_keys(keys, "probe"), _Draws() as draws:
        map_BKhw, _ = probe(torch.zeros(2, *shape, device="meta"))
        named = {name: p for name, p in probe.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(map_BKhw.sum(), list(named.values()), allow_unused=True)
    unused = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
    return _Seen(tuple(map_BKhw.shape), unused, draws.found, called)


def _taken(trunk: Backbone, shape: Sequence[int]) -> tuple[int, int] | None:
    """The first doubling of an image's sides that a network takes."""
    height, width = 2 * shape[1], 2 * shape[2]
    while max(height, width) <= _LARGEST:
        try:
            _pass(trunk, (shape[0], height, width))
        except Exception:  # noqa: BLE001  # whatever stops a library's layers
            height, width = 2 * height, 2 * width
        else:
            return height, width
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _drop_unused(network: nn.Module, seen: _Seen) -> list[str]:
    """Take away the modules that did not run and whose parameters have no gradient; their paths."""
    unused = {name.removeprefix("network.") for name in seen.unused}
    dropped: list[str] = []
    for path, module in list(network.named_modules()):
        within = f"{path}."
        mine = {f"{within}{name}" for name, _ in module.named_parameters()}
        ran = any(f"{other}.".startswith(within) for other in seen.called)
        if path and mine and mine <= unused and not ran and not path.startswith(tuple(f"{d}." for d in dropped)):
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, nn.Identity())
            dropped.append(path)
    return dropped


# timm


def _timm(name: str, shape: Sequence[int], where: str) -> TimmTrunk:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"{where}: timm cannot be imported ({error}); pip install 'distkd[timm]', or use monai, resnet18 or vgg16"
        ) from error
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models(), "timm", where)
    try:
        settings = timm.get_pretrained_cfg(name)
        sized: dict[str, Any] = {}
        if settings is not None and settings.fixed_input_size:
            sized["img_size"] = tuple(shape[1:])
        network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=shape[0], **sized)
    except Exception as error:
        raise ConfigError(
            f"{where}: timm makes no {name} for images of shape {tuple(shape)}: {_first_line(error)}; use another "
            "backbone"
        ) from error
    heads = None if settings is None else settings.classifier
    heads = [heads] if isinstance(heads, str) else heads or []
    return TimmTrunk(network, f"timm {name}", [f"{head}." for head in heads])


# MONAI


class _Family(NamedTuple):
    names: tuple[str, ...]
    make: Callable[[str, int], nn.Module]
    cut: Callable[[Any], list[Stage]]
    without: str


def _monai(name: str, shape: Sequence[int], where: str) -> MonaiTrunk:
    for family in _FAMILIES:
        if name in family.names:
            return MonaiTrunk(family.make(name, shape[0]), f"monai {name}", [family.without], family.cut)
    raise _unknown(name, [known for family in _FAMILIES for known in family.names], "monai", where)


def _nets() -> Any:
    from monai.networks import nets  # seconds, which only these networks cost

    return nets


def _resnet(name: str, channels: int) -> nn.Module:
    # a bias before batch norm has the rounding of a sum for its gradient
    return getattr(_nets(), name)(spatial_dims=2, n_input_channels=channels, feed_forward=False, bias_downsample=False)


def _resnet_stages(network: Any) -> list[Stage]:
    stem = chain((network.conv1, network.bn1, network.act, network.maxpool))
    return [stem, network.layer1, network.layer2, network.layer3, network.layer4]


def _densenet(name: str, channels: int) -> nn.Module:
    network = getattr(_nets(), name)(spatial_dims=2, in_channels=channels, out_channels=1)
    network.class_layers = network.class_layers[:1]  # its ReLU
    return network


def _densenet_stages(network: Any) -> list[Stage]:
    layers = dict(network.features.named_children())
    stages: list[Stage] = [chain(layers[name] for name in ("conv0", "norm0", "relu0", "pool0"))]
    stages += [chain((layers[f"denseblock{n}"], layers[f"transition{n}"])) for n in (1, 2, 3)]
    return [*stages, chain((layers["denseblock4"], layers["norm5"], network.class_layers))]


def _efficientnet(name: str, channels: int) -> nn.Module:
    network = _nets().EfficientNetBN(name, pretrained=False, spatial_dims=2, in_channels=channels, num_classes=1)
    network._fc, network._dropout = nn.Identity(), nn.Identity()
    return network


def _efficientnet_stages(network: Any) -> list[Stage]:
    stem = chain((network._conv_stem_padding, network._conv_stem, network._bn0, network._swish))
    head = (network._conv_head_padding, network._conv_head, network._bn1, network._swish)
    *blocks, last = network._blocks
    return [stem, *blocks, chain((last, *head))]


def _senet(name: str, channels: int) -> nn.Module:
    network = getattr(_nets(), name)(spatial_dims=2, in_channels=channels, num_classes=1)
    network.last_linear, network.dropout = nn.Identity(), None
    return network


def _senet_stages(network: Any) -> list[Stage]:
    return [network.layer0, network.layer1, network.layer2, network.layer3, network.layer4]


_FAMILIES = (
    _Family(tuple(f"resnet{n}" for n in (10, 18, 34, 50, 101, 152, 200)), _resnet, _resnet_stages, "fc."),
    _Family(tuple(f"densenet{n}" for n in (121, 169, 201, 264)), _densenet, _densenet_stages, "class_layers."),
    _Family(tuple(f"efficientnet-b{n}" for n in range(9)), _efficientnet, _efficientnet_stages, "_fc."),
    _Family(
        ("SENet154", "SEResNet50", "SEResNet101", "SEResNet152", "SEResNext50", "SEResNext101"),
        _senet,
        _senet_stages,
        "last_linear.",
    ),
)


def _unknown(name: str, known: Sequence[str], library: Library, where: str) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=3)
    listed = "timm.list_models() lists its networks" if library == "timm" else f"it has {', '.join(known)}"
    hint = f"did you mean {' or '.join(close)}?" if close else listed
    return ConfigError(f"{where}.backbone: {library} has no network {name!r}; {hint}")
