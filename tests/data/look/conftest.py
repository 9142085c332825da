from __future__ import annotations

import numpy as np
import pytest

from distkd.data.manifest import Description, Fold, Modality
from distkd.data.shardset import ShardSet
from distkd.data.write import ShardWriter
from tests.data.look.scans import SHAPE, lesion, space_of, volume


@pytest.fixture(scope="session")
def brains(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Six cases with flair and t1, two without t1, one without target, one of other spacing and axes."""
    volumes = {
        name: Modality(kind="volume", dtype="int16", shape=(1, *SHAPE), codec="zarr", chunk=(1, 7, 6, 5))
        for name in ("flair", "t1")
    }
    description = Description(
        task="brains",
        problem="segmentation",
        container="zarr",
        class_names=["background", "oedema", "core"],
        modalities={
            **volumes,
            "age": Modality(kind="vector", dtype="float32", shape=(1,), codec="zarr", role="aux"),
            "seg": Modality(
                kind="volume", dtype="uint8", shape=(1, *SHAPE), codec="zarr", role="target", values=[0, 1, 2],
                compression="zstd",
            ),
        },
        source="made by the tests",
        licence="none",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("brains") / "shards"
    with ShardWriter(folder, description) as writer:
        for number in range(6):
            spacing = (1.0, 1.0, 3.0) if number == 5 else (1.0, 1.0, 1.0)
            signs = (1, 1, 1) if number == 5 else (-1, -1, 1)
            arrays = {"flair": volume("flair", number)[None], "age": np.array([50], np.float32)}
            if number not in (2, 3):
                arrays["t1"] = volume("t1", number)[None]
            if number != 4:
                arrays["seg"] = lesion(number)[None]
            space = space_of(np.diag([*np.multiply(spacing, signs), 1.0]), SHAPE)
            writer.add(f"case-{number}", arrays, patient=f"p{number}", label=None, space=space)
        writer.split([Fold(train=["p0", "p1"], val=["p2"], test=["p3", "p4"])], rule="by hand", seed=None)
    return ShardSet(folder)
