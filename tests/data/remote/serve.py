"""A web server for one test, that counts what it is asked for and misbehaves on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

__all__ = ["Answer", "Handler", "Server"]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = urlsplit(self.path).path.rpartition("/")[2]
        with self.server.lock:
            self.server.asked.append(name)
            self.server.paths.append(self.path)
            self.server.headers.append(dict(self.headers))
            turn = self.server.asked.count(name)
        body = (self.server.folder / name).read_bytes() if (self.server.folder / name).is_file() else None
        answer = self.server.answers.get(name)
        if answer is not None:
            answer(self, body or b"", turn)
        elif body is None:
            self.send_error(404)
        else:
            self.reply(body)

    def reply(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


Answer = Callable[[Handler, bytes, int], None]
"""Handler, what the file holds, the how-manieth request for it."""


class Server(ThreadingHTTPServer):
    """The files of a folder, on a free port of this machine."""

    daemon_threads = False  # so that closing waits for them, and no socket is left

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.lock = threading.Lock()
        self.asked: list[str] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[str, Answer] = {}
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
