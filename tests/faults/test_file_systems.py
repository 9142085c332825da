"""Faults of file systems and nodes are not the user's: they end with code 1, so that a job is tried again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distkd.base import World
from distkd.cli import INTERNAL, USER, main
from distkd.config import load
from distkd.data.manifest import MANIFEST
from distkd.data.shardset import ShardSet
from distkd.errors import CheckpointError, ConfigError, DataError, DiskError, DistkdError
from distkd.train import run as module
from distkd.train.checkpoint import find_latest
from distkd.train.export import load_export
from distkd.train.run import met_alone
from tests.data.toy import write_toy
from tests.data.toy_volumes import write_volumes
from tests.small import Small

OURS = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]


def failing(original: Callable[..., Any], number: int, concerns: Callable[..., bool]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if concerns(*args):
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    return call


def read_all(folder: Path) -> None:
    shards = ShardSet(folder)
    for name in shards.manifest.modalities:
        shards.read(0, [name])


@pytest.mark.parametrize("number", [*OURS, errno.EACCES])
@pytest.mark.parametrize("write", [write_toy, write_volumes], ids=["tars", "zarr"])
@pytest.mark.parametrize("call", ["open", "pread", "preadv", "stat"])
def test_a_shard_that_cannot_be_read_for_now_is_no_damaged_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object], call: str, number: int
):
    write(tmp_path / "set")
    shards = ShardSet(tmp_path / "set")
    name = next(iter(shards.manifest.modalities))
    modality = shards.manifest.modalities[name]

    def read() -> None:
        if call == "stat":
            ShardSet(tmp_path / "set")
        elif call == "preadv" and shards.manifest.container == "wds":
            shards.read_rows(name, [0], np.empty((1, *modality.shape), modality.dtype))
        else:
            read_all(tmp_path / "set")

    def concerns(what: Any, *_: object) -> bool:
        if call not in {"stat", "open"}:
            return True
        text = os.fspath(what) if isinstance(what, str | Path) else ""
        return str(tmp_path / "set") in text and not text.endswith((".json", "/set"))

    read()
    if call == "preadv" and shards.manifest.container == "wds":
        # rows that cannot be read together are read one by one, which names the sample
        monkeypatch.setattr(os, "pread", failing(os.pread, number, lambda *_: True))
    monkeypatch.setattr(os, call, failing(getattr(os, call), number, concerns))
    with pytest.raises(DistkdError) as caught:
        read()
    assert type(caught.value) is DiskError if number in OURS else isinstance(caught.value, DataError)
    if number in OURS:
        assert caught.value.local  # it speaks, whichever rank it is
        assert os.strerror(number) in str(caught.value)


@pytest.mark.parametrize("number", [*OURS, errno.EACCES])
def test_so_it_is_with_manifest_config_and_export(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    write_toy(tmp_path / "set")
    config = small.write(tmp_path, "teacher")
    reads: dict[type[DistkdError], Callable[[], object]] = {
        DataError: lambda: ShardSet(tmp_path / "set"),
        ConfigError: lambda: load(config),
        CheckpointError: lambda: load_export(small.root / "teacher"),
    }
    names = (MANIFEST, config.name, "model.json")
    broken = failing(Path.read_text, number, lambda path, *_: path.name in names)
    monkeypatch.setattr(Path, "read_text", broken)
    for kind, read in reads.items():
        with pytest.raises(DiskError if number in OURS else kind):
            read()


@pytest.mark.parametrize(
    "number, code",
    [(number, INTERNAL) for number in (*OURS, errno.ENOSPC, errno.EDQUOT, errno.EROFS)]
    + [(number, USER) for number in (errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG)],
)
def test_a_run_folder_that_cannot_be_made_is_the_users_only_where_the_path_is_wrong(
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
):
    config = small.write(tmp_path, "alone")
    monkeypatch.setattr(module, "write_config", failing(module.write_config, number, lambda *_: True))
    assert main(["train", str(config)]) == code
    folder = tmp_path / "runs" / "alone"
    words = f"distkd: cannot write run folder {folder}: {os.strerror(number)}; choose another --run.root\n"
    assert capsys.readouterr().err.endswith(words)


@pytest.mark.parametrize("number", [*OURS, errno.ENOSPC])
def test_what_a_rank_meets_alone_is_told_as_it_is(number: int):
    error = met_alone(OSError(number, os.strerror(number)), Path("runs/a"))
    assert isinstance(error, DiskError)
    assert error.local
    assert ("make room" in str(error)) == (number == errno.ENOSPC)
    assert str(error).endswith("start again to resume")
    other = OSError(errno.EACCES, "Permission denied")
    assert met_alone(other, Path("runs/a")) is other


def test_checkpoints_that_are_out_of_reach_are_not_called_damaged(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small.write(tmp_path, "alone", run={"checkpoint_every": 2})
    assert main(["train", str(config)]) == 0
    checkpoints = tmp_path / "runs" / "alone" / "checkpoints"
    newest = find_latest(checkpoints, World())
    assert newest is not None
    digest = module.checkpoint.digest  # pyright: ignore[reportPrivateImportUsage]
    # one that cannot be read is passed over as a damaged one is
    monkeypatch.setattr(module.checkpoint, "digest", failing(digest, errno.ESTALE, lambda path: newest in path.parents))
    older = find_latest(checkpoints, World())
    assert older is not None
    assert older < newest
    monkeypatch.setattr(module.checkpoint, "digest", failing(digest, errno.ESTALE, lambda path: True))
    with pytest.raises(DiskError, match=rf"cannot read checkpoints in {checkpoints} on .*: Stale file handle"):
        find_latest(checkpoints, World())
    monkeypatch.setattr(module.checkpoint, "digest", lambda path: "other")
    with pytest.raises(CheckpointError, match="is damaged"):
        find_latest(checkpoints, World())
