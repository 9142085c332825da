"""UCI Multiple Features: 1600 handwritten digits in six feature views, ten classes.

The data lies in the repository (shards/data/uci_mfeat, CC BY 4.0), so no --raw is needed. Every view describes the
same digit: a teacher sees all six, a student one weak view such as `fou` or `zer`. Each digit is its own patient.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np

from distkd.data.manifest import Description, Modality
from distkd.data.raw.recipe import Made, arguments, raw_file, run, tables_digest, track
from distkd.data.splits import patient_folds
from distkd.data.write import ShardWriter
from distkd.errors import DataError

NEEDS_RAW = False
EMBEDDED = Path(__file__).resolve().parent / "data" / "uci_mfeat"
VIEWS = {
    "fac": (216, "profile correlations"),
    "fou": (76, "Fourier coefficients"),
    "kar": (64, "Karhunen-Loeve coefficients"),
    "mor": (6, "morphological features"),
    "pix": (240, "means of 2 x 3 pixel windows"),
    "zer": (47, "Zernike moments"),
}
N_FOLDS = 5
VAL_SHARE = 1 / 16
"""Of what is not tested: 1200 to train, 80 to validate, 320 to test."""


def make(raw: Path | None, out: Path, *, seed: int = 0) -> Made:
    """Shard set of the digits; `raw` is the embedded folder unless it is given."""
    columns = _read(raw or EMBEDDED)
    description = Description(
        task="digit",
        class_names=[str(digit) for digit in range(10)],
        modalities={
            name: Modality(kind="vector", dtype="float32", shape=(width,), codec="npy", unit=unit)
            for name, (width, unit) in VIEWS.items()
        },
        excluded={"row": "place in the original file, which is sorted by digit"},
        source="UCI Machine Learning Repository, Multiple Features (R. Duin, 1998), doi 10.24432/C5HC70; "
        "1600 of its 2000 digits",
        licence="CC BY 4.0",
    )
    tables = tables_digest((raw or EMBEDDED) / "mfeat.npz")
    with ShardWriter(out, description, options=f"seed {seed}, tables {tables}") as writer:
        for i in track(np.argsort(columns["row"]).tolist(), "digits"):
            key = f"digit-{columns['row'][i]:04d}"
            writer.add(key, {name: columns[name][i] for name in VIEWS}, patient=key, label=int(columns["y"][i]))
        writer.split(
            patient_folds(writer.patients, writer.labels, n_folds=N_FOLDS, val_share=VAL_SHARE, seed=seed),
            rule=f"{N_FOLDS} folds by digit, stratified by class; 1/16 of the rest is the validation part",
            seed=seed,
        )
    assert writer.manifest is not None
    return Made(writer.manifest)


def _read(raw: Path) -> dict[str, np.ndarray]:
    path = raw_file(raw, "mfeat.npz", "the UCI multiple features (mfeat.npz)")
    try:
        # opened here: np.load leaves the file of a damaged archive open
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            columns = {name: file[name] for name in [*VIEWS, "y", "row"]}
    except KeyError as error:
        raise DataError(f"{str(path)!r} lacks an array: {error.args[0]}; copy it again") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}; copy it again") from error
    n = len(columns["y"])
    for name, array in columns.items():
        expected = (n, VIEWS[name][0]) if name in VIEWS else (n,)
        if array.shape != expected:
            raise DataError(
                f"{name!r} of {str(path)!r} has shape {array.shape}, expected {expected}; copy the file again"
            )
    return columns


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, raw=None)
    parser.add_argument("--raw", type=Path, metavar="DIR", help="folder with mfeat.npz (default: the embedded one)")
    return run(_make, parser, argv)


def _make(options: argparse.Namespace) -> Made:
    return make(options.raw, options.out, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
