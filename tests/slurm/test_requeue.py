"""Which jobs go back to the queue, how often, and what their counters remember."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from distkd.slurm.requeue import MAX_IDLE, Ending, Limits, Past, decide, position, read_past

HERE = "runs/a step-00000040"
PAST = Past(requeues=2, failures=1, idle=1, position=HERE)


def _end(code: int, where: str = HERE, *, warned: bool = False, killed: bool = False) -> Ending:
    return Ending(code, warned, killed, where)


@pytest.mark.parametrize(
    ("end", "again", "why"),
    [
        (_end(0), False, "done"),
        (_end(0, warned=True), False, "done"),
        (_end(3, warned=True), True, "SLURM has announced the end"),
        (_end(1, warned=True), True, "SLURM has announced the end"),
        (_end(1), True, "failure 2 since the newest checkpoint"),
        (_end(1, "runs/a step-00000060"), True, "failure 1 since"),
        (_end(2), False, "would be made again"),
        (_end(2, warned=True), False, "would be made again"),
        (_end(3), False, "stopped as asked"),
        (_end(3, killed=True), False, "SLURM ends this job"),
        (_end(3, warned=True, killed=True), False, "SLURM ends this job"),
        (_end(1, killed=True), False, "SLURM ends this job"),
    ],
)
def test_what_happens_to_a_job(end, again, why):
    verdict = decide(end, PAST, Limits())
    assert verdict.again is again
    assert why in verdict.why
    assert verdict.past.requeues == PAST.requeues + again


def _chain(ends: list[Ending], limits: Limits) -> list[bool]:
    past, said = Past(), []
    for end in ends:
        verdict = decide(end, past, limits)
        said.append(verdict.again)
        past = verdict.past
    return said


def test_a_job_that_fails_at_one_place_is_requeued_so_often_and_no_more():
    assert _chain([_end(1)] * 5, Limits(failures=3)) == [True, True, True, False, False]
    assert _chain([_end(1)], Limits(failures=0)) == [False]


def test_failures_before_the_first_checkpoint_count_too():
    assert _chain([_end(1, "")] * 4, Limits(failures=3)) == [True, True, True, False]


def test_a_newer_checkpoint_forgives_failures():
    ends = [_end(1, f"runs/a step-{step:08d}") for step in (10, 10, 20, 20, 30)]
    assert _chain(ends, Limits(failures=2)) == [True] * 5


def test_the_time_limit_may_interrupt_a_long_run_many_times_as_long_as_it_gets_on():
    ends = [_end(3, f"runs/a step-{step:08d}", warned=True) for step in range(50)]
    assert all(_chain(ends, Limits(failures=0)))


def test_a_time_limit_too_short_for_one_checkpoint_ends_in_words():
    said = _chain([_end(3, warned=True)] * (MAX_IDLE + 2), Limits())
    assert said == [True] * MAX_IDLE + [False, False]
    past = Past(idle=MAX_IDLE - 1, position=HERE)
    assert "allow more time (sbatch --time)" in decide(_end(3, warned=True), past, Limits()).why


def test_interruptions_and_failures_are_counted_apart():
    ends = [_end(1), _end(3, warned=True), _end(1), _end(3, warned=True), _end(1), _end(1)]
    assert _chain(ends, Limits(failures=3)) == [True, True, True, True, True, False]


def test_there_is_an_end_to_all_requeues():
    ends = [_end(3, f"runs/a step-{step:08d}", warned=True) for step in range(6)]
    assert _chain(ends, Limits(requeues=4)) == [True] * 4 + [False] * 2


def test_the_position_is_the_newest_checkpoint_of_the_noted_run(tmp_path):
    run, notes = tmp_path / "runs" / "fold 3", tmp_path / "notes"
    notes.mkdir()
    assert position(notes) == ""
    (notes / "run-0").write_text(str(run))
    assert position(notes) == f"{run} none"
    for step in (9, 12, 100):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run / "checkpoints" / ".step-00000200.partial").mkdir()
    assert position(notes) == f"{run} step-00000100"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"unknown": 1}'])
def test_torn_counters_count_from_nothing(tmp_path, text):
    (tmp_path / "requeues.json").write_text(text)
    assert read_past(tmp_path / "requeues.json") == Past()


def test_as_the_batch_scripts_call_it(tmp_path):
    """Exit code and counters; torch is not imported, there may be seconds left."""
    past = tmp_path / "requeues.json"
    arguments = ["--notes", tmp_path, "--past", past, "--max-failures", "1", "--code"]
    program = "import sys; from distkd.slurm import requeue; code = requeue.main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", f"{program}; sys.exit(code)", *map(str, arguments)]
    said = [subprocess.run([*command, code], capture_output=True, text=True) for code in ("1", "1", "0")]
    assert [done.returncode for done in said] == [0, 1, 1], said
    assert [done.stdout.partition(":")[0] for done in said] == ["requeue", "no requeue", "no requeue"]
    assert json.loads(past.read_text())["requeues"] == 1
