"""What a launcher makes of torchrun's exit code, the outcome of the run and the codes that the ranks noted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.exit_code import exit_code, noted_codes, youngest_outcome


def _outcome(folder: Path, age: float, **content: str) -> None:
    folder.mkdir(parents=True)
    path = folder / "outcome.json"
    path.write_text(json.dumps(content))
    os.utime(path, (1000.0 - age, 1000.0 - age))


@pytest.mark.parametrize("outcome", [None, {"state": "done"}, {"state": "failed", "kind": "config"}])
def test_what_torchrun_calls_a_success_is_one(outcome):
    assert exit_code(0, outcome, set()) == 0


@pytest.mark.parametrize(
    ("outcome", "codes", "expected"),
    [
        ({"state": "interrupted"}, set(), 3),
        ({"state": "interrupted"}, {3}, 3),
        ({"state": "failed", "kind": "config"}, {2, 3}, 2),
        ({"state": "failed", "kind": "data"}, set(), 2),
        ({"state": "failed", "kind": "nonfinite"}, {2}, 2),
        ({"state": "failed", "kind": "lost_rank"}, {2}, 1),
        ({"state": "failed", "kind": "internal"}, set(), 1),
        ({"state": "done"}, {2}, 2),
        (None, {2}, 2),
        (None, {2, 3}, 2),
        (None, {3}, 3),
        (None, {0, 1}, 1),
        (None, set(), 1),
    ],
)
def test_the_outcome_decides_and_the_ranks_where_there_is_none(outcome, codes, expected):
    assert exit_code(1, outcome, codes) == expected


def test_the_youngest_outcome_counts_and_those_of_earlier_attempts_do_not(tmp_path):
    _outcome(tmp_path / "old", 500.0, state="failed")
    assert youngest_outcome(tmp_path, since=600.0) is None
    _outcome(tmp_path / "first", 300.0, state="done")
    _outcome(tmp_path / "study" / "second", 200.0, state="interrupted")
    assert youngest_outcome(tmp_path, since=600.0) == {"state": "interrupted"}


def test_a_run_root_that_was_never_made_has_no_outcome(tmp_path):
    assert youngest_outcome(tmp_path / "runs", since=0.0) is None


def test_the_codes_of_all_ranks_are_read(tmp_path):
    for rank, code in enumerate((2, 3, 3)):
        (tmp_path / f"rank-{rank}").write_text(str(code))
    (tmp_path / "started").touch()
    assert noted_codes(tmp_path) == {2, 3}
