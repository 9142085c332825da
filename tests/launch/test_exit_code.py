"""What a launcher makes of torchrun's exit code, the outcome of the run and the codes that the ranks noted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.exit_code import exit_code, noted_codes, noted_outcome


def _outcome(folder: Path, **content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "outcome.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("codes", [{0}, {0, 1}])
@pytest.mark.parametrize("outcome", [None, {"state": "done"}])
def test_ranks_that_are_done_are_a_success_whatever_others_before_them_noted(outcome, codes):
    assert exit_code(0, outcome, codes) == 0


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
        ({"state": "done"}, {0, 2}, 2),
        ({"state": "done"}, {1}, 1),
        ({"state": "done"}, {0}, 0),
        ({"state": "done"}, {0, 1}, 0),
        (None, {2}, 2),
        (None, {2, 3}, 2),
        (None, {3}, 3),
        (None, {0, 1}, 1),
        (None, set(), 1),
    ],
)
def test_the_outcome_decides_and_the_ranks_where_there_is_none(outcome, codes, expected):
    assert exit_code(1, outcome, codes) == expected


@pytest.mark.parametrize(
    ("outcome", "codes", "expected"),
    [
        ({"state": "interrupted"}, {3}, 3),
        ({"state": "interrupted"}, set(), 3),
        (None, {3}, 3),
        (None, {2}, 2),
        (None, set(), 1),
        ({"state": "done"}, set(), 1),
    ],
)
def test_a_launcher_that_reports_success_is_not_believed_against_its_ranks(outcome, codes, expected):
    """The outcome may be that of the stage before."""
    assert exit_code(0, outcome, codes) == expected


def test_the_outcome_is_that_of_the_run_that_the_ranks_noted(tmp_path):
    _outcome(tmp_path / "runs" / "another fold", state="failed")
    run = _outcome(tmp_path / "runs" / "fold 3", state="interrupted")
    (tmp_path / "node-0").mkdir()
    (tmp_path / "node-0" / "run-0").write_text(str(run))
    assert noted_outcome(tmp_path) == {"state": "interrupted"}
    (tmp_path / "run-0").write_text(str(run))
    assert noted_outcome(tmp_path) == {"state": "interrupted"}


def test_a_run_that_could_not_say_how_it_ended_has_no_outcome(tmp_path):
    assert noted_outcome(tmp_path) is None
    (tmp_path / "run-0").write_text(str(tmp_path / "runs" / "killed"))
    assert noted_outcome(tmp_path) is None


def test_the_codes_of_all_ranks_are_read(tmp_path):
    for rank, code in enumerate((2, 3, 3)):
        (tmp_path / f"code-{rank}").write_text(str(code))
    (tmp_path / "run-0").touch()
    assert noted_codes(tmp_path) == {2, 3}
