"""A remote shard set through the node's cache: fetched once, checked, limited, and damage or trouble named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distkd.data.manifest import MANIFEST, Manifest
from distkd.data.remote import node_cache, transport
from distkd.data.remote import store as store_module
from distkd.data.remote.node_cache import CacheFullError
from distkd.errors import DataError
from tests.data.remote.common import (
    MIB,
    SHARD,
    bytes_on_disk,
    cached,
    ended,
    flipped,
    leftovers,
    open_store,
)
from tests.data.remote.serve import Handler, Server
from tests.data.toy import write_toy

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_a_file_is_fetched_at_its_first_use_only(server: Server, source: Path, cache: Path):
    with open_store(server.url, cache) as store:
        assert server.asked == []
        assert store.manifest() == store.manifest()
        for _ in range(2):
            assert store.path(1).read_bytes() == (source / "toy-000001.tar").read_bytes()
        assert server.asked == [MANIFEST, "toy-000001.tar"]
        assert store.n_fetched == 2
        assert store.bytes_fetched == sum((source / name).stat().st_size for name in server.asked)
    assert leftovers(cache) == []


def test_the_set_s_folder_is_one_of_a_shard_set(server: Server, source: Path, cache: Path):
    with open_store(server.url, cache) as store:
        assert (store.folder / MANIFEST).read_bytes() == (source / MANIFEST).read_bytes()
        assert store.path(0) == store.folder / SHARD


@pytest.mark.parametrize("url", ["file://{}", "file://{}/", "pipe:cat {}/{{}}", "pipe:cat '{}/{{}}' | cat"])
def test_folders_and_commands_give_the_same(source: Path, cache: Path, url: str):
    with open_store(url.format(source), cache) as store:
        for number, shard in enumerate(store.manifest().shards):
            assert store.path(number).read_bytes() == (source / shard.file).read_bytes()


def test_a_cache_that_others_could_change_is_refused(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    open_store(f"file://{source}", cache).close()
    root = cache / "distkd-shards"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for rights in (0o770, 0o702):
        root.chmod(rights)
        with pytest.raises(DataError, match=rf"rights are {rights:o}, so others can .* with data\.stream\.cache$"):
            open_store(f"file://{source}", cache)
    root.chmod(0o755)  # that others can read it is the owner's matter
    open_store(f"file://{source}", cache).close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(DataError, match=r"cannot be trusted: it belongs to user \d+, expected 12345"):
            open_store(f"file://{source}", cache)
    root.rename(cache / "elsewhere")
    root.symlink_to(cache / "elsewhere")
    with pytest.raises(DataError, match="cannot be trusted: it is a link or a file, expected a folder; remove it"):
        open_store(f"file://{source}", cache)


def test_a_folder_s_name_may_hold_signs_that_urls_escape(source: Path, tmp_path: Path):
    shutil.copytree(source, tmp_path / "a b")
    with open_store(f"file://{tmp_path}/a%20b", tmp_path / "cache") as store:
        assert store.path(0).stat().st_size == (source / SHARD).stat().st_size


def test_the_same_set_elsewhere_is_found_in_the_cache(server: Server, source: Path, cache: Path):
    with open_store(server.url, cache) as store:
        store.path(0)
    with open_store(f"file://{source}", cache) as store:
        store.path(0)
        assert store.n_fetched == 1  # the manifest
    assert server.asked == [MANIFEST, SHARD]


def test_another_set_of_the_same_names_is_kept_apart(source: Path, tmp_path: Path, cache: Path):
    write_toy(tmp_path / "other", n_samples=30, shard_bytes=12_000)
    for folder in (source, tmp_path / "other"):
        with open_store(f"file://{folder}", cache) as store:
            assert store.path(0).read_bytes() == (folder / SHARD).read_bytes()


def test_a_manifest_is_asked_for_again_after_a_while(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch):
    for _ in range(2):
        with open_store(server.url, cache) as store:
            store.manifest()
    assert server.asked == [MANIFEST]
    monkeypatch.setattr(store_module, "_FRESH_S", -1.0)
    with open_store(server.url, cache) as store:
        store.manifest()
    assert server.asked == [MANIFEST, MANIFEST]


def test_processes_of_a_node_fetch_each_file_once(server: Server, cache: Path, in_child: Callable[..., int]):
    slow = threading.Event()

    def answer(handler: Handler, body: bytes, turn: int) -> None:
        slow.wait(120)  # until both processes want it
        handler.reply(body)

    server.answers[SHARD] = answer
    n_shards = 3

    def work() -> None:
        with open_store(server.url, cache) as store:
            for number in range(n_shards):
                found = hashlib.sha256(store.path(number).read_bytes()).hexdigest()
                assert found == store.manifest().shards[number].sha256

    children = [in_child(work) for _ in range(2)]
    while SHARD not in server.asked:
        time.sleep(0.01)
    time.sleep(0.1)
    slow.set()
    assert [ended(child) for child in children] == [0, 0]
    assert sorted(server.asked) == sorted([MANIFEST, *(f"toy-{number:06d}.tar" for number in range(n_shards))])


def test_threads_fetch_each_file_once(server: Server, cache: Path):
    with open_store(server.url, cache) as store:
        threads = [threading.Thread(target=store.path, args=(0,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.path(0).exists()
    assert server.asked == [MANIFEST, SHARD]


def test_a_process_killed_in_the_middle_leaves_nothing_broken(
    server: Server, source: Path, cache: Path, in_child: Callable[..., int]
):
    half, going_on = threading.Event(), threading.Event()

    def answer(handler: Handler, body: bytes, turn: int) -> None:
        if turn == 1:
            handler.reply(body[: len(body) // 2], length=len(body))
            half.set()
            going_on.wait(240)
        else:
            handler.reply(body)

    server.answers[SHARD] = answer
    child = in_child(lambda: open_store(server.url, cache).path(0))
    assert half.wait(240)
    while not leftovers(cache):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert leftovers(cache) == [f".{SHARD}.part"]
    assert cached(cache) == set()
    going_on.set()
    with open_store(server.url, cache) as store:
        assert store.path(0).read_bytes() == (source / SHARD).read_bytes()
    assert leftovers(cache) == []


@pytest.mark.parametrize("wanted", [0, 1])
def test_what_a_killed_process_left_makes_room(source: Path, cache: Path, wanted: int):
    with open_store(f"file://{source}", cache) as store:
        folder, size = store.folder, (source / "toy-000001.tar").stat().st_size
        (folder / f".{SHARD}.part").write_bytes(bytes(MIB))
        limit = bytes_on_disk(cache) - MIB + size
    with open_store(f"file://{source}", cache, limit) as store:
        store.path(wanted)
    assert leftovers(cache) == []


def test_the_cache_keeps_within_its_limit_and_drops_the_least_recently_used(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        shards = store.manifest().shards
        room = bytes_on_disk(cache)
    assert len(shards) > 4
    size = max(shard.bytes for shard in shards)
    limit = room + 3 * size + 100
    with open_store(f"file://{source}", cache, limit) as store:

        def use(number: int) -> None:
            store.path(number)
            store.release(number)
            assert bytes_on_disk(cache) <= limit

        for number in (0, 1, 2):
            use(number)
        use(0)
        use(3)
        assert cached(cache) == {shards[number].file for number in (0, 2, 3)}
        use(4)
        assert cached(cache) == {shards[number].file for number in (0, 3, 4)}
        assert store.n_fetched == 5


def test_files_in_use_stay_and_a_cache_too_small_for_them_is_named(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        shards = store.manifest().shards
        room = bytes_on_disk(cache)
    size = max(shard.bytes for shard in shards)
    limit = room + 2 * size + 100
    with open_store(f"file://{source}", cache, limit) as store, open_store(f"file://{source}", cache, limit) as other:
        store.path(0)
        other.path(1)
        with pytest.raises(
            CacheFullError,
            match=rf"^no room for '{shards[2].file}' in the cache .*: it needs {shards[2].bytes} bytes, \d+ of "
            rf"the {limit} of data\.stream\.cache_gib are in use by the processes of this node; raise it to \S+ or "
            "more$",
        ):
            store.path(2)
        assert cached(cache) == {shards[0].file, shards[1].file}
        other.release(1)
        store.path(2)
        assert cached(cache) == {shards[0].file, shards[2].file}


def test_a_file_stays_until_it_is_released_as_often_as_it_was_asked_for(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        shards = store.manifest().shards
        limit = bytes_on_disk(cache) + max(shard.bytes for shard in shards) + 100
    with open_store(f"file://{source}", cache, limit) as store:
        store.path(0)
        store.path(0)
        store.release(0)
        with pytest.raises(CacheFullError):
            store.path(1)
        store.release(0)
        store.path(1)
    assert cached(cache) == {shards[1].file}


def test_room_is_waited_for(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        shards = store.manifest().shards
        limit = bytes_on_disk(cache) + max(shard.bytes for shard in shards) + 100
    with open_store(f"file://{source}", cache, limit, wait_s=240.0) as store:
        store.path(0)
        release = threading.Timer(0.1, store.release, (0,))
        release.start()
        store.path(1)
        release.join()
    assert cached(cache) == {shards[1].file}


def test_the_caller_s_spare_files_make_room(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        shards = store.manifest().shards
        limit = bytes_on_disk(cache) + max(shard.bytes for shard in shards) + 100
    with open_store(f"file://{source}", cache, limit) as store:
        store.path(0)
        store.path(1, spare=lambda: store.release(0) is None)
    assert cached(cache) == {shards[1].file}


def test_a_file_larger_than_the_limit_is_named(source: Path, cache: Path):
    limit = (source / MANIFEST).stat().st_size * 3
    with open_store(f"file://{source}", cache, limit) as store:
        store.manifest()
        with pytest.raises(
            DataError, match=rf"'x' has {limit + 1} bytes, more than the {limit} of data\.stream\.cache_gib; raise it"
        ):
            store.fetch("x", limit + 1, "0" * 64)


def test_a_manifest_larger_than_the_limit_is_named(source: Path, cache: Path):
    with (
        open_store(f"file://{source}", cache, 500) as store,
        pytest.raises(DataError, match=r"cannot fetch 'manifest\.json' from .*: more than 500 bytes, the limit"),
    ):
        store.manifest()


def test_nothing_but_its_own_is_removed(source: Path, cache: Path):
    cache.mkdir()
    (cache / "thesis.tar").write_bytes(bytes(MIB))
    with open_store(f"file://{source}", cache) as store:
        shards = store.manifest().shards
        limit = bytes_on_disk(cache / "distkd-shards") + 2 * max(shard.bytes for shard in shards)
    with open_store(f"file://{source}", cache, limit) as store:
        for number in range(len(shards)):
            store.path(number)
            store.release(number)
    assert (cache / "thesis.tar").stat().st_size == MIB
    assert stat.S_IMODE((cache / "distkd-shards").stat().st_mode) == 0o700


def test_a_forked_process_does_not_hold_its_parent_s_files(source: Path, cache: Path, in_child: Callable[..., int]):
    with open_store(f"file://{source}", cache) as store:
        shards = store.manifest().shards
        limit = bytes_on_disk(cache) + max(shard.bytes for shard in shards) + 100
    with open_store(f"file://{source}", cache, limit) as store:
        store.path(0)
        from_child, ready = os.pipe()
        released, to_child = os.pipe()

        def work() -> None:
            os.write(ready, b"x")
            assert os.read(released, 1)
            store.path(1)
            store.path(0)  # which evicts: nothing else fits

        def quiet() -> None:
            with pytest.raises(CacheFullError):
                work()

        child = in_child(quiet)
        assert os.read(from_child, 1)
        store._cache.forget()  # closes without giving the locks back, as a killed process does
        store.path(1)
        assert cached(cache) == {shards[1].file}
        store.release(1)
        os.write(to_child, b"x")
        assert ended(child) == 0
    for descriptor in (from_child, ready, released, to_child):
        os.close(descriptor)


def test_a_store_travels_with_its_manifest(server: Server, cache: Path):
    with open_store(server.url, cache) as store:
        store.manifest()
        with pickle.loads(pickle.dumps(store)) as other:
            assert other.manifest() == store.manifest()
            assert other.path(0) == store.path(0)
    assert server.asked == [MANIFEST, SHARD]


def test_a_cached_file_of_another_size_is_fetched_again(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        path = store.path(0)
    os.truncate(path, 100)
    with open_store(f"file://{source}", cache) as store:
        assert store.path(0).read_bytes() == (source / SHARD).read_bytes()
        assert store.n_fetched == 1


def test_a_cached_file_is_hashed_again_after_a_reboot(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    with open_store(f"file://{source}", cache) as store:
        path = store.path(0)
        store.path(1)
    with path.open("r+b") as file:
        file.write(bytes(100))  # of the right size, as after a power failure
    monkeypatch.setattr(node_cache, "_boot", lambda: b"0" * 36)
    with open_store(f"file://{source}", cache) as store:
        assert store.path(0).read_bytes() == (source / SHARD).read_bytes()
        store.path(1)
        assert store.n_fetched == 1


def test_a_damaged_cached_file_is_mended_on_request(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        path = store.path(0)
        assert not store.mend(0)
        with path.open("r+b") as file:
            file.write(bytes(100))
        assert store.mend(0)
        assert path.read_bytes() == (source / SHARD).read_bytes()
        assert store.n_fetched == 3


def test_a_full_disk_is_named(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_store(f"file://{source}", cache) as store:
        size = store.manifest().shards[0].bytes
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            DataError,
            match=rf"the disk of the cache folder '.*' is full: no space for '{SHARD}' \({size} bytes\), \d+ bytes "
            r"free; free some, lower data\.stream\.cache_gib \(\d+ bytes\), or choose another folder with "
            r"data\.stream\.cache$",
        ):
            store.path(0)
    assert leftovers(cache) == []


def test_a_disk_that_fills_up_below_the_limit_is_made_room_on(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    with open_store(f"file://{source}", cache) as store:
        store.path(0)
        store.release(0)
        allocate = os.posix_fallocate

        def full_once(descriptor: int, offset: int, size: int) -> None:
            if SHARD in cached(cache):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allocate(descriptor, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", full_once)
        store.path(1)
    assert cached(cache) == {"toy-000001.tar"}


def test_a_disk_that_cannot_reserve_is_used_all_the_same(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    with open_store(f"file://{source}", cache) as store:
        assert store.path(0).read_bytes() == (source / SHARD).read_bytes()


def test_a_cache_that_is_no_folder_is_named(source: Path, cache: Path):
    cache.write_text("")
    with pytest.raises(
        DataError, match=r"cannot use the cache folder .*; choose a folder .* with data\.stream\.cache$"
    ):
        open_store(f"file://{source}", cache)


@pytest.mark.parametrize("name", ["../out.tar", "/etc/passwd", "a/b.tar", "..", "-rf.tar", "a\\b", "a b", "", ".x.tar"])
def test_names_that_lead_elsewhere_are_refused(source: Path, cache: Path, name: str):
    with open_store(f"file://{source}", cache) as store:
        with pytest.raises(DataError, match=r"the manifest names the file .*the shard set is not to be trusted"):
            store.fetch(name, 1, "0" * 64)
        content = json.loads((source / MANIFEST).read_text())
        content["shards"][0]["file"] = name
        (source / MANIFEST).write_text(json.dumps(content))
        with (
            open_store(f"file://{source}/", cache.with_name("fresh")) as other,
            pytest.raises(DataError, match="cannot be streamed"),
        ):
            other.manifest()


def test_a_file_beside_the_shards_is_fetched_by_its_digest(source: Path, cache: Path):
    (source / "notes.txt").write_bytes(b"notes")
    (source / "other.txt").write_bytes(b"damage")
    with open_store(f"file://{source}", cache) as store:
        assert store.fetch("notes.txt", 5, hashlib.sha256(b"notes").hexdigest()).read_bytes() == b"notes"
        with pytest.raises(DataError, match=r"cannot fetch 'other\.txt' .* attempt 3 of 3: SHA-256"):
            store.fetch("other.txt", 6, hashlib.sha256(b"otherX").hexdigest())


def test_what_is_no_manifest_is_named_and_forgotten(server: Server, source: Path, cache: Path):
    good = (source / MANIFEST).read_bytes()
    (source / MANIFEST).write_bytes(good[:1000])
    with open_store(server.url, cache) as store:
        with pytest.raises(DataError, match=rf"shard set '{server.url}' cannot be streamed: .* not a valid manifest"):
            store.manifest()
        (source / MANIFEST).write_bytes(good)
        assert store.manifest().n_samples == 48


def test_a_zarr_set_is_refused(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = Manifest.model_validate_json((source / MANIFEST).read_text()).model_copy(update={"container": "zarr"})
    monkeypatch.setattr(store_module, "read_manifest", lambda folder: manifest)
    with (
        open_store(f"file://{source}", cache) as store,
        pytest.raises(DataError, match=r"cannot be streamed: it is a zarr set, .*; copy the set to a disk of the node"),
    ):
        store.manifest()


def test_shards_outside_of_the_set_are_refused(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        n = len(store.manifest().shards)
        with pytest.raises(
            DataError, match=rf"shard {n} is not in shard set 'file:.*', which has shards 0\.\.{n - 1}$"
        ):
            store.path(n)


def test_prefetched_files_are_there_and_come_in_order(server: Server, cache: Path):
    with open_store(server.url, cache, ahead=2) as store:
        store.prefetch([3, 1, 0, 2])
        while server.asked.count("toy-000001.tar") == 0:
            time.sleep(0.01)
        thread = store._ahead._thread
        if thread is not None:
            thread.join()
        assert server.asked == [MANIFEST, "toy-000003.tar", "toy-000001.tar"]  # two ahead, not more
        store.path(3)
        while server.asked.count(SHARD) == 0:
            time.sleep(0.01)
        assert store.path(1).exists()
        assert store.path(0).exists()
        assert store.path(2).exists()
    assert server.asked[1:] == ["toy-000003.tar", "toy-000001.tar", SHARD, "toy-000002.tar"]


def test_prefetched_files_stay_until_they_are_not_wanted(source: Path, cache: Path):
    with open_store(f"file://{source}", cache) as store:
        shards = store.manifest().shards
        limit = bytes_on_disk(cache) + 2 * max(shard.bytes for shard in shards) + 100
    with open_store(f"file://{source}", cache, limit) as store, open_store(f"file://{source}", cache, limit) as other:
        store.prefetch([0, 1])
        while (thread := store._ahead._thread) is not None:
            thread.join()
        with pytest.raises(CacheFullError):
            other.path(2)
        store.prefetch([1])
        other.path(2)
        assert cached(cache) == {shards[1].file, shards[2].file}
        other.release(2)
        # of one's own prefetched files the last makes room for what is needed now
        store.prefetch([1, 3])
        while (thread := store._ahead._thread) is not None:
            thread.join()
        store.path(2)
        assert cached(cache) == {shards[1].file, shards[2].file}


def test_what_fails_in_the_background_is_raised_where_it_is_asked_for(server: Server, cache: Path):
    server.answers[SHARD] = flipped
    with open_store(server.url, cache) as store:
        store.prefetch([0, 1])
        while (thread := store._ahead._thread) is not None:
            thread.join()
        assert store.path(1).exists()
        with pytest.raises(DataError, match=rf"cannot fetch '{SHARD}' .* SHA-256"):
            store.path(0)
        assert server.asked.count(SHARD) == 3
        del server.answers[SHARD]
        assert store.path(0).exists()


def test_closing_ends_a_download_in_the_background(server: Server, cache: Path):
    half, stop = threading.Event(), threading.Event()

    def answer(handler: Handler, body: bytes, turn: int) -> None:
        half.set()  # first: who waits for the rest may have hung up already
        handler.reply(body[:100], length=len(body))
        stop.wait(240)

    server.answers[SHARD] = answer
    with open_store(server.url, cache, backoff_s=3600.0) as store:
        store.manifest()  # which comes in its own time
        store._stall_s = 0.2
        store.prefetch([0])
        assert half.wait(240)
    stop.set()
    assert leftovers(cache) == []
    assert store._ahead._thread is None


def test_closing_ends_a_slow_download(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch):
    begun, left = threading.Event(), threading.Event()

    def answer(handler: Handler, body: bytes, turn: int) -> None:
        handler.reply(body[:100], length=len(body))
        begun.set()
        for start in range(100, len(body)):  # minutes, if nobody leaves
            left.wait(0.02)
            handler.wfile.write(body[start : start + 1])

    monkeypatch.setattr(transport, "_BLOCK_BYTES", 1)
    server.answers[SHARD] = answer
    with open_store(server.url, cache) as store:
        store.prefetch([0])
        assert begun.wait(240)
    left.set()
    assert store.n_fetched == 1  # the manifest
    assert leftovers(cache) == []
    assert cached(cache) == set()
