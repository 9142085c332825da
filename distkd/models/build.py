"""From a config to a classifier: one encoder per modality, a fusion where there are several, a linear head on each."""

# Shapes: B samples, D feature width, C classes, K channels of a map of H x W places

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from distkd.base import Batch, InputSpec, Outputs, StrictConfig
from distkd.errors import ConfigError, ShapeError
from distkd.models.backbones import Backbone, Library, backbone
from distkd.models.cnn import CNN
from distkd.models.dropout import dropout_keys, salt_by_path
from distkd.models.fusion import ConcatFusion, GatedBilinearFusion
from distkd.models.mlp import MLP
from distkd.models.norm import Norm
from distkd.models.resnet import ResNet18
from distkd.models.snn import SNN, max_init
from distkd.models.trunk import ImageEncoder, Trunk
from distkd.models.vgg import VGG16
from distkd.models.weights import load_weights

__all__ = ["Classifier", "EncoderConfig", "ModelConfig", "build", "parameter_table"]

_SMALL_IMAGE = 64
"""Images below this many pixels a side get the small network by default."""

_WIDTHS = {"mlp": (128,), "snn": (64, 48, 32), "cnn": (16, 32, 64)}

_OF_IMAGES = ("cnn", "resnet18", "vgg16", "timm", "monai")
_LIBRARIES: tuple[Library, ...] = ("timm", "monai")
_PRETRAINED = {"resnet18": "ResNet-18", "vgg16": "VGG16"}
_POOLED = ("vgg16", *_LIBRARIES)
"""Encoders whose head is pooled where nothing else is asked for."""


class EncoderConfig(StrictConfig):
    """The network of one modality."""

    name: Literal["auto", "mlp", "snn", "cnn", "resnet18", "vgg16", "timm", "monai"] = "auto"
    """`auto`: `mlp` for vectors, `cnn` for images below 64 px, `resnet18` for larger ones. `timm` and `monai`: the
    network of that library which `backbone` names."""
    backbone: str | None = None
    """Name of the network in its library, as `convnext_tiny` of timm or `densenet121` of MONAI."""
    head: Literal["auto", "projected", "pooled"] = "auto"
    """What follows an image's last map: `projected` is pool, linear, norm, ReLU to `feature_dim`; `pooled` is the pool
    alone (GAP + linear), so that each place's share in a class is known: its feature is as wide as the map. `auto`:
    `pooled` for vgg16, timm and monai, `projected` for cnn and resnet18."""
    widths: tuple[PositiveInt, ...] | None = None
    """Hidden widths or channels of mlp, snn and cnn; unset takes (128), (64, 48, 32) and (16, 32, 64)."""
    weights: Path | None = None
    """Pretrained weights for resnet18, vgg16, timm and monai: a local file, .safetensors or plain .pth, of a state dict
    with the usual names, or with those of the library. Nothing is downloaded."""


class ModelConfig(StrictConfig):
    """The architecture of the model that is trained."""

    modalities: list[str] = Field(min_length=1)
    """What it sees, in order."""
    encoders: dict[str, EncoderConfig] = Field(default_factory=dict[str, EncoderConfig])
    """By modality, where the default does not fit."""
    fusion: Literal["auto", "gated_bilinear", "concat"] = "auto"
    """`auto`: gated bilinear for an image of a projected head with a vector, else concatenation: pairs of values of a
    pooled head, which is as wide as its map, would be hundreds of millions of weights."""
    feature_dim: PositiveInt = 128
    """Width of every feature, but those of pooled heads."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of dropped values, where a network has dropout."""
    norm: Norm = "sync"
    """`sync`: batch statistics over all ranks; `group`: none over the batch, no collective."""
    detach_branches: bool = False
    """The fused loss trains the fusion alone, not the encoders (`cut_fuse_grad` in the source)."""


class Branch(nn.Module):
    """One modality: its encoder and its own linear head."""

    def __init__(self, encoder: nn.Module, feature_dim: int, n_classes: int):
        super().__init__()
        self.encoder = encoder
        self.feature_dim = encoder.feature_dim if isinstance(encoder, ImageEncoder) else feature_dim
        self.classifier = nn.Linear(self.feature_dim, n_classes)
        if isinstance(encoder, SNN):
            max_init(self.classifier)  # in the source it is a part of the genomic network

    @property
    def trunk(self) -> Trunk | None:
        """The network behind a pooled head, whose map is handed out."""
        if isinstance(self.encoder, ImageEncoder) and self.encoder.head is None:
            return self.encoder.trunk
        return None

    def forward(self, x: Tensor) -> Outputs:
        map_BKHW, inner = None, None
        if isinstance(self.encoder, ImageEncoder):
            feature_BD, map_BKHW, inner = self.encoder(x)
        else:
            feature_BD = self.encoder(x)
        return Outputs(feature_BD, self.classifier(feature_BD), map_BKHW=map_BKHW, inner_BKHW=inner)


class Classifier(nn.Module):
    """A model of one or several modalities: batch to feature and logits.

    With several, `Outputs.branches` has each modality's own feature and logits, and a modality that a sample lacks
    counts as a feature of zeros in the fusion.
    """

    role: str = "student"
    """Which network this is to the dropout draws: a student, its mean teacher and a teacher drop differently."""

    def __init__(self, config: ModelConfig, specs: Mapping[str, InputSpec], n_classes: int, *, pretrained: bool = True):
        super().__init__()
        self.config = config
        self.n_classes = n_classes
        self.modalities = list(config.modalities)
        self.specs = {name: specs[name] for name in self.modalities}
        encoders = {name: _encoder(name, config, spec, pretrained) for name, spec in self.specs.items()}
        self.branches = nn.ModuleDict(
            {name: Branch(encoder, config.feature_dim, n_classes) for name, encoder in encoders.items()}
        )
        self.fusion: nn.Module | None = None
        if len(self.modalities) > 1:
            self.fusion = _fusion(config, self.specs, [self.branch(name).feature_dim for name in self.modalities])
            self.fused_classifier = nn.Linear(config.feature_dim, n_classes)
        salt_by_path(self)

    @property
    def feature_dim(self) -> int:
        """Width of the feature that the prediction is made of."""
        return self.classifier.in_features

    @property
    def classifier(self) -> nn.Linear:
        """The linear head whose logits are the prediction."""
        return self.branch(self.modalities[0]).classifier if self.fusion is None else self.fused_classifier

    def branch(self, modality: str) -> Branch:
        """Encoder and head of one modality."""
        branch = self.branches[modality]
        assert isinstance(branch, Branch)
        return branch

    @property
    def mapped_modality(self) -> str | None:
        """The one image whose branch hands out a map, None where none or several do."""
        found = [name for name in self.modalities if self.branch(name).trunk is not None]
        return found[0] if len(found) == 1 else None

    @property
    def mapped(self) -> Branch | None:
        """The branch of `mapped_modality`."""
        name = self.mapped_modality
        return None if name is None else self.branch(name)

    @property
    def map_size(self) -> tuple[int, int]:
        """Places of the map that `mapped` hands out, an earlier stage's where its trunk was asked for one."""
        name = self.mapped_modality
        assert name is not None
        trunk = self.branch(name).trunk
        assert trunk is not None
        return trunk.map_size(self.specs[name].shape)

    def mapped_outputs(self, out: Outputs) -> Outputs:
        """What `mapped` gave, of the outputs of this model."""
        return next((branch for branch in out.branches.values() if branch.map_BKHW is not None), out)

    def branch_parameters(self, modality: str) -> list[nn.Parameter]:
        """Encoder and head of one modality."""
        return list(self.branches[modality].parameters())

    def forward(self, batch: Batch) -> Outputs:
        with dropout_keys(batch.key_B, self.role) if self.training else nullcontext():
            found = {name: self.branches[name](self._input(batch, name)) for name in self.modalities}
            if self.fusion is None:
                return found[self.modalities[0]]
            features = [self._for_fusion(found[name].feature_BD, batch.present[name]) for name in self.modalities]
            fused_BD = self.fusion(features)
        return Outputs(fused_BD, self.fused_classifier(fused_BD), found)

    def _input(self, batch: Batch, name: str) -> Tensor:
        x, expected = batch.inputs.get(name), self.specs[name].shape
        if x is None:
            raise ShapeError(
                f"batch has no modality {name!r}, found {', '.join(sorted(batch.inputs))}; the model takes all of "
                f"{self.modalities}, with zeros and `present` false where a sample lacks one"
            )
        if x.dim() != 1 + len(expected) or x.shape[1] != expected[0]:
            raise ShapeError(
                f"batch {name!r} has shape {tuple(x.shape)}, the model expects (B, {', '.join(map(str, expected))})"
            )
        return x

    def _for_fusion(self, feature_BD: Tensor, present_B: Tensor) -> Tensor:
        feature_BD = feature_BD.detach() if self.config.detach_branches else feature_BD
        return feature_BD * present_B[:, None].to(feature_BD.dtype)


def build(
    config: ModelConfig, specs: Mapping[str, InputSpec], n_classes: int, *, seed: int, pretrained: bool = True
) -> Classifier:
    """A model whose initial weights are a function of `seed` alone; the global generators are left as they were.

    Args:
        config: the architecture.
        specs: at least the modalities of the config.
        n_classes: width of every head.
        seed: of the initial weights, any int64.
        pretrained: read the `weights` files of the config; false where all weights are loaded afterwards anyway.

    Raises:
        ConfigError: an encoder or fusion that does not fit its modalities.
        CheckpointError: a `weights` file that is missing, damaged, or of another network.
    """
    _check(config, specs)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that one also seeds every CUDA device
        return Classifier(config, specs, n_classes, pretrained=pretrained)


def _check(config: ModelConfig, specs: Mapping[str, InputSpec]) -> None:
    if len(set(config.modalities)) < len(config.modalities):
        raise ConfigError(f"model.modalities names one twice: {config.modalities}")
    for name in config.modalities:
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f"model.modalities names {name!r}, which cannot be the name of a module; rename the modality"
            )
    for name in config.encoders:
        if name not in config.modalities:
            hint = _suggestion(name, config.modalities)
            raise ConfigError(f"model.encoders.{name}: no such modality in model.modalities {config.modalities}{hint}")
    for name in config.modalities:
        if name not in specs:
            hint = _suggestion(name, specs)
            raise ConfigError(f"model.modalities names {name!r}, the data has {', '.join(sorted(specs))}{hint}")
        _check_encoder(name, config, specs[name])
    if config.fusion == "gated_bilinear" and len(config.modalities) != 2:
        raise ConfigError(
            f"model.fusion gated_bilinear takes two modalities, found {len(config.modalities)}: {config.modalities}; "
            "use concat"
        )


def _check_encoder(name: str, config: ModelConfig, spec: InputSpec) -> None:
    if spec.kind == "volume":
        raise ConfigError(
            f"modality {name!r} is a volume, for which this version has no network yet; use images and vectors"
        )
    chosen, kind = _encoder_name(name, config, spec), spec.kind
    if (chosen in _OF_IMAGES) != (kind == "image"):
        fitting = _listed(_OF_IMAGES if kind == "image" else ("mlp", "snn"))
        raise ConfigError(f"model.encoders.{name}: {chosen} does not take a modality of kind {kind}; use {fitting}")
    section = config.encoders.get(name, EncoderConfig())
    if section.head != "auto" and kind != "image":
        raise ConfigError(
            f"model.encoders.{name}.head={section.head} is for images, {name!r} is a {kind}; leave it out"
        )
    if chosen == "vgg16" and min(spec.shape[1:]) < VGG16.least:
        raise ConfigError(
            f"model.encoders.{name}: vgg16 needs images of at least {VGG16.least} px, {name!r} has "
            f"{' x '.join(map(str, spec.shape[1:]))}; use cnn"
        )
    if section.weights is not None and chosen not in (*_PRETRAINED, *_LIBRARIES):
        raise ConfigError(
            f"model.encoders.{name}.weights: {chosen} has no pretrained weights; use "
            f"{_listed((*_PRETRAINED, *_LIBRARIES))}, or leave it out"
        )
    if section.weights is not None and chosen == "resnet18" and config.norm != "sync":
        raise ConfigError(
            f"model.encoders.{name}.weights were trained with batch norm; set model.norm=sync, not {config.norm}"
        )
    if section.backbone is None and chosen in _LIBRARIES:
        raise ConfigError(
            f"model.encoders.{name}: {chosen} needs the name of one of its networks; set backbone, such as "
            f"{'convnext_tiny' if chosen == 'timm' else 'densenet121'}"
        )
    if section.backbone is not None and chosen not in _LIBRARIES:
        raise ConfigError(
            f"model.encoders.{name}.backbone={section.backbone} is for timm and monai, not for {chosen}; set name=timm "
            "or name=monai, or leave it out"
        )
    if section.widths is not None and chosen in (*_PRETRAINED, *_LIBRARIES):
        raise ConfigError(f"model.encoders.{name}.widths: those of {chosen} are fixed; leave it out or use cnn")


def _encoder_name(name: str, config: ModelConfig, spec: InputSpec) -> str:
    chosen = config.encoders.get(name, EncoderConfig()).name
    if chosen != "auto":
        return chosen
    if spec.kind == "vector":
        return "mlp"
    return "cnn" if min(spec.shape[1:]) < _SMALL_IMAGE else "resnet18"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _encoder(name: str, config: ModelConfig, spec: InputSpec, pretrained: bool) -> nn.Module:
    section = config.encoders.get(name, EncoderConfig())
    chosen, n_inputs = _encoder_name(name, config, spec), spec.shape[0]
    if chosen in _OF_IMAGES:
        pooled = section.head == "pooled" or (section.head == "auto" and chosen in _POOLED)
        trunk = _trunk(name, config, spec, pooled)
        if section.weights is not None and pretrained:
            key = f"model.encoders.{name}.weights"
            if isinstance(trunk, Backbone):
                trunk.load(section.weights, key=key)
            else:
                load_weights(trunk, section.weights, name=_PRETRAINED[chosen], without=("fc.", "classifier."), key=key)
        return ImageEncoder(trunk, None if pooled else config.feature_dim, norm=config.norm)
    widths = _WIDTHS[chosen] if section.widths is None else section.widths
    if chosen == "snn":
        return SNN(n_inputs, widths, config.feature_dim, dropout=config.dropout)
    return MLP(n_inputs, widths, config.feature_dim, norm=config.norm, dropout=config.dropout)


def _trunk(name: str, config: ModelConfig, spec: InputSpec, pooled: bool) -> Trunk:
    section, channels = config.encoders.get(name, EncoderConfig()), spec.shape[0]
    chosen = _encoder_name(name, config, spec)
    if chosen in _LIBRARIES:
        assert section.backbone is not None
        weights, where = section.weights is not None, f"model.encoders.{name}"
        return backbone(chosen, section.backbone, spec.shape, norm=config.norm, weights=weights, where=where)
    if chosen == "vgg16":
        return VGG16(channels)
    if chosen == "resnet18":
        return ResNet18(channels, norm=config.norm)
    return CNN(channels, section.widths or _WIDTHS["cnn"], norm=config.norm, signed=pooled)


def _fusion(config: ModelConfig, specs: Mapping[str, InputSpec], dims: Sequence[int]) -> nn.Module:
    kinds = sorted(spec.kind for spec in specs.values())
    projected = all(dim == config.feature_dim for dim in dims)
    fitting = "gated_bilinear" if kinds == ["image", "vector"] and projected else "concat"
    chosen = fitting if config.fusion == "auto" else config.fusion
    if chosen == "gated_bilinear":
        return GatedBilinearFusion(dims[0], dims[1], config.feature_dim, norm=config.norm, dropout=config.dropout)
    return ConcatFusion(dims, config.feature_dim, norm=config.norm, dropout=config.dropout)


def parameter_table(model: Classifier) -> list[tuple[str, int]]:
    """Trainable parameters of each modality's network, of the fusion with its head, and of all."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    table = [(name, count(branch)) for name, branch in model.branches.items()]
    if model.fusion is not None:
        table += [("fusion", count(model.fusion)), ("fused head", count(model.classifier))]
    return [*table, ("all", count(model))]
