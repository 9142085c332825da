"""A trained model alone, with all that is needed to use it: weights, architecture, preprocessing, class names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distkd.base import InputSpec
from distkd.data.dataset import Dataset
from distkd.data.transform import Preprocess
from distkd.errors import CheckpointError, ConfigError, DiskError
from distkd.files import atomic_folder, digest, raise_disk_fault, read_json, write_json
from distkd.models.build import Classifier, ModelConfig, build

__all__ = ["Export", "find_export", "load_export", "write_export"]

FORMAT = 1
WEIGHTS, MODEL = "student.safetensors", "model.json"


@dataclass(frozen=True, slots=True)
class Export:
    """What a folder of weights claims about itself."""

    folder: Path
    card: dict[str, Any]
    config: ModelConfig
    specs: dict[str, InputSpec]

    @property
    def class_names(self) -> list[str]:
        return self.card["class_names"]

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_dict(self.card["preprocess"])

    def load(self) -> Classifier:
        """The model with its weights, in eval mode, without gradients.

        Raises:
            CheckpointError: the weights are damaged or of another model.
        """
        # pretrained: the weights that the training started from are not needed, nor on this machine
        model = build(self.config, self.specs, len(self.class_names), seed=0, pretrained=False)
        path = self.folder / WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has {MODEL} but no {WEIGHTS}; export again")
        if digest(path) != self.card["sha256"]:
            raise CheckpointError(
                f"{path} is not the file that {MODEL} was written for (SHA-256 differs); export again"
            )
        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} does not hold the model that {MODEL} describes: {error}; only safetensors are accepted, no "
                "pickles: export again"
            ) from error
        return model.eval().requires_grad_(False)


def write_export(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    config: ModelConfig,
    dataset: Dataset,
    about: Mapping[str, Any],
) -> None:
    """Replace an export folder; `about` is what else the model card says (method, step, fold, metrics)."""
    with atomic_folder(folder) as aside:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, aside / WEIGHTS)
        except SafetensorError as error:
            raise DiskError(
                f"cannot write {folder}: {error}; make room, then start again, which makes the export alone"
            ) from error
        specs = {name: dataset.input_specs[name] for name in config.modalities}
        card = {
            "format": FORMAT,
            "task": dataset.task,
            "class_names": list(dataset.class_names),
            "model": config.model_dump(mode="json"),
            "inputs": {name: {"kind": spec.kind, "shape": list(spec.shape)} for name, spec in specs.items()},
            "preprocess": dataset.preprocess.only(config.modalities).to_dict(),
            **about,
            "sha256": digest(aside / WEIGHTS),
        }
        write_json(aside / MODEL, card)


def find_export(path: Path) -> Path:
    """The export folder that a path means: itself, or that of a run folder.

    Raises:
        CheckpointError: neither, with what was found.
    """
    for folder in (path, path / "export"):
        if (folder / MODEL).is_file():
            return folder
    if path.suffix in {".pt", ".pth", ".pkl", ".bin", ".ckpt"}:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read; only safetensors exports are accepted, "
            "written by `distkd train` or `distkd export`"
        )
    if (path / "config.yaml").exists():
        raise CheckpointError(f"run {path} has no export yet; finish it with `distkd train {path / 'config.yaml'}`")
    raise CheckpointError(
        f"no export in {path}: expected {MODEL} there or in {path / 'export'}; train the teacher first"
    )


def load_export(path: Path) -> Export:
    """Read the card of an export, not yet its weights.

    Raises:
        CheckpointError: missing, unreadable, or a pickle where weights are expected.
        ConfigError: written by a newer version.
        DiskError: the file system cannot give it.
    """
    folder = find_export(path)
    try:
        card: dict[str, Any] = read_json(folder / MODEL)
        if card["format"] > FORMAT:
            raise ConfigError(
                f"{folder / MODEL} has format {card['format']}, this version reads up to {FORMAT}; update distkd"
            )
        specs = {name: InputSpec(item["kind"], tuple(item["shape"])) for name, item in card["inputs"].items()}
        return Export(folder, card, ModelConfig(**card["model"]), specs)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, OSError):
            raise_disk_fault(str(folder / MODEL), error)
        raise CheckpointError(f"{folder / MODEL} cannot be read: {error}; export the teacher again") from error
