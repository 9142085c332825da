"""TensorBoard is given every number of metrics.jsonl once, and a sink that fails leaves the run alone."""

import logging
import math
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distkd.errors import ConfigError
from distkd.metrics import sinks as sinks_module
from distkd.metrics.jsonl import MetricsWriter, read_jsonl
from distkd.metrics.scalars import Scalars
from distkd.metrics.settings import MetricsConfig
from distkd.metrics.sinks import Sinks, check_sinks, open_sinks
from distkd.metrics.tensorboard import TensorBoard
from distkd.train.folder import FREE

LINE = {"step": 4, "epoch": 1, "time": 1000.5, "samples": 32, "loss": 1.5, "parts": {"kl": 0.5}, "gauges": {}}


def line(step, **values):
    return {**LINE, "step": step, "time": 1000.0 + step, **values}


def opened(folder, config, step=0):
    return open_sinks(config, folder, step=step, run="r", method="supervised", settings={"run": {"name": "r"}})


def points(folder):
    """What TensorBoard makes of a folder: tag to (wall time, step, value)."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    found = {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}
    return {tag: [(point.wall_time, point.step, point.value) for point in values] for tag, values in found.items()}


def as_float32(value):
    return pytest.approx(value, rel=1e-6, nan_ok=True)


class Failing:
    """A sink of which one method does not work."""

    name = "Failing"

    def __init__(self, method):
        self.method, self.calls = method, []

    def _call(self, method, *_):
        self.calls.append(method)
        if method == self.method:
            raise RuntimeError("the network\nis gone")

    def __getattr__(self, method):
        return lambda *arguments: self._call(method, *arguments)


def test_tensorboard_reads_back_every_number_of_a_training(small, tmp_path):
    records = read_jsonl(small.root / "student" / "metrics.jsonl")
    sinks = opened(tmp_path, MetricsConfig(tensorboard=True))
    for record in records:
        sinks.write(record)
    sinks.close("done")
    assert read_jsonl(tmp_path / "metrics.jsonl") == records
    scalars, expected = Scalars(), {}
    for record in records:
        for name, value in scalars.of(record).items():
            expected.setdefault(name, []).append((record["time"], record["step"], as_float32(value)))
    assert points(tmp_path / "tensorboard") == expected
    assert {"loss/total", "lr", "grad_norm", "skipped", "timings/forward", "val/auc_macro"} <= expected.keys()


def test_each_number_of_a_record_has_a_name_in_its_group():
    record = line(
        6,
        parts={"task": 1.0, "kl": 2.0},
        gauges={
            "weight/kl": 0.5,
            "cosine/kl|task": -0.1,
            "gated/kl": 0.2,
            "bank/age": 3.0,
            "teacher/task": 4.0,
            "x": 5,
        },
        lr=1e-3,
        grad_norm=7.0,
        skipped=0,
        replaced=2,
        timings={"data": 1.0, "forward": 2.0, "straggler_index": 1.5, "straggler_rank": 1, "save": 0.5},
    )
    assert Scalars(step=2).of(record) == {
        "loss/total": 1.5, "loss/task": 1.0, "loss/kl": 2.0,
        "agreement/weight/kl": 0.5, "agreement/cosine/kl|task": -0.1, "agreement/gated/kl": 0.2,
        "bank/age": 3.0, "teacher/task": 4.0, "gauges/x": 5.0,
        "lr": 1e-3, "grad_norm": 7.0, "skipped": 0.0, "replaced": 2.0,
        "timings/data": 0.25, "timings/forward": 0.5,
        "timings/straggler_index": 1.5, "timings/straggler_rank": 1.0, "timings/save": 0.5,
    }  # fmt: skip
    assert Scalars().of({"step": 6, "val": {"accuracy": 0.5, "auc_macro": None}}) == {"val/accuracy": 0.5}


def test_seconds_of_a_phase_are_divided_by_the_steps_since_the_line_before():
    scalars = Scalars(step=10)
    lines = [line(12, timings={"data": 1.0}), line(12, val={"accuracy": 1.0}), line(20, timings={"data": 2.0})]
    assert [scalars.of(record).get("timings/data") for record in lines] == [0.5, None, 0.25]


@pytest.mark.usefixtures("seconds_apart")
def test_a_resumed_run_has_no_point_twice(tmp_path):
    config = MetricsConfig(tensorboard=True)
    first = opened(tmp_path, config)
    for step in range(1, 8):
        first.write(line(step, loss=float(step)))
    first.close("failed")
    again = opened(tmp_path, config, step=4)
    for step in range(5, 10):
        again.write(line(step, loss=100.0 + step))
    again.close("done")
    assert [(step, loss) for _, step, loss in points(tmp_path / "tensorboard")["loss/total"]] == [
        *((step, step) for step in range(1, 5)),
        *((step, 100 + step) for step in range(5, 10)),
    ]
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 10))


def test_a_run_killed_within_a_record_is_read_up_to_it_and_goes_on(tmp_path, seconds_apart):
    first = TensorBoard(tmp_path)
    first.truncate_after(0)
    for step in (1, 2, 3):
        first.write(line(step))
    first.close()
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    again = TensorBoard(tmp_path)
    again.truncate_after(2)
    again.write(line(3))
    again.write(line(4))
    again.close()
    assert [step for _, step, _ in points(tmp_path)["loss/total"]] == [1, 2, 3, 4]


def test_numbers_that_float32_or_json_do_not_have_are_shown_for_what_they_are(tmp_path):
    sinks = opened(tmp_path, MetricsConfig(tensorboard=True))
    for step, loss in enumerate([math.nan, math.inf, -1e300, None, 2.0], start=1):
        sinks.write(line(step, loss=loss))
    sinks.close("done")
    found = {step: value for _, step, value in points(tmp_path / "tensorboard")["loss/total"]}
    assert found == {1: as_float32(math.nan), 2: math.inf, 3: -math.inf, 5: 2.0}
    assert [record["loss"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [None, None, -1e300, None, 2.0]


def test_long_runs_keep_their_step(tmp_path):
    board = TensorBoard(tmp_path)
    board.truncate_after(0)
    for step in (127, 128, 2**40):
        board.write(line(step))
    board.close()
    assert [step for _, step, _ in points(tmp_path)["loss/total"]] == [127, 128, 2**40]


def test_what_the_student_reached_is_shown_at_the_last_step(tmp_path):
    sinks = opened(tmp_path, MetricsConfig(tensorboard=True))
    sinks.score(9, "test", {"accuracy": 0.75, "auc_macro": None})
    sinks.close("done")
    assert [(tag, *found[0][1:]) for tag, found in points(tmp_path / "tensorboard").items()] == [
        ("final/test/accuracy", 9, 0.75)
    ]
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_nothing_but_metrics_jsonl_is_written_unless_asked_for(tmp_path):
    sinks = opened(tmp_path, MetricsConfig())
    sinks.write(LINE)
    sinks.close("done")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("method", ["truncate_after", "write", "score", "close"])
def test_a_failing_sink_is_left_out_with_one_warning_and_the_others_go_on(method, tmp_path, caplog):
    failing, whole = Failing(method), Failing(None)
    sinks = Sinks(MetricsWriter(tmp_path / "metrics.jsonl"), [failing, whole])
    with caplog.at_level(logging.WARNING):
        sinks.truncate_after(0)
        sinks.write(LINE)
        sinks.score(4, "test", {})
        sinks.write(line(5))
        sinks.close("done")
    assert [record.getMessage() for record in caplog.records] == [
        "Failing gets no more records: the network (RuntimeError); the run and its metrics.jsonl go on"
    ]
    assert failing.calls[-1] == method
    assert failing.calls.count(method) == 1
    assert whole.calls == ["truncate_after", "write", "score", "write", "close"]
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [4, 5]


def test_a_sink_that_cannot_begin_is_left_out(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file is in the way")
    sinks = opened(tmp_path, MetricsConfig(tensorboard=True))
    sinks.write(LINE)
    sinks.close("done")
    assert len(caplog.records) == 1
    assert "TensorBoard gets no more records: " in caplog.text
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("found", [None, types.SimpleNamespace(origin=None)])
def test_a_missing_package_is_a_config_error_with_the_command_that_brings_it(found, monkeypatch):
    monkeypatch.setattr(sinks_module, "find_spec", lambda name: found)
    for config, name in ((MetricsConfig(wandb="p"), "wandb"), (MetricsConfig(tensorboard=True), "tensorboard")):
        with pytest.raises(ConfigError, match=rf"metrics.{name} needs a package .*distkd\[{name}\]', or"):
            check_sinks(config)
    check_sinks(MetricsConfig())


def test_sinks_may_change_when_a_run_is_resumed():
    assert {f"metrics.{name}" for name in MetricsConfig.model_fields} <= FREE
