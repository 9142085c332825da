"""Every byte of a shard set against its manifest: files in parallel, faults with the names of shard and sample."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distkd.data.manifest import VOLUMES
from distkd.data.shardset import REMEDY, ShardSet, raise_all, size_fault
from distkd.data.wds import Member, TarFault, leads_out, members
from distkd.errors import DataError, DiskError
from distkd.files import digest

__all__ = ["Verified", "verify"]

_SHOWN = 3
"""How many of a shard's stray members a fault names."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What was compared and found sound."""

    files: int
    bytes: int
    samples: int
    values: int
    """Modalities of samples, decoded."""


def verify(
    shard_set: ShardSet,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
    threads: int | None = None,
) -> Verified:
    """Hash every file, walk every tar, decode every sample, look for files that do not belong to the set.

    Label maps must hold the values of the classes, too.

    Args:
        progress: wraps the names of the files, to show how far it is.
        threads: files at a time; None: one per processor. Hashing leaves the interpreter free for the others.

    Raises:
        DataError: with all that was found wrong, the first few in words.
    """
    job = _Job(shard_set)
    names = [shard.file for shard in shard_set.manifest.shards]
    faults: list[str] = []
    pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), thread_name_prefix="distkd-verify")
    try:
        for _, found in zip(progress(names), pool.map(job.file_faults, range(len(names))), strict=True):
            faults += found
    finally:
        pool.shutdown(cancel_futures=True)
        job.shard_set.close()
    raise_all([*faults, *_stray_faults(shard_set.folder, set(names))])
    return Verified(
        files=len(names),
        bytes=sum(shard.bytes for shard in shard_set.manifest.shards),
        samples=len(shard_set),
        values=sum(len(values) for values in job.values),
    )


class _Job:
    """What is in which file, and the checks of one of them."""

    def __init__(self, shard_set: ShardSet):
        self.shard_set = shard_set.checking("always")
        self.manifest = shard_set.manifest
        samples, n_files = self.manifest.samples, len(self.manifest.shards)
        self.values: list[list[tuple[int, str]]] = [[] for _ in range(n_files)]
        """(sample, modality) by file."""
        self.samples: list[list[int]] = [[] for _ in range(n_files)]
        for sample, shard in enumerate(samples.shard):
            self.samples[shard].append(sample)
            for name in self.manifest.modalities:
                number = samples.file[name][sample] if name in samples.file else shard
                if samples.bytes[name][sample] is not None and number is not None:
                    self.values[number].append((sample, name))

    def file_faults(self, number: int) -> list[str]:
        shard = self.manifest.shards[number]
        fault = size_fault(self.shard_set.folder, shard.file, shard.bytes)
        if fault:
            return [fault]
        path = self.shard_set.folder / shard.file
        try:
            found = digest(path)
            faults = self._tar_faults(number, path) if self.manifest.container == "wds" else []
        except OSError as error:
            return [f"cannot read shard {shard.file!r}: {error}"]
        faults += self._value_faults(number)
        if found == shard.sha256:
            return faults
        words = f"shard {shard.file!r} has SHA-256 {found[:12]}..., manifest says {shard.sha256[:12]}..."
        nowhere = "" if faults else " (every value that has a checksum is sound; the damage lies beside them)"
        return [words + nowhere, *faults]

    def _value_faults(self, number: int) -> Iterator[str]:
        """Read each value; of a block of vectors the first, which compares the checksum of them all."""
        done: set[tuple[str, int]] = set()
        for sample, name in self.values[number]:
            block = (name, self.shard_set.block(sample, name))
            if block in done:
                continue
            done.add(block)
            try:
                array = self.shard_set.read(sample, (name,))[name]
            except (DataError, DiskError) as error:  # a part of the disk that cannot be read is one fault of many
                yield str(error).removesuffix(f"; {REMEDY}")
            else:
                if self.manifest.modalities[name].role == "target":
                    yield from self._label_map_faults(sample, name, array)

    def _label_map_faults(self, sample: int, name: str, array: np.ndarray) -> Iterator[str]:
        expected = self.manifest.modalities[name].values or list(range(len(self.manifest.class_names)))
        is_wrong = ~np.isin(array, expected)
        if is_wrong.any():
            at = tuple(np.argwhere(is_wrong)[0].tolist())
            yield (
                f"{self.shard_set.where(sample, name)} holds {array[at]} at {at}, expected one of {expected} "
                f"({np.count_nonzero(is_wrong)} of {array.size} places hold no class)"
            )

    def _tar_faults(self, number: int, path: Path) -> list[str]:
        found: list[Member] = []
        faults: list[str] = []
        end: int | None = None
        try:
            found.extend(members(path))
        except TarFault as fault:
            faults = [f"shard {path.name!r} {fault}{self._sample_at(number, fault.offset)}"]
            end = fault.offset
            found = list(_sound_members(path))
        if end is None:
            faults += self._listing_faults(number, path.name, found)
        place_of = {member.name: (member.offset, member.size) for member in found}
        for name, place in self._expected(number).items():
            if end is not None and place[0] > end:
                continue  # behind the fault nothing can be said
            at = place_of.get(name)
            if at is None or at[0] != place[0] or place[1] not in (None, at[1]):
                said = place if place[1] is not None else place[0]
                faults.append(f"{name!r} of shard {path.name!r} lies at {at or 'no place'}, manifest says {said}")
        return [*faults, *self._label_faults(number, path, place_of)]

    def _listing_faults(self, number: int, file: str, found: list[Member]) -> Iterator[str]:
        inside = [member.name for member in found if not leads_out(member.name)]
        n_samples = len({name.partition(".")[0] for name in inside})
        if n_samples != len(self.samples[number]):
            yield f"shard {file!r} has {n_samples} samples, manifest says {len(self.samples[number])}"
        for member in found:
            if leads_out(member.name):
                yield f"shard {file!r} has a member {member.name!r} that leads out of its folder; do not unpack it"
        twice = [name for name, count in Counter(inside).items() if count > 1]
        if twice:
            yield f"shard {file!r} has {len(twice)} members more than once: {_some(twice)}"
        stray = sorted(set(inside) - self._expected(number).keys())
        if stray:
            yield f"shard {file!r} has {len(stray)} members that the manifest does not list: {_some(stray)}"

    def _expected(self, number: int) -> dict[str, tuple[int, int | None]]:
        """Offset and size of the members of a tar; the size of the description of a sample is not listed."""
        samples = self.manifest.samples
        places: dict[str, tuple[int, int | None]] = {
            f"{samples.key[sample]}.json": (samples.offset[sample] + 512, None) for sample in self.samples[number]
        }
        for sample, name in self.values[number]:
            place = samples.bytes[name][sample]
            assert place is not None, (sample, name)
            places[f"{samples.key[sample]}.{name}.{self.manifest.modalities[name].codec}"] = place
        return places

    def _label_faults(self, number: int, path: Path, place_of: dict[str, tuple[int, int]]) -> Iterator[str]:
        """What a tar says of its samples to other readers, against the manifest."""
        samples = self.manifest.samples
        with path.open("rb") as file:
            for sample in self.samples[number]:
                member = f"{samples.key[sample]}.json"
                if member not in place_of:
                    continue
                offset, size = place_of[member]
                file.seek(offset)
                said = _json(file.read(size))
                expected = {
                    "group": samples.group[sample],
                    "label": samples.label[sample],
                    "patient": samples.patient[sample],
                }
                if said is None:
                    yield f"{member!r} of shard {path.name!r} is not readable JSON"
                elif said != expected:
                    name = next((n for n in expected if said.get(n) != expected[n]), "other names")
                    yield (
                        f"{member!r} of shard {path.name!r} has {name} {said.get(name)!r}, "
                        f"manifest says {expected.get(name)!r}"
                    )

    def _sample_at(self, number: int, offset: int | None) -> str:
        samples = self.manifest.samples
        places = sorted((samples.offset[sample], samples.key[sample]) for sample in self.samples[number])
        at = -1 if offset is None else bisect_right(places, offset, key=lambda place: place[0]) - 1
        return f" (sample {places[at][1]!r})" if at >= 0 else ""


def _sound_members(path: Path) -> Iterator[Member]:
    """Those before a fault."""
    try:
        yield from members(path)
    except TarFault:
        return


def _json(data: bytes) -> dict[str, object] | None:
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None  # pyright: ignore[reportUnknownVariableType]


def _stray_faults(folder: Path, listed: set[str]) -> list[str]:
    below = (path for path in (folder / VOLUMES).rglob("*") if not path.is_dir() or path.is_symlink())
    found = sorted(path.relative_to(folder).as_posix() for path in (*folder.glob("*.tar"), *below))
    return [f"{name!r} is in the folder, but not in the manifest; remove it" for name in found if name not in listed]


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
