"""A log that grows is read on, never again from its beginning; whatever happens to it, no line comes twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkd.metrics.jsonl import MetricsWriter
from distkd.top.follow import Follower


def steps_of(follower: Follower) -> list[int]:
    return [line["step"] for line in follower.read()]


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path):
    follower = Follower(tmp_path / "absent" / "metrics.jsonl")
    assert steps_of(follower) == []
    with MetricsWriter(follower.path) as writer:
        writer.write({"step": 1})
    assert steps_of(follower) == [1]
    follower.path.unlink()
    assert steps_of(follower) == []


@given(pieces=st.lists(st.integers(0, 40), max_size=30), n_lines=st.integers(0, 12))
def test_a_line_counts_once_it_is_whole(tmp_path_factory: pytest.TempPathFactory, pieces: list[int], n_lines: int):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    content = "".join(json.dumps({"step": step}) + "\n" for step in range(n_lines))
    follower, written = Follower(path), 0
    for piece in pieces:
        with path.open("a") as file:
            file.write(content[written : written + piece])
        written = min(len(content), written + piece)
        assert steps_of(follower) == list(range(content[:written].count("\n")))


def test_a_run_that_resumes_cuts_its_log_back(tmp_path: Path):
    follower = Follower(tmp_path / "metrics.jsonl")
    with MetricsWriter(follower.path) as writer:
        for step in range(1, 9):
            writer.write({"step": step, "attempt": 1})
        assert len(follower.read()) == 8
        writer.truncate_after(3)
        assert steps_of(follower) == [1, 2, 3]
        for step in range(4, 12):  # longer than before, between two readings
            writer.write({"step": step, "attempt": 2})
        writer.truncate_after(5)
        for step in range(6, 20):
            writer.write({"step": step, "attempt": 3})
        lines = follower.read()
    assert [line["step"] for line in lines] == list(range(1, 20))
    assert [line["attempt"] for line in lines] == [1] * 3 + [2] * 2 + [3] * 14


def test_torn_lines_and_other_things_are_passed_over(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \n\xff\xfe\n[1]\n{"step": 2}\n{"ste')
    assert steps_of(Follower(path)) == [1, 2]


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(10_000)))
    follower = Follower(path, size=200, keep=5)
    assert steps_of(follower) == [9995, 9996, 9997, 9998, 9999]
    long = Follower(path, size=200)
    assert steps_of(long)[-1] == 9999
    assert len(long.lines) == 13  # of 15 bytes, the first one is cut
    with path.open("a") as file:  # more than is read at once has come since then
        file.write("".join(json.dumps({"step": step}) + "\n" for step in range(10_000, 20_000)))
    assert steps_of(long)[0] > 19_000
