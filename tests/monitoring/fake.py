"""A rank that only answers: values as a test sets them, announced as distkd's own ranks are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distkd.metrics import targets

__all__ = ["FakeRank"]


class FakeRank:
    """Serves `values` until the end of the block.

    Args:
        run: its folder.
        rank: which one it is.
        values: of series without labels, or with them as Prometheus writes them: `distkd_loss{part="total"}`;
            one that moves is asked for at each scrape.
    """

    def __init__(self, run: Path, rank: int = 0, **values: float | Callable[[], float]):
        self.run, self.rank = run, rank
        self.values: Mapping[str, float | Callable[[], float]] = values
        rank_of_this = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                now = {name: one() if callable(one) else one for name, one in rank_of_this.values.items()}
                body = "".join(f"{name} {value}\n" for name, value in now.items()).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def vanish(self) -> None:
        """No more answers, and the target stays, as after SIGKILL."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def leave(self) -> None:
        """As a rank that ends."""
        targets.remove_own(self.run, self.rank)
        if self._thread.is_alive():
            self.vanish()

    def __enter__(self) -> Self:
        self._thread.start()
        labels = {"run": self.run.name, "stage": "fake", "node": f"n{self.rank + 1}", "slurm_job": ""}
        targets.write(self.run, self.rank, f"127.0.0.1:{self._server.server_address[1]}", labels)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
