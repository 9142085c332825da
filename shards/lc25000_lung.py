"""LC25000 lung histology tiles in grey: benign, adenocarcinoma, squamous-cell carcinoma.

--raw DIR holds labels.csv (file, class_name, label, source_tile) and the images it names. Each tile is stored twice:
`tile` at 112 px (--tile: any size up to the raw one) for the teacher, and a box-filtered copy, `tile28` at 28 px, for
the student (--coarse: other sizes, or none where training makes the copies of `tile`). Grey, because colour alone
separates the classes at any size. Folds keep all copies of an original tile together; patients are not published.
Terms of the data: free to download for research (Borkowski et al. 2019, arXiv 1912.12142), no licence text.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from distkd.data.codec import IMAGE_FAULTS
from distkd.data.manifest import Description, Modality
from distkd.data.raw.recipe import Made, arguments, raw_file, read_table, run, tables_digest
from distkd.data.splits import patient_folds
from distkd.data.write import Sample, ShardWriter
from distkd.errors import ConfigError, DataError

NEEDS_RAW = True
FOLDER = "LC25000 lung tiles (labels.csv and images/)"
CLASS_NAMES = ["lung_n", "lung_aca", "lung_scc"]
TILE = 112
COARSE = (28,)
N_FOLDS = 5
VAL_SHARE = 0.15


def make(raw: Path | None, out: Path, *, tile: int = TILE, coarse: tuple[int, ...] = COARSE, seed: int = 0) -> Made:
    """Shard set of the tiles at `tile` pixels and at each coarse size."""
    if raw is None:
        raise DataError(f"no raw data; name with --raw the folder of {FOLDER}")
    if tile < 1:
        raise ConfigError(f"--tile is {tile}, expected a size of 1 pixel or more")
    wrong = [size for size in coarse if not 1 <= size < tile]
    if wrong or len(set(coarse)) != len(coarse):
        raise ConfigError(
            f"--coarse is {list(coarse)}, expected different sizes below the {tile} pixels of --tile, or none"
        )
    rows = read_table(raw_file(raw, "labels.csv", FOLDER), ["file", "class_name", "label", "source_tile"])
    sizes = {"tile": tile, **{f"tile{size}": size for size in coarse}}
    description = Description(
        task="lung_tissue",
        class_names=CLASS_NAMES,
        modalities={
            name: Modality(kind="image", dtype="uint8", shape=(size, size, 1), codec="png", unit="grey level")
            for name, size in sizes.items()
        },
        excluded={
            "colour": "the stain alone separates the classes at any size",
            "n_aug": "a property of the collection",
        },
        source="LC25000 (Borkowski et al. 2019, arXiv 1912.12142), lung part; one image per original tile by the "
        "clusters of LC25000-clean",
        licence="no licence text; free to download for research; not to be shipped",
    )
    order = sorted(rows, key=lambda row: row["file"])
    tables = tables_digest(raw / "labels.csv")
    with ShardWriter(out, description, options=f"coarse {coarse}, seed {seed}, tables {tables}") as writer:
        items = ((Path(row["file"]).stem, partial(_sample, raw, row, sizes)) for row in order)
        writer.add_all(items, total=len(order), label="tiles")
        writer.split(
            patient_folds(writer.patients, writer.labels, n_folds=N_FOLDS, val_share=VAL_SHARE, seed=seed),
            rule=f"{N_FOLDS} folds by original tile, stratified by class; {VAL_SHARE:g} of the rest for validation",
            seed=seed,
        )
    assert writer.manifest is not None
    return Made(writer.manifest)


def _sample(raw: Path, row: dict[str, str], sizes: dict[str, int]) -> Sample:
    if row["class_name"] not in CLASS_NAMES or row["label"] != str(CLASS_NAMES.index(row["class_name"])):
        raise DataError(
            f"{row['file']!r} has class {row['class_name']!r}, label {row['label']!r} in labels.csv, expected "
            f"{', '.join(f'{name} {label}' for label, name in enumerate(CLASS_NAMES))}; mend labels.csv"
        )
    grey = _grey(raw_file(raw, row["file"], FOLDER), sizes["tile"])
    arrays = {
        name: np.asarray(grey.resize((size, size), Image.Resampling.BOX))[:, :, None] for name, size in sizes.items()
    }
    return Sample(arrays, patient=f"{row['class_name']}-{row['source_tile']}", label=int(row["label"]))


def _grey(path: Path, least: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            grey = image.convert("L")
    except IMAGE_FAULTS as error:
        raise DataError(f"cannot read the image {str(path)!r}: {error}; copy it again") from error
    if grey.width != grey.height or grey.width < least:
        raise DataError(
            f"{str(path)!r} is {grey.width} x {grey.height} px, expected a square of at least {least}; leave it out, "
            "or make all tiles smaller with --tile"
        )
    return grey


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, raw=f"folder of {FOLDER}")
    parser.add_argument("--tile", type=int, default=TILE, metavar="PX", help=f"side of the tiles (default {TILE})")
    parser.add_argument(
        "--coarse",
        type=int,
        nargs="*",
        default=list(COARSE),
        metavar="PX",
        help="sizes of the student's copies (default 28); without a number none are stored",
    )
    return run(_make, parser, argv)


def _make(options: argparse.Namespace) -> Made:
    return make(options.raw, options.out, tile=options.tile, coarse=tuple(options.coarse), seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
