"""Files fetched in the background before they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from distkd.data.remote.node_cache import CacheFullError, Cancelled

__all__ = ["Ahead"]


class Ahead:
    """Files fetched before they are asked for, by one thread that ends when there is nothing to fetch.

    Args:
        take: fetches and holds a file.
        drop: releases it.
    """

    def __init__(self, take: Callable[[int, threading.Event], None], drop: Callable[[int], None], limit: int):
        self._take, self._drop, self._limit = take, drop, limit
        self._changed = threading.Condition()
        self._wanted: list[int] = []
        self._ready: set[int] = set()
        self._faults: dict[int, Exception] = {}
        self._busy: int | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def want(self, numbers: Sequence[int]) -> None:
        with self._changed:
            self._wanted = list(dict.fromkeys(numbers))
            for number in self._ready - set(self._wanted):
                self._ready.discard(number)
                self._drop(number)
            self._faults = {number: fault for number, fault in self._faults.items() if number in self._wanted}
            self._start()

    def claim(self, number: int) -> bool:
        """Whether the file was fetched; the hold on it is the caller's then."""
        with self._changed:
            while self._busy == number:
                self._changed.wait()
            if number in self._wanted:
                self._wanted.remove(number)
            if (fault := self._faults.pop(number, None)) is not None:
                raise fault
            found = number in self._ready
            self._ready.discard(number)
            self._start()
            return found

    def spare(self) -> bool:
        """Give back the file that is needed last."""
        with self._changed:
            number = next((number for number in reversed(self._wanted) if number in self._ready), None)
            if number is None:
                return False
            self._wanted.remove(number)
            self._ready.discard(number)
            self._drop(number)
            return True

    def close(self) -> None:
        with self._changed:
            self._wanted = []
            self._stop.set()
            thread = self._thread
        if thread is not None:
            thread.join()
        self.want([])

    def _start(self) -> None:
        if self._thread is None and self._next() is not None:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._work, name="distkd-fetch", daemon=True)
            self._thread.start()

    def _next(self) -> int | None:
        if len(self._ready) >= self._limit:
            return None
        waiting = (number for number in self._wanted if number not in self._ready and number not in self._faults)
        return next(waiting, None)

    def _work(self) -> None:
        full = False
        while True:
            with self._changed:
                number = None if full or self._stop.is_set() else self._next()
                if number is None:
                    self._thread = None
                    return
                self._busy = number
            fault: Exception | None = None
            try:
                self._take(number, self._stop)
            except (CacheFullError, Cancelled):
                full = True  # who needs it waits for room; until then the next step asks again
            except Exception as error:  # noqa: BLE001 - it is raised where the file is asked for
                fault = error
            with self._changed:
                self._busy = None
                if fault is not None:
                    self._faults[number] = fault
                elif not full and number in self._wanted:
                    self._ready.add(number)
                elif not full:
                    self._drop(number)
                self._changed.notify_all()
