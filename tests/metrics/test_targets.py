"""Target files: in the form that Prometheus reads, gone with their process, known as stale where it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distkd.metrics import targets

LABELS = {"run": "r", targets.JOB: ""}


def _announced(run: Path, rank: int = 0, program: str = "", **labels: str) -> subprocess.Popen[str]:
    """A process that has announced itself as a rank, and lives until its standard input closes."""
    about = {**LABELS, **labels}
    code = (
        "import sys; from pathlib import Path; from distkd.metrics import targets\n"
        f"path = targets.write(Path({str(run)!r}), {rank}, '127.0.0.1:1', {about!r})\n"
        "print('ready', flush=True); sys.stdin.read()\n" + program
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _end(process: subprocess.Popen[str], number: signal.Signals | None = None) -> None:
    if number is not None:
        process.send_signal(number)
    process.communicate(timeout=60)


def test_a_file_is_one_target_group_that_one_glob_finds_for_all_runs(tmp_path: Path):
    path = targets.write(tmp_path / "run", 3, "10.0.0.7:9103", {**LABELS, targets.JOB: "17_3"}, attempt=2)
    assert path == tmp_path / "run" / "prometheus" / "rank-00003.json"
    [copy] = tmp_path.glob("prometheus/*.json")
    assert copy.name == "run.rank-00003.json"
    assert copy.read_bytes() == path.read_bytes()
    [group] = json.loads(path.read_text())
    assert group["targets"] == ["10.0.0.7:9103"]
    kept = {name: value for name, value in group["labels"].items() if not name.startswith("__meta_")}
    assert kept == {
        "run": "r",
        "slurm_job": "17_3",
        "rank": "3",
    }  # `job` is Prometheus' own
    assert group["labels"]["__meta_distkd_attempt"] == "2"  # no label: a series goes on over attempts
    assert [path.name for path in path.parent.iterdir()] == ["rank-00003.json"]


def test_a_process_withdraws_its_own_file_and_not_that_of_its_successor(tmp_path: Path):
    run = tmp_path / "run"
    first = _announced(run, program=f"targets.remove_own(Path({str(run)!r}), 0)\n")
    targets.write(run, 0, "127.0.0.1:2", LABELS)
    _end(first)
    assert first.returncode == 0
    found = list(tmp_path.rglob("*.json"))
    assert [json.loads(path.read_text())[0]["targets"] for path in found] == [["127.0.0.1:2"]] * 2
    targets.remove_own(run, 0)
    assert not list(tmp_path.rglob("*.json"))
    targets.remove_own(run, 0)  # a second time does no harm


def test_a_killed_process_leaves_a_stale_file(tmp_path: Path):
    process = _announced(tmp_path)
    assert targets.stale(tmp_path, ended=False, running_jobs=None) == []
    process.kill()
    process.communicate(timeout=60)
    assert [path.name for path in targets.stale(tmp_path, ended=False, running_jobs=None)] == ["rank-00000.json"]


def test_a_zombie_and_another_process_of_the_same_number_do_not_count_as_alive(tmp_path: Path):
    process = _announced(tmp_path)
    path = tmp_path / "prometheus" / "rank-00000.json"
    written = path.read_text()
    [group] = json.loads(written)
    process_label = next(name for name in group["labels"] if name.startswith("__meta_"))
    group["labels"][process_label] += "1"  # started at another time
    path.write_text(json.dumps([group]))
    assert targets.stale(tmp_path, ended=False, running_jobs=None) == [path]
    path.write_text(written)
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass  # killed, not yet waited for
    assert targets.stale(tmp_path, ended=False, running_jobs=None) == [path]
    process.communicate(timeout=60)


def test_of_a_process_on_another_machine_nothing_is_known(tmp_path: Path):
    process = _announced(tmp_path, slurm_job="17")
    _end(process, signal.SIGKILL)
    path = tmp_path / "prometheus" / "rank-00000.json"
    [group] = json.loads(path.read_text())
    process_label = next(name for name in group["labels"] if name.startswith("__meta_"))
    group["labels"][process_label] = "another-boot/pid:[1] 1 1"
    path.write_text(json.dumps([group]))
    assert targets.stale(tmp_path, ended=False, running_jobs=None) == []
    assert targets.stale(tmp_path, ended=False, running_jobs={"17"}) == []
    assert targets.stale(tmp_path, ended=False, running_jobs={"18"}) == [path]  # but of its job
    assert targets.stale(tmp_path, ended=True, running_jobs={"17"}) == [path]


def test_a_process_that_lives_is_asked_rightly_whatever_is_said_of_its_run(tmp_path: Path):
    process = _announced(tmp_path, slurm_job="17")
    assert targets.stale(tmp_path, ended=True, running_jobs=()) == []  # it waits for a last scrape
    _end(process)
    assert len(targets.stale(tmp_path, ended=False, running_jobs={"17"})) == 1


def test_the_identity_of_a_process_tells_whether_it_has_ended():
    assert targets.identity() == targets.identity(os.getpid())
    assert not targets.is_gone(targets.identity())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = targets.identity(process.pid)
        assert not targets.is_gone(identity)
        process.kill()
    assert targets.is_gone(identity)
    assert not targets.is_gone("")


def test_without_a_job_the_queue_says_nothing(tmp_path: Path):
    targets.write(tmp_path, 0, "127.0.0.1:1", LABELS)
    assert targets.stale(tmp_path, ended=False, running_jobs=()) == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"targets": []}]', '[{"labels": 3}]'])
def test_a_file_of_somebody_else_is_stale_only_where_the_run_has_ended(tmp_path: Path, text: str):
    path = tmp_path / "prometheus" / "rank-00000.json"
    path.parent.mkdir()
    path.write_text(text)
    assert targets.stale(tmp_path, ended=False, running_jobs={"17"}) == []
    assert targets.stale(tmp_path, ended=True, running_jobs=None) == [path]
    assert targets.remove(tmp_path, job="17") == []
    assert targets.remove(tmp_path) == [path]


def test_remove_takes_one_job_or_one_attempt_or_all(tmp_path: Path):
    run, beside = tmp_path / "run[1]", tmp_path / "run"  # a name is no pattern
    targets.write(beside, 0, "127.0.0.1:1", LABELS)
    for rank, (job, attempt) in enumerate([("17", 1), ("17", 2), ("18", 1)]):
        targets.write(run, rank, "127.0.0.1:1", {**LABELS, targets.JOB: job}, attempt=attempt)
    torn = run / "prometheus" / ".rank-00009.json.4711"
    torn.write_text("[")

    def removed(**which: Any) -> list[str]:
        return [path.name for path in targets.remove(run, **which)]

    assert removed(job="17", attempt=2) == ["rank-00001.json", "run[1].rank-00001.json"]
    assert removed(job="17") == ["rank-00000.json", "run[1].rank-00000.json"]
    assert torn.exists()  # perhaps it is being written
    assert removed() == ["rank-00002.json", "run[1].rank-00002.json"]
    assert not torn.exists()
    assert targets.remove(tmp_path / "absent") == []
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_without_conditions_files_are_removed_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for rank in range(20):
        targets.write(tmp_path / "run", rank, "127.0.0.1:1", LABELS)
    read: list[Path] = []
    text_of = Path.read_text

    def noted(path: Path, *args: Any, **kwargs: Any) -> str:
        read.append(path)
        return text_of(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", noted)
    assert targets.remove(tmp_path / "run", job="17") == []
    assert len(read) == 40
    assert len(targets.remove(tmp_path / "run")) == 40
    assert len(read) == 40
    assert not list(tmp_path.rglob("*.json"))


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distkd.metrics.targets", "--remove", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_batch_script_clears_its_own_job_below_a_folder_of_runs(tmp_path: Path):
    runs = [tmp_path / "teacher", tmp_path / "study" / "fold-1"]
    for run, job in ((runs[0], "17"), (runs[0], "18"), (runs[1], "17")):
        targets.write(run, int(job), "127.0.0.1:1", {**LABELS, targets.JOB: job})
    everywhere = _command(tmp_path)
    assert everywhere.returncode == 0
    assert everywhere.stdout == f"no scrape targets of {tmp_path}\n"  # not those of other jobs, without being asked
    ended = _command(tmp_path, "--job", "17")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"removed 2 scrape targets of {tmp_path}\n"  # of two files each
    assert {path.name for path in tmp_path.rglob("*.json")} == {"rank-00018.json", "teacher.rank-00018.json"}
    _command(runs[0])
    assert not list(tmp_path.rglob("*.json"))


def test_a_batch_script_clears_several_runs_at_once_and_does_not_mind_where_there_is_nothing(tmp_path: Path):
    runs = [tmp_path / name for name in ("teacher", "student", "cleared", "never-made")]
    for run in runs[:3]:
        targets.write(run, 0, "127.0.0.1:1", {**LABELS, targets.JOB: "17_3"})
        (run / "config.yaml").touch()
    targets.write(runs[1], 1, "127.0.0.1:1", {**LABELS, targets.JOB: "17_4"})
    shutil.rmtree(runs[2])  # its copy beside the run folders is still there
    done = _command(*runs, "--job", "17_3")
    assert (done.returncode, done.stderr) == (0, f"no folder {runs[3]}\n")
    assert done.stdout == "".join(f"removed 1 scrape target of {run}\n" for run in runs[:3])
    assert {path.name for path in tmp_path.rglob("rank-*.json")} == {"rank-00001.json"}
    assert [path.name for path in tmp_path.glob("prometheus/*")] == ["student.rank-00001.json"]
    again = _command(*runs, "--job", "17_3")
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr == "".join(f"no folder {run}\n" for run in runs[2:])


def test_whoever_names_a_run_by_hand_is_told_where_there_is_nothing_to_remove(tmp_path: Path):
    run, absent = tmp_path / "run", tmp_path / "rnu"
    for rank in range(2):
        targets.write(run, rank, "127.0.0.1:1", LABELS)
    done = _command(absent, run)
    assert (done.returncode, done.stderr) == (2, f"no folder {absent}\n")
    assert done.stdout == f"removed 2 scrape targets of {run}\n"
    again = _command(run)
    assert (again.returncode, again.stdout, again.stderr) == (0, f"no scrape targets of {run}\n", "")


def test_targets_do_without_heavy_imports():
    code = "import sys; from distkd.metrics import targets; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout == "set()\n", said.stderr
