"""Using a trained student: score a run's split, predict raw inputs, hand the export on."""

# Shapes: N items, C classes

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distkd.base import UNLABELLED, Batch, InputSpec, World
from distkd.data.fitted import DegradedInput
from distkd.data.manifest import MANIFEST, Split
from distkd.data.shardset import ShardSet
from distkd.data.transform import Preprocess
from distkd.errors import ConfigError, DataError
from distkd.files import atomic_folder
from distkd.metrics.predictions import Predictions, write_predictions
from distkd.train.attention import write_attention
from distkd.train.evaluate import evaluate, write_report
from distkd.train.export import Export, find_export, load_export
from distkd.train.job import dataset_of, split_digest
from distkd.train.settings import Settings

__all__ = ["copy_export", "evaluate_run", "predict_files"]

IMAGES = {".png", ".jpg", ".jpeg"}


def evaluate_run(settings: Settings, run: Path, split: Split) -> dict[str, float]:
    """Score a run's exported student on a split; writes `eval/<split>.json` and the predictions, returns the metrics.

    Raises:
        CheckpointError: the run has no export.
        ConfigError: the samples that the fold trains on are not those that the run was trained on.
        DataError: the split is empty.
    """
    export, world = load_export(run), World()
    dataset = dataset_of(settings, world, list(export.config.modalities))
    if export.card["split_digest"] != split_digest(dataset):
        raise ConfigError(
            f"run {run} was trained on other samples (fold {export.card['fold']} of {export.card['shards']}) than fold "
            f"{dataset.fold} of {dataset.shard_set.place} trains on, so split {split!r} may hold some of them; "
            "score the run's own fold, or use `distkd predict` on other data"
        )
    dataset.preprocess = export.preprocess
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
    write_attention(
        run,
        model,
        dataset,
        split,
        device=torch.device("cpu"),
        dtype=torch.float32,
        per_class=settings.eval.attention_samples,
    )
    return report.metrics


def copy_export(run: Path, output: Path | None) -> Path:
    """The export folder of a run, copied to `output` where one is given; its digest is checked.

    Raises:
        ConfigError: `output` holds something else than an export, which would be lost.
    """
    export = load_export(run)
    export.load()
    if output is None or output.resolve() == export.folder.resolve():
        return export.folder
    ours = {path.name for path in export.folder.iterdir()}
    if output.is_file() or (output.is_dir() and {path.name for path in output.iterdir()} - ours):
        raise ConfigError(f"output {output} exists and is no export; name a new folder with --output")
    with atomic_folder(output) as aside:
        for path in export.folder.iterdir():
            shutil.copy2(path, aside / path.name)
    return output


@torch.no_grad()
def predict_files(source: Path, inputs: Sequence[Path], output: Path) -> Path:
    """Predict raw inputs with the preprocessing that the student was trained with; writes `predictions.csv`.

    Inputs are shard sets, or, for a student of one modality, image files, `.npy` arrays with one row per item, or
    `.csv` tables with a header of feature names and an optional first column `key`; an empty cell is a missing value.

    Patient, group and label are those of a shard set's manifest; a label of a class that the student does not know is
    left empty. The `predictions.csv` of an earlier call is gone if this one fails.

    Raises:
        DataError: an input that the student cannot take, and what it takes.
    """
    made_csv = output / "predictions.csv"
    if any(path.resolve() == made_csv.resolve() for path in inputs):
        raise DataError(f"input {made_csv} would be overwritten; name another folder with --output")
    with _writing(made_csv):
        made_csv.unlink(missing_ok=True)
    export = load_export(find_export(source))
    model, preprocess = export.load(), export.preprocess
    origin: dict[str, Path] = {}
    rows: list[np.ndarray] = []
    about: list[_About] = []
    for path in inputs:
        for key, values, known in _items(path, export):
            if key in origin:
                raise DataError(f"two items have the key {key!r}: in {origin[key]} and in {path}; rename one")
            try:
                made = {name: torch.as_tensor(array)[None] for name, array in preprocess.apply(values).items()}
            except DataError as error:
                raise DataError(
                    f"{path}, item {key!r}: {error}{_or_coarse(values, preprocess)}; "
                    "prepare it as the items of the shard set were"
                ) from error
            log_p = model(_batch_of_one(made, export)).logits_BC.double().log_softmax(dim=-1)
            origin[key] = path
            rows.append(log_p.exp().numpy()[0])
            about.append(known)
    if not rows:
        raise DataError(f"no item in {', '.join(map(str, inputs))}; give {_accepted(export)}")
    keys = list(origin)
    predictions = Predictions(
        key=keys,
        patient=[known.patient for known in about],
        group=[known.group for known in about],
        label_N=np.array([known.label for known in about], dtype=np.int64),
        probability_NC=np.stack(rows),
        class_names=export.class_names,
    )
    with _writing(made_csv):
        write_predictions(made_csv, predictions)
    return made_csv


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; name another folder with --output") from error


@dataclass(frozen=True, slots=True)
class _About:
    """What a shard set says of an item; files say nothing."""

    patient: str = ""
    group: str | None = None
    label: int = UNLABELLED
    """By the student's classes."""


def _or_coarse(values: Mapping[str, np.ndarray], preprocess: Preprocess) -> str:
    """The other size that a student of a degraded copy takes, for an image that has none of both."""
    for name, fitted in preprocess.inputs.items():
        raw = values.get(name, values.get(preprocess.source(name)))
        if not isinstance(fitted, DegradedInput) or fitted.factor == 1 or raw is None:
            continue
        (height, width, channels), factor = fitted.image.shape, fitted.factor
        if raw.shape[:2] != (height, width) and not (height % factor or width % factor):
            return f" or, of an image scanned at the coarse resolution, {(height // factor, width // factor, channels)}"
    return ""


def _batch_of_one(made: dict[str, torch.Tensor], export: Export) -> Batch:
    zero = torch.zeros(1, dtype=torch.int64)
    present = {name: torch.tensor([name in made]) for name in export.config.modalities}
    views = {name: made.get(name, torch.zeros(1, *export.specs[name].shape)) for name in export.config.modalities}
    return Batch(views=(views,), present=present, label_B=zero - 1, index_B=zero - 1, sample_B=zero, key_B=zero)


def _items(path: Path, export: Export) -> Iterator[tuple[str, dict[str, np.ndarray], _About]]:
    """Key, raw values by modality, and what is known of every item of an input."""
    modalities = list(export.config.modalities)
    if (path / MANIFEST).is_file():
        shards = ShardSet(path)
        stored = set(shards.manifest.modalities)
        # a coarse copy is made of the sharp image, unless the set has it as it was scanned
        names = [name if name in stored else export.preprocess.source(name) for name in modalities]
        columns = shards.manifest.samples
        numbers = {name: number for number, name in enumerate(export.class_names)}
        label_of = {UNLABELLED: UNLABELLED}
        label_of |= {i: numbers.get(name, UNLABELLED) for i, name in enumerate(shards.manifest.class_names)}
        for sample, key in enumerate(columns.key):
            known = _About(columns.patient[sample], columns.group[sample], label_of[columns.label[sample]])
            yield key, shards.read(sample, dict.fromkeys(names)), known
        return
    if not path.is_file():
        raise DataError(f"input {path} is neither a file nor a shard set; give {_accepted(export)}")
    if len(modalities) > 1:
        raise DataError(f"the model sees {', '.join(modalities)}; a single file cannot hold them, give a shard set")
    name, spec = modalities[0], export.specs[modalities[0]]
    suffix = path.suffix.lower()
    if spec.kind == "image" and suffix in IMAGES:
        yield path.stem, {name: _read_image(path, spec)}, _About()
    elif spec.kind == "vector" and suffix == ".csv":
        for key, row in _read_table(path, spec, export.preprocess, name):
            yield key, {name: row}, _About()
    elif spec.kind == "vector" and suffix == ".npy":
        for number, row in enumerate(_read_array(path, spec, name)):
            yield f"{path.stem}-{number}", {name: row.astype(np.float32)}, _About()
    else:
        raise DataError(f"the student cannot take {path}; give {_accepted(export)}")


def _accepted(export: Export) -> str:
    kinds = {spec.kind for spec in export.specs.values()}
    single = len(export.specs) == 1
    files = ".png or .jpg files, " if single and kinds == {"image"} else ".npy or .csv files, " if single else ""
    return f"{files}or a shard set with {', '.join(export.specs)}"


def _read_image(path: Path, spec: InputSpec) -> np.ndarray:
    """Upright, as the recipes store it."""
    from PIL import Image, ImageOps

    from distkd.data.codec import IMAGE_FAULTS

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"image {path} has pixels of mode {image.mode}, expected 8 bits a channel; convert it as the "
                    "images that the student was trained on"
                )
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("L" if spec.shape[0] == 1 else "RGB"))
    except IMAGE_FAULTS as error:
        raise DataError(f"image {path} cannot be read: {error}; copy it again") from error
    return pixels


def _read_array(path: Path, spec: InputSpec, name: str) -> np.ndarray:
    try:
        table = np.atleast_2d(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:  # a pickle inside is a ValueError
        raise DataError(f"{path} cannot be read: {error}; give a plain array of numbers") from error
    if table.ndim != 2 or table.shape[1] != spec.shape[0] or table.dtype.kind not in "fiub":
        raise DataError(
            f"{path} has {table.dtype} values of shape {table.shape}, the student expects numbers of shape "
            f"(items, {spec.shape[0]}) of {name!r}"
        )
    return table


def _read_table(path: Path, spec: InputSpec, preprocess: Preprocess, name: str) -> Iterator[tuple[str, np.ndarray]]:
    features = getattr(preprocess.inputs[name], "features", None) or [str(i) for i in range(spec.shape[0])]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            lines = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}; give a table in UTF-8 with commas") from error
    missing = [feature for feature in features if feature not in header]
    if missing:
        raise DataError(f"{path} lacks {len(missing)} columns that the student needs, first {missing[:3]}")
    for number, (line, row) in enumerate(lines):
        if None in row or None in row.values():
            raise DataError(f"{path}, line {line}: the number of cells is not that of the header ({len(header)})")
        try:
            values = [float(row[feature] or "nan") for feature in features]
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}; empty means missing") from error
        yield row.get("key") or f"{path.stem}-{number}", np.array(values, dtype=np.float32)
