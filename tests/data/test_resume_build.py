"""A build that dies goes on where it was, and ends with the bytes of one that did not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from distkd.data.manifest import Fold
from distkd.data.shardset import ShardSet
from distkd.data.write import Sample, ShardWriter, SkipSample
from distkd.errors import DataError
from tests.data.toy import DESCRIPTION, toy_arrays
from tests.data.toy_volumes import write_volumes

N = 24
SHARD_BYTES = 6000
"""Some four samples a tar."""


def items(
    loaded: list[int] | None = None, *, at: int = -1, then: Callable[[], object] = lambda: None, n: int = N
) -> Iterator[tuple[str, Callable[[], Sample]]]:
    """Samples of the toy set; every seventh is left out, and sample `at` does something else first."""

    def load(number: int) -> Sample:
        if loaded is not None:
            loaded.append(number)
        if number == at:
            then()
        if number % 7 == 3:
            raise SkipSample("a seventh")
        return Sample(toy_arrays(number), patient=f"p{number // 2}", label=number % 2)

    for number in range(n):
        yield f"s-{number:03d}", lambda number=number: load(number)


def build(out: Path, what: Iterator[tuple[str, Callable[[], Sample]]], options: str = "") -> ShardWriter:
    with ShardWriter(out, DESCRIPTION, options=options, shard_bytes=SHARD_BYTES) as writer:
        writer.add_all(what)
        writer.split([Fold(train=sorted(set(writer.patients)), val=[], test=[])], rule="all", seed=None)
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise DataError("the raw file is cut off")


def build_and_die(out: Path, at: int) -> None:
    build(out, items(at=at, then=die))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    build(out, items())
    return contents(out)


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def test_samples_loaded_by_threads_are_those_that_are_added_one_by_one(tmp_path: Path, whole: dict[str, bytes]):
    with ShardWriter(tmp_path / "out", DESCRIPTION, shard_bytes=SHARD_BYTES) as writer:
        for number in range(N):
            if number % 7 != 3:
                writer.add(f"s-{number:03d}", toy_arrays(number), patient=f"p{number // 2}", label=number % 2)
        writer.split([Fold(train=sorted(set(writer.patients)), val=[], test=[])], rule="all", seed=None)
    assert contents(tmp_path / "out") == whole
    ShardSet(tmp_path / "out").verify()


@pytest.mark.parametrize("at", [0, 9, 22])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, whole: dict[str, bytes], at: int):
    process = get_context("fork").Process(target=build_and_die, args=(tmp_path / "out", at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    loaded: list[int] = []
    writer = build(tmp_path / "out", items(loaded))
    assert contents(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert writer.skipped.lines() == ["skipped 3: a seventh (s-003, s-010, s-017)"]
    # a tar and what was loaded ahead is done again, no more
    assert loaded[0] >= at - 10
    assert (at < 9) == (loaded[0] == 0)


def test_after_an_error_it_goes_on_too(tmp_path: Path, whole: dict[str, bytes]):
    with pytest.raises(DataError, match="the raw file is cut off"):
        build(tmp_path / "out", items(at=20, then=fail))
    loaded: list[int] = []
    build(tmp_path / "out", items(loaded))
    assert contents(tmp_path / "out") == whole
    assert loaded[0] > 8


def test_an_error_before_anything_is_finished_leaves_nothing(tmp_path: Path):
    with pytest.raises(DataError, match="the raw file is cut off"):
        build(tmp_path / "out", items(at=1, then=fail))
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_is_not_believed(tmp_path: Path, whole: dict[str, bytes]):
    with pytest.raises(DataError):
        build(tmp_path / "out", items(at=20, then=fail))
    journal = partial(tmp_path / "out") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    build(tmp_path / "out", items())
    assert contents(tmp_path / "out") == whole


def test_a_build_with_other_options_starts_anew(tmp_path: Path):
    with pytest.raises(DataError):
        build(tmp_path / "out", items(at=20, then=fail), options="size 12")
    loaded: list[int] = []
    build(tmp_path / "out", items(loaded), options="size 16")
    assert sorted(loaded) == list(range(N))


def test_other_raw_data_are_told(tmp_path: Path):
    with pytest.raises(DataError):
        build(tmp_path / "out", items(at=20, then=fail))
    words = r"had 's-000' as item 1, now it is 's-001': the raw data have changed; remove '.*\.out\.partial' to start"
    others = items()
    next(others)
    with pytest.raises(DataError, match=words):
        build(tmp_path / "out", others)
    with pytest.raises(DataError, match=r"had \d+ items, now there are 4: the raw data have changed"):
        build(tmp_path / "out", items(n=4))
    build(tmp_path / "out", items())


def test_two_builds_of_one_folder_are_refused(tmp_path: Path):
    words = r"another process is building '.*\.out\.partial'; wait for it"

    def build_beside() -> None:
        with pytest.raises(DataError, match=words):
            build(tmp_path / "out", items())
        assert partial(tmp_path / "out").is_dir()

    build(tmp_path / "out", items(at=20, then=build_beside))


def test_a_full_disk_is_told_and_the_build_goes_on_when_there_is_room(tmp_path: Path, whole: dict[str, bytes]):
    def fill() -> None:
        for number in range(2, 9):
            path = partial(tmp_path / "out") / f"toy-{number:06d}.tar"
            if not path.exists():
                path.symlink_to("/dev/full")

    words = r"cannot write 'toy-00000\d\.tar' in .* \(\d+ MB are free\): No space left on device; free some space"
    with pytest.raises(DataError, match=words):
        build(tmp_path / "out", items(at=5, then=fill))
    for path in partial(tmp_path / "out").iterdir():
        if path.is_symlink():
            path.unlink()
    loaded: list[int] = []
    build(tmp_path / "out", items(loaded))
    assert contents(tmp_path / "out") == whole
    assert loaded[0] > 3


@pytest.mark.parametrize("damage", [lambda tar: os.truncate(tar, 700), Path.unlink], ids=["cut", "gone"])
def test_a_file_that_lost_its_end_is_not_believed(
    tmp_path: Path, whole: dict[str, bytes], damage: Callable[[Path], object]
):
    with pytest.raises(DataError):
        build(tmp_path / "out", items(at=20, then=fail))
    damage(partial(tmp_path / "out") / "toy-000001.tar")
    loaded: list[int] = []
    build(tmp_path / "out", items(loaded))
    assert contents(tmp_path / "out") == whole
    assert 0 < loaded[0] < 8


def test_a_tar_that_a_killed_build_began_is_no_part_of_a_smaller_set(tmp_path: Path):
    with pytest.raises(DataError):
        build(tmp_path / "out", items(at=20, then=fail))
    blocks = (partial(tmp_path / "out") / "journal.jsonl").read_text().splitlines()[1:]
    n = sum(len(json.loads(block)["order"]) for block in blocks)
    begun = partial(tmp_path / "out") / f"toy-{len(blocks):06d}.tar"
    begun.write_bytes(b"a sample")
    (begun.parent / ".manifest.json.77").write_text("{")
    build(tmp_path / "out", items(n=n))
    build(tmp_path / "small", items(n=n))
    assert contents(tmp_path / "out") == contents(tmp_path / "small")
    ShardSet(tmp_path / "out").verify()


def test_metadata_of_volumes_that_a_killed_build_began_are_removed(tmp_path: Path):
    with pytest.raises(DataError):
        write_volumes(tmp_path / "out", lambda number: fail() if number == 9 else None)
    for folder in ("volumes.zarr", "volumes.zarr/flair"):
        (partial(tmp_path / "out") / folder / ".zarr.json.77").write_text("{")
    write_volumes(tmp_path / "out")
    ShardSet(tmp_path / "out").verify()


def volumes_and_die(out: Path, at: int) -> None:
    write_volumes(out, lambda number: die() if number == at else None)


def test_a_killed_build_of_volumes_ends_with_the_same_bytes(tmp_path: Path):
    at = 6
    write_volumes(tmp_path / "whole")
    # not a fork: torch's threads do not survive one
    process = get_context("spawn").Process(target=volumes_and_die, args=(tmp_path / "out", at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    loaded: list[int] = []
    write_volumes(tmp_path / "out", loaded.append)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert loaded[0] >= at - 7
    ShardSet(tmp_path / "out").verify()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
