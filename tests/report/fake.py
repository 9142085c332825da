"""Run folders with the documented files and invented, regular contents; no training behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distkd.metrics.classification import classification_metrics

__all__ = ["edit_config", "evaluation", "fake_maps", "fake_run", "fake_study"]

CLASSES = ["II", "III", "IV"]


def evaluation(
    accuracy: float, *, n: int = 100, class_names: list[str] = CLASSES, level: str = "sample"
) -> dict[str, Any]:
    """A file of metrics whose accuracy is exactly a multiple of 1 / n; mistakes go to the next class."""
    c = len(class_names)
    label = np.arange(n) % c
    wrong = np.arange(n) < round((1 - accuracy) * n)
    probability = np.eye(c)[np.where(wrong, (label + 1) % c, label)] * 0.7 + 0.3 / c
    found = classification_metrics(probability, label, class_names).to_dict()
    levels = {name: {key: found[key] for key in ("n", "metrics", "per_class")} for name in (level, "patient")}
    return {"split": "test", "level": level, "levels": levels, **found}


def fake_run(
    folder: Path,
    *,
    method: str = "supervised",
    modalities: tuple[str, ...] = ("path",),
    seed: int = 0,
    fold: int = 0,
    test: dict[str, Any] | None = None,
    state: str | None = "done",
    message: str = "",
    teacher: Path | None = None,
    labelled: int | None = None,
    degraded: dict[str, Any] | None = None,
    steps: int = 40,
    task: str = "glioma grading",
    shards: Path = Path("shards/glioma"),
) -> Path:
    """Writes the files that a run of these settings leaves; `test=None`: not evaluated."""
    folder.mkdir(parents=True)
    config = {
        "run": {"name": folder.name, "seed": seed, "root": str(folder.parent)},
        "data": {"shards": str(shards), "fold": fold, "labelled": labelled, "degraded": degraded or {}},
        "model": {"modalities": list(modalities)},
        "method": {"name": method},
        "teacher": {"export": None if teacher is None else str(teacher / "export")},
        "eval": {"select": "best", "metric": "balanced_accuracy"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if state is not None:
        outcome = {"state": state, "kind": "", "step": steps, "attempt": 1, "message": message}
        (folder / "outcome.json").write_text(json.dumps(outcome))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "world_size": 2}))
    (folder / "export").mkdir()
    model = {"task": task, "class_names": CLASSES if test is None else test["class_names"]}
    (folder / "export" / "model.json").write_text(json.dumps(model))
    if test is not None:
        (folder / "eval").mkdir()
        (folder / "eval" / "test.json").write_text(json.dumps({"method": method, "fold": fold, "seed": seed, **test}))
    with (folder / "metrics.jsonl").open("w") as file:
        for record in records(method, seed, steps):
            file.write(json.dumps(record) + "\n")
    return folder


def fake_maps(run: Path, keys: list[str], *, modality: str = "path", side: int = 8, **changes: Any) -> Path:
    """The maps of a finished run, one sample a key, labels in turn, every second prediction wrong; `changes` are
    fields to have otherwise, None to leave out."""
    n, c = len(keys), len(CLASSES)
    draws = np.random.default_rng(n)
    label = np.arange(n) % c
    content = {
        "format": 1,
        "class_names": CLASSES,
        "modality": modality,
        "size": [side, side],
        "key": keys,
        "label": label,
        "predicted": (label + np.arange(n) % 2) % c,
        "probability": np.linspace(0.5, 0.9, n),
        "image": np.stack([np.full((side, side, 3), 17 * int(key[1:]), dtype=np.uint8) for key in keys]),
        "maps": draws.random((n, c, 4, 4)).astype(np.float16),
    } | changes
    path = run / "eval" / "test.attention.npz"
    arrays: dict[str, Any] = {name: np.array(value) for name, value in content.items() if value is not None}
    np.savez_compressed(path, **arrays)
    return path


def records(method: str, seed: int, steps: int) -> list[dict[str, Any]]:
    draws = np.random.default_rng(seed)
    parts = {"supervised": ["task"], "logit_kd": ["task", "kl"]}.get(method, ["task", "kl_mean_teacher", "kl", "nce"])
    written: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        decay = 0.25 - 0.02 * len(parts) + np.exp(-step / (steps / 4)) + draws.normal(0, 0.02)
        record: dict[str, Any] = {"step": step, "epoch": step // 10, "samples": step * 32, "loss": decay * len(parts)}
        record["parts"] = {name: decay * (1 + 0.3 * i) for i, name in enumerate(parts)}
        record |= {
            "gauges": {},
            "lr": 1e-3 / len(parts) * (1 - step / steps),
            "grad_norm": 2 * decay,
            "timings": {"data": 0.01},
        }
        if len(parts) > 2:
            record["gauges"] = {f"weight/{name}": 0.5 + 0.4 * np.sin(step / 9 + i) for i, name in enumerate(parts[1:])}
            record["gauges"] |= {f"cosine/{name}|task": np.cos(step / 12 + i) * 0.6 for i, name in enumerate(parts[1:])}
        written.append(record)
        if step % 10 == 0:
            score = 0.8 + 0.03 * len(parts) - 0.5 * np.exp(-step / (steps / 4)) + draws.normal(0, 0.01)
            written.append(
                {
                    "step": step,
                    "epoch": step // 10,
                    "val": {"accuracy": score, "balanced_accuracy": score - 0.03, "auc_micro": min(score + 0.05, 1)},
                }
            )
    return written


def fake_study(root: Path, *, seeds: int = 3, folds: int = 1) -> Path:
    """Teacher, student alone, logit KD and the distilled student; the last gains, the third does not."""
    for fold in range(folds):
        for seed in range(seeds):
            tail = f"f{fold}-s{seed}"
            small = 0.01 * ((seed + fold) % 3)
            teacher = fake_run(
                root / f"teacher-{tail}",
                modalities=("path", "omics"),
                seed=seed,
                fold=fold,
                test=evaluation(0.95 - small),
            )
            common: dict[str, Any] = {"seed": seed, "fold": fold}
            fake_run(root / f"alone-{tail}", test=evaluation(0.80 + small), **common)
            fake_run(
                root / f"kd-{tail}",
                method="logit_kd",
                teacher=teacher,
                test=evaluation(0.80 + 2 * small - 0.01),
                **common,
            )
            fake_run(
                root / f"dc-{tail}",
                method="dc_distill",
                teacher=teacher,
                test=evaluation(0.85 + small + 0.01 * (seed % 2)),
                **common,
            )
    return root


def edit_config(folder: Path, section: str, key: str, value: Any) -> None:
    """Sets one value in a run's config."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config[section][key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
