"""`verify`: whatever byte is wrong, it is found and named with shard and sample; a sound set passes and is counted."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from distkd.data.manifest import MANIFEST
from distkd.data.shardset import ShardSet
from distkd.data.verify import Verified, verify
from distkd.errors import DataError
from distkd.files import digest
from tests.data.test_shardset import damage, volumes
from tests.data.toy_volumes import N_SAMPLES, write_volumes

__all__ = ["volumes"]


def flip(path: Path, at: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def change_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def rewrite_tar(folder: Path, change: Callable[[list[tuple[str, bytes]]], None]) -> None:
    """The first shard with other members behind those that are listed, and a manifest that knows its new checksum."""
    path = folder / "toy-000000.tar"
    with tarfile.open(path) as tar:
        entries = [(member.name, tar.extractfile(member).read()) for member in tar]  # pyright: ignore[reportOptionalMemberAccess]
    change(entries)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    change_manifest(folder, lambda c: c["shards"][0].update(bytes=path.stat().st_size, sha256=digest(path)))


def test_a_sound_set_verifies_is_counted_and_shows_its_progress(toy: ShardSet):
    seen: list[str] = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    found = toy.verify(progress, 3)
    assert seen == [shard.file for shard in toy.manifest.shards]
    n_values = sum(int(toy.has(name).sum()) for name in toy.manifest.modalities)
    n_bytes = sum(path.stat().st_size for path in toy.folder.glob("*.tar"))
    assert found == Verified(files=len(seen), bytes=n_bytes, samples=48, values=n_values)


@pytest.mark.parametrize("place", [0, 100, 600, 700, 20_000, -1])
def test_one_changed_byte_anywhere_is_found(toy_folder: Path, place: int):
    flip(toy_folder / "toy-000001.tar", place)
    with pytest.raises(DataError, match=r"shard 'toy-000001\.tar' has SHA-256 .*, manifest says"):
        ShardSet(toy_folder).verify()


@pytest.mark.parametrize("name", ["gene", "slide", "coarse"])
def test_a_flipped_byte_names_shard_and_sample(toy_folder: Path, name: str):
    damage(ShardSet(toy_folder), 4, name)
    with pytest.raises(
        DataError,
        match=rf"^shard 'toy-000000\.tar' has SHA-256 \w{{12}}\.\.\., manifest says \w{{12}}\.\.\.; '{name}' of sample "
        r"'s-004' in shard 'toy-000000\.tar' has CRC-32C \w{8}, manifest says \w{8}; copy it again or build it again",
    ):
        verify(ShardSet(toy_folder))


def test_damage_beside_the_values_says_so(toy_folder: Path):
    path = toy_folder / "toy-000000.tar"
    sound = path.read_bytes()
    samples = ShardSet(toy_folder).manifest.samples
    header = samples.bytes["slide"][3]
    assert header is not None
    flip(path, header[0] - 512 + 3)
    with pytest.raises(
        DataError,
        match=r"is damaged in the header at byte \d+, behind member 's-003\.gene.npy': its sum .* \(sample 's-003'\)",
    ):
        ShardSet(toy_folder).verify()
    path.write_bytes(sound)
    flip(path, sum(header))
    with pytest.raises(
        DataError, match=r"is damaged in the padding of 's-003\.slide\.png', between \d+ and \d+ \(sample 's-003'\)"
    ):
        ShardSet(toy_folder).verify()
    path.write_bytes(sound)
    flip(path, samples.offset[3] + 512, 255)
    with pytest.raises(DataError, match=r"'s-003\.json' of shard 'toy-000000\.tar' is not readable JSON"):
        ShardSet(toy_folder).verify()


def test_damage_without_a_checksum_is_found_and_said_to_be_nowhere(toy_folder: Path):
    change_manifest(toy_folder, lambda c: c["samples"].update(crc32c={}))
    damage(ShardSet(toy_folder), 4, "gene")
    with pytest.raises(
        DataError, match=r"has SHA-256 .* \(every value that has a checksum is sound; the damage lies beside"
    ):
        ShardSet(toy_folder).verify()


def test_every_damaged_shard_is_named_and_the_rest_counted(toy_folder: Path):
    for path in sorted(toy_folder.glob("*.tar")):
        flip(path, 600, 255)
    with pytest.raises(DataError, match=r"toy-000000\.tar.*toy-000001\.tar"):
        ShardSet(toy_folder).verify()


def test_a_shard_that_changes_after_opening_is_found(toy_folder: Path):
    shard_set = ShardSet(toy_folder)
    os.truncate(toy_folder / "toy-000000.tar", 1000)
    (toy_folder / "toy-000001.tar").unlink()
    with pytest.raises(
        DataError, match=r"'toy-000000\.tar' is truncated: 1000 bytes, .*'toy-000001\.tar' is missing from"
    ):
        shard_set.verify()


def test_an_unreadable_image_with_the_right_checksums_is_found(toy_folder: Path):
    from google_crc32c import value

    shard_set = ShardSet(toy_folder)
    damage(shard_set, 0, "slide", at=3)
    path = toy_folder / "toy-000000.tar"
    offset, size = shard_set.manifest.samples.bytes["slide"][0] or (0, 0)

    def sign(content: dict) -> None:
        content["shards"][0]["sha256"] = digest(path)
        content["samples"]["crc32c"]["slide"][0] = value(path.read_bytes()[offset : offset + size])

    change_manifest(toy_folder, sign)
    with pytest.raises(
        DataError, match=r"^'slide' of sample 's-000' in shard 'toy-000000\.tar' is not a readable image"
    ):
        ShardSet(toy_folder).verify()


def test_a_manifest_that_points_elsewhere_is_found(toy_folder: Path):
    def swap(content: dict) -> None:
        slides = content["samples"]["bytes"]["slide"]
        slides[0], slides[1] = slides[1], slides[0]

    change_manifest(toy_folder, swap)
    with pytest.raises(DataError, match=r"'s-000\.slide\.png' of shard 'toy-000000\.tar' lies at .*, manifest says"):
        ShardSet(toy_folder).verify()


def test_a_label_that_the_tar_says_otherwise_is_found(toy_folder: Path):
    change_manifest(toy_folder, lambda c: c["samples"]["label"].__setitem__(0, 1))
    with pytest.raises(DataError, match=r"'s-000\.json' of shard 'toy-000000\.tar' has label 0, manifest says 1"):
        ShardSet(toy_folder).verify()


def test_a_sample_that_the_manifest_does_not_list_is_found(toy_folder: Path):
    def remove_first(content: dict) -> None:
        samples = content["samples"]
        columns = [samples[name] for name in samples if isinstance(samples[name], list) and samples[name]]
        nested = [column for name in ("bytes", "crc32c", "file") for column in samples.get(name, {}).values()]
        for column in columns + nested:
            del column[0]
        content["shards"][0]["samples"] -= 1

    change_manifest(toy_folder, remove_first)
    with pytest.raises(
        DataError,
        match=r"shard 'toy-000000\.tar' has (\d+) samples, manifest says \d+; shard 'toy-000000\.tar' has 4 members "
        r"that the manifest does not list: 's-000\.coarse\.png', 's-000\.gene\.npy', 's-000\.json', \.\.\.",
    ):
        ShardSet(toy_folder).verify()


@pytest.mark.parametrize("name", ["../escape.txt", "/etc/escape.txt", "s-000/../../escape.txt"])
def test_a_member_that_leads_out_of_the_folder_is_named(toy_folder: Path, name: str):
    rewrite_tar(toy_folder, lambda entries: entries.append((name, b"x")))
    with pytest.raises(DataError) as caught:
        ShardSet(toy_folder).verify()
    assert str(caught.value) == (
        f"shard 'toy-000000.tar' has a member {name!r} that leads out of its folder; do not unpack it; copy it again "
        "or build it again; `distkd shards verify` checks every byte"
    )


def test_members_that_occur_twice_are_named(toy_folder: Path):
    rewrite_tar(toy_folder, lambda entries: entries.append(("s-000.json", entries[0][1])))
    with pytest.raises(DataError, match=r"shard 'toy-000000\.tar' has 1 members more than once: 's-000\.json'"):
        ShardSet(toy_folder).verify()


def test_a_stray_shard_is_found(toy_folder: Path):
    shutil.copy(toy_folder / "toy-000000.tar", toy_folder / "other.tar")
    with pytest.raises(DataError, match=r"'other\.tar' is in the folder, but not in the manifest; remove it"):
        ShardSet(toy_folder).verify()


def test_a_sound_zarr_set_verifies(volumes: Path):
    found = ShardSet(volumes).verify()
    assert (found.samples, found.values) == (3, 8)
    assert found.files == sum(path.is_file() for path in (volumes / "volumes.zarr").rglob("*"))


@pytest.mark.parametrize("at", [3, -3])
def test_a_flipped_byte_of_a_volume_names_file_and_sample(volumes: Path, at: int):
    flip(volumes / "volumes.zarr" / "t2" / "c" / "2" / "0" / "0" / "0" / "0", at)
    with pytest.raises(
        DataError,
        match=r"shard 'volumes\.zarr/t2/c/2/0/0/0/0' has SHA-256 .*; cannot read 't2' of sample 'v2' in shard",
    ):
        ShardSet(volumes).verify()


def test_a_flipped_byte_of_vectors_or_metadata_names_the_file(volumes: Path):
    flip(volumes / "volumes.zarr" / "gene" / "c" / "0" / "0", 1)
    with pytest.raises(DataError, match=r"shard 'volumes\.zarr/gene/c/0/0' has SHA-256 .*'gene' of sample 'v0'"):
        ShardSet(volumes).verify()


def test_a_block_of_vectors_is_read_once(volumes: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[tuple[int, str]] = []
    real = ShardSet.read
    monkeypatch.setattr(
        ShardSet, "read", lambda self, sample, names: read.append((sample, *names)) or real(self, sample, names)
    )
    assert ShardSet(volumes).verify().values == 8
    assert [sample for sample, name in read if name == "gene"] == [0]
    assert sorted(sample for sample, name in read if name != "gene") == [0, 0, 1, 2, 2]
    flip(volumes / "volumes.zarr" / "gene" / "c" / "0" / "0", 1)
    with pytest.raises(DataError) as caught:
        ShardSet(volumes).verify()
    assert str(caught.value).count("'gene'") == 1


@pytest.mark.parametrize(
    "values, expected", [([0, 1, 7], r"\[0, 1, 7\] \(4 of 630 places"), (None, r"\[0, 1, 2\] \(4 of 630")]
)
def test_a_label_map_with_values_of_no_class_names_sample_and_value(
    tmp_path: Path, values: list[int] | None, expected: str
):
    write_volumes(tmp_path / "set")
    assert ShardSet(tmp_path / "set").verify().samples == N_SAMPLES
    change_manifest(tmp_path / "set", lambda c: c["modalities"]["seg"].update(values=values))
    with pytest.raises(
        DataError,
        match=r"'seg' of sample 'case-00' in shard 'volumes\.zarr/seg/c/0/0/0/0/0' holds 4 at \(0, 4, 4, 3\), expected "
        rf"one of {expected}",
    ):
        ShardSet(tmp_path / "set").verify()


def test_a_stray_file_of_a_zarr_set_is_found(volumes: Path):
    shutil.copytree(volumes / "volumes.zarr" / "t2" / "c" / "2", volumes / "volumes.zarr" / "t2" / "c" / "1")
    with pytest.raises(
        DataError, match=r"'volumes\.zarr/t2/c/1/0/0/0/0' is in the folder, but not in the manifest; remove it"
    ):
        ShardSet(volumes).verify()
