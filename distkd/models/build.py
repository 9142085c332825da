"""From a config to a classifier: one encoder per modality, a fusion where there are several, a linear head on each."""

# Shapes: B samples, D feature width, C classes

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from distkd.base import Batch, InputSpec, Outputs, StrictConfig
from distkd.errors import ConfigError, ShapeError
from distkd.models.cnn import CNN
from distkd.models.dropout import dropout_keys, salt_by_path
from distkd.models.fusion import ConcatFusion, GatedBilinearFusion
from distkd.models.mlp import MLP
from distkd.models.norm import Norm
from distkd.models.resnet import ResNetEncoder
from distkd.models.snn import SNN, max_init

__all__ = ["Classifier", "EncoderConfig", "ModelConfig", "build", "parameter_table"]

_SMALL_IMAGE = 64
"""Images below this many pixels a side get the small network by default."""

_WIDTHS = {"mlp": (128,), "snn": (64, 48, 32), "cnn": (16, 32, 64)}


class EncoderConfig(StrictConfig):
    """The network of one modality."""

    name: Literal["auto", "mlp", "snn", "cnn", "resnet18"] = "auto"
    """`auto`: `mlp` for vectors, `cnn` for images below 64 px, `resnet18` for larger ones."""
    widths: tuple[PositiveInt, ...] | None = None
    """Hidden widths or channels of mlp, snn and cnn; unset takes (128), (64, 48, 32) and (16, 32, 64)."""
    weights: Path | None = None
    """ImageNet weights for resnet18, a state dict with the usual names as .safetensors or plain .pth."""


class ModelConfig(StrictConfig):
    """The architecture of the model that is trained."""

    modalities: list[str] = Field(min_length=1)
    """What it sees, in order."""
    encoders: dict[str, EncoderConfig] = Field(default_factory=dict[str, EncoderConfig])
    """By modality, where the default does not fit."""
    fusion: Literal["auto", "gated_bilinear", "concat"] = "auto"
    """`auto`: gated bilinear for an image with a vector, else concatenation."""
    feature_dim: PositiveInt = 128
    """Width of every feature."""
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
        self.classifier = nn.Linear(feature_dim, n_classes)
        if isinstance(encoder, SNN):
            max_init(self.classifier)  # in the source it is a part of the genomic network

    def forward(self, x: Tensor) -> Outputs:
        feature_BD = self.encoder(x)
        return Outputs(feature_BD, self.classifier(feature_BD))


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
        self.feature_dim = config.feature_dim
        self.modalities = list(config.modalities)
        self.specs = {name: specs[name] for name in self.modalities}
        encoders = {name: _encoder(name, config, spec, pretrained) for name, spec in self.specs.items()}
        self.branches = nn.ModuleDict(
            {name: Branch(encoder, config.feature_dim, n_classes) for name, encoder in encoders.items()}
        )
        self.fusion: nn.Module | None = None
        if len(self.modalities) > 1:
            self.fusion = _fusion(config, self.specs)
            self.fused_classifier = nn.Linear(config.feature_dim, n_classes)
        salt_by_path(self)

    @property
    def classifier(self) -> nn.Linear:
        """The linear head whose logits are the prediction."""
        if self.fusion is not None:
            return self.fused_classifier
        branch = self.branches[self.modalities[0]]
        assert isinstance(branch, Branch)
        return branch.classifier

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
    if (chosen in ("cnn", "resnet18")) != (kind == "image"):
        fitting = "cnn or resnet18" if kind == "image" else "mlp or snn"
        raise ConfigError(f"model.encoders.{name}: {chosen} does not take a modality of kind {kind}; use {fitting}")
    section = config.encoders.get(name, EncoderConfig())
    if section.weights is not None and chosen != "resnet18":
        raise ConfigError(
            f"model.encoders.{name}.weights: {chosen} has no pretrained weights; use resnet18 or leave it out"
        )
    if section.weights is not None and config.norm != "sync":
        raise ConfigError(
            f"model.encoders.{name}.weights were trained with batch norm; set model.norm=sync, not {config.norm}"
        )
    if section.widths is not None and chosen == "resnet18":
        raise ConfigError(f"model.encoders.{name}.widths: those of resnet18 are fixed; leave it out or use cnn")


def _encoder_name(name: str, config: ModelConfig, spec: InputSpec) -> str:
    chosen = config.encoders.get(name, EncoderConfig()).name
    if chosen != "auto":
        return chosen
    if spec.kind == "vector":
        return "mlp"
    return "cnn" if min(spec.shape[1:]) < _SMALL_IMAGE else "resnet18"


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _encoder(name: str, config: ModelConfig, spec: InputSpec, pretrained: bool) -> nn.Module:
    section = config.encoders.get(name, EncoderConfig())
    chosen, n_inputs = _encoder_name(name, config, spec), spec.shape[0]
    if chosen == "resnet18":
        weights = section.weights if pretrained else None
        return ResNetEncoder(n_inputs, config.feature_dim, norm=config.norm, weights=weights)
    widths = _WIDTHS[chosen] if section.widths is None else section.widths
    if chosen == "cnn":
        return CNN(n_inputs, widths, config.feature_dim, norm=config.norm)
    if chosen == "snn":
        return SNN(n_inputs, widths, config.feature_dim, dropout=config.dropout)
    return MLP(n_inputs, widths, config.feature_dim, norm=config.norm, dropout=config.dropout)


def _fusion(config: ModelConfig, specs: Mapping[str, InputSpec]) -> nn.Module:
    kinds = sorted(spec.kind for spec in specs.values())
    fitting = "gated_bilinear" if kinds == ["image", "vector"] else "concat"
    chosen = fitting if config.fusion == "auto" else config.fusion
    dim, n = config.feature_dim, len(specs)
    if chosen == "gated_bilinear":
        return GatedBilinearFusion(dim, dim, dim, norm=config.norm, dropout=config.dropout)
    return ConcatFusion([dim] * n, dim, norm=config.norm, dropout=config.dropout)


def parameter_table(model: Classifier) -> list[tuple[str, int]]:
    """Trainable parameters of each modality's network, of the fusion with its head, and of all."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    table = [(name, count(branch)) for name, branch in model.branches.items()]
    if model.fusion is not None:
        table += [("fusion", count(model.fusion)), ("fused head", count(model.classifier))]
    return [*table, ("all", count(model))]
