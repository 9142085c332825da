"""metrics.jsonl: whole lines only, whatever a kill leaves behind."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkd.errors import DataError
from distkd.metrics.jsonl import MetricsWriter, read_jsonl


def steps(path) -> list[int]:
    return [record["step"] for record in read_jsonl(path)]


def test_each_object_is_readable_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl") as writer:
        writer.write({"step": 1, "parts": {"kl": 0.5}})
        assert read_jsonl(writer.path) == [{"step": 1, "parts": {"kl": 0.5}}]


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write({"step": 1, "loss": float("nan"), "parts": {"a": [float("inf"), 1.0]}})
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record == {"step": 1, "loss": None, "parts": {"a": [None, 1.0]}}


@settings(deadline=None)
@given(cut=st.integers(0, 90))
def test_a_file_cut_anywhere_is_read_and_continued_on_its_own_line(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(5):
            writer.write({"step": step, "x": "y" * step})
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    before = steps(path)
    assert before == list(range(len(before)))
    with MetricsWriter(path) as writer:
        writer.write({"step": 9})
    assert steps(path) == [*before, 9]


def test_a_tail_of_zero_bytes_counts_as_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n' + bytes(40))
    assert steps(path) == [1]


def test_truncation_drops_later_steps_and_what_was_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2, 3, 3, 4):
            writer.write({"step": step})
        writer.write({"note": "no step"})
    path.write_bytes(path.read_bytes() + b'{"step": 5, "lo')
    with MetricsWriter(path) as writer:
        writer.truncate_after(3)
        writer.write({"step": 4, "again": True})
    assert read_jsonl(path) == [
        *({"step": step} for step in (1, 2, 3, 3)),
        {"note": "no step"},
        {"step": 4, "again": True},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_torn_in_the_middle_of_the_file_is_an_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":1}\n[2]\n{"step":3}\n')
    with pytest.raises(DataError, match=r"jsonl line 2 is not a JSON object .* only the last line may be torn"):
        read_jsonl(tmp_path / "metrics.jsonl")


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []
