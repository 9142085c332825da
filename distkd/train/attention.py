"""What a student with a pooled head looks at in a few samples of a split: `eval/<split>.attention.npz`, for the report.

Samples are chosen by key, label and patient alone, so that all runs of a study show the same ones, at any resolution.
"""

# Shapes: N chosen samples, C classes, K channels of a map of h x w places, H x W pixels

from __future__ import annotations

import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distkd.base import UNLABELLED
from distkd.data.dataset import Dataset
from distkd.data.fitted import DegradedInput, ImageInput
from distkd.data.manifest import Split
from distkd.errors import DistkdError
from distkd.files import write_bytes
from distkd.models.build import Classifier
from distkd.ops.attention import class_maps, normalised
from distkd.ops.draws import text_key

__all__ = ["choose_samples", "viewable", "write_attention"]

log = logging.getLogger(__name__)

FORMAT = 1
AT_MOST = 12
MAX_SIDE = 192
"""Pixels a side of a stored image; a larger one is averaged down."""


def choose_samples(dataset: Dataset, split: Split, per_class: int = 2) -> list[int]:
    """Numbers in the manifest of a few labelled samples, class by class, while they last of different patients:
    a function of the split's keys, labels and patients.
    """
    columns = dataset.shard_set.manifest.samples
    by_label: dict[int, list[int]] = {}
    for sample in dataset.split_samples(split).tolist():
        label = columns.label[sample]
        if label != UNLABELLED:
            by_label.setdefault(label, []).append(sample)
    ranked: list[tuple[int, int, int]] = []
    for label, samples in by_label.items():
        drawn = sorted(samples, key=lambda sample: (text_key(columns.key[sample]), columns.key[sample]))
        seen = Counter[str]()
        turns: list[int] = []
        for sample in drawn:
            turns.append(seen[columns.patient[sample]])
            seen[columns.patient[sample]] += 1
        first = [sample for _, sample in sorted(zip(turns, drawn, strict=True), key=lambda pair: pair[0])][:per_class]
        ranked += [(rank, label, sample) for rank, sample in enumerate(first)]
    kept = sorted(ranked)[:AT_MOST]  # of many classes the first of each before the second of any
    return [sample for _, _, sample in sorted(kept, key=lambda item: (item[1], item[0]))]


@torch.no_grad()
def write_attention(
    folder: Path,
    model: Classifier,
    dataset: Dataset,
    split: Split,
    *,
    device: torch.device,
    dtype: torch.dtype,
    per_class: int = 2,
) -> None:
    """Write `eval/<split>.attention.npz`, or remove it where the model has no map of an image; on the main rank.

    Local: no collective inside, and nothing that fails here ends a run, since other ranks are on their way to the next
    collective. The model's mode is put back.
    """
    path = folder / "eval" / f"{split}.attention.npz"
    try:
        content = _content(model, dataset, split, device, dtype, per_class)
        if content is None:
            path.unlink(missing_ok=True)  # of a run that had one
        else:
            write_bytes(path, content)
    except (OSError, DistkdError, torch.OutOfMemoryError) as error:
        log.warning("cannot write %s: %s; the report will lack this run's maps", path, error)


def _content(
    model: Classifier, dataset: Dataset, split: Split, device: torch.device, dtype: torch.dtype, per_class: int
) -> bytes | None:
    name = model.mapped_modality
    was_training = model.training
    model.eval()
    samples = [] if name is None else choose_samples(dataset, split, per_class)
    shown = [_show(model, dataset, sample, str(name), device, dtype) for sample in samples]
    model.train(was_training)
    found = [one for one in shown if one is not None]
    if name is None or not found:
        return None
    content: dict[str, Any] = {field: np.stack([one[field] for one in found]) for field in found[0]}
    about = {
        "format": np.int64(FORMAT),
        "class_names": np.array(dataset.class_names),
        "modality": np.array(name),
        "size": np.array(model.specs[name].shape[1:], dtype=np.int64),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **about, **content)
    return file.getvalue()


def _show(
    model: Classifier, dataset: Dataset, sample: int, name: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any] | None:
    """One sample as the model saw it and what it made of it; None where the image is missing or cannot be read.

    One at a time: the numbers do not depend on which others were chosen, and the largest image fits.
    """
    batch = dataset.batch([sample], epoch=0, train=False).to(device, dtype)
    if not len(batch) or not batch.present[name].item():
        return None
    out = model(batch)
    head, map_BKhw = model.branch(name).classifier, model.mapped_outputs(out).map_BKHW
    assert map_BKhw is not None
    maps_BChw = normalised(class_maps(map_BKhw.float(), head.weight.float()))
    probability_C = out.logits_BC[0].double().softmax(dim=-1).cpu()
    predicted = int(probability_C.argmax())
    about = dataset.describe(sample)
    return {
        "key": np.array(about["key"]),
        "label": np.int64(about["label"]),
        "predicted": np.int64(predicted),
        "probability": np.float64(probability_C[predicted].item()),
        "image": viewable(batch.inputs[name][0], dataset.preprocess.inputs[name]),
        "maps": maps_BChw[0].cpu().numpy().astype(np.float16),
    }


def viewable(image_CHW: Tensor, fitted: Any) -> np.ndarray:
    """uint8, (H, W) of grey and (H, W, 3) of colour, before the normalisation; any other channels as their mean."""
    sharp = fitted.image if isinstance(fitted, DegradedInput) else fitted
    assert isinstance(sharp, ImageInput), fitted
    made_CHW = image_CHW.float().cpu().numpy()
    mean_C, std_C = (np.array(values, dtype=np.float32)[:, None, None] for values in (sharp.mean, sharp.std))
    made_CHW = made_CHW * std_C + mean_C
    if len(made_CHW) != 3:
        made_CHW = made_CHW.mean(axis=0, keepdims=True)
    pixels_HWC = (np.clip(made_CHW, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    view = Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    scale = MAX_SIDE / max(view.size)
    if scale < 1:
        size = (max(1, round(view.width * scale)), max(1, round(view.height * scale)))
        view = view.resize(size, Image.Resampling.BOX)
    return np.asarray(view)
