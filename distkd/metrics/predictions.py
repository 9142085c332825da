"""What a model said about each item of a split, and its CSV file (`<split>.predictions.csv`)."""

# Shapes: N items, C classes

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distkd.base import UNLABELLED
from distkd.errors import DataError, ShapeError
from distkd.files import write_text

__all__ = ["Predictions", "read_predictions", "write_predictions"]

_FIXED = ["key", "patient", "group", "label", "predicted"]


@dataclass(frozen=True)
class Predictions:
    """Items with their probabilities, each item once; the order of the items carries no meaning."""

    key: list[str]
    patient: list[str]
    group: list[str | None]
    label_N: np.ndarray
    """int64 class, or `UNLABELLED`."""
    probability_NC: np.ndarray
    """float64; rows sum to one, except after the `max` rule of `levels`."""
    class_names: list[str]

    def __post_init__(self) -> None:
        n, c = len(self.key), len(self.class_names)
        found = (len(self.patient), len(self.group), self.label_N.shape, self.probability_NC.shape)
        if found != (n, n, (n,), (n, c)):
            raise ShapeError(
                f"predictions of {n} keys and {c} classes have {found[0]} patients, {found[1]} groups, labels "
                f"{found[2]} and probabilities {found[3]}; expected {n}, {n}, {(n,)} and {(n, c)}"
            )
        twice = [key for key, count in Counter(self.key).items() if count > 1]
        assert not twice, f"{len(twice)} samples were evaluated more than once, first {sorted(twice)[:3]}"

    def __len__(self) -> int:
        return len(self.key)

    @property
    def predicted_N(self) -> np.ndarray:
        return self.probability_NC.argmax(axis=1)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Writes the CSV, sorted by key, whole or not at all.

    Columns: key, patient, group (empty if none), label (class name, empty if unknown), predicted (class name) and
    `p_<class name>` in class order. Probabilities are written so that they read back bit for bit.
    """
    names = predictions.class_names
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_FIXED + [f"p_{name}" for name in names])
    predicted_N = predictions.predicted_N
    for row in sorted(range(len(predictions)), key=predictions.key.__getitem__):
        label = int(predictions.label_N[row])
        table.writerow(
            [
                predictions.key[row],
                predictions.patient[row],
                predictions.group[row] or "",
                "" if label == UNLABELLED else names[label],
                names[predicted_N[row]],
                *(repr(float(p)) for p in predictions.probability_NC[row]),
            ]
        )
    write_text(path, text.getvalue())


def read_predictions(path: Path) -> Predictions:
    """Reads what `write_predictions` wrote.

    Raises:
        DataError: the file is missing or its columns or values are not those of a predictions file.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; `distkd eval RUN` writes it")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    header = rows[0] if rows else []
    if header[: len(_FIXED)] != _FIXED or not all(column.startswith("p_") for column in header[len(_FIXED) :]):
        raise DataError(
            f"{path} has the columns {','.join(header) or '(none)'}; expected {','.join(_FIXED)},p_<class>...; "
            f"write it again with `distkd eval RUN`"
        )
    names = [column[2:] for column in header[len(_FIXED) :]]
    number = {name: i for i, name in enumerate(names)} | {"": UNLABELLED}
    body = rows[1:]
    try:
        label_N = np.array([number[row[3]] for row in body], dtype=np.int64)
        probability_NC = np.array([[float(p) for p in row[len(_FIXED) :]] for row in body], dtype=np.float64)
        return Predictions(
            key=[row[0] for row in body],
            patient=[row[1] for row in body],
            group=[row[2] or None for row in body],
            label_N=label_N,
            probability_NC=probability_NC.reshape(len(body), len(names)),
            class_names=names,
        )
    except (IndexError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} has a damaged line ({type(error).__name__}: {error}); write it again with `distkd eval RUN`"
        ) from error
