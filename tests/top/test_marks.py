"""Bars and sparklines, in blocks or in ASCII."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkd.top.marks import ASCII, BLOCKS, Marks


@pytest.mark.parametrize(
    "environ, marks",
    [
        ({"LC_ALL": "C"}, ASCII),
        ({"LC_CTYPE": "C", "LANG": "en_US.UTF-8"}, ASCII),
        ({"LANG": "POSIX"}, ASCII),
        ({"LC_ALL": "C.UTF-8", "LANG": "C"}, BLOCKS),
        ({}, BLOCKS),
    ],
)
def test_in_the_c_locale_pictures_are_ascii(environ: dict[str, str], marks: Marks):
    others = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "LC_CTYPE", "LANG")}
    code = "from rich.console import Console; from distkd.top.screen import marks_of; print(ascii(marks_of(Console())))"
    command = [sys.executable, "-c", code]
    utf8 = {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=others | utf8 | environ)
    assert done.stdout == f"{marks!a}\n"


@given(st.lists(st.none() | st.floats(), max_size=50), st.integers(0, 60))
def test_a_sparkline_is_as_wide_as_it_may_be(values: list[float | None], width: int):
    for marks in (ASCII, BLOCKS):
        drawn = marks.spark(values, width)
        assert len(drawn) == min(width, len(values))
        assert set(drawn) <= {*marks.heights, " "}


def test_a_sparkline_shows_low_and_high():
    assert ASCII.spark([0, 7, None, 3.5], 4) == "_# ="
    assert ASCII.spark([1, 1, 1], 3) == "~~~"
    assert ASCII.spark([0, 0, 7, 7], 2) == "_#"


@given(st.floats(), st.integers(0, 60))
def test_a_bar_is_full_only_for_the_whole(share: float, width: int):
    bar = ASCII.bar(share, width)
    assert len(bar) == width
    if width:
        assert (bar == "#" * width) == (share >= 1 and share != float("inf"))
