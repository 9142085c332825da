"""What `distkd top` says of a run folder, on narrow and wide screens, of few ranks and many."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distkd.cli import main
from distkd.slurm import queue
from distkd.top.look import Looker, for_scripts
from distkd.top.marks import ASCII
from distkd.top.view import view
from tests.small import Small
from tests.top.folders import NOW, append, line_of, made, ranks_of, write_ranks

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_asked", lambda *_: None)


def shown(*paths: Path, width: int = 80, height: int | None = None, now: float = NOW, foot: str = "") -> list[str]:
    glance = Looker(paths, clock=lambda: now).look()
    return [line.plain for line in view(glance.facts, glance.others, width, height, ASCII, foot)]


def words(*paths: Path, **how: Any) -> str:
    return "\n".join(shown(*paths, **how))


NARROW = """\
kd  dc_distill, fold 1, seed 3  running
#################...........  60 %  step 600/1000, epoch 13/20, ETA 38 s (<at>)
attempt 2, 4 ranks (cpu), last line 2 s ago

!  rank 2 makes a step 1.80x as long, all wait for it: 50 ms a step in 'data',
   the median 2 ms; its disk or its cores are slow or shared: more data.threads,
   or data.scratch to read from its own disk

speed  640 samples/s, 64 over the attempt, 10 steps/s  ~~~~~~~~~~~~~~~~~~~~~~~~~

step         100 ms
 data          2 ms   2 %  #.......................................
 forward      50 ms  50 %  ####################....................
 backward     30 ms  30 %  ############............................
 collective   10 ms  10 %  ####....................................
 optimizer     8 ms   8 %  ###.....................................

loss              now  change  trend                     teacher  weight  cosine
 total        0.01667   -91 %  #-....__________________
 task            0.01   -91 %  #-....__________________   0.0625
 kl_teacher  0.006667   -91 %  #-....__________________              1.5     0.5
 nce                2    +0 %  ~~~~~~~~~~~~~~~~~~~~~~~~             0.25  -0.125

optimizer  lr 0.001, grad norm 2.5
val  auc_macro 0.75 at step 600, best 0.75 at step 600; accuracy 0.5
checkpoint  none yet

rank  x median  data  forw  backw  coll  optim  queue      GPU  ms a step
 2        1.80    50    50     30    10      8      2  1.0 GiB
 0        1.00     2    50     30    10      8      2  1.0 GiB
 1        1.00     2    50     30    10      8      2  1.0 GiB
 3        1.00     2    50     30    10      8      2  1.0 GiB

bank   steps old  unwritten  norm drift
 gene       12.5       10 %       0.001

agreement             cosine  trend
 kl_teacher with nce   -0.25  ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

method          value
 selected/easy   0.75"""

SMALL = """\
kd  dc_distill, fold 1, seed 3  running
#################...........  60 %  step 600/1000, epoch 13/20, ETA 38 s (<at>)
attempt 2, 64 ranks (cpu), last line 2 s ago
!  rank 41 makes a step 1.80x as long, all wait for it: 50 ms a step in 'data',
   the median 2 ms; its disk or its cores are slow or shared: more data.threads,
   or data.scratch to read from its own disk
speed  640 samples/s, 64 over the attempt, 10 steps/s  ~~~~~~~~~~~~~~~~~~~~~~~~~
step         100 ms
 data          2 ms   2 %  #.......................................
 forward      50 ms  50 %  ####################....................
 backward     30 ms  30 %  ############............................
 collective   10 ms  10 %  ####....................................
 optimizer     8 ms   8 %  ###.....................................
loss              now  change  trend                     teacher  weight  cosine
 total        0.01667   -91 %  #-....__________________
 task            0.01   -91 %  #-....__________________   0.0625
  2 more
optimizer  lr 0.001, grad norm 2.5
val  auc_macro 0.75 at step 600, best 0.75 at step 600; accuracy 0.5
checkpoint  none yet
rank  x median  data  forw  backw  coll  optim  queue      GPU  ms a step
 41       1.80    50    50     30    10      8      2  1.0 GiB
  63 more
q quits"""


def same(lines: Sequence[str], expected: str) -> None:
    at = time.strftime("%H:%M", time.localtime(NOW + 38))
    assert lines == expected.replace("<at>", at).splitlines()


def test_a_run_with_a_slow_rank_on_eighty_columns(tmp_path: Path):
    folder = made(tmp_path / "kd")
    write_ranks(folder, ranks_of(4, slow=2))
    same(shown(folder), NARROW)


def test_on_a_small_screen_what_matters_most_stays(tmp_path: Path):
    folder = made(tmp_path / "kd", n_ranks=64)
    write_ranks(folder, ranks_of(64, slow=41))
    same(shown(folder, height=24, foot="q quits"), SMALL)


@pytest.mark.parametrize("width", [20, 40, 80, 123, 124, 140, 300])
@pytest.mark.parametrize("height", [3, 10, 24, 50, 200])
def test_nothing_is_wider_or_higher_than_the_screen(tmp_path: Path, width: int, height: int):
    folder = made(tmp_path / "runs" / "kd", n_ranks=64)
    made(tmp_path / "runs" / "other", n_lines=3)
    write_ranks(folder, ranks_of(64, slow=41))
    lines = shown(tmp_path / "runs", width=width, height=height, foot="q quits")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("kd")
    assert lines[-1] == "q quits"


def test_a_wide_screen_has_two_columns(tmp_path: Path):
    folder = made(tmp_path / "kd", n_ranks=64)
    write_ranks(folder, ranks_of(64, slow=41))
    lines = shown(folder, width=140, height=40)
    speed = next(line for line in lines if line.startswith("speed  640 samples/s"))
    assert "rank  x median  data  forw  backw  coll  optim  queue      GPU" in speed
    assert any(" 41       1.80    50" in line for line in lines)
    text = "\n".join(lines)
    assert "loss " in text
    assert "bank " in text
    assert "agreement " in text
    assert re.search(r" \d\d more$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "device, phase, help",
    [
        ("cpu", "data", "data.threads"),
        ("cuda", "forward", "its device is slow or shared: look at clocks"),
        ("cuda", "optimizer", "its device is slow or shared: look at clocks"),
        ("cpu", "forward", "its cores are shared: look for other processes on them"),
    ],
)
def test_a_slow_rank_is_named_with_its_phase_and_what_to_do(tmp_path: Path, device: str, phase: str, help: str):
    folder = made(tmp_path / "kd", device=device)
    write_ranks(folder, ranks_of(4, slow=3, phase=phase, times=2.0))
    text = " ".join(words(folder).split())
    assert "rank 3 makes a step 2.00x as long, all wait for it: " in text
    assert f" ms a step in '{phase}', the median " in text
    assert help in text


@pytest.mark.parametrize(
    "readings, said",
    [
        ([(2, 1.8), (2, 1.4), (2, 1.5)], "rank 2 makes a step 1.50x as long"),
        ([(2, 1.8), (2, 1.2), (2, 1.5)], ""),
        ([(2, 1.8), (1, 1.4), (2, 1.5)], ""),
        ([(2, 1.8), (2, 1.4)], ""),
    ],
)
def test_a_rank_is_slow_that_was_the_slowest_three_times_in_a_row(
    tmp_path: Path, readings: list[tuple[int, float]], said: str
):
    folder = made(tmp_path / "kd")
    for i, (rank, index) in enumerate(readings):
        timings = {"forward": 0.5, "straggler_rank": rank, "straggler_index": index}
        append(folder / "metrics.jsonl", line_of(610 + 10 * i, NOW - 1, timings=timings))
    text = words(folder)
    assert said in text
    assert ("!" in text) == bool(said)


def test_a_step_is_not_shorter_than_its_phases_when_an_attempt_has_just_begun(tmp_path: Path):
    folder = made(tmp_path / "kd", n_lines=0)
    for step, at in ((10, NOW - 2), (20, NOW - 1)):
        append(folder / "metrics.jsonl", line_of(step, at))
    facts = Looker([folder], clock=lambda: NOW).look().facts
    assert facts.step_s == pytest.approx(0.1)
    assert sum(facts.phases_s.values()) == pytest.approx(0.1)


@pytest.mark.parametrize("width", [124, 126, 130])
def test_names_of_losses_stay_apart_in_two_columns(tmp_path: Path, width: int):
    folder = made(tmp_path / "kd")
    parts = {"task": 1.0, "contrast_path_queue": 2.0, "contrast_omic_queue": 3.0}
    gauges = {f"{kind}/{name}": 0.125 for kind in ("weight", "teacher", "cosine_with_task") for name in parts}
    append(folder / "metrics.jsonl", line_of(610, NOW - 1, parts=parts, gauges=gauges))
    names = [line[:60].split()[0] for line in shown(folder, width=width) if line.startswith(" contr")]
    assert len(set(names)) == 2
    assert all(name.endswith("_queue") for name in names)


def test_scores_are_shown_whole_or_not_at_all(tmp_path: Path):
    folder = made(tmp_path / "kd")
    scores = {"auc_macro": 0.75, **{f"score_{i}": i / 16 for i in range(9)}}
    append(folder / "metrics.jsonl", {"step": 600, "epoch": 1, "time": NOW - 1, "val": scores})
    for width in range(50, 124):
        [line] = [line for line in shown(folder, width=width) if line.startswith("val")]
        _, _, others = line.partition("; ")
        entries = others.removesuffix(" ...").split(", ") if others else []
        assert entries == [f"score_{i} {i / 16:.4g}" for i in range(len(entries))]
        assert len(line) <= width


def test_a_rank_that_costs_little_is_not_worth_a_word(tmp_path: Path):
    folder = made(tmp_path / "kd")
    write_ranks(folder, ranks_of(4, slow=3, times=1.29))
    assert "!" not in words(folder)
    write_ranks(folder, ranks_of(4, slow=3, times=1.3))
    assert "!  rank 3 makes a step 1.30x as long" in words(folder)


def test_only_phases_in_which_a_rank_waits_for_no_other_are_blamed(tmp_path: Path):
    folder = made(tmp_path / "kd")
    ranks = ranks_of(2, slow=1, phase="data")
    ranks[1]["phases"]["forward"] += 1.0  # where weights are gathered it waits for others
    write_ranks(folder, ranks)
    assert " ms a step in 'forward', the median " in " ".join(words(folder).split())
    write_ranks(folder, ranks, own_work=["data", "optimizer", "backward"])
    assert " ms a step in 'data', the median " in " ".join(words(folder).split())
    write_ranks(folder, ranks, own_work=[])
    assert "!" not in words(folder)


def test_numbers_of_ranks_that_are_old_say_so(tmp_path: Path):
    folder = made(tmp_path / "kd")
    write_ranks(folder, ranks_of(4), age_s=200, step=400)
    assert " of step 400, 3 min older than the last line" in words(folder)
    write_ranks(folder, ranks_of(4, slow=2), age_s=4000, step=400)
    text = words(folder)
    assert " of an attempt before this one" in text
    assert "!" not in text


def test_without_numbers_of_all_ranks_the_slowest_is_told(tmp_path: Path):
    folder = made(tmp_path / "kd")
    timings = {"data": 0.1, "straggler_rank": 3, "straggler_index": 1.5}
    append(folder / "metrics.jsonl", line_of(610, NOW - 1, timings=timings))
    said = "rank  3 is the slowest, a step 1.50x as long; no ranks.json tells of all"
    assert said in words(folder)
    for damaged in ("", "{", "[]", '{"ranks": 3}', '{"ranks": [{"rank": null}, 3]}'):
        (folder / "ranks.json").write_text(damaged)
        assert said in words(folder)


def test_a_run_without_a_line_says_what_it_does(tmp_path: Path):
    folder = made(tmp_path / "kd", n_lines=0)
    assert "began 10 min ago; its first line comes at step 10 at the latest" in words(folder)
    (folder / "environment.json").unlink()
    (folder / "events" / "rank-00000.jsonl").unlink()
    assert "it is being started: packages, data, the teacher" in words(folder)


def test_silence_is_told_before_a_run_counts_as_lost(tmp_path: Path):
    folder = made(tmp_path / "kd", age_s=45)
    text = words(folder)
    assert "!  no news for 45 s; before, lines came every 1 s or sooner: a long" in text
    assert "or it was killed" in " ".join(text.split())
    assert "ETA" not in text
    assert for_scripts(Looker([folder], clock=lambda: NOW).look().facts)["eta_s"] is None
    looker = Looker([folder], clock=lambda: NOW)
    assert looker.look().is_active
    late = Looker([folder], clock=lambda: NOW + 600)
    assert not late.look().is_active
    text = words(folder, now=NOW + 600)
    assert "lost" in text.splitlines()[0]
    assert "!  no news for 11 min" in text


def test_a_failure_is_shown_with_its_message(tmp_path: Path):
    folder = made(tmp_path / "kd")
    message = "loss is nan at step 601; the last checkpoint is step 600"
    outcome = {"state": "failed", "kind": "nonfinite", "step": 601, "attempt": 2, "message": message}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    lines = shown(folder)
    assert lines[0] == "kd  dc_distill, fold 1, seed 3  failed"
    assert f"!  {message}" in lines
    assert not Looker([folder], clock=lambda: NOW).look().is_active


def test_what_is_not_finite_is_told(tmp_path: Path):
    folder = made(tmp_path / "kd")
    append(folder / "metrics.jsonl", line_of(610, NOW - 1, loss=None, skipped=7, parts={"task": None}, grad_norm=None))
    text = " ".join(words(folder).split())
    assert "total not finite" in text
    assert "the loss is not finite, or every step was left out, since the line before step 610" in text
    assert "7 of the last 190 steps were left out, since a gradient was not finite" in text
    assert "optimizer lr 0.001, grad norm -, 7 steps left out" in text


def test_waiting_for_data_is_told(tmp_path: Path):
    folder = made(tmp_path / "kd", n_lines=5)
    for i in range(20):
        append(folder / "metrics.jsonl", line_of(60 + 10 * i, NOW - 20 + i, timings={"data": 0.9, "forward": 0.1}))
    assert "!  steps wait for data for 90 % of a step: more data.threads" in words(folder)


def test_a_drop_of_speed_is_told(tmp_path: Path):
    folder = made(tmp_path / "kd", age_s=30)
    append(folder / "metrics.jsonl", line_of(610, NOW - 1))
    assert "!  22.1 samples/s now, 640 before: other work on the nodes, or a slow disk" in words(folder)


def test_checkpoints_are_told_with_their_age(tmp_path: Path):
    folder = made(tmp_path / "kd")
    (folder / "checkpoints" / "step-00000500").mkdir(parents=True)
    best = {"best": {"step": 350, "value": 0.875}}
    (folder / "checkpoints" / "step-00000500" / "meta.json").write_text(json.dumps(best))
    latest = folder / "checkpoints" / "latest"
    latest.write_text("step-00000500\n")
    os.utime(latest, (NOW - 12, NOW - 12))
    events = folder / "events" / "rank-00000.jsonl"
    for step in (300, 400, 500):
        append(events, {"event": "checkpoint", "time": NOW - 62 + step / 10, "step": step, "seconds": 0.25})
    text = words(folder)
    assert "checkpoint  step 500, 12 s old, written in 0.25 s" in text
    assert "val  auc_macro 0.75 at step 600, best 0.875 at step 350; accuracy 0.5" in text
    assert "!" not in text
    os.utime(latest, (NOW - 150, NOW - 150))
    assert "!  the last checkpoint is 2 min old; before, one came every 10 s or sooner" in words(folder)
    append(events, {"event": "checkpoint_failed", "time": NOW, "step": 600, "reason": "No space left on device"})
    said = "checkpoint of step 600 could not be written: No space left on device; make room"
    assert said in " ".join(words(folder).split())


def test_of_several_runs_the_newest_that_runs_is_shown(tmp_path: Path):
    made(tmp_path / "a", age_s=9)
    made(tmp_path / "b", age_s=3)
    done = made(tmp_path / "c", age_s=1)
    (done / "outcome.json").write_text('{"state": "done", "step": 600}')
    lines = shown(tmp_path)
    assert lines[0].startswith("b  dc_distill")
    assert lines[-3] == "other runs"
    assert lines[-2].startswith(" a  running  step 600/1000  ETA ")
    assert lines[-1] == " c  done  auc_macro 0.7500"
    looker = Looker([tmp_path], clock=lambda: NOW)
    names = [looker.look().facts.row.name]
    for by in (1, 1, -1, 1):
        looker.choose(by)
        names.append(looker.look().facts.row.name)
    assert names == ["b", "c", "a", "c", "a"]


def test_when_a_run_ends_the_next_one_is_shown(tmp_path: Path):
    folder = made(tmp_path / "teacher")
    looker = Looker([tmp_path], clock=lambda: NOW)
    assert looker.look().facts.row.name == "teacher"
    made(tmp_path / "student", n_lines=1, age_s=1)
    (folder / "outcome.json").write_text('{"state": "done", "step": 1000}')
    glance = looker.look()
    assert (glance.facts.row.name, glance.is_active) == ("student", True)
    assert [row.state for row in glance.others] == ["done"]


def test_a_restarted_run_starts_its_numbers_again(tmp_path: Path):
    folder = made(tmp_path / "kd")
    looker = Looker([folder], clock=lambda: NOW)
    assert looker.look().facts.samples_per_s == pytest.approx(640)
    kept = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:30]
    (folder / "metrics.jsonl").write_text("".join(kept))
    started = {"world_size": 2, "n_steps": 1000, "started": NOW - 2}
    (folder / "environment.json").write_text(json.dumps(started))
    append(folder / "events" / "rank-00000.jsonl", {"event": "start", "time": NOW - 2, "attempt": 3, "step": 300})
    facts = looker.look().facts
    assert (facts.row.step, facts.attempt, facts.world_size, facts.samples_per_s) == (300, 3, 2, None)
    append(folder / "metrics.jsonl", line_of(310, NOW - 0.5))
    facts = looker.look().facts
    assert facts.phases_s["forward"] == pytest.approx(0.05)
    assert facts.samples_per_s_overall == pytest.approx(640 / 1.5)


def test_a_job_that_is_newer_than_the_last_answer_of_the_queue_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = made(tmp_path / "kd")
    answers: list[dict[str, queue.QueuedJob]] = [{}, {"17": queue.QueuedJob("17", "RUNNING", "", 600, "n[1-2]")}]
    monkeypatch.setattr("distkd.top.look.queued", lambda: answers.pop(0))
    looker = Looker([folder], clock=lambda: NOW)
    assert looker.look().facts.row.state == "running"
    about = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(about | {"job": "17"}))
    append(folder / "jobs.jsonl", {"event": "started", "time": NOW, "job": "17", "restart": 0, "nodes": "n[1-2]"})
    glance = looker.look()
    assert (glance.facts.row.state, glance.is_active, answers) == ("running", True, [])
    lines = [line.plain for line in view(glance.facts, [], 80, None, ASCII)]
    assert "attempt 2, 4 ranks (cpu), job 17 RUNNING, 10 min left, n[1-2], last line 2 s ago" in lines


# real runs


def test_a_real_run_is_read_in_full(small: Small):
    facts = Looker([small.root / "student"]).look().facts
    assert (facts.row.state, facts.row.step, facts.row.total) == ("done", 6, 6)
    assert facts.phases_s.keys() >= {"data", "forward", "backward", "optimizer"}
    assert facts.samples_per_s is not None
    assert facts.mapping("parts").keys() >= {"task"}
    assert facts.checkpoint is not None
    assert facts.checkpoint.step == 6
    assert facts.best is not None
    text = words(small.root / "student", width=140)
    assert "logit_kd" in text
    assert "100 %  step 6/6, epoch 2/2" in text
    lines = (small.root / "student" / "metrics.jsonl").read_text().splitlines()
    real = next(line for line in map(json.loads, lines) if "loss" in line)
    assert line_of(1, 0.0).keys() == real.keys()  # so that runs made by hand are like real ones


def test_looking_changes_nothing(small: Small):
    def states() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in small.root.rglob("*")}

    before = states()
    assert main(["top", str(small.root), "--once"]) == 0
    assert states() == before
