"""The terminal: a full screen that is drawn again, keys, and everything put back at the end."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from distkd.slurm.judge import duration
from distkd.top.look import Glance, Looker
from distkd.top.marks import ASCII, BLOCKS, Marks
from distkd.top.view import view

__all__ = ["lines_of", "live", "marks_of"]

_AWAKE_S = 0.2
"""Keys and new sizes of the window are looked for so often."""
_LOCALE = ("LC_ALL", "LC_CTYPE", "LANG")
"""The first one that is set counts."""
_SLOW_S = 5.0
"""A reading that takes longer is worth a word."""


def marks_of(console: Console) -> Marks:
    return ASCII if console.options.ascii_only or _is_plain(_began_with()) else BLOCKS


def _is_plain(environ: Mapping[str, str]) -> bool:
    """Whether the locale for characters is C or POSIX, by its name."""
    return next((found for name in _LOCALE if (found := environ.get(name))), "") in ("C", "POSIX")


def _began_with() -> Mapping[str, str]:
    """The environment that this process was started with: Python writes over LC_CTYPE where the locale is C."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in (entry.partition(b"=") for entry in entries)}


def lines_of(glance: Glance, console: Console, height: int | None, foot: str = "") -> list[Text]:
    return view(glance.facts, glance.others, console.width, height, marks_of(console), foot)


class _Reading(threading.Thread):
    """Looks again and again beside the screen: a file system that hangs does not take the keys away."""

    def __init__(self, looker: Looker, every_s: float):
        super().__init__(name="distkd-top", daemon=True)
        self.looker, self.every_s = looker, every_s
        self.glance: Glance | None = None
        self.error: BaseException | None = None
        self.trouble = ""
        self.begun: float | None = None
        """When the reading that is under way began, monotonic."""
        self.hurry = threading.Event()
        """Set: do not wait for the next turn."""
        self.by = 0
        """Places by which the user has gone on in the list of runs."""

    def run(self) -> None:
        while self.error is None:
            self.hurry.clear()
            self.begun = time.monotonic()
            try:
                by, self.by = self.by, 0
                if by:
                    self.looker.choose(by)
                self.glance = self.looker.look()
                self.trouble = ""
            except OSError as error:  # of a file system that is away; it may come back
                self.trouble = f"cannot read: {error.strerror or error}"
            except Exception as error:  # noqa: BLE001 - the screen raises it
                self.error = error
            self.begun = None
            self.hurry.wait(self.every_s)


def live(paths: Sequence[Path], every_s: float, console: Console) -> int:
    """Show the runs until nothing runs or waits, `q` or Ctrl-C; then the last view stays where all has ended.

    Raises:
        DataError: there is no run at or below any of the paths.
    """
    reading = _Reading(Looker(paths), every_s)
    reading.start()
    try:
        with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as screen:
            glance = _show(reading, screen, console, keys)
    except KeyboardInterrupt:
        return 0
    if glance is not None:
        console.print(Group(*lines_of(glance, console, None)), highlight=False, no_wrap=True, crop=False)
    return 0


def _show(reading: _Reading, screen: Live, console: Console, keys: int | None) -> Glance | None:
    """Draw until it ends; None where the user has seen enough."""
    drawn: object = None
    while True:
        if reading.error is not None:
            raise reading.error
        glance = reading.glance
        if glance is not None and not glance.is_active:
            return glance
        state = (id(glance), int(time.time()), console.size)
        if state != drawn:
            screen.update(_screen(reading, console), refresh=True)
            drawn = state
        for key in _pressed(keys):
            if key in "qQ":
                return None
            if key in "np":
                reading.by += 1 if key == "n" else -1
                reading.hurry.set()


def _screen(reading: _Reading, console: Console) -> Group:
    glance, begun = reading.glance, reading.begun
    late_s = 0.0 if begun is None else time.monotonic() - begun
    slow = f"reading for {duration(late_s)}: a slow file system or queue" if late_s > _SLOW_S else ""
    words = [time.strftime("%H:%M:%S"), "q quits", reading.trouble, slow]
    if glance is None:
        return Group(Text(slow or "reading ..."))
    if glance.others:
        words.insert(2, "n, p: next and previous run")
    facts, row = glance.facts, glance.facts.row
    aged = replace(facts, now=time.time(), row=replace(row, news_age_s=_aged(row.news_age_s, facts.now)))
    foot = "  ".join(word for word in words if word)
    return Group(*lines_of(replace(glance, facts=aged), console, console.height, foot))


def _aged(age_s: float | None, then: float) -> float | None:
    return None if age_s is None else age_s + max(0.0, time.time() - then)


@contextmanager
def _keys() -> Iterator[int | None]:
    """Keys one by one and unseen; None where nobody types. SIGTERM, too, leaves the terminal as it was."""
    descriptor = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = None if descriptor is None else termios.tcgetattr(descriptor)
    handler = signal.signal(signal.SIGTERM, _end)
    try:
        if descriptor is not None:
            tty.setcbreak(descriptor)
            ours = termios.tcgetattr(descriptor)
            ours[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave a shell on our screen
            termios.tcsetattr(descriptor, termios.TCSANOW, ours)
        yield descriptor
    finally:
        if descriptor is not None and before is not None:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, handler)


def _end(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _pressed(descriptor: int | None) -> str:
    """What was typed, after a moment."""
    ready, _, _ = select.select([] if descriptor is None else [descriptor], [], [], _AWAKE_S)
    return os.read(ready[0], 64).decode(errors="replace") if ready else ""
