"""`distkd top` in a terminal: the real command, looked at from the other end of a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from distkd.cli import USER
from tests.top.folders import append, line_of, ranks_of

_PATIENCE_S = 90.0
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|[\r\x00]")
_END = b"\x00that is all\x00"
_ENTER, _LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


class Terminal:
    """A terminal that a command runs in."""

    def __init__(self, *words: str, columns: int = 100, rows: int = 40, **environ: str):
        self.main, self.other = pty.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self.other)
        hidden = {"NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
        clean = {name: value for name, value in os.environ.items() if name not in hidden}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distkd.cli", "top", "--interval", "0.1", *words],
            stdin=self.other,
            stdout=self.other,
            stderr=self.other,
            env={**clean, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", "PATH": "/nowhere", **environ},
        )
        self.seen = b""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, words: str) -> str:
        """What came until these words, a regular expression, were there in one line.

        What came before an earlier call is not looked at. That call may have ended in the midst of a picture: words
        that only a later picture has tell the two apart.
        """
        end = time.monotonic() + _PATIENCE_S
        while True:
            text = self.text
            if re.search(words, text):
                self.seen = b""
                return text
            assert time.monotonic() < end, f"{words!r} did not come; the screen has {text[-3000:]!r}"
            ended = self.process.poll() is not None
            if not self._read(0.2) and ended:
                raise AssertionError(f"it ended with {self.process.returncode} without {words!r}: {text[-3000:]!r}")

    def end(self) -> int:
        """Its exit code; `seen` has what came last."""
        end = time.monotonic() + _PATIENCE_S
        while self.process.poll() is None:
            self._read(0.1)
            assert time.monotonic() < end, f"it does not end: {self.text[-3000:]!r}"
        while self._read(0.0):
            pass
        os.write(self.other, _END)  # what the command wrote comes before it, though perhaps not at once
        while _END not in self.seen:
            self._read(0.1)
            assert time.monotonic() < end, f"its last words do not come: {self.text[-3000:]!r}"
        self.seen = self.seen.replace(_END, b"")
        return self.process.returncode

    @property
    def text(self) -> str:
        return _ESCAPES.sub(b"", self.seen).decode(errors="replace")

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.other) == self.before

    def type(self, keys: str) -> None:
        os.write(self.main, keys.encode())

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.main], [], [], seconds)
        if ready:
            self.seen += os.read(self.main, 2**16)
        return bool(ready)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.main)
        os.close(self.other)


@pytest.fixture
def opened() -> Iterator[list[Terminal]]:
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.close()


def begin(folder: Path) -> Path:
    """A run that has begun just now."""
    (folder / "events").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "run: {epochs: 4, log_every: 10}\nmethod: {name: crd}\neval: {metric: auc_macro}\n"
    )
    now = time.time()
    about = {"world_size": 4, "device": "cpu", "n_steps": 40, "started": now, "job": None}
    (folder / "environment.json").write_text(json.dumps(about))
    append(folder / "events" / "rank-00000.jsonl", {"event": "start", "time": now, "attempt": 1, "step": 0})
    return folder


def test_a_run_is_followed_from_its_start_to_its_end(tmp_path: Path, opened: list[Terminal]):
    folder = begin(tmp_path / "kd")
    opened.append(terminal := Terminal(str(folder)))
    assert "its first line comes at step 10 at the latest" in terminal.wait_for("q quits")

    append(folder / "metrics.jsonl", line_of(10, time.time()))
    terminal.wait_for("step 10/40")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "ti')  # a line that is being written
    append(folder / "events" / "rank-00000.jsonl", {"event": "checkpoint", "time": time.time(), "step": 10})
    (folder / "metrics.jsonl").write_text(json.dumps(line_of(10, time.time())) + "\n")  # cut back
    append(folder / "metrics.jsonl", line_of(20, time.time() + 1))
    terminal.wait_for("samples/s")

    ranks = {"step": 20, "time": time.time() + 1, "ranks": ranks_of(4, slow=2)}
    (folder / "ranks.json").write_text(json.dumps(ranks))
    slow = line_of(20, 0.0)["timings"] | {"straggler_rank": 2, "straggler_index": 1.8}
    for step in (21, 22, 23):
        append(folder / "metrics.jsonl", line_of(step, time.time() + 1, timings=slow))
    terminal.wait_for(r"rank 2 makes a step 1\.80x as long")

    terminal.resize(140, 30)
    terminal.wait_for(r"speed .*rank  x median .*queue      GPU")

    (folder / "outcome.json").write_text(json.dumps({"state": "done", "step": 40}))
    assert terminal.end() == 0
    assert terminal.is_as_before
    _, _, after = terminal.seen.partition(_LEAVE)
    assert _ENTER not in after
    left = _ESCAPES.sub(b"", after).decode()
    assert re.match(r"kd  crd  done\s+\S+ 100 %  step 40/40", left.lstrip())
    assert "q quits" not in left


@pytest.mark.parametrize("how", ["q", "ctrl-c", "terminate"])
def test_whoever_has_seen_enough_gets_the_terminal_back(tmp_path: Path, opened: list[Terminal], how: str):
    folder = begin(tmp_path / "kd")
    opened.append(terminal := Terminal(str(folder)))
    terminal.wait_for("q quits")
    assert not terminal.is_as_before
    if how == "q":
        terminal.type("q")
    else:
        terminal.process.send_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGTERM)
    assert terminal.end() == (128 + signal.SIGTERM if how == "terminate" else 0)
    assert terminal.is_as_before
    assert _LEAVE in terminal.seen
    assert "Traceback" not in terminal.text


def test_keys_go_to_other_runs(tmp_path: Path, opened: list[Terminal]):
    for name in ("a", "b"):
        append(begin(tmp_path / name) / "metrics.jsonl", line_of(10, time.time() + (name == "a")))
    opened.append(terminal := Terminal(str(tmp_path)))
    terminal.wait_for("a  crd  running")
    terminal.type("n")
    terminal.wait_for("b  crd  running")
    terminal.type("p")
    terminal.wait_for("a  crd  running")


def test_a_run_folder_that_is_removed_ends_it_with_a_message(tmp_path: Path, opened: list[Terminal]):
    folder = begin(tmp_path / "kd")
    opened.append(terminal := Terminal(str(folder)))
    terminal.wait_for("q quits")
    folder.rename(tmp_path / "gone")
    assert terminal.end() == USER
    assert terminal.is_as_before
    assert "kd does not exist; name a run folder" in " ".join(terminal.text.split())


def test_no_colour_where_none_is_wanted(tmp_path: Path, opened: list[Terminal]):
    folder = begin(tmp_path / "kd")
    colour = re.compile(rb"\x1b\[[0-9;]*3[0-7][0-9;]*m")
    cases: list[tuple[dict[str, Any], bool]] = [({}, True), ({"NO_COLOR": "1"}, False)]
    for environ, wanted in cases:
        opened.append(terminal := Terminal(str(folder), **environ))
        end = time.monotonic() + _PATIENCE_S
        while "q quits" not in terminal.text and time.monotonic() < end:
            terminal._read(0.2)
        assert (colour.search(terminal.seen) is not None) == wanted


def test_a_terminal_without_cursor_gets_text_once(tmp_path: Path, opened: list[Terminal]):
    opened.append(terminal := Terminal(str(begin(tmp_path / "kd")), TERM="dumb"))
    assert terminal.end() == 0
    assert "\x1b" not in terminal.seen.decode()
    assert "kd  crd  running" in terminal.text
