"""WebDataset tars read by offset: bytes of a member by positioned reads, from any thread or process.

What lies where is the manifest's business; `members` walks a tar without it, to compare. Files are never mapped into
memory: one that was cut would end the process instead of raising an error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distkd.data.checksum import crc32c, crc32c_on
from distkd.data.descriptors import OpenFile, Recent

__all__ = ["BLOCK_BYTES", "Member", "TarFault", "TarFiles", "leads_out", "members"]

BLOCK_BYTES = 512

_MAX_OPEN = 512
"""Descriptors kept open, those used last."""


class TarFiles:
    """The tars of a folder, by their number. Descriptors are opened when they are needed and kept."""

    def __init__(self, folder: Path, files: Sequence[str], sizes: Sequence[int]):
        self._paths = [os.path.join(folder, file) for file in files]
        self._sizes = list(sizes)
        self._begin()

    def read(self, number: int, offset: int, n_bytes: int) -> bytes:
        """Those bytes, fewer where the file ends.

        Raises:
            OSError: it cannot be opened or read, or has another size than it should.
        """
        with self._open({number}) as descriptors:
            data = os.pread(descriptors[number], n_bytes, offset)
            while 0 < len(data) < n_bytes:  # one call gives 2 GiB at most
                more = os.pread(descriptors[number], n_bytes - len(data), offset + len(data))
                if not more:
                    break
                data += more
        return data

    def read_rows(
        self,
        numbers: Sequence[int],
        offsets: Sequence[int],
        header: bytes,
        rows: Sequence[np.ndarray],
        sums: Sequence[int] | None = None,
    ) -> list[int]:
        """Fill each row with the bytes that follow `header` at its place: one system call a row, no copy.

        Args:
            rows: writable, contiguous, all of one size.
            sums: CRC-32C of header and row, -1 where it is not to be compared.

        Returns:
            Places of the rows that could not be read or are not as expected; these hold anything.
        """
        expected = [-1] * len(rows) if sums is None else sums
        parts = self._parts(numbers)
        if len(parts) == 1:
            return self._read_part(numbers, offsets, header, rows, expected)
        odd: list[int] = []
        for part in parts:
            found = self._read_part(
                [numbers[place] for place in part],
                [offsets[place] for place in part],
                header,
                [rows[place] for place in part],
                [expected[place] for place in part],
            )
            odd += [part[place] for place in found]
        return odd

    def _parts(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """Places of the rows, so that no more files are needed at once than are kept open."""
        files = set(numbers)
        if len(files) <= _MAX_OPEN:
            return [range(len(numbers))] if files else []
        part_of = {number: at // _MAX_OPEN for at, number in enumerate(files)}
        parts: list[list[int]] = [[] for _ in range(0, len(files), _MAX_OPEN)]
        for place, number in enumerate(numbers):
            parts[part_of[number]].append(place)
        return [*parts]

    def _read_part(
        self,
        numbers: Sequence[int],
        offsets: Sequence[int],
        header: bytes,
        rows: Sequence[np.ndarray],
        sums: Sequence[int],
    ) -> list[int]:
        odd: list[int] = []
        preadv, n_bytes = os.preadv, len(header) + rows[0].nbytes
        scratch, sound = bytearray(len(header)), bytearray(header)
        header_sum = crc32c(header)
        try:
            with self._open(set(numbers)) as descriptors:
                for place, (number, offset, row, expected) in enumerate(zip(numbers, offsets, rows, sums, strict=True)):
                    try:
                        found = preadv(descriptors[number], (scratch, row), offset)  # pyright: ignore[reportArgumentType]
                    except OSError:
                        found = -1
                    if (
                        found != n_bytes
                        or scratch != sound
                        or (expected >= 0 and crc32c_on(header_sum, row) != expected)  # at once: it is in the cache
                    ):
                        odd.append(place)
        except OSError:  # a file that cannot be opened: all of them one by one, which tells which
            return list(range(len(rows)))
        return odd

    @property
    def n_open(self) -> int:
        """Descriptors that are kept."""
        return len(self._held)

    def close(self) -> None:
        """Give the descriptors back; reading opens them again."""
        with self._guard():
            self._held.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"_paths": self._paths, "_sizes": self._sizes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._held: Recent[int, OpenFile] = Recent(_MAX_OPEN)
        self._process = os.getpid()

    def _guard(self) -> threading.Lock:
        if self._process != os.getpid():
            self._begin()  # after a fork a thread that is gone may hold the lock, or have been changing what it guards
        return self._lock

    @contextmanager
    def _open(self, numbers: set[int]) -> Generator[dict[int, int]]:
        """Descriptors of these files, open for as long as this is."""
        with self._guard():  # what is kept first, before the others push it out
            files = {number: file for number in numbers if (file := self._held.get(number)) is not None}
        for number in numbers - files.keys():
            files[number] = self._file(number)
        yield {number: file.descriptor for number, file in files.items()}

    def _file(self, number: int) -> OpenFile:
        with self._guard():
            file = self._held.get(number)
            if file is None:
                file = OpenFile(self._paths[number])
                found = os.fstat(file.descriptor).st_size
                if found != self._sizes[number]:
                    raise OSError(
                        f"the file was replaced or cut: it has {found} bytes, manifest says {self._sizes[number]}"
                    )
                self._held.put(number, file)
        return file


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a tar."""

    name: str
    header: int
    """Offset of its header."""
    offset: int
    """Of its data."""
    size: int


class TarFault(ValueError):
    """What is wrong with a tar, and in the member at which byte; None: behind the members."""

    def __init__(self, fault: str, offset: int | None):
        super().__init__(fault)
        self.offset = offset


def members(path: Path) -> Iterator[Member]:
    """The members of a plain tar as it is written here: regular files with USTAR headers, zeros to fill the blocks.

    Raises:
        TarFault: anything else is found there; what came before it is sound.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        offset, last = 0, "its start"
        while True:
            file.seek(offset)
            block = file.read(BLOCK_BYTES)
            if len(block) < BLOCK_BYTES:
                raise TarFault(f"ends at byte {n_bytes} behind {last}, without the zeros of a tar's end", offset)
            if not any(block):
                break
            member = _parse(block, offset, last)
            fill = -member.size % BLOCK_BYTES
            end = member.offset + member.size
            if end + fill > n_bytes:
                raise TarFault(f"ends at byte {n_bytes}, inside member {member.name!r}, which ends at {end}", offset)
            file.seek(end)
            yield member
            if any(file.read(fill)):
                raise TarFault(f"is damaged in the padding of {member.name!r}, between {end} and {end + fill}", offset)
            offset, last = end + fill, f"member {member.name!r}"
        for start in range(offset, n_bytes, 1 << 20):
            file.seek(start)
            if any(file.read(1 << 20)):
                raise TarFault(f"is damaged in the zeros behind {last}, after byte {start}", None)


def _parse(block: bytes, offset: int, last: str) -> Member:
    try:
        # the sum counts its own field as spaces
        said, found = int(block[148:156].rstrip(b"\0 ") or b"-1", 8), sum(block) - sum(block[148:156]) + 8 * 32
        size = int(block[124:136].rstrip(b"\0 ") or b"0", 8)
        name = b"/".join(part for part in (_text(block[345:500]), _text(block[:100])) if part).decode()
    except ValueError:
        raise TarFault(f"is damaged in the header at byte {offset}, behind {last}", offset) from None
    if said != found:
        words = f"its sum is {found}, it says {said}"
        raise TarFault(f"is damaged in the header at byte {offset}, behind {last}: {words}", offset)
    if block[156:157] not in b"0\0" or block[257:263] != b"ustar\0":
        raise TarFault(
            f"has a member {name!r} of type {block[156:157].decode('latin-1')!r} at byte {offset}; shards hold plain "
            "files with USTAR headers only",
            offset,
        )
    return Member(name=name, header=offset, offset=offset + BLOCK_BYTES, size=size)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def leads_out(name: str) -> bool:
    """Whether an unpacked member of that name could land outside of the folder."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or (len(name) > 1 and name[1] == ":")
