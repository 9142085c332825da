"""Tars by offset: the same bytes from any thread or process, and a tar of which the manifest says nothing, walked."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google_crc32c import value as crc32c

from distkd.data import wds
from distkd.data.wds import TarFault, TarFiles, leads_out, members

DATA = [bytes([number]) * (100 + 300 * number) for number in range(5)]


def write_tar(path: Path, entries: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kind
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", [(f"m{number}", data) for number, data in enumerate(DATA)])


def open_files(*paths: Path) -> TarFiles:
    return TarFiles(paths[0].parent, [path.name for path in paths], [path.stat().st_size for path in paths])


def test_members_are_where_tarfile_finds_them(tar: Path):
    with tarfile.open(tar) as reference:
        expected = [(member.name, member.offset, member.offset_data, member.size) for member in reference]
    assert [(m.name, m.header, m.offset, m.size) for m in members(tar)] == expected


def test_long_names_are_put_together(tmp_path: Path):
    name = "k" * 80 + "/" + "n" * 90
    assert [m.name for m in members(write_tar(tmp_path / "a.tar", [(name, b"x")]))] == [name]


def test_every_member_comes_back_whole(tar: Path):
    files = open_files(tar)
    assert [files.read(0, m.offset, m.size) for m in members(tar)] == DATA
    assert files.n_open == 1
    files.close()
    assert files.n_open == 0
    assert files.read(0, 512, 100) == DATA[0]


def test_rows_are_filled_behind_their_header(tmp_path: Path):
    rows = np.random.default_rng(0).integers(0, 256, (6, 50), dtype=np.uint8)
    paths = [
        write_tar(tmp_path / f"{k}.tar", [(f"m{n}", b"HEAD" + rows[n].tobytes()) for n in range(3 * k, 3 * k + 3)])
        for k in range(2)
    ]
    files, order = open_files(*paths), [5, 0, 3, 3]
    offsets = [m.offset for path in paths for m in members(path)]
    out = np.zeros((4, 50), dtype=np.uint8)
    odd = files.read_rows([n // 3 for n in order], [offsets[n] for n in order], b"HEAD", list(out))
    assert odd == []
    np.testing.assert_array_equal(out, rows[order])


def test_rows_that_are_not_as_expected_are_told_by_their_place(tar: Path, tmp_path: Path):
    import google_crc32c

    files = open_files(tar)
    offsets = [m.offset for m in members(tar)]
    out = list(np.zeros((3, 90), dtype=np.uint8))
    header = DATA[1][:10]
    sums = [google_crc32c.value(DATA[1][:100])] * 3
    assert files.read_rows([0] * 3, [offsets[2], offsets[1], 1 << 40], header, out) == [0, 2]
    assert files.read_rows([0] * 3, [offsets[1]] * 3, header, out, [sums[0], sums[0] ^ 1, -1]) == [1]
    tar.unlink()
    files.close()
    assert files.read_rows([0] * 3, [offsets[1]] * 3, header, out) == [0, 1, 2]
    assert files.read_rows([], [], header, []) == []


def test_a_file_of_another_size_is_not_read(tar: Path):
    files = open_files(tar)
    with tar.open("ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match=r"the file was replaced or cut: it has \d+ bytes, manifest says \d+"):
        files.read(0, 512, 100)


@pytest.fixture
def four(tmp_path: Path) -> tuple[TarFiles, list[bytes]]:
    """Four tars with one row each, of which two may be open."""
    rows = [bytes([65 + number]) * 90 for number in range(4)]
    return open_files(*(write_tar(tmp_path / f"{n}.tar", [("m", b"HEAD" + row)]) for n, row in enumerate(rows))), rows


@pytest.fixture
def two_open(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened."""
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(wds, "_MAX_OPEN", 2)
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(str(path)[-5:]) or real(path, *rest))
    return opened


def test_the_files_used_last_stay_open(two_open: list[str], four: tuple[TarFiles, list[bytes]]):
    files, rows = four
    two_open.clear()
    for number in (0, 1, 0, 1, 2, 1, 0, 3):
        assert files.read(number, 512 + 4, 90) == rows[number]
    assert two_open == ["0.tar", "1.tar", "2.tar", "0.tar", "3.tar"]
    assert files.n_open == 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors cannot be counted")
def test_rows_of_many_files_need_no_more_descriptors_than_are_kept(
    two_open: list[str], four: tuple[TarFiles, list[bytes]], monkeypatch: pytest.MonkeyPatch
):
    files, rows = four
    before, most, real = len(os.listdir("/proc/self/fd")), [0], os.preadv

    def counted(*args: Any) -> int:
        most[0] = max(most[0], len(os.listdir("/proc/self/fd")))
        return real(*args)

    monkeypatch.setattr(os, "preadv", counted)
    two_open.clear()
    order = [3, 0, 2, 0, 1, 3, 3]
    out = np.zeros((len(order), 90), dtype=np.uint8)
    assert files.read_rows(order, [512] * 7, b"HEAD", list(out)) == []
    assert [bytes(row) for row in out] == [rows[number] for number in order]
    assert sorted(two_open) == ["0.tar", "1.tar", "2.tar", "3.tar"]  # each once
    assert most[0] <= before + 4  # two that are kept, and two in use that push them out
    sums = [crc32c(b"HEAD" + rows[number]) for number in order]
    sums[5] ^= 1
    assert files.read_rows(order, [512] * 6 + [511], b"HEAD", list(out), sums) == [5, 6]
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_pushed_out_stays_open_for_who_reads_it(two_open: list[str], four: tuple[TarFiles, list[bytes]]):
    files, rows = four
    with files._open({0}) as descriptors:
        for number in (1, 2, 3):
            files.read(number, 0, 1)
        files.close()
        assert os.pread(descriptors[0], 90, 512 + 4) == rows[0]
        descriptor = descriptors[0]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pread(descriptor, 1, 0)


def test_threads_read_the_same_while_files_are_pushed_out(two_open: list[str], four: tuple[TarFiles, list[bytes]]):
    files, rows = four
    wanted = [number for _ in range(100) for number in (0, 1, 2, 3, 2)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: files.read(number, 516, 90), wanted)) == [rows[n] for n in wanted]
    assert files.n_open == 2


def test_threads_and_another_process_read_the_same(tar: Path):
    files, wanted = open_files(tar), list(members(tar)) * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda m: files.read(0, m.offset, m.size), wanted))
    assert found == DATA * 20
    again = pickle.loads(pickle.dumps(files))
    assert again.n_open == 0
    assert again.read(0, wanted[3].offset, wanted[3].size) == DATA[3]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_opens_its_own(tar: Path):
    files = open_files(tar)
    assert files.read(0, 512, 100) == DATA[0]
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, f"{zlib.crc32(files.read(0, 512, 100))}".encode())
            files.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(read_end, 100)) == zlib.crc32(DATA[0])
    os.close(read_end)
    os.close(write_end)
    assert files.read(0, 512, 100) == DATA[0]


@pytest.mark.parametrize(
    "at, words",
    [
        (3, "is damaged in the header at byte 0, behind its start: its sum is"),
        (150, "is damaged in the header at byte 0, behind its start"),
        (512 + 100, "is damaged in the padding of 'm0', between 612 and 1024"),
        (-1, "is damaged in the zeros behind member 'm4'"),
    ],
)
def test_a_flipped_byte_beside_the_data_is_named(tar: Path, at: int, words: str):
    content = bytearray(tar.read_bytes())
    content[at] ^= 1
    tar.write_bytes(content)
    with pytest.raises(TarFault, match=words):
        list(members(tar))


@pytest.mark.parametrize(
    "n_bytes, words",
    [(700, "ends at byte 700 behind member 'm0'|ends at byte 700, inside member 'm0'"), (600, "inside member 'm0'")],
)
def test_a_truncated_tar_is_named(tar: Path, n_bytes: int, words: str):
    os.truncate(tar, n_bytes)
    with pytest.raises(TarFault, match=words):
        list(members(tar))


def test_a_tar_without_its_end_is_named(tar: Path):
    os.truncate(tar, list(members(tar))[1].header)
    with pytest.raises(TarFault, match=r"ends at byte 1024 behind member 'm0', without the zeros of a tar's end"):
        list(members(tar))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_links_folders_and_devices_are_refused(tmp_path: Path, kind: bytes):
    path = write_tar(tmp_path / "a.tar", [("m0", b"")], kind)
    with pytest.raises(TarFault, match=r"has a member 'm0/?' of type '.' at byte 0; shards hold plain files"):
        list(members(path))


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..\\x", "\\x", "C:/x"])
def test_names_that_lead_out_of_a_folder(name: str):
    assert leads_out(name)


@pytest.mark.parametrize("name", ["x", "a..b.png", "s-1.slide.png", "a/b"])
def test_names_that_stay_in_a_folder(name: str):
    assert not leads_out(name)
