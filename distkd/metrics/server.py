"""Answers scrapes over HTTP or HTTPS, each on a thread of its own, from pages that were made before.

Nobody who connects can hold up more than himself: few connections at a time, the oldest goes for a new one, and each
ends soon when it says nothing. Formats are negotiated as the client library does.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import socket
import socketserver
import ssl
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector
from prometheus_client.exposition import choose_encoder, gzip_accepted

from distkd.errors import ConfigError
from distkd.metrics.exposition import Families, Page

__all__ = ["ScrapeServer", "read_password", "tls_context"]

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
"""How long a connection may say nothing, its TLS handshake included."""
_CONNECTIONS = 8
"""At a time; Prometheus needs one, for some milliseconds."""
_POLL_S = 0.2
"""How long the end of a run may wait for the server's loop, and a signal for the wait for a last scrape."""


class ScrapeServer(socketserver.ThreadingTCPServer):
    """Takes connections from the start, and answers them from `serve` until it is closed.

    Not `http.server.HTTPServer`, which asks for the host's full name when it binds and may wait long for that.

    Args:
        address: host and port to listen on; port 0 is any free one.
        tls: makes it HTTPS.
        password: `user:password` that a scraper has to name.

    Raises:
        OSError: the port is taken.
        OverflowError: there is no such port.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 16

    def __init__(
        self,
        address: tuple[str, int],
        *,
        tls: ssl.SSLContext | None = None,
        password: bytes | None = None,
    ):
        self._tls, self._password = tls, password
        self.was_scraped = False
        """Whether anybody who may has asked for a page."""
        self._answered: Page | None = None
        self._news = threading.Condition()
        self._open: dict[socket.socket, None] = {}
        """Connections, the oldest first."""
        self._answering: list[threading.Thread] = []
        """Of connections; one lives a little longer than its connection."""
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        super().__init__(address, _Handler)

    def serve(self, page: Callable[[], Page]) -> None:
        """Answer with what `page` gives, on threads of its own."""
        self.page = page
        thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": _POLL_S}, name="metrics-server", daemon=True
        )
        thread.start()
        self._thread = thread  # only now: `close` would wait for ever for one that could not be started

    def wait_for_scrape(self, timeout_s: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until a scrape was answered with the page that stands now; false when none came in time.

        Args:
            timeout_s: how long at most.
            until: asked again and again; the wait ends when it says yes.
        """
        page, end = self.page(), time.monotonic() + timeout_s
        while not until():
            left = min(end - time.monotonic(), _POLL_S)
            with self._news:
                if self._news.wait_for(lambda: self._answered is page, left):
                    return True
            if left <= 0:
                break
        return False

    def note_answer(self, page: Page) -> None:
        with self._news:
            self._answered = page
            self._news.notify_all()

    def admits(self, authorization: str | None) -> bool:
        """Whether a request may see the page."""
        if self._password is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        try:
            named = base64.b64decode(given.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        # takes as long for a good guess as for a bad one
        return scheme.lower() == "basic" and hmac.compare_digest(named, self._password)

    def close(self) -> None:
        """Let the port go and end all connections; no thread is left."""
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
        self.server_close()
        with self._guard:
            left, threads = list(self._open), self._answering
        for connection in left:
            _hang_up(connection)
        for thread in threads:
            thread.join()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, client = super().get_request()
        connection.settimeout(_TIMEOUT_S)
        if self._tls is not None:
            # the handshake waits for the client, so it is left to the connection's thread
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, client

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="metrics-scrape", daemon=True
        )
        with self._guard:
            if len(self._open) >= _CONNECTIONS:
                oldest = next(iter(self._open))
                _hang_up(oldest)
                self._open[oldest] = self._open.pop(oldest)  # its thread takes it out; the next one is another's turn
            thread.start()
            self._open[request] = None
            self._answering = [*(one for one in self._answering if one.is_alive()), thread]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._guard:
                self._open.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that hangs up in mid-answer, or that speaks no TLS, is no news."""
        log.debug("scrape by %s failed", client_address, exc_info=True)


class _Handler(MetricsHandler):
    timeout = _TIMEOUT_S

    def version_string(self) -> str:
        """Nothing about what runs here."""
        return "distkd"

    def do_GET(self) -> None:
        server = cast(ScrapeServer, self.server)
        if not server.admits(self.headers.get("Authorization")):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="distkd"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        server.was_scraped = True  # before the answer: whoever has it is known
        page = server.page()
        if "name[]" in parse_qs(urlsplit(self.path).query):
            self._answer_by_library(page)
        else:
            self._answer(page)
        server.note_answer(page)

    def _answer(self, page: Page) -> None:
        _, content_type = choose_encoder(self.headers.get("Accept", ""))
        compressed = gzip_accepted(self.headers.get("Accept-Encoding", ""))
        body = page.body(openmetrics=content_type.startswith("application/openmetrics-text"), compressed=compressed)
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        if compressed:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))  # without it the end of a TLS stream looks cut off
        self.end_headers()
        self.wfile.write(body)

    def _answer_by_library(self, page: Page) -> None:
        registry = CollectorRegistry(auto_describe=True)  # it has to know who has which name
        registry.register(Families(page.snapshot))
        ProcessCollector(registry=registry)
        self.registry = registry
        super().do_GET()


def tls_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """What HTTPS is served with.

    Raises:
        ConfigError: a file cannot be read or does not fit.
    """
    for name, path in (("tls_cert", certificate), ("tls_key", key)):
        if path is not None:
            _read(f"metrics.{name}", path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # an empty passphrase, or OpenSSL would ask for one on the terminal and wait
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        beside = "" if key is None else f" and metrics.tls_key={key}"
        raise ConfigError(
            f"metrics.tls_cert={certificate}{beside} are no certificate with its key, in PEM form without a "
            f"passphrase: {error}"
        ) from error
    return context


def read_password(path: Path) -> bytes:
    """`user:password` of a file that only its owner (and perhaps a group) may read.

    Raises:
        ConfigError: it cannot be read, is open to others, or has something else.
    """
    content = _read("metrics.password_file", path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IRWXO:
        raise ConfigError(f"metrics.password_file={path} is open to others (mode {mode:04o}); run chmod o= {path}")
    lines = content.split(b"\n")
    if lines[1:] not in ([], [b""]) or not lines[0].partition(b":")[2].strip():
        raise ConfigError(f"metrics.password_file={path} has something else than one line user:password")
    return lines[0].rstrip(b"\r")


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}={path} cannot be read: {error.strerror}") from error


def _hang_up(connection: socket.socket) -> None:
    """Wakes the thread that waits for it."""
    with suppress(OSError):  # it has ended by itself
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # past TLS, which would want to say farewell
