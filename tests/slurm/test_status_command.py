"""`distkd status` of many runs: their order and names, what else lies in a root, and how it is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distkd.cli import USER, main
from distkd.errors import DataError
from distkd.metrics import targets
from distkd.slurm import table
from distkd.slurm.find import find
from distkd.slurm.judge import duration
from distkd.slurm.queue import queued
from distkd.slurm.status import Row, look
from distkd.slurm.unbegun import unbegun
from tests.slurm.watched import CONFIG, NOW, begun, ended, lines_of, only, queue_of, submitted

# several runs


def test_running_comes_first_then_what_waits_then_the_newest_ending(tmp_path: Path):
    ended(tmp_path / "old", "failed", age_s=500.0)
    ended(tmp_path / "new", "done", age_s=5.0)
    submitted(tmp_path / "fold10", "10")
    submitted(tmp_path / "fold9", "9")
    begun(tmp_path / "z")
    rows = look([tmp_path], queue_of(("9", "PENDING", "Priority"), ("10", "PENDING", "Priority")), NOW)
    assert [row.name for row in rows] == ["z", "fold9", "fold10", "new", "old"]


def test_a_study_is_a_line_for_each_state_unless_all_are_asked_for(tmp_path: Path):
    for fold in range(15):
        for seed in range(5):
            ended(tmp_path / f"kd-fold{fold}-seed{seed}", "done", age_s=100 + fold)
    ended(tmp_path / "kd-fold15-seed0", "failed", message="torn")
    begun(tmp_path / "kd-fold15-seed1")
    queue = queue_of(*((f"7_{fold}", "PENDING", "DependencyNeverSatisfied") for fold in range(4)))
    for fold in range(4):
        submitted(tmp_path / f"late-fold{fold}", f"7_{fold}", after=[f"6_{fold}"])
    rows = look([tmp_path], queue, NOW)
    lines = table.plain(rows, NOW)
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["kd-fold15-seed1", "running"],
        ["late-fold*", "waiting"],
        ["->", "what"],
        ["kd-fold15-seed0", "failed"],
        ["->", "torn"],
        ["kd-fold*-seed*", "done"],
    ]
    assert "4 runs" in lines[2]
    assert "7_0 .. 7_3" in lines[2]
    assert "auc_macro 0.6000" in lines[6]
    assert lines[-1] == "1 running, 4 waiting, 1 failed, 75 done"
    assert len(table.plain(rows, NOW, everything=True)) == 1 + 81 + 5 + 1  # five with advice


def test_names_are_told_apart_where_two_roots_have_the_same(tmp_path: Path):
    for root in ("one", "two"):
        ended(tmp_path / root / "a", "done")
    names = [row.name for row in look([tmp_path / "one", tmp_path / "two"], None, NOW)]
    assert sorted(names) == [str(tmp_path / "one" / "a"), str(tmp_path / "two" / "a")]
    assert len(look([tmp_path, tmp_path / "one"], None, NOW)) == 2  # each once


def test_of_several_folders_names_are_relative_to_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = tmp_path / "here"
    for folder in (here / "runs" / "a", here / "more" / "b", tmp_path / "c"):
        ended(folder, "done")
    monkeypatch.chdir(here)
    several = [Path("runs"), here / "more", Path("../c")]
    assert {*find(several)} == {"runs/a", "more/b", str(tmp_path / "c")}
    assert [*find([here / "more"])] == ["b"]


@pytest.mark.usefixtures("no_squeue")
def test_a_folder_without_runs_is_left_out_with_a_word_while_others_have_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ended(tmp_path / "a", "done")
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / name) for name in ("absent", "a", "empty")]
    for words in (["status", *paths], ["status", *paths, "--watch", "1"]):
        assert main(words) == 0
        *_, counts, absent, empty = capsys.readouterr().out.splitlines()
        assert counts == "1 done"
        assert absent.startswith(f"{paths[0]} does not exist")
        assert empty.startswith(f"no run found at or below {paths[2]}")
    assert main(["status", "--json", *paths]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 1
    assert f"{paths[0]} does not exist" in said.err
    assert main(["status", paths[0], paths[2], "--watch", "1"]) == USER
    said = capsys.readouterr().err
    assert f"{paths[0]} does not exist" in said
    assert f"no run found at or below {paths[2]}" in said


def test_the_copies_of_a_submission_are_no_runs(tmp_path: Path):
    ended(tmp_path / "a", "done")
    copies = tmp_path / "slurm" / "submitted-20260101-000000"
    copies.mkdir(parents=True)
    (copies / "config.yaml").write_text(CONFIG)
    assert only(tmp_path).name == "a"


def test_of_the_folders_of_jobs_and_of_runs_nothing_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = tmp_path / "runs"
    for fold in range(3):
        folder = ended(runs / "study" / f"fold-{fold}", "done")
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        job = f"17_{fold}"
        for attempt in range(4):
            for node in range(16):
                (runs / "slurm" / job / f"logs.{attempt}" / f"node-{node}").mkdir(parents=True)
            (runs / "slurm" / job / f"notes.{attempt}").mkdir()
            (runs / "slurm" / job / f"stop.{attempt}").touch()
        if fold:
            (runs / "slurm" / f"folds-{job}.out").touch()
    (runs / "slurm" / "submitted-20260101-000000").mkdir()
    (runs / "prometheus").mkdir()
    ended(runs / "2026" / "7", "done")  # numbers are good names, too
    visited: list[str] = []
    scandir = os.scandir

    def noted(folder: Any) -> Any:
        visited.append(Path(folder).relative_to(runs).as_posix())
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", noted)
    assert [*find([runs])] == ["2026/7", "study/fold-0", "study/fold-1", "study/fold-2"]
    # of the jobs only the one without a log beside it, and of that no folder inside
    studies = ["study", "study/fold-0", "study/fold-1", "study/fold-2"]
    assert visited == [".", "2026", "2026/7", "slurm", "slurm/17_0", *studies]


# jobs by hand


def by_hand(root: Path, job: str, age_s: float = 60.0, run: str | None = None) -> Path:
    """The folder of a job that has begun, and perhaps a run of its own."""
    folder = root / "slurm" / job
    (folder / "notes.0" / "node-0").mkdir(parents=True)
    (folder / "stop.0").touch()
    if run is not None:
        (folder / "notes.0" / "node-0" / "run-0").write_text(run)
    os.utime(folder, (NOW - age_s, NOW - age_s))
    return folder


def test_jobs_by_hand_that_ended_before_a_run_began_are_named(
    tmp_path: Path, fake_squeue: Callable[[str], None], capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    by_hand(runs, "12")
    by_hand(runs, "13", run="a run that is somewhere else")
    by_hand(runs, "14_2", age_s=30.0)
    (by_hand(runs, "18") / "notes.0" / "code-0").write_text("0\n")  # its run was done already
    (by_hand(runs, "19", age_s=90.0) / "notes.0" / "code-0").write_text("2\n")
    by_hand(runs, "15", age_s=5 * 86400)
    by_hand(runs, "16")
    begun(runs / "a", job="17")
    by_hand(runs, "17")
    (tmp_path / "distkd-14_2.out").touch()  # of sbatch, in the current folder
    fake_squeue("16|RUNNING|None|1:00|n1\n17|RUNNING|None|1:00|n1\n12 FAILED 512 NonZeroExitCode")
    said = unbegun([Path("runs")], [runs / "a"], queued(), NOW)
    assert said == [
        "job 14_2 ended before its run began, see distkd-14_2.out",
        "job 12 ended with exit code 2 before its run began, see runs/slurm/12",
        "job 19 ended before its run began, see runs/slurm/19",
    ]
    assert unbegun([Path("runs")], [runs / "a"], None, NOW) == []
    assert table.run([Path("runs")], clock=lambda: NOW) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == said
    for job in range(20, 30):
        by_hand(runs, str(job), age_s=50 - job)
    assert [line.split()[1] for line in unbegun([runs], [], {}, NOW)] == ["29", "28", "27", "26", "25"]
    (runs / "a").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"(?s)no run found at or below.*job 29 ended before its run began"):
        table.run([runs], clock=lambda: NOW)


# targets of Prometheus


def announced(folder: Path) -> None:
    """A target as a rank on another machine has left it."""
    lines_of(folder / "prometheus" / "rank-00000.json", [])
    content = [{"targets": ["n1:9000"], "labels": {"run": folder.name, "slurm_job": "17"}}]
    (folder / "prometheus" / "rank-00000.json").write_text(json.dumps(content))


def test_ranks_that_wait_for_a_last_scrape_are_not_to_be_withdrawn(tmp_path: Path):
    for age_s, stale in ((30.0, 0), (119.0, 0), (121.0, 1)):  # of ranks elsewhere only the age tells
        announced(ended(tmp_path / "a", "done", age_s=age_s))
        assert only(tmp_path).stale_targets == stale
    targets.write(tmp_path / "a", 0, "127.0.0.1:1", {"run": "a"})
    assert only(tmp_path).stale_targets == 0  # its process is this one


def test_targets_of_runs_that_do_not_run_are_named_with_the_command_that_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    over = ended(tmp_path / "over", "failed", age_s=500.0)
    alive = begun(submitted(tmp_path / "alive", "17"), job="17")
    for folder in (over, alive):
        announced(folder)
    rows = look([tmp_path], queue_of(("17", "RUNNING", "")), NOW)
    assert {row.name: row.stale_targets for row in rows} == {"over": 1, "alive": 0}
    command = f"python -m distkd.metrics.targets --remove {over}"
    assert table.plain(rows, NOW)[-1] == f"Prometheus still asks ranks of 1 run that does not run: {command}"
    assert "ranks of 2 runs that do not run: " in table.plain([rows[-1]] * 2, NOW)[-1]
    monkeypatch.chdir(tmp_path)
    assert table.plain(rows, NOW)[-1].endswith(" --remove over")
    monkeypatch.undo()
    subprocess.run([sys.executable, *command.split()[1:]], check=True, capture_output=True)
    assert [row.stale_targets for row in look([tmp_path], queue_of(("17", "RUNNING", "")), NOW)] == [0, 0]


# the command


def test_the_command_prints_aligned_lines_with_what_the_queue_says(
    tmp_path: Path, fake_squeue: Callable[[str], None], capsys: pytest.CaptureFixture[str]
):
    begun(submitted(tmp_path / "runs" / "a", "17_3"), job="17_3", age_s=0.0)
    submitted(tmp_path / "runs" / "b", "18_3")
    fake_squeue("17_3|RUNNING|None|1-00:00:00|n[1-2]\n18_3|PENDING|Dependency|4:00:00|")
    assert set(queued() or {}) == {"17_3", "18_3"}
    assert table.run([tmp_path / "runs"], clock=lambda: NOW) == 0
    heading, a, b, counts = capsys.readouterr().out.splitlines()
    column = heading.index("job")
    assert a[column:] == "17_3 RUNNING, 24 h 0 min left"
    assert b[column:] == "18_3 PENDING (Dependency)"
    assert a[heading.index("step") :].startswith("60/100 (60 %)")
    assert a[heading.index("rate") :].startswith("0.5 steps/s, 16 samples/s")
    assert counts == "1 running, 1 waiting"


@pytest.mark.usefixtures("no_squeue")
def test_without_squeue_it_says_that_it_could_not_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    submitted(tmp_path / "a", "17")
    assert main(["status", str(tmp_path)]) == 0
    *_, counts, note = capsys.readouterr().out.splitlines()
    assert counts == "1 queued"
    assert note == "the queue cannot be asked (no squeue, or no answer): all of this is from files alone"


@pytest.mark.usefixtures("no_squeue")
def test_scripts_get_every_run_with_the_same_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed in range(3):
        ended(tmp_path / f"a-seed{seed}", "done")
    submitted(tmp_path / "b", "17")
    assert main(["status", "--json", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in found] == ["queued", "done", "done", "done"]
    assert {tuple(row) for row in found} == {tuple(Row.__dataclass_fields__)}
    assert found[0]["jobs"][0]["job"] == "17"


@pytest.mark.usefixtures("no_squeue")
def test_a_terminal_gets_a_table_with_the_advice_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    begun(tmp_path / "kd[1]", age_s=0.0)
    ended(tmp_path / "b", "failed", message="shard [3] is torn")
    assert table.run([tmp_path], clock=lambda: NOW) == 0
    out = capsys.readouterr().out
    assert "kd[1]" in out
    assert "shard [3] is torn" in out
    assert "job" not in out  # no column without content


@pytest.mark.usefixtures("no_squeue")
def test_watching_ends_by_itself_when_nothing_runs_or_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = begun(tmp_path / "a", age_s=0.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            ended(folder, "done")

    assert table.run([tmp_path], every_s=7, clock=lambda: NOW, sleep=sleep) == 0
    assert slept == [7, 7]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("1 ")] == [
        "1 running", "1 running", "1 done",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_squeue")
def test_watching_ends_with_ctrl_c(tmp_path: Path):
    begun(tmp_path / "a", age_s=0.0)

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    assert table.run([tmp_path], every_s=7, clock=lambda: NOW, sleep=sleep) == 0


@pytest.mark.usefixtures("no_squeue")
@pytest.mark.parametrize(
    "name, words",
    [
        ("absent", "absent does not exist; name a run folder, or a folder of run folders such as runs/"),
        ("file", "file is a file, not a folder; name a run folder"),
        ("empty", "empty; `distkd submit` and `distkd train CONFIG` make one"),
    ],
)
def test_a_path_without_runs_is_refused_with_what_to_do(
    tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError):
        look([tmp_path / name], None, NOW)
    assert main(["status", str(tmp_path / name)]) == USER
    assert words in capsys.readouterr().err


def test_looking_at_runs_needs_no_torch():
    code = "import sys, distkd.slurm.table; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "0 s"), (99, "99 s"), (720, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_rounded_to_what_matters(seconds: float, words: str):
    assert duration(seconds) == words
