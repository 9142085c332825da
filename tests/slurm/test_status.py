"""What `distkd status` says of a run in every state, with and without a queue to ask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from distkd.metrics import targets
from distkd.slurm import progress, table
from distkd.slurm.queue import EndedJob
from distkd.slurm.status import look
from tests.slurm.watched import NOW, Lines, begun, ended, lines_of, only, queue_of, submitted

# one run's position


def test_rate_and_remaining_time_are_those_of_the_last_lines(tmp_path: Path):
    row = only(begun(tmp_path / "a", every_s=20.0, age_s=4.0))
    assert (row.name, row.state, row.step, row.total) == ("a", "running", 60, 100)
    assert row.steps_per_s == pytest.approx(50 / 101)  # from the first line to the newest validation
    assert row.samples_per_s == pytest.approx(32 * 50 / 101)
    assert row.eta_s == pytest.approx(40 * 101 / 50 - 4)
    assert row.finish == pytest.approx(NOW + 40 * 101 / 50 - 4)
    assert (row.news_age_s, row.metric, row.value, row.advice) == (4.0, "auc_macro", 0.6, "")


def test_the_rate_is_of_the_present_attempt(tmp_path: Path):
    folder = begun(tmp_path / "a", step=100, every_s=20.0, started_s=30.0, n_steps=200)
    assert only(folder).steps_per_s == pytest.approx(10 / 21)  # steps 90 and 100
    lines = progress.tail(folder / "metrics.jsonl")
    lines_of(folder / "metrics.jsonl", [{**line, "time": line["time"] - 50_000} for line in lines])
    row = only(folder)
    assert (row.steps_per_s, row.eta_s) == (None, None)
    assert row.step == 0  # where the attempt resumed


def test_the_rate_forgets_what_was_long_ago(tmp_path: Path):
    folder = begun(tmp_path / "a", step=300, every_s=50.0, started_s=10_000.0, n_steps=400)
    slow = [{"step": step, "time": NOW - 9000 + step, "samples": 32 * step} for step in range(10)]
    lines_of(folder / "metrics.jsonl", slow + progress.tail(folder / "metrics.jsonl"))
    assert only(folder).steps_per_s == pytest.approx(0.2, rel=0.05)


def test_lines_without_a_time_are_helped_by_the_events(tmp_path: Path):
    folder = begun(tmp_path / "a", started_s=100.0)
    lines = progress.tail(folder / "metrics.jsonl")
    lines_of(folder / "metrics.jsonl", [{k: v for k, v in line.items() if k != "time"} for line in lines])
    os.utime(folder / "metrics.jsonl", (NOW - 7, NOW - 7))
    events = progress.tail(folder / "events" / "rank-00000.jsonl")
    saved: Lines = [{"event": "checkpoint", "time": NOW - 50, "step": 25}]
    lines_of(folder / "events" / "rank-00000.jsonl", events + saved)
    row = only(folder)
    assert (row.step, row.news_age_s, row.steps_per_s) == (60, 7.0, 0.5)


def test_what_is_not_known_is_shown_as_such(tmp_path: Path):
    folder = begun(tmp_path / "a", n_steps=None)
    (folder / "config.yaml").write_text("[no mapping")
    row = only(folder)
    assert (row.total, row.eta_s, row.metric, row.value) == (None, None, None, None)
    assert "60 of ?" in table.plain([row], NOW)[1]


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path):
    folder = begun(tmp_path / "a")
    log = folder / "metrics.jsonl"
    newest = log.read_text()
    long: Lines = [{"step": 0, "time": NOW - 500, "val": {"auc_macro": 0.1}}]
    long += [{"step": 1, "time": NOW - 400, "rest": "x" * 1000} for _ in range(200)]
    lines_of(log, long)
    assert progress.read_position(folder).value == 0.1  # beyond the tail, but not far beyond
    with log.open("a") as file:
        file.write(newest + '{"step": 61, "ti')  # one that is being written
    found = progress.tail(log)
    assert len(found) < 100
    assert found[-1]["step"] == 60
    assert progress.read_position(folder).step == 60


def test_a_run_that_has_done_its_last_step_is_evaluating(tmp_path: Path):
    row = only(begun(tmp_path / "a", step=100, age_s=400.0))
    assert (row.state, row.advice, row.eta_s) == ("evaluating", "", None)


# states without a queue


@pytest.mark.parametrize("state", ["done", "interrupted", "failed"])
def test_a_run_says_itself_how_it_ended(tmp_path: Path, state: str):
    row = only(ended(tmp_path / "a", state, message="shard 3 is\n torn; take it from a copy"))
    assert (row.state, row.ended, row.steps_per_s) == (state, NOW - 5, None)
    assert (
        row.advice
        == {
            "done": "",
            "interrupted": "the same command, or `distkd submit`, goes on from its checkpoint",
            "failed": "shard 3 is torn; take it from a copy",
        }[state]
    )
    assert not row.is_active


def test_a_silent_run_outside_of_slurm_is_given_up_by_the_age_of_its_news(tmp_path: Path):
    assert only(begun(tmp_path / "a", age_s=290.0)).state == "running"
    row = only(begun(tmp_path / "a", age_s=720.0))
    assert (row.state, row.is_active) == ("lost", False)
    assert (
        row.advice
        == "no news for 12 min, lines came every 19 s or sooner before; if it no longer runs, start it again to resume"
    )
    # whose lines are far apart is given longer
    assert only(begun(tmp_path / "a", age_s=720.0, every_s=200.0, started_s=5000.0)).state == "running"


def test_before_its_first_line_a_run_is_given_longer(tmp_path: Path):
    assert only(begun(tmp_path / "a", step=0, started_s=800.0)).state == "running"
    row = only(begun(tmp_path / "a", step=0, started_s=1200.0))
    assert (row.state, row.advice) == ("lost", "no news for 20 min; if it no longer runs, start it again to resume")


# a main rank that was killed


@pytest.fixture
def killed() -> str:
    """Identity of a process of this machine that has ended without a word."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = targets.identity(process.pid)
        process.kill()
    return identity


_ENDED = "its processes on this machine ended without a word; start it again to resume"


def test_a_run_whose_processes_were_killed_here_is_lost_at_once(tmp_path: Path, killed: str):
    row = only(begun(tmp_path / "a", age_s=3.0, process=killed))
    assert (row.state, row.advice, row.is_active) == ("lost", _ENDED, False)
    assert (row.steps_per_s, row.eta_s) == (None, None)
    assert only(begun(tmp_path / "a", step=100, process=killed)).state == "lost"  # in its evaluation
    assert only(begun(tmp_path / "a", process=targets.identity())).state == "running"
    machine, _, rest = killed.partition(" ")
    assert only(begun(tmp_path / "a", process=f"{machine}-another {rest}")).state == "running"


@pytest.mark.parametrize("outcome", ["done", "failed", "interrupted"])
def test_a_run_that_said_how_it_ended_is_not_lost_with_its_processes(tmp_path: Path, killed: str, outcome: str):
    assert only(ended(tmp_path / "a", outcome, process=killed)).state == outcome


def test_with_a_job_the_queue_decides_and_where_it_cannot_be_asked_nobody_does(tmp_path: Path, killed: str):
    folder = begun(tmp_path / "a", job="17", process=killed)
    assert only(folder, queue_of(("17", "RUNNING", ""))).state == "running"
    assert only(folder, queue_of(("17", "PENDING", "BeginTime"))).state == "queued again"
    assert only(folder).state == "running"
    row = only(folder, {})
    assert (row.state, row.advice) == (
        "lost",
        "job 17 is gone and the run has not said how it ended; submit again to resume",
    )
    later = submitted(begun(tmp_path / "b", process=killed), "18")  # begun by hand
    assert only(later, queue_of(("18", "PENDING", "Priority"))).state == "queued again"
    assert only(later, {}).advice == _ENDED


@pytest.mark.parametrize("meanwhile", ["ends", "starts again"])
def test_a_run_that_ends_or_starts_again_while_it_is_read_is_not_lost(
    tmp_path: Path, killed: str, monkeypatch: pytest.MonkeyPatch, meanwhile: str
):
    folder = begun(tmp_path / "a", process=killed)

    def is_gone(process: str) -> bool:
        gone = targets.is_gone(process)
        if gone and meanwhile == "ends":
            ended(folder, "done", process=killed)
        elif gone:
            begun(folder, process=targets.identity())
        return gone

    monkeypatch.setattr(progress, "is_gone", is_gone)
    assert only(folder).state == {"ends": "done", "starts again": "running"}[meanwhile]


# states with a queue


@pytest.mark.parametrize(
    "job_state, reason, state, active",
    [
        ("PENDING", "Priority", "queued", True),
        ("PENDING", "Dependency", "waiting", True),
        ("PENDING", "DependencyNeverSatisfied", "waiting", False),
        ("PENDING", "JobHeldUser", "queued", False),
        ("RUNNING", "", "starting", True),
    ],
)
def test_a_run_that_has_not_begun_is_what_its_job_is(
    tmp_path: Path, job_state: str, reason: str, state: str, active: bool
):
    row = only(submitted(tmp_path / "a", "17_3", after=["16_3"]), queue_of(("17_3", job_state, reason)))
    assert (row.state, row.is_active, row.step) == (state, active, None)
    assert [(job.job, job.state, job.reason) for job in row.jobs] == [("17_3", job_state, reason)]
    assert bool(row.advice) == (not active)
    if reason == "DependencyNeverSatisfied":
        assert row.advice == "what it waits for will not come (job 16_3): scancel 17_3, mend that, submit again"


def test_a_run_in_a_running_job_runs_and_is_never_called_lost(tmp_path: Path):
    log = tmp_path / "a.out"
    log.touch()
    folder = begun(submitted(tmp_path / "a", "17", log=str(log)), job="17", restart=2)
    row = only(folder, queue_of(("17", "RUNNING", "")))
    assert (row.state, row.advice, row.jobs[0].restarts, row.jobs[0].time_left_s) == ("running", "", 2, 3600)
    assert "17 RUNNING, 60 min left, restarted 2x" in table.plain([row], NOW)[1]
    begun(folder, job="17", age_s=720.0)
    row = only(folder, queue_of(("17", "RUNNING", "")))
    assert row.state == "running"
    assert row.advice == f"no news for 12 min, lines came every 19 s or sooner before, see {log}"
    assert row.eta_s is None


@pytest.mark.parametrize("outcome", ["interrupted", "failed", None])
def test_a_requeued_run_is_queued_again_and_then_starts(tmp_path: Path, outcome: str | None):
    folder = submitted(tmp_path / "a", "17")
    if outcome is None:
        begun(folder, job="17")
    else:
        ended(folder, outcome, job="17")
    row = only(folder, queue_of(("17", "PENDING", "BeginTime")))
    assert (row.state, row.advice) == ("queued again", "")
    assert (
        only(folder, queue_of(("17", "RUNNING", ""))).state
        == {
            "interrupted": "starting",
            "failed": "failed",
            None: "running",
        }[outcome]
    )


@pytest.mark.parametrize("outcome", ["failed", None])
def test_a_requeued_job_that_runs_again_is_starting_until_the_run_says_something(tmp_path: Path, outcome: str | None):
    jobs, queue = tmp_path / "jobs", queue_of(("17_3", "RUNNING", ""))
    folder = submitted(tmp_path / "a", "17_3", log=str(jobs / "folds-17_3.out"))
    begin = {"job": "17_3", "restart": 1, "age_s": 720.0}
    begun(folder, **begin) if outcome is None else ended(folder, outcome, **begin)
    (jobs / "17_3").mkdir(parents=True)
    for attempt in range(2):
        (jobs / "17_3" / f"stop.{attempt}").touch()
    assert only(folder, queue).state == (outcome or "running")
    (jobs / "17_3" / "stop.2").touch()  # its third attempt
    row = only(folder, queue)
    assert (row.state, row.advice) == ("starting", "")
    (folder / "outcome.json").unlink(missing_ok=True)
    begun(folder, job="17_3", restart=2)
    assert only(folder, queue).state == "running"


def test_a_failed_run_that_was_submitted_again_is_starting(tmp_path: Path):
    folder = submitted(ended(tmp_path / "a", "failed", job="17"), "18")
    row = only(folder, queue_of(("18", "RUNNING", "")))
    assert (row.state, row.jobs[0].job) == ("starting", "18")


def test_a_run_whose_job_is_gone_is_lost_at_once(tmp_path: Path):
    folder = begun(submitted(tmp_path / "a", "17"), job="17", age_s=3.0)
    row = only(folder, queue_of(("18", "RUNNING", "")))
    assert row.state == "lost"
    assert row.advice == "job 17 is gone and the run has not said how it ended; submit again to resume"  # no such log
    never = only(submitted(tmp_path / "b", "17"), {})
    assert (never.state, never.advice) == (
        "lost",
        "job 17 left the queue before the run began; submit again",
    )


@pytest.mark.parametrize(
    "end, state, words",
    [
        (
            EndedJob("17", "FAILED", "NonZeroExitCode", 2),
            "failed",
            "ended with exit code 2{when}, see {log}; mend it and",
        ),
        (EndedJob("17", "OUT_OF_MEMORY", "", 0), "failed", "ended: out of memory{when}, see {log}; mend it and"),
        (EndedJob("17", "CANCELLED", "", 0), "cancelled", "was cancelled{when}, see {log};"),
    ],
)
def test_a_run_whose_job_ended_is_what_slurm_says_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: EndedJob, state: str, words: str
):
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "my logs" / "a-17.out"
    log.parent.mkdir()
    log.touch()
    folder = submitted(tmp_path / "a", "17", log=str(log))
    row = only(folder, {}, end)
    assert (row.state, row.is_active) == (state, False)
    quoted = "'my logs/a-17.out'"
    assert row.advice == f"job 17 {words.format(when=' before the run began', log=quoted)} submit again"
    row = only(begun(folder, job="17"), {}, end)  # the same in the middle of the run
    assert row.state == state
    assert row.advice == f"job 17 {words.format(when='', log=quoted)} submit again to resume"


def test_where_there_is_no_log_slurm_is_to_be_asked(tmp_path: Path):
    row = only(submitted(tmp_path / "a", "17", log=str(tmp_path / "none")), {}, EndedJob("17", "FAILED", "", 1))
    assert row.advice == (
        "job 17 ended with exit code 1 before the run began, see scontrol show job 17; mend it and submit again"
    )


def test_a_job_that_slurm_took_out_of_the_queue_names_the_one_it_waited_for(tmp_path: Path):
    end = EndedJob("17_3", "CANCELLED", "DependencyNeverSatisfied", 0)
    row = only(submitted(tmp_path / "a", "17_3", after=["16_3"]), {}, end)
    assert (row.state, row.advice) == (
        "cancelled",
        "what job 17_3 waited for did not come (job 16_3): mend that, submit again",
    )


@pytest.mark.parametrize("outcome", ["failed", "interrupted"])
def test_a_second_job_that_came_to_nothing_is_spoken_of_not_the_first(tmp_path: Path, outcome: str):
    end = EndedJob("18", "FAILED", "", 2)
    folder = submitted(ended(tmp_path / "a", outcome, job="17"), "18", time=NOW - 2)
    row = only(folder, {}, end)
    assert (row.state, row.jobs[0].job) == ("failed", "18")
    assert row.advice.startswith("job 18 ended with exit code 2 before the run began")
    assert only(folder, {}).state == outcome  # forgotten by SLURM
    ended(folder, outcome, started_s=1.0)  # since then by hand, outside of SLURM
    assert only(folder, {}, end).state == outcome


def test_slurm_is_asked_once_and_only_for_jobs_whose_end_is_not_known(tmp_path: Path):
    ended(tmp_path / "done", "done", job="1")
    ended(tmp_path / "failed", "failed", job="2")
    begun(tmp_path / "lost", job="3")
    begun(tmp_path / "running", job="4")
    submitted(tmp_path / "never", "5")
    asked: list[Collection[str]] = []

    def ends(ids: Collection[str]) -> dict[str, EndedJob]:
        asked.append(ids)
        return {}

    look([tmp_path], queue_of(("4", "RUNNING", "")), NOW, ended=ends)
    assert asked == [{"3", "5"}]
    look([tmp_path], None, NOW, ended=ends)
    look([tmp_path / "done"], {}, NOW, ended=ends)
    assert len(asked) == 1


@pytest.mark.parametrize("outcome", ["done", "failed", "interrupted"])
@pytest.mark.parametrize("state, words", [("RUNNING", "17 RUNNING, 60 min left"), ("PENDING", "17 PENDING")])
def test_a_job_that_lives_is_shown_whatever_the_state_of_the_run(tmp_path: Path, outcome: str, state: str, words: str):
    row = only(ended(tmp_path / "a", outcome, job="17"), queue_of(("17", state, "")))
    assert words in table.plain([row], NOW)[1]
    assert row.is_active  # its next attempt, or its end
    over = only(tmp_path / "a", {})
    assert not over.is_active
    if outcome == "done":
        assert over.jobs == ()


def test_without_a_queue_to_ask_nobody_is_called_lost_for_a_missing_job(tmp_path: Path):
    assert only(begun(tmp_path / "a", job="17", age_s=3.0)).state == "running"
    assert only(submitted(tmp_path / "b", "17")).state == "queued"


def test_a_later_stage_of_a_job_waits_for_the_stage_that_runs(tmp_path: Path):
    begun(submitted(tmp_path / "teacher", "17"), job="17")
    submitted(tmp_path / "student", "17")
    rows = look([tmp_path], queue_of(("17", "RUNNING", "")), NOW)
    assert [(row.name, row.state) for row in rows] == [("teacher", "running"), ("student", "waiting")]
