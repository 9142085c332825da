"""Curves of several runs on one grid of steps."""

import numpy as np
import pytest

from distkd.report.curves import agreement_panels, loss_panels, optimisation_panels, series, validation_panels
from distkd.report.runs import load_run
from distkd.report.study import make_study
from tests.report.fake import fake_run, fake_study


def runs_with(tmp_path, *logs):
    runs = []
    for number, log in enumerate(logs):
        run = load_run(fake_run(tmp_path / f"r{number}", seed=number, steps=4), "test")
        run.records[:] = [{"step": step, "loss": value} for step, value in log.items()]
        runs.append(run)
    return runs


def loss(record):
    return record.get("loss")


def test_runs_meet_at_all_steps_and_end_where_they_end(tmp_path):
    steps, values = series(runs_with(tmp_path, {1: 1.0, 3: 3.0}, {1: 5.0, 2: 6.0}), loss)
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(values, [[1.0, 2.0, 3.0], [5.0, 6.0, np.nan]])


def test_values_that_are_missing_or_null_are_passed_over(tmp_path):
    steps, values = series(runs_with(tmp_path, {1: 1.0, 2: None, 3: 3.0}, {}), loss)
    assert (steps.tolist(), values.tolist()) == ([1, 3], [[1.0, 3.0]])


def test_a_long_run_is_thinned_and_keeps_its_ends(tmp_path):
    steps, _ = series(runs_with(tmp_path, dict.fromkeys(range(5000), 1.0)), loss)
    assert len(steps) == 400
    assert (steps[0], steps[-1]) == (0, 4999)


def test_there_is_a_panel_for_each_quantity_that_was_logged(tmp_path):
    fake_study(tmp_path, seeds=1)
    runs = [load_run(folder, "test") for folder in sorted(tmp_path.iterdir())]
    roles = make_study(runs, "test", None).roles
    assert [panel.title for panel in loss_panels(roles)] == [
        "training loss",
        "part: task",
        "part: kl",
        "part: kl_mean_teacher",
        "part: nce",
    ]
    names = ["accuracy", "balanced_accuracy", "auc_micro"]
    assert [panel.title for panel in validation_panels(roles)] == [f"validation {name}" for name in names]
    assert [panel.title for panel in optimisation_panels(roles)] == ["learning rate", "gradient norm"]
    assert [panel.title for panel in agreement_panels(roles)] == [
        "dc_distill: weight of each loss",
        "dc_distill: cosine of gradients",
    ]


@pytest.mark.parametrize("family", [loss_panels, validation_panels, optimisation_panels, agreement_panels])
def test_nothing_logged_nothing_drawn(tmp_path, family):
    run = load_run(fake_run(tmp_path / "r", steps=0), "test")
    assert family(make_study([run], "test", None).roles) == []
