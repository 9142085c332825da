"""Copies on a machine's own disk: made once, whole or not at all, and nothing of a run depends on them."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distkd.base import World
from distkd.cli import DONE, INTERNAL, USER, main
from distkd.data import scratch as module
from distkd.data.config import DataConfig
from distkd.data.manifest import MANIFEST
from distkd.data.scratch import CopiedSet, copy_set, local_copy, open_copied
from distkd.data.shardset import ShardSet
from distkd.errors import ConfigError, DataError, DiskError, SampleError
from distkd.files import digest, read_json
from distkd.train.job import assemble
from distkd.train.loop import train
from tests.data.toy import write_toy
from tests.data.toy_volumes import write_volumes
from tests.laws.common import ending, run_steps, settings_of, train_until
from tests.small import Small

COPY = "import sys; from pathlib import Path; from distkd.data.scratch import copy_set; "
COPY += "print(copy_set(Path(sys.argv[1]), Path(sys.argv[2]), threads=1))"


def files_of(folder: Path) -> dict[str, str]:
    """Names and digests."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in folder.rglob("*") if path.is_file()}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.rglob("*.tar")}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def start_copy(folder: Path, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COPY, str(folder), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("write", [write_toy, write_volumes], ids=["tars", "zarr"])
def test_a_copy_is_the_set_byte_for_byte_and_for_its_owner_alone(tmp_path: Path, write: Any):
    write(tmp_path / "shards")
    place = copy_set(tmp_path / "shards", tmp_path / "local" / "disk")
    assert place == tmp_path / "local" / "disk" / f"shards-{digest(tmp_path / 'shards' / MANIFEST)[:12]}"
    found = files_of(place)
    del found[".complete.json"]
    assert found == files_of(tmp_path / "shards")
    assert place.stat().st_mode & 0o777 == 0o700
    ShardSet(place).verify()


def test_a_complete_copy_is_used_without_reading_the_original(toy_folder: Path, tmp_path: Path):
    place = copy_set(toy_folder, tmp_path / "local")
    for tar in toy_folder.glob("*.tar"):
        tar.unlink()
    assert copy_set(toy_folder, tmp_path / "local") == place


def test_another_set_of_the_same_name_gets_a_copy_of_its_own(tmp_path: Path):
    write_toy(tmp_path / "one" / "shards")
    write_toy(tmp_path / "two" / "shards", n_samples=30)
    places = [copy_set(tmp_path / name / "shards", tmp_path / "local") for name in ("one", "two")]
    assert [len(ShardSet(place)) for place in places] == [48, 30]


def test_a_set_on_that_disk_is_not_copied(toy_folder: Path):
    assert copy_set(toy_folder, toy_folder.parent) == toy_folder
    assert list(toy_folder.parent.iterdir()) == [toy_folder]


def test_names_of_the_environment_are_filled_in(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "local"))
    monkeypatch.setenv("JOB", "17")
    assert local_copy(toy_folder, "$NODE_DISK/${JOB}x").parent == tmp_path / "local" / "17x"
    monkeypatch.setenv("JOB", "")
    with pytest.raises(ConfigError, match=r"data\.scratch=\$NODE_DISK/\$JOB: JOB is not set in the environment"):
        local_copy(toy_folder, "$NODE_DISK/$JOB")


def test_where_there_is_no_shard_set_that_is_the_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"no manifest\.json in"):
        copy_set(tmp_path / "nothing", tmp_path / "local")
    assert not (tmp_path / "local").exists()


# what goes wrong


def test_a_damaged_original_is_an_error_that_names_the_shard(toy_folder: Path, tmp_path: Path):
    tars = sorted(toy_folder.glob("*.tar"))
    flip_a_byte(tars[1])
    with pytest.raises(DataError, match=rf"'{tars[1].name}' of '{toy_folder}' has SHA-256 \w+\.\.\., manifest says"):
        local_copy(toy_folder, str(tmp_path / "local"))
    os.truncate(tars[1], 100)
    with pytest.raises(DataError, match=rf"'{tars[1].name}' is truncated: 100 bytes"):
        local_copy(toy_folder, str(tmp_path / "local"))
    tars[1].unlink()
    with pytest.raises(DataError, match=rf"cannot read '{tars[1]}': No such file"):
        local_copy(toy_folder, str(tmp_path / "local"))
    (place,) = (path for path in (tmp_path / "local").iterdir() if path.is_dir())
    assert not {tars[1].name, f".{tars[1].name}.part", MANIFEST} & {path.name for path in place.iterdir()}


def test_without_room_it_is_read_where_it_lies(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 29))
    assert local_copy(toy_folder, str(tmp_path / "local")) == toy_folder
    assert capsys.readouterr().err == (
        f"distkd: {platform.node()}: warning: no room for shard set '{toy_folder}' in '{tmp_path / 'local'}': 1.00 GiB "
        f"are needed, 0.50 are free; free some space, or name another folder; reads it from '{toy_folder}' instead\n"
    )
    assert local_copy(toy_folder, str(tmp_path / "local"), speaks=False) == toy_folder
    assert capsys.readouterr().err == ""
    assert type(open_copied(toy_folder, str(tmp_path / "local"))) is ShardSet
    with pytest.raises(DiskError, match="no room"):
        copy_set(toy_folder, tmp_path / "local")


def test_a_folder_that_cannot_be_made_is_a_warning_too(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    assert local_copy(toy_folder, str(tmp_path / "file" / "local")) == toy_folder
    assert "Not a directory; name another folder on a disk of this machine; reads it from" in capsys.readouterr().err


def test_a_disk_that_fills_up_meanwhile_leaves_no_half_file(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        assert local_copy(toy_folder, str(tmp_path / "local")) == toy_folder
    assert "No space left on device; free some space, or name another folder" in capsys.readouterr().err
    (place,) = (path for path in (tmp_path / "local").iterdir() if path.is_dir())
    assert list(place.iterdir()) == []
    ShardSet(local_copy(toy_folder, str(tmp_path / "local"))).verify()


def _owner_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this name belong to another user from now on."""

    def given_away(about: os.stat_result) -> os.stat_result:
        return os.stat_result((*about[:4], 54321, *about[5:]))

    lstat, fstat = Path.lstat, os.fstat
    monkeypatch.setattr(
        Path, "lstat", lambda path: given_away(lstat(path)) if path.name.endswith(name) else lstat(path)
    )

    def of_descriptor(descriptor: int) -> os.stat_result:
        about = fstat(descriptor)
        return given_away(about) if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name) else about

    monkeypatch.setattr(module.os, "fstat", of_descriptor)


@pytest.mark.parametrize("which", ["", ".lock"], ids=["folder", "lock"])
def test_what_another_user_has_put_there_is_not_used(
    toy_folder: Path, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / "local"
    place = copy_set(toy_folder, target)
    if which:
        (place / ".complete.json").unlink()  # a complete copy of one's own needs no lock
    capsys.readouterr()
    theirs = target / f".{place.name}.lock" if which else place
    if os.geteuid() == 0:
        os.chown(theirs, 54321, -1)
    else:
        _owner_of(theirs.name, monkeypatch)
    before = files_of(target)
    assert local_copy(toy_folder, str(target)) == toy_folder
    assert capsys.readouterr().err == (
        f"distkd: {platform.node()}: warning: '{theirs}' belongs to user 54321, who could read and change what is "
        f"copied there; name another folder, for example one with $USER in its name; reads it from '{toy_folder}' "
        "instead\n"
    )
    assert files_of(target) == before


@pytest.mark.parametrize("which", ["folder", "lock"])
def test_a_link_is_not_followed(toy_folder: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]):
    place = copy_set(toy_folder, tmp_path / "elsewhere")
    lock = place.with_name(f".{place.name}.lock")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / (place if which == "folder" else lock).name).symlink_to(place if which == "folder" else lock)
    assert local_copy(toy_folder, str(tmp_path / "local")) == toy_folder
    words = {
        "folder": "is a link or a file, not the folder of a copy; remove it",
        "lock": "symbolic links; name another",
    }
    assert words[which] in capsys.readouterr().err
    assert len(list((tmp_path / "local").iterdir())) == 1


def test_a_folder_that_others_could_read_is_closed(toy_folder: Path, tmp_path: Path):
    place = copy_set(toy_folder, tmp_path / "local")
    before = inodes(place)
    place.chmod(0o755)
    assert copy_set(toy_folder, tmp_path / "local") == place
    assert place.stat().st_mode & 0o777 == 0o700
    assert inodes(place) == before


def test_a_folder_that_others_could_write_to_is_made_anew(toy_folder: Path, tmp_path: Path):
    place = copy_set(toy_folder, tmp_path / "local")
    tar = min(place.glob("*.tar"))
    flip_a_byte(tar)  # of the right size, beside a marker that says that all is well
    (place / "planted").symlink_to(tmp_path)
    place.chmod(0o770)
    assert copy_set(toy_folder, tmp_path / "local") == place
    assert place.stat().st_mode & 0o777 == 0o700
    assert not (place / "planted").is_symlink()
    ShardSet(place).verify()


def test_an_original_that_is_out_of_reach_for_now_is_no_damaged_set(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    opened = Path.open

    def stale(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".tar" and path.parent == toy_folder:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", stale)
    assert local_copy(toy_folder, str(tmp_path / "local")) == toy_folder
    assert "Stale file handle; that is a fault of the file system" in capsys.readouterr().err


@pytest.mark.parametrize("hurt", [lambda tar: os.truncate(tar, 100), Path.unlink], ids=["cut off", "gone"])
def test_a_file_that_a_copy_lost_is_copied_again_and_no_other(toy_folder: Path, tmp_path: Path, hurt: Any):
    place = copy_set(toy_folder, tmp_path / "local")
    before, tar = inodes(place), min(place.glob("*.tar"))
    hurt(tar)
    assert copy_set(toy_folder, tmp_path / "local") == place
    after = inodes(place)
    assert {name for name in before if after[name] != before[name]} <= {tar.name}
    ShardSet(place).verify()


def test_a_damaged_copy_is_named_when_it_is_read(toy_folder: Path, tmp_path: Path):
    shards = open_copied(toy_folder, str(tmp_path / "local"))
    for tar in shards.folder.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(SampleError, match=rf"of '{shards.folder}', a copy of '{toy_folder}' that may be removed"):
        shards.read(0, ["slide"])


# several processes


def test_of_several_processes_one_copies_and_the_others_wait(toy_folder: Path, tmp_path: Path):
    target = tmp_path / "local"
    target.mkdir()
    name = f"shards-{digest(toy_folder / MANIFEST)[:12]}"
    with (target / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [start_copy(toy_folder, target) for _ in range(2)]
        for process in processes:  # each has found the lock taken before it is given back
            assert process.stderr is not None
            assert "waits for another process, which copies" in process.stderr.readline()
        assert not (target / name).exists()
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [out for out, _ in said] == [f"{target / name}\n"] * 2
    assert sum(err.count(": copied shard set") for _, err in said) == 1


def test_a_killed_copy_goes_on_where_it_was(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [shard.file for shard in ShardSet(toy_folder).manifest.shards]
    assert len(files) > 2
    last = toy_folder / files[-1]
    content = last.read_bytes()
    last.unlink()
    os.mkfifo(last)
    process = start_copy(toy_folder, tmp_path / "local")
    with last.open("wb") as pipe:  # opens when the copy has come to this file
        pipe.write(content[: len(content) // 2])
        pipe.flush()
        process.send_signal(signal.SIGKILL)
        assert process.wait(240) == -signal.SIGKILL
        last.unlink()
    last.write_bytes(content)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()

    (place,) = (path for path in (tmp_path / "local").iterdir() if path.is_dir())
    before = inodes(place)
    assert set(before) == set(files[:-1])
    flip_a_byte(place / files[0])
    assert copy_set(toy_folder, tmp_path / "local") == place
    after = inodes(place)
    assert {name for name in before if after[name] != before[name]} == {files[0]}
    assert "were there" in capsys.readouterr().err
    ShardSet(place).verify()
    assert not list(place.glob(".*.part"))


def test_a_long_copy_says_how_far_it_is(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(module, "_SAY_EVERY_S", 0.0)
    place = copy_set(toy_folder, tmp_path / "local")
    *lines, end = capsys.readouterr().err.splitlines()
    about = f"distkd: {platform.node()}: %s shard set '{toy_folder}' to '{place}': 0.00 "
    assert len(lines) == len(ShardSet(toy_folder).manifest.shards)
    assert all(line.startswith(about % "copies" + "of 0.00 GiB, ") and line.endswith(" GiB/s") for line in lines)
    assert end.startswith(about % "copied" + "GiB in 0 s, ")


# a run


def config_with(small: Small, root: Path, scratch: Path | None, **run: Any) -> dict[str, Any]:
    data = {"scratch": None if scratch is None else str(scratch), "augment": {"hflip": 0.5, "vector_noise": 0.1}}
    return small.config("teacher", run={"root": str(root), **run}, data=data)


@pytest.mark.parametrize("size", [1, 2])
def test_samples_order_and_losses_are_bit_equal_with_and_without(ranks: Any, small: Small, tmp_path: Path, size: int):
    traces = [
        ranks(size).run(run_steps, config=config_with(small, tmp_path / "runs", scratch), steps=6)
        for scratch in (None, tmp_path / "local")
    ]
    assert (tmp_path / "local").exists()
    for without, copied in zip(*traces, strict=True):
        assert copied.samples == without.samples
        assert copied.losses == without.losses
        assert copied.weights.keys() == without.weights.keys()
        assert all(torch.equal(copied.weights[name], tensor) for name, tensor in without.weights.items())


def test_a_run_is_recorded_under_the_name_of_the_original(small: Small, tmp_path: Path):
    for name, scratch in (("plain", None), ("copied", tmp_path / "local")):
        train(settings_of(config_with(small, tmp_path / "runs", scratch, name=name)), World())
    plain, copied = tmp_path / "runs" / "plain", tmp_path / "runs" / "copied"
    data = [read_json(run / "environment.json")["data"] for run in (plain, copied)]
    assert data[0] == data[1]
    assert data[0]["folder"] == str(small.shards)
    cards = [read_json(run / "export" / "model.json") for run in (plain, copied)]
    assert [card["shards"] for card in cards] == [str(small.shards)] * 2
    for path in copied.rglob("*"):
        if path.is_file():
            assert f"{tmp_path / 'local'}/".encode() not in path.read_bytes(), path


def test_a_run_may_be_resumed_without_the_copy(ranks: Any, small: Small, tmp_path: Path):
    whole = config_with(small, tmp_path / "whole", None, checkpoint_every=2)
    broken = config_with(small, tmp_path / "broken", tmp_path / "local", checkpoint_every=2)
    train_until(World(), whole)
    ranks(1).run(train_until, config=broken, crash_at=5)
    shutil.rmtree(tmp_path / "local")
    train_until(World(), config_with(small, tmp_path / "broken", None, checkpoint_every=2))
    expected, found = ending(whole), ending(broken)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_job_reads_the_copy_and_so_do_other_processes(small: Small, tmp_path: Path):
    job = assemble(settings_of(config_with(small, tmp_path, tmp_path / "local")), World())
    shards = job.dataset.shard_set
    assert isinstance(shards, CopiedSet)
    for each in (shards, pickle.loads(pickle.dumps(shards)), shards.checking("always")):
        assert each.folder.parent == tmp_path / "local"
        assert each.place == str(small.shards)


def test_a_url_is_not_copied_and_the_message_names_the_cache():
    with pytest.raises(ValueError, match=r"data\.scratch copies a folder, .* by data\.stream\.cache"):
        DataConfig(shards="https://host/set", scratch="/local")


# the command line


def test_shards_copy_prints_the_folder(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["shards", "copy", str(toy_folder), "--to", str(tmp_path / "local")]) == DONE
    place = Path(capsys.readouterr().out.removesuffix("\n"))
    assert place.parent == tmp_path / "local"
    ShardSet(place).verify()


def test_a_copy_that_is_asked_for_and_cannot_be_made_is_no_success(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert main(["shards", "copy", str(toy_folder), "--to", str(tmp_path / "local")]) == INTERNAL
    assert "no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["copy", "a"], "`shards copy` needs --to FOLDER"),
        (["info", "a", "--to", "b"], "--to is an option of `shards copy`, not of `shards info`"),
        (["copy", "https://host/set", "--to", "b"], "`shards copy` copies a folder, https://host/set is none"),
    ],
)
def test_wrong_words_of_shards_copy(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["shards", *words]) == USER
    assert message in capsys.readouterr().err


def test_stage_in_takes_the_arguments_of_a_training_and_trains_nothing(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    configs = [str(small.write(tmp_path, kind)) for kind in ("teacher", "student")]
    words = ["train", *configs, "--data.scratch", str(tmp_path / "local"), "--folds", "0-2", "--stage-in"]
    assert main(words) == DONE
    out = capsys.readouterr().out
    assert out == f"{copy_set(small.shards, tmp_path / 'local')}\n"  # one set, however many runs
    assert not (tmp_path / "runs").exists()


def test_stage_in_has_nothing_to_do_where_no_copy_is_asked_for_or_no_set_is_there(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = small.write(tmp_path, "teacher")
    assert main(["train", str(plain), "--stage-in"]) == DONE
    assert capsys.readouterr() == ("", "distkd: nothing to copy: data.scratch is not set\n")
    made = small.write(
        tmp_path, "alone", data={"shards": None, "make": "synthetic", "scratch": str(tmp_path / "local")}
    )
    assert main(["train", str(made), "--stage-in"]) == DONE
    found = capsys.readouterr()
    assert (found.out, "nothing to copy: training makes shard set" in found.err) == ("", True)
    assert not (tmp_path / "local").exists()


def test_a_name_whose_value_is_no_whole_path_is_refused(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHERE", "me")
    with pytest.raises(ConfigError, match=r"data\.scratch=\$WHERE/foo is 'me/foo' on .*, which is no whole path"):
        local_copy(toy_folder, "$WHERE/foo")
    assert not (tmp_path / "me").exists()
