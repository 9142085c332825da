"""Using a trained student: score a run's split, predict raw inputs, hand the export on."""

# Shapes: N items, C classes

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from distkd.base import Batch, InputSpec, World
from distkd.data.manifest import MANIFEST
from distkd.data.transform import Preprocess
from distkd.data.wds import ShardSet
from distkd.errors import DataError
from distkd.files import atomic_folder
from distkd.metrics.predictions import Predictions, write_predictions
from distkd.train.evaluate import evaluate, write_report
from distkd.train.export import Export, find_export, load_export
from distkd.train.job import dataset_of
from distkd.train.settings import Settings

__all__ = ["copy_export", "evaluate_run", "predict_files"]

IMAGES = {".png", ".jpg", ".jpeg"}


def evaluate_run(settings: Settings, run: Path, split: str) -> dict[str, float]:
    """Score a run's exported student on a split; writes `eval/<split>.json` and the predictions, returns the metrics.

    Raises:
        CheckpointError: the run has no export.
        DataError: the split is empty.
    """
    export, world = load_export(run), World()
    dataset = dataset_of(settings, world, list(export.config.modalities))
    model = export.load()
    report = evaluate(
        lambda batch: model(batch).logits_BC,
        model,
        dataset,
        split,
        settings.eval,
        micro_batch=settings.batch.per_rank(world),
        device=torch.device("cpu"),
        dtype=torch.float32,
        world=world,
    )
    about = {name: export.card[name] for name in ("method", "fold", "seed", "run", "selection")}
    write_report(run, report, about)
    return report.metrics


def copy_export(run: Path, output: Path | None) -> Path:
    """The export folder of a run, copied to `output` where one is given; its digest is checked."""
    export = load_export(run)
    export.load()
    if output is None or output.resolve() == export.folder.resolve():
        return export.folder
    with atomic_folder(output) as aside:
        for path in export.folder.iterdir():
            shutil.copy2(path, aside / path.name)
    return output


@torch.no_grad()
def predict_files(source: Path, inputs: Sequence[Path], output: Path) -> Path:
    """Predict raw inputs with the preprocessing that the student was trained with; writes `predictions.csv`.

    Inputs are shard sets, or, for a student of one modality, image files, `.npy` arrays with one row per item, or `.csv`
    tables with a header of feature names and an optional first column `key`.

    Raises:
        DataError: an input that the student cannot take, and what it takes.
    """
    export = load_export(find_export(source))
    model, preprocess = export.load(), export.preprocess
    keys: list[str] = []
    rows: list[np.ndarray] = []
    for path in inputs:
        for key, values in _items(path, export):
            made = {name: torch.as_tensor(array)[None] for name, array in preprocess.apply(values).items()}
            log_p = model(_batch_of_one(made, export)).logits_BC.double().log_softmax(dim=-1)
            keys.append(key)
            rows.append(log_p.exp().numpy()[0])
    predictions = Predictions(
        key=keys,
        patient=[""] * len(keys),
        group=[None] * len(keys),
        label_N=np.full(len(keys), -1, dtype=np.int64),
        probability_NC=np.stack(rows),
        class_names=export.class_names,
    )
    output.mkdir(parents=True, exist_ok=True)
    path = output / "predictions.csv"
    write_predictions(path, predictions)
    return path


def _batch_of_one(made: dict[str, torch.Tensor], export: Export) -> Batch:
    zero = torch.zeros(1, dtype=torch.int64)
    present = {name: torch.tensor([name in made]) for name in export.config.modalities}
    views = {name: made.get(name, torch.zeros(1, *export.specs[name].shape)) for name in export.config.modalities}
    return Batch(views=(views,), present=present, label_B=zero - 1, index_B=zero - 1, sample_B=zero, key_B=zero)


def _items(path: Path, export: Export) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Key and raw values by modality of every item of an input."""
    modalities = list(export.config.modalities)
    if (path / MANIFEST).is_file():
        shards = ShardSet(path)
        for sample, key in enumerate(shards.manifest.samples.key):
            yield key, shards.read(sample, modalities)
        return
    if not path.is_file():
        raise DataError(f"input {path} is neither a file nor a shard set; give {_accepted(export)}")
    if len(modalities) > 1:
        raise DataError(f"the model sees {', '.join(modalities)}; a single file cannot hold them, give a shard set")
    name, spec = modalities[0], export.specs[modalities[0]]
    suffix = path.suffix.lower()
    if spec.kind == "image" and suffix in IMAGES:
        yield path.stem, {name: _read_image(path, spec)}
    elif spec.kind == "vector" and suffix == ".csv":
        for key, row in _read_table(path, spec, export.preprocess, name):
            yield key, {name: row}
    elif spec.kind == "vector" and suffix == ".npy":
        table = np.atleast_2d(np.load(path, allow_pickle=False))
        if table.ndim != 2 or table.shape[1] != spec.shape[0]:
            raise DataError(f"{path} has shape {table.shape}, the student expects (items, {spec.shape[0]}) of {name!r}")
        for number, row in enumerate(table):
            yield f"{path.stem}-{number}", {name: row.astype(np.float32)}
    else:
        raise DataError(f"the student cannot take {path}; give {_accepted(export)}")


def _accepted(export: Export) -> str:
    kinds = {spec.kind for spec in export.specs.values()}
    single = len(export.specs) == 1
    files = ".png or .jpg files, " if single and kinds == {"image"} else ".npy or .csv files, " if single else ""
    return f"{files}or a shard set with {', '.join(export.specs)}"


def _read_image(path: Path, spec: InputSpec) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if spec.shape[0] == 1 else "RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"image {path} cannot be read: {error}") from error
    return pixels


def _read_table(path: Path, spec: InputSpec, preprocess: Preprocess, name: str) -> Iterator[tuple[str, np.ndarray]]:
    features = getattr(preprocess.inputs[name], "features", None) or [str(i) for i in range(spec.shape[0])]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [feature for feature in features if feature not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path} lacks {len(missing)} columns that the student needs, first {missing[:3]}")
        for number, row in enumerate(reader):
            try:
                values = [float(row[feature] or "nan") for feature in features]
            except ValueError as error:
                raise DataError(f"{path}, line {number + 2}: {error}; empty means missing") from error
            yield row.get("key") or f"{path.stem}-{number}", np.array(values, dtype=np.float32)
