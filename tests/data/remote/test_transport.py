"""How files are fetched: trouble is named or overcome, and secrets stay where they belong."""

from __future__ import annotations

import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from distkd.data.manifest import MANIFEST
from distkd.data.remote.transport import TransferError, address, check_url, is_url, masked, open_stream
from distkd.errors import ConfigError, DataError
from tests.data.remote.common import (
    SHARD,
    busy,
    cached,
    flipped,
    leftovers,
    long,
    open_store,
    short,
    silent,
)
from tests.data.remote.serve import Handler, Server

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize(
    "answer, found",
    [
        (flipped, r"SHA-256 [0-9a-f]{12}\.\.\., manifest says [0-9a-f]{12}\.\.\.; copy the shard set there again"),
        (short, r"1000 bytes, manifest says \d+; copy the shard set there again"),
        (long, r"more than \d+ bytes, manifest says that; copy the shard set there again"),
        (busy, r"HTTP status 503 Service Unavailable; check the address, the rights and the network"),
        (silent, r"the connection broke \(.+\); check the address"),
    ],
)
def test_trouble_is_named_after_three_attempts(server: Server, cache: Path, answer: Any, found: str):
    server.answers[SHARD] = answer
    with open_store(server.url, cache) as store:
        with pytest.raises(
            DataError, match=rf"^cannot fetch '{SHARD}' from '{server.url}/{SHARD}', attempt 3 of 3: {found}"
        ):
            store.path(0)
        assert server.asked.count(SHARD) == 3
        assert leftovers(cache) == []
        assert cached(cache) == set()
        del server.answers[SHARD]
        store.path(0)  # mended there: goes on


def test_what_is_not_there_is_asked_for_once(server: Server, source: Path, cache: Path):
    (source / SHARD).unlink()
    with open_store(server.url, cache) as store, pytest.raises(DataError, match=r"attempt 1 of 3: HTTP status 404 Not"):
        store.path(0)
    assert server.asked.count(SHARD) == 1
    with (
        open_store(f"file://{source}", cache) as store,
        pytest.raises(DataError, match=rf"from 'file://{source}/{SHARD}', attempt 1 of 3: No such file"),
    ):
        store.path(0)


@pytest.mark.parametrize("status", [500, 429])
def test_passing_trouble_is_overcome(server: Server, source: Path, cache: Path, status: int):
    def answer(handler: Handler, body: bytes, turn: int) -> None:
        if turn < 3:
            handler.send_error(status)
        else:
            handler.reply(body)

    server.answers[SHARD] = answer
    with open_store(server.url, cache) as store:
        assert store.path(0).read_bytes() == (source / SHARD).read_bytes()
    assert server.asked.count(SHARD) == 3


def test_waits_grow_and_differ(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch):
    server.answers[SHARD] = busy
    waits: list[float] = []
    with open_store(server.url, cache, backoff_s=0.5) as store:
        store.manifest()
        monkeypatch.setattr(store._never, "wait", waits.append)
        with pytest.raises(DataError, match="attempt 3 of 3"):
            store.path(0)
    assert len(waits) == 2
    assert 0.25 <= waits[0] <= 0.75
    assert 0.5 <= waits[1] <= 1.5
    assert waits[1] != 2 * waits[0]


def test_a_server_that_stops_sending_is_given_up(server: Server, cache: Path):
    stop = threading.Event()

    def answer(handler: Handler, body: bytes, turn: int) -> None:
        handler.reply(body[:100], length=len(body))
        stop.wait(240)

    server.answers[SHARD] = answer
    with open_store(server.url, cache, attempts=1) as store:
        store.manifest()  # which comes in its own time
        store._stall_s = 1.0
        # a slow machine may not come to the first byte before
        with pytest.raises(DataError, match=r"attempt 1 of 1: (the connection broke|no connection) \(timed out\)"):
            store.path(0)
    stop.set()


def test_no_server_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        with (
            open_store(f"http://127.0.0.1:{taken.getsockname()[1]}/set", cache) as store,
            pytest.raises(DataError, match=r"cannot fetch 'manifest\.json' from .*: no connection \(.*refused.*\)"),
        ):
            store.manifest()


@pytest.mark.parametrize(
    "command, found",
    [
        ("exit 7 # {}", "exit code 7"),
        ("head -c 100 SOURCE/{}; exit 3", "exit code 3"),
        ("kill -9 $$ # {}", "the command was killed by signal 9"),
        ("head -c 100 SOURCE/{}", r"100 bytes, manifest says \d+"),
    ],
)
def test_a_command_s_failure_is_named(source: Path, cache: Path, command: str, found: str):
    _refused_command(source, cache, command, found, stall_s=240.0)


def test_a_command_that_hangs_is_given_up(source: Path, cache: Path):
    _refused_command(source, cache, "exec sleep 600 # {}", r"no byte for 0\.2 s", stall_s=0.2)


def test_a_command_that_does_not_end_is_given_up(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """However long its first byte takes: only the wait for its end is cut short."""
    wait = subprocess.Popen.wait

    def waited(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        return wait(process, None if timeout is None else 0.2)

    monkeypatch.setattr(subprocess.Popen, "wait", waited)
    found = "the command has not ended 240 s after its last byte"
    _refused_command(source, cache, "cat SOURCE/{}; exec 1>&-; exec sleep 600", found, stall_s=240.0)


def _refused_command(source: Path, cache: Path, command: str, found: str, *, stall_s: float) -> None:
    with open_store(f"file://{source}", cache) as store:
        store.manifest()
        store.url = "pipe:" + command.replace("SOURCE", str(source))
        store._stall_s = stall_s
        words = rf"cannot fetch '{SHARD}' from 'pipe:.*', attempt 3 of 3: {found}; "
        with pytest.raises(DataError, match=words):
            store.path(0)


def read_all(place: str) -> bytes:
    with open_stream(place, stall_s=240) as read:
        return b"".join(iter(read, b""))


def test_a_failing_command_is_seen_when_webdataset_is_verbose(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GOPEN_VERBOSE", "1")  # it forgets the exit code then
    with pytest.raises(TransferError, match="exit code 3"):
        read_all("pipe:echo x; exec 1>&-; sleep 0.05; exit 3")


def test_an_aborted_command_ends():
    """Or the test would wait for it, longer than a test may take."""
    with suppress(KeyError), open_stream("pipe:echo x; exec sleep 3600", stall_s=240) as read:
        assert read()
        raise KeyError


def test_a_command_cannot_be_run_in_webdataset_s_secure_mode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(TransferError, match=r"webdataset's gopen refuses it \(ValueError\)"):
        read_all("pipe:cat x")


def test_user_and_password_go_into_the_header_and_not_into_messages(server: Server, cache: Path):
    server.answers[SHARD] = busy
    host = server.url.removeprefix("http://")
    with open_store(f"http://annabel:pa%20ss@{host}?sig=secret&x=1", cache) as store:
        with pytest.raises(DataError) as caught:
            store.path(0)
        assert server.headers[0]["Authorization"] == "Basic YW5uYWJlbDpwYSBzcw=="
        assert server.paths[:2] == [f"/set/{MANIFEST}?sig=secret&x=1", f"/set/{SHARD}?sig=secret&x=1"]
        assert f"'http://***@{host}/{SHARD}?***'" in str(caught.value)
        assert caught.value.__cause__ is None
        for text in (str(caught.value), str(store), *(path.name for path in cache.rglob("*"))):
            assert not any(secret in text for secret in ("annabel", "pa%20ss", "pa ss", "secret"))


def test_a_password_does_not_follow_to_another_server(server: Server, source: Path, cache: Path):
    with Server(source) as elsewhere:

        def answer(handler: Handler, body: bytes, turn: int) -> None:
            handler.send_response(302)
            handler.send_header("Location", f"{elsewhere.url}/{SHARD}")
            handler.end_headers()

        server.answers[SHARD] = answer
        with open_store(server.url.replace("http://", "http://ann:pass@"), cache) as store:
            assert store.path(0).read_bytes() == (source / SHARD).read_bytes()
        assert "Authorization" in server.headers[0]
        assert "Authorization" not in elsewhere.headers[0]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://h/set/a.tar", "https://h/set/a.tar"),
        ("https://u:p@h:8/set/a.tar?X-Sig=s&e=1#f", "https://***@h:8/set/a.tar?***"),
        ("https://[h/set", "https://..."),
        ("file:///data/a.tar", "file:///data/a.tar"),
        ("pipe:cat /data/set/a.tar", "pipe:cat /data/set/a.tar"),
        ("pipe:aws s3 cp s3://b/set/a.tar -", "pipe:aws ... s3://b/set/a.tar ..."),
        ("pipe:TOKEN=abc KEY=d curl -u me:pw https://u:p@h/a.tar?s=1", "pipe:curl ... https://***@h/a.tar?***"),
        ('pipe:curl -H "Authorization: Bearer abc" "https://h/a.tar?s=1&t=2"', "pipe:curl ... https://h/a.tar?***"),
        ("pipe:sh -c 'curl -u me:pw https://u:p@h/a?s=1&x=2'", "pipe:sh ... https://***@h/a?***"),
        ("pipe:curl 'unclosed --token abc", "pipe:curl ..."),
        ("pipe:$(secret)", "pipe:..."),
        ("pipe:", "pipe:..."),
    ],
)
def test_secrets_are_masked(text: str, shown: str):
    assert masked(text) == shown


@pytest.mark.parametrize(
    "url, expected",
    [
        ("https://h/set", "https://h/set/a.tar"),
        ("https://h/set/?sig=1", "https://h/set/a.tar?sig=1"),
        ("https://h/get?file={}&sig=1", "https://h/get?file=a.tar&sig=1"),
        ("pipe:gsutil cat gs://b/{}", "pipe:gsutil cat gs://b/a.tar"),
    ],
)
def test_the_address_of_a_file(url: str, expected: str):
    assert address(check_url(url), "a.tar") == expected


@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://bucket/set", r"no way to read 's3://bucket/set'; available: .*gs, .*pipe.*'pipe:aws s3 cp s3://bucket"),
        ("/data/set", "no way to read"),
        ("pipe:aws s3 cp s3://b/set -", r"the command 'pipe:aws .*' has no \{\}, which stands for the file's name"),
        ("https:///set", "names no host"),
        ("https://[h/set", "is no URL"),
        ("file://other/set", r"names a host; a folder of this machine is 'file:///path/set'"),
    ],
)
def test_addresses_that_cannot_be_read_are_refused(url: str, message: str, cache: Path):
    with pytest.raises(ConfigError, match=message):
        open_store(url, cache)


def test_a_url_is_told_from_a_folder():
    assert is_url("https://h/set")
    assert is_url("pipe:cat {}")
    assert not is_url("/data/set")
    assert not is_url("data/set")
