"""What can go wrong around a build: another builder, a full disk, a folder that cannot be moved or locked."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distkd.data import journal
from distkd.data.manifest import Fold
from distkd.data.raw.recipe import Made, arguments, run
from distkd.data.shardset import ShardSet
from distkd.data.write import ShardWriter
from distkd.errors import DataError
from tests.data.test_resume_build import build, contents, fail, items, partial
from tests.data.toy import DESCRIPTION, toy_arrays, write_toy

KEPT = "and start the same command again, which goes on behind what is finished, or choose another --out"
NOT_KEPT = "and start the same command again, or choose another --out"
BUSY = r"another process is building '.*\.out\.partial'; wait for it"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    build(out, items())
    return contents(out)


def before(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, first: Callable[..., object]) -> None:
    """Something happens before the first call of a function."""
    function = getattr(owner, name)
    to_do = [first]

    def called(*arguments: object, **options: object) -> object:
        if to_do:
            to_do.pop()(*arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


def test_nobody_else_builds_while_the_folder_gets_its_name(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    tried: list[Path] = []

    def build_beside(folder: Path, target: Path) -> None:
        tried.append(target)
        with pytest.raises(DataError, match=BUSY):
            build(tmp_path / "out", items())

    def rename(folder: Path, target: Path, move: Callable[[Path, Path], Path] = Path.rename) -> Path:
        if target.name == "out":
            build_beside(folder, target)
        return move(folder, target)

    monkeypatch.setattr(Path, "rename", rename)
    build(tmp_path / "out", items())
    assert tried == [tmp_path / "out"]
    assert contents(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nobody_else_builds_while_the_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried: list[str] = []

    def unlink(path: Path, missing_ok: bool = False, remove: Callable[[Path, bool], None] = Path.unlink) -> None:
        with pytest.raises(DataError, match=BUSY):
            build(tmp_path / "out", items())
        tried.append(path.name)
        remove(path, missing_ok)

    def remove_watched() -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        fail()

    with pytest.raises(DataError, match="the raw file is cut off"):
        build(tmp_path / "out", items(at=1, then=remove_watched))
    assert tried[-1] == "journal.jsonl"
    assert list(tmp_path.iterdir()) == []


def test_who_comes_to_the_lock_after_the_set_was_published_is_refused(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    before(monkeypatch, fcntl, "flock", lambda *_: build(tmp_path / "out", items()))
    with pytest.raises(DataError, match=r"output '.*out' exists already; remove it or name another"):
        build(tmp_path / "out", items())
    assert contents(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_who_comes_to_the_lock_after_the_folder_was_removed_makes_another(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    def fail_beside(*_: object) -> None:
        with pytest.raises(DataError, match="the raw file is cut off"):
            build(tmp_path / "out", items(at=1, then=fail))

    before(monkeypatch, fcntl, "flock", fail_beside)
    build(tmp_path / "out", items())
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch):
    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    words = rf"cannot lock '.*journal\.jsonl': {os.strerror(number)}; .*mount the file system with locks"
    with pytest.raises(DataError, match=words):
        build(tmp_path / "out", items())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_moved_does_not_lose_the_build(tmp_path: Path, whole: dict[str, bytes]):
    def occupy() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")

    words = rf"cannot move the finished shards from '.*partial' to '.*out': Directory not empty; mend that {KEPT}"
    with pytest.raises(DataError, match=words):
        build(tmp_path / "out", items(at=23, then=occupy))
    assert contents(tmp_path / "out") == {"mine": b"x"}
    (tmp_path / "out" / "mine").unlink()
    loaded: list[int] = []
    build(tmp_path / "out", items(loaded))
    assert contents(tmp_path / "out") == whole
    assert loaded[0] > 15


def test_what_was_found_stays_when_the_next_build_ends_before_it_adds(tmp_path: Path, whole: dict[str, bytes]):
    with pytest.raises(DataError):
        build(tmp_path / "out", items(at=20, then=fail))
    with pytest.raises(DataError), ShardWriter(tmp_path / "out", DESCRIPTION, shard_bytes=6000):
        fail()
    loaded: list[int] = []
    build(tmp_path / "out", items(loaded))
    assert contents(tmp_path / "out") == whole
    assert loaded[0] > 8


def test_manifest_and_names_are_on_the_disk_before_the_build_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(folder: Path, target: Path) -> Path:
        done.append("renamed")
        return rename(folder, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    build(tmp_path / "out", items())
    manifest, *rest = done[-5:]
    assert manifest.startswith(".manifest.json")
    assert rest == [".out.partial", "renamed", "out", tmp_path.name]


def test_a_journal_that_finds_no_room_is_told_and_the_build_goes_on(tmp_path: Path, whole: dict[str, bytes]):
    def fill() -> None:
        file = str(partial(tmp_path / "out") / "journal.jsonl")
        links = {int(link.name): os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, next(number for number, target in links.items() if target == file))
        os.close(full)

    words = rf"cannot write 'journal\.jsonl' in .*: No space left on device; free some space {KEPT}"
    with pytest.raises(DataError, match=words):
        build(tmp_path / "out", items(at=12, then=fill))
    loaded: list[int] = []
    build(tmp_path / "out", items(loaded))
    assert contents(tmp_path / "out") == whole
    assert loaded[0] > 0


def test_a_journal_that_took_a_part_of_a_line_is_cut_back(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    room = [1 << 20, 1 << 20, 100]

    class Narrow(io.FileIO):
        """A disk with room for two lines and a half."""

        def write(self, data: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[: room.pop(0)])

    monkeypatch.setattr(journal, "FileIO", Narrow)
    with pytest.raises(DataError, match=rf"cannot write 'journal\.jsonl' in .* {KEPT}"):
        build(tmp_path / "out", items())
    lines = (partial(tmp_path / "out") / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    assert lines[-1].endswith(b"\n")
    monkeypatch.undo()
    build(tmp_path / "out", items())
    assert contents(tmp_path / "out") == whole


def fill_manifest(out: Path) -> None:
    (partial(out) / f".manifest.json.{os.getpid()}").symlink_to("/dev/full")


def test_a_manifest_that_finds_no_room_is_told_and_the_build_goes_on(tmp_path: Path, whole: dict[str, bytes]):
    words = rf"cannot write 'manifest\.json' in .*: No space left on device; free some space {KEPT}"
    with pytest.raises(DataError, match=words):
        build(tmp_path / "out", items(at=20, then=lambda: fill_manifest(tmp_path / "out")))
    loaded: list[int] = []
    build(tmp_path / "out", items(loaded))
    assert contents(tmp_path / "out") == whole
    assert loaded[0] > 15


def write_toy_without_room(out: Path) -> None:
    with ShardWriter(out, DESCRIPTION, shard_bytes=6000) as writer:
        for number in range(20):
            writer.add(f"s-{number}", toy_arrays(number), patient="p", label=0)
        writer.split([Fold(train=["p"], val=[], test=[])], rule="", seed=None)
        fill_manifest(out)


def test_a_build_that_keeps_nothing_does_not_say_so(tmp_path: Path):
    with pytest.raises(DataError, match=rf"cannot write 'manifest\.json' .*; free some space {NOT_KEPT}"):
        write_toy_without_room(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nor_does_a_build_whose_first_tar_finds_no_room(tmp_path: Path):
    def fill() -> None:
        (partial(tmp_path / "out") / "toy-000000.tar").symlink_to("/dev/full")

    with pytest.raises(DataError, match=rf"cannot write 'toy-000000\.tar' .*; free some space {NOT_KEPT}"):
        build(tmp_path / "out", items(at=0, then=fill))
    assert list(tmp_path.iterdir()) == []


def test_the_folder_we_are_in_may_be_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")

    def make(options: object) -> Made:
        return Made(write_toy(Path(".")))

    assert run(make, arguments(None, raw=None), ["--out", "."]) == 0
    assert f"wrote {tmp_path / 'out'};" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ShardSet(tmp_path / "out").verify()


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    write_toy(tmp_path / "out")
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()
    ShardSet(tmp_path / "out").verify()


@pytest.mark.parametrize("at, words", [(1, "start again\n"), (20, "start again to go on behind what is finished\n")])
def test_who_stops_a_build_hears_whether_it_goes_on(
    tmp_path: Path, at: int, words: str, capsys: pytest.CaptureFixture[str]
):
    def stop() -> None:
        raise KeyboardInterrupt

    def make(options: object) -> Made:
        build(tmp_path / "out", items(at=at, then=stop))
        raise AssertionError

    assert run(make, arguments(None, raw=None), ["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith(f"was not written; {words}")
