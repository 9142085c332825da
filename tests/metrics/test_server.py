"""A scrape: the format that was asked for, for those who may, and nobody holds up another."""

from __future__ import annotations

import base64
import gzip
import socket
import ssl
import subprocess
import time
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from distkd.errors import ConfigError
from distkd.metrics import server as serving
from distkd.metrics.exposition import Page, Renderer, process_registry
from distkd.metrics.ledger import Ledger
from distkd.metrics.server import ScrapeServer, read_password, tls_context
from tests.metrics.scraping import OPENMETRICS, get, left_for_good, left_over, scrape, values

SEEN = {"counter distkd_steps_total": 7}


@contextmanager
def _server(**options: Any) -> Iterator[str]:
    ledger = Ledger()
    ledger.add("distkd_steps_total", 7)
    page = Page(ledger.snapshot(), Renderer(), process_registry())
    server = ScrapeServer(("127.0.0.1", 0), **options)
    server.serve(lambda: page)
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.close()
        assert left_for_good() == []


def _connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=60)


@pytest.mark.parametrize(
    "accept", ["", "text/plain", "text/plain;version=1.0.0", OPENMETRICS, f"{OPENMETRICS},*/*;q=0.1"]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_the_format_that_was_asked_for_is_served(accept: str, compressed: bool):
    headers = {"Accept": accept, "Accept-Encoding": "gzip" if compressed else "identity"}
    with _server() as address:
        body, about = get(address, headers)
    openmetrics = accept.startswith("application")
    kind = "application/openmetrics-text; version=1.0.0;" if openmetrics else "text/plain; version="
    assert about["Content-Type"].startswith(kind)
    assert about.get("Content-Encoding") == ("gzip" if compressed else None)
    assert int(about["Content-Length"]) == len(body)
    assert "ython" not in str(about)  # what runs here is nobody's business
    text = (gzip.decompress(body) if compressed else body).decode()
    assert values(text, openmetrics=openmetrics) == SEEN
    assert "process_resident_memory_bytes" in text
    assert "_created" not in text


def test_single_names_may_be_asked_for():
    with _server() as address:
        body, _ = get(address, query="?name[]=distkd_steps_total")
        assert body.decode().splitlines()[-1] == "distkd_steps_total 7.0"
        assert len(body.splitlines()) == 3
        body, _ = get(address, query="?name[]=process_open_fds")
        assert len(body.splitlines()) == 3


def test_who_says_nothing_holds_up_neither_scrapes_nor_the_end():
    with ExitStack() as silent:
        with _server() as address:
            for _ in range(3 * serving._CONNECTIONS):  # more than there may be: the oldest go
                silent.enter_context(_connect(address))
                assert scrape(address) == SEEN
        with pytest.raises(ConnectionRefusedError):
            _connect(address)


def test_connections_are_few_at_a_time():
    with ExitStack() as stack, _server() as address:
        silent = [stack.enter_context(_connect(address)) for _ in range(serving._CONNECTIONS + 3)]
        for connection in silent[:3]:
            assert connection.recv(1) == b""  # hung up, to make room
        assert scrape(address) == SEEN
        end = time.monotonic() + 60
        while left_over().count("metrics-scrape") > serving._CONNECTIONS:  # those that were hung up on are ending
            assert time.monotonic() < end
            time.sleep(0.01)  # polling other threads, not waiting for luck


def test_a_silent_connection_ends_by_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "_TIMEOUT_S", 0.01)
    monkeypatch.setattr(serving._Handler, "timeout", 0.01)
    with _server() as address, _connect(address) as connection:
        connection.sendall(b"GET /metr")
        assert connection.recv(1) == b""


def test_a_request_without_end_is_refused():
    with _server() as address, _connect(address) as connection:
        # as much as is read and no more: what lies unread when a connection ends takes the answer along
        connection.sendall(b"GET /".ljust(2**16 + 1, b"a"))
        assert connection.recv(4096).startswith(b"HTTP/1.0 414 ")


@pytest.mark.parametrize(
    "authorization",
    [
        None, "", "Basic", "Basic !", "Bearer abc", "Basic " + base64.b64encode(b"prometheus").decode(),
        "Basic " + base64.b64encode(b"prometheus:wrong").decode(), "Basic " + base64.b64encode(b"x:secret").decode(),
    ],
)  # fmt: skip
def test_a_password_is_asked_for(authorization: str | None):
    with _server(password=b"prometheus:secret") as address:
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(address, {} if authorization is None else {"Authorization": authorization})
        refused.value.close()
        assert refused.value.code == 401
        assert refused.value.headers["WWW-Authenticate"] == 'Basic realm="distkd"'
        known = "Basic " + base64.b64encode(b"prometheus:secret").decode()
        assert values(get(address, {"Authorization": known})[0].decode()) == SEEN


def test_a_password_file_has_one_line_that_others_cannot_read(tmp_path: Path):
    path = tmp_path / "password"
    with pytest.raises(ConfigError, match=rf"metrics.password_file={path} cannot be read: No such file or directory"):
        read_password(path)
    path.write_text("prometheus:a:b c\n")
    path.chmod(0o604)
    with pytest.raises(ConfigError, match=rf"is open to others \(mode 0604\); run chmod o= {path}"):
        read_password(path)
    path.chmod(0o640)
    assert read_password(path) == b"prometheus:a:b c"
    for text in ("", "\n", "prometheus\n", "prometheus:\n", "a:b\nc:d\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="has something else than one line user:password"):
            read_password(path)


def test_https_is_served_and_a_silent_client_holds_up_nobody(certificate: tuple[Path, Path]):
    cert, key = certificate
    trusting = ssl.create_default_context(cafile=str(cert))
    with ExitStack() as silent, _server(tls=tls_context(cert, key)) as address:
        for _ in range(2 * serving._CONNECTIONS):
            silent.enter_context(_connect(address))  # and no handshake
            assert values(get(address, tls=trusting)[0].decode()) == SEEN
        with _connect(address) as plain:
            plain.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert b"distkd" not in plain.recv(4096)
        with pytest.raises(urllib.error.URLError):
            get(address, tls=ssl.create_default_context())  # which does not know the certificate


def test_a_file_may_hold_certificate_and_key(certificate: tuple[Path, Path], tmp_path: Path):
    both = tmp_path / "both.pem"
    both.write_bytes(certificate[0].read_bytes() + certificate[1].read_bytes())
    with _server(tls=tls_context(both, None)) as address:
        assert values(get(address, tls=ssl.create_default_context(cafile=str(both)))[0].decode()) == SEEN


def test_files_that_are_no_certificate_with_its_key_are_refused(certificate: tuple[Path, Path], tmp_path: Path):
    cert, key = certificate
    with pytest.raises(ConfigError, match=r"metrics.tls_key=\S*absent cannot be read: No such file or directory"):
        tls_context(cert, tmp_path / "absent")
    with pytest.raises(ConfigError, match=rf"metrics.tls_cert={key} and metrics.tls_key={key} are no certificate with"):
        tls_context(key, key)
    with pytest.raises(ConfigError, match="are no certificate with its key"):
        tls_context(cert, None)
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with pytest.raises(ConfigError, match="in PEM form without a passphrase"):  # and nobody is asked for it
        tls_context(cert, locked)
