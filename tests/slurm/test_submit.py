"""What `distkd submit` hands to SLURM, notes, leaves out and lets wait; SLURM's commands are stand-ins."""

from __future__ import annotations

import fcntl
import re
import shlex
import sys
import threading
import time
from pathlib import Path

import pytest

from distkd.allocation import note_job, read_jobs
from distkd.cli import DONE, main
from distkd.config import load, parse_overrides
from distkd.slurm.sbatch import LOCK, alone
from distkd.train.folder import write_outcome
from tests.slurm.stand_ins import HOME, Capture, Slurm, options_of, refusal, told

# what is submitted


def test_a_teacher_and_its_student_then_the_report(slurm: Slurm, capsys: Capture):
    assert main(["submit", *slurm.pair(), "--nodes", "2", "--optim.lr", "1e-3", "--ranks-per-node", "2"]) == DONE
    teacher, student, report = slurm.calls()
    [folder] = (slurm.here / "my runs" / "slurm").glob("submitted-*")
    assert told(teacher)[0] == told(student)[0] == f"{HOME}/slurm/train.sbatch"
    assert told(teacher)[1:] == [f"{folder}/configs/2/my study/teacher.yaml", "--optim.lr", "1e-3"]
    assert told(student)[1:] == [f"{folder}/configs/1/my study/student.yaml", "--optim.lr", "1e-3"]
    assert options_of(teacher) == [
        "--parsable", "--job-name=my-study-teacher", f"--chdir={slurm.here}",
        f"--output={slurm.here}/my runs/slurm/%x-%j.out", "--export=ALL", "--nodes=2", "--signal=B:USR1@120",
    ]  # fmt: skip
    assert options_of(student)[-2:] == ["--dependency=afterok:17", "--kill-on-invalid-dep=yes"]
    assert "--dependency=afterany:17:18" in report
    assert told(report)[1:] == ["my runs/my study-student", "my runs/my study-teacher", "--output", "my runs/report"]

    said = capsys.readouterr().out
    assert [re.split(r"\s{2,}", line) for line in said.splitlines()[:4]] == [
        ["job", "name", "runs", "waits for"],
        ["17", "my-study-teacher", "1", "-"],
        ["18", "my-study-student", "1", "17"],
        ["19", "report", "-", "17 18"],
    ]
    assert "watch:   distkd status 'my runs'\ncancel:  scancel 17 18 19\n" in said


def test_the_scripts_are_told_where_things_are_and_keep_what_was_submitted(slurm: Slurm):
    (slurm.here / "my site.env").write_text("DISTKD_PARTITION=gpu\nDISTKD_TIME=1:00:00\n")
    words = ["--site", "my site.env", "--ranks-per-node", "2", "--nodes", "2", "--elastic", "1", "--time", "2:00:00"]
    assert main(["submit", *slurm.pair(), *words]) == DONE
    environ, call = slurm.environ(), slurm.calls()[0]
    [folder] = (slurm.here / "my runs" / "slurm").glob("submitted-*")
    assert environ["DISTKD_HOME"] == str(HOME)
    assert environ["DISTKD_JOBS"] == f"{slurm.here}/my runs/slurm"
    assert environ["DISTKD_SITE"] == f"{folder}/site.env"
    assert environ["DISTKD_PYTHON"] == sys.executable
    assert (environ["DISTKD_RANKS_PER_NODE"], environ["DISTKD_ELASTIC"]) == ("2", "1")
    assert {"--partition=gpu", "--time=2:00:00", "--no-kill"} < set(call)
    assert (folder / "site.env").read_text() == (slurm.here / "my site.env").read_text()
    assert shlex.join(call[-2:]) in (folder / "commands.txt").read_text()


@pytest.mark.parametrize("name", ["DISTKD_CONTAINER", "DISTKD_SETUP", "DISTKD_MODULES", "DISTKD_PYTHON"])
@pytest.mark.parametrize("in_file", [True, False])
def test_the_sites_interpreter_is_left_to_the_scripts(
    slurm: Slurm, name: str, in_file: bool, monkeypatch: pytest.MonkeyPatch
):
    slurm.write("a.yaml", "teacher", name="a")
    if in_file:
        (slurm.folder / "site.env").write_text(f"{name}=something\n")
    else:
        monkeypatch.setenv(name, "something")
    assert main(["submit", "a.yaml", "--no-report"]) == DONE
    found = {key: slurm.environ().get(key) for key in (name, "DISTKD_PYTHON")}
    assert found == {"DISTKD_PYTHON": None, name: None if in_file else "something"}


def test_the_environment_wins_over_the_site_file(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    (slurm.folder / "site.env").write_text("DISTKD_PARTITION=gpu\nDISTKD_RANKS_PER_NODE=4\nDISTKD_ELASTIC=1\n")
    monkeypatch.setenv("DISTKD_PARTITION", "debug")
    monkeypatch.setenv("DISTKD_RANKS_PER_NODE", "2")
    monkeypatch.setenv("DISTKD_UNHEARD_OF", "1")
    slurm.write("a.yaml", "teacher", name="a")
    assert main(["submit", "a.yaml", "--nodes", "2"]) == DONE
    job, report = slurm.calls()
    assert {"--partition=debug", "--no-kill"} < set(job)
    assert "--partition=debug" in report
    environ = slurm.environ()
    assert (environ["DISTKD_RANKS_PER_NODE"], environ["DISTKD_ELASTIC"]) == ("2", "1")


def test_elastic_and_ranks_have_defaults_in_the_environment_and_the_command_line_wins(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DISTKD_ELASTIC", "1")
    monkeypatch.setenv("DISTKD_RANKS_PER_NODE", "1")
    slurm.write("a.yaml", "teacher", name="a")
    assert main(["submit", "a.yaml", "--nodes", "4", "--no-report"]) == DONE
    assert main(["submit", "a.yaml", "--nodes", "4", "--no-report", "--elastic", "2", "--ranks-per-node", "2"]) == DONE
    assert all("--no-kill" in call for call in slurm.calls())
    told = [{name: slurm.environ(job)[f"DISTKD_{name}"] for name in ("ELASTIC", "RANKS_PER_NODE")} for job in (17, 18)]
    assert told == [{"ELASTIC": "1", "RANKS_PER_NODE": "1"}, {"ELASTIC": "2", "RANKS_PER_NODE": "2"}]


def test_the_scripts_know_how_long_before_the_end_they_are_told(slurm: Slurm):
    slurm.write("a.yaml", "teacher", name="a")
    assert main(["submit", "a.yaml", "--lead", "300"]) == DONE
    assert slurm.environ()["DISTKD_LEAD"] == "300"


def test_each_run_has_its_job_noted_with_its_log_and_what_it_waits_for(slurm: Slurm):
    assert main(["submit", *slurm.pair(), "--folds", "1-2"]) == DONE
    logs = f"{slurm.here}/my runs/slurm"
    [teacher] = read_jobs(slurm.here / "my runs" / "my study-teacher-fold2")  # the second of the folds: task 1
    [student] = read_jobs(slurm.here / "my runs" / "my study-student-fold2")
    assert {**teacher, "time": 0} == {
        "event": "submitted", "time": 0, "job": "17_1", "script": "folds.sbatch",
        "log": f"{logs}/my-study-teacher-17_1.out", "after": [],
    }  # fmt: skip
    assert (student["job"], student["after"]) == ("18_1", ["17_1"])
    assert "--job-name=my-study-teacher" in slurm.calls()[0]
    assert f"--output={logs}/%x-%A_%a.out" in slurm.calls()[0]


@pytest.mark.parametrize(
    "words, folds, seeds, array, names",
    [
        (["--folds", "2,0-1"], "0-2", "", "0-2", {0: "fold0", 2: "fold2"}),
        (["--folds", "1-2"], "1-2", "", "0-1", {0: "fold1", 1: "fold2"}),
        (["--seeds", "1337,42"], "", "42,1337", "0-1", {0: "seed42", 1: "seed1337"}),
        (["--folds", "1-2", "--seeds", "5,3"], "1-2", "3,5", "0-3", {1: "fold1-seed5", 2: "fold2-seed3"}),
    ],
)
def test_the_task_that_is_noted_trains_that_unit(
    slurm: Slurm, words: list[str], folds: str, seeds: str, array: str, names: dict[int, str]
):
    slurm.write("teacher.yaml", "teacher", name="t")
    assert main(["submit", "teacher.yaml", *words]) == DONE
    assert (slurm.environ()["FOLDS"], slurm.environ()["SEEDS"]) == (folds, seeds)
    assert f"--array={array}" in slurm.calls()[0]
    for task, suffix in names.items():
        assert read_jobs(slurm.here / "my runs" / f"t-{suffix}")[0]["job"] == f"17_{task}"


@pytest.mark.parametrize("name", [None, "own", "a-{seed}/b-{fold}"])
@pytest.mark.parametrize("path", ["tiny/a b.yaml", "configs/teacher.yaml", "configs/x/config.yaml", "link.yaml"])
def test_the_copy_of_a_config_names_the_run_that_is_noted(slurm: Slurm, path: str, name: str | None):
    slurm.write("configs/y/real.yaml", "teacher", name=name)
    if path == "link.yaml":
        (slurm.here / path).symlink_to("configs/y/real.yaml")
    else:
        slurm.write(path, "teacher", name=name)
    assert main(["submit", path, "--folds", "1", "--optim.lr", "1e-3"]) == DONE
    _, copy, *overrides = told(slurm.calls()[0])
    (slurm.here / path).write_text("nothing")  # a later change is none of the queued job's
    trained = load(Path(copy), parse_overrides(overrides), fold=1)
    assert read_jobs(trained.folder)[0]["job"] == "17_0"
    assert trained.optim.lr == 1e-3


def test_a_config_of_two_folders_by_one_name_has_two_copies(slurm: Slurm):
    slurm.write("one/x/a.yaml", "teacher", name="a")
    slurm.write("two/x/a.yaml", "teacher", name="b")
    assert main(["submit", "one/x/a.yaml", "two/x/a.yaml", "--no-report"]) == DONE
    assert [load(Path(told(call)[1])).run.name for call in slurm.calls()] == ["a", "b"]


def test_submissions_of_one_second_have_folders_of_their_own(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distkd.slurm.submit.time.strftime", lambda _: "submitted-now")
    slurm.write("a.yaml", "teacher", name="a")
    for number in range(3):
        assert main(["submit", "a.yaml", "--run.name", f"r{number}"]) == DONE
    names = sorted(path.name for path in (slurm.here / "my runs" / "slurm").glob("submitted-*"))
    assert names == ["submitted-now", "submitted-now-2", "submitted-now-3"]


def test_together_and_without_report_is_one_job(slurm: Slurm):
    assert main(["submit", *slurm.pair(), "--together", "--no-report"]) == DONE
    [call] = slurm.calls()
    assert told(call)[0] == f"{HOME}/slurm/stages.sbatch"
    assert [Path(word).stem for word in told(call)[1:]] == ["teacher", "student"]


def test_a_recipes_shards_are_made_once_and_not_by_jobs_that_start_together(slurm: Slurm):
    slurm.write("a.yaml", "teacher", name="a", data={"shards": None, "make": "synthetic"})
    assert main(["submit", "a.yaml", "--folds", "0-1"]) == DONE
    assert (slurm.here / "my runs/shards/synthetic/manifest.json").is_file()


def test_variables_of_the_job_it_is_called_from_are_not_handed_on(
    slurm: Slurm, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    of_job = {
        "SLURM_JOB_ID": "5", "SLURM_EXPORT_ENV": "NONE", "SRUN_CPUS_PER_TASK": "1", "DISTKD_STOP_FILE": "/s",
        "DISTKD_NOTES": "/n", "DISTKD_JOBS": "/other", "DISTKD_PARTITION": "other", "DISTKD_ELASTIC": "9",
    }  # fmt: skip
    for name, value in {**of_job, "SLURM_CONF": "/c", "NCCL_DEBUG": "INFO"}.items():
        monkeypatch.setenv(name, value)
    words = slurm.pair()
    assert main(["submit", *words, "--dry-run"]) == DONE
    [unset] = re.findall(r"^unset (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert of_job.keys() <= set(unset.split())
    assert not {"SLURM_CONF", "NCCL_DEBUG"} & set(unset.split())
    assert main(["submit", *words]) == DONE
    environ = slurm.environ()
    assert environ.keys() & {*of_job, "SLURM_CONF", "NCCL_DEBUG"} == {"SLURM_CONF", "NCCL_DEBUG", "DISTKD_JOBS"}
    assert environ["DISTKD_JOBS"] == f"{slurm.here}/my runs/slurm"
    assert not any(word.startswith("--partition") for word in slurm.calls()[0])


# what is left out or waits


def test_what_is_done_is_left_out(slurm: Slurm, capsys: Capture):
    slurm.end("my study-teacher-fold1")
    assert main(["submit", *slurm.pair(), "--folds", "1-2", "--throttle", "1"]) == DONE
    teacher, free, waiting, _ = slurm.calls()
    assert "--array=1%1" in teacher
    assert "--array=0%1" in free
    assert not any(word.startswith("--dependency") for word in free)
    assert {"--array=1%1", "--dependency=aftercorr:17"} < set(waiting)
    assert "1 run done already, left out" in capsys.readouterr().err


def test_nothing_left_is_no_mistake_and_the_report_is_offered(slurm: Slurm, capsys: Capture):
    slurm.end("my study-teacher")
    slurm.end("my study-student")
    assert main(["submit", *slurm.pair()]) == DONE
    said = capsys.readouterr().out
    assert said == (
        "nothing to submit: 2 runs of 2 done; see  "
        "distkd report 'my runs/my study-student' 'my runs/my study-teacher' --output 'my runs/report'\n"
    )
    assert slurm.calls() == []


def test_what_is_in_the_queue_is_refused_with_its_job(slurm: Slurm, capsys: Capture):
    words = [*slurm.pair(), "--folds", "1-2"]
    assert main(["submit", *words]) == DONE
    (slurm.folder / "queue").write_text(
        "17_1|RUNNING|None|1:00|n1\n18_1|PENDING|Dependency|1:00|\n99|RUNNING|None|1:00|n\n"
    )
    said = refusal(words, capsys)
    assert "2 runs already in the queue:\n  my runs/my study-student-fold2: job 18_1\n" in said
    assert said.endswith("scancel 18_1 17_1\n")
    assert len(slurm.calls()) == 3, "nothing more was submitted"


def test_a_job_that_has_left_the_queue_is_no_obstacle(slurm: Slurm):
    words = slurm.pair()
    assert main(["submit", *words]) == DONE
    assert main(["submit", *words]) == DONE
    assert [line["job"] for line in read_jobs(slurm.here / "my runs" / "my study-teacher")] == ["17", "20"]


def started_in(slurm: Slurm, command: str) -> None:
    """A run that was begun in job 7, which is still in the queue, and is no run of `distkd submit`."""
    slurm.write("a.yaml", "teacher", name="a")
    note_job(slurm.here / "my runs" / "a", "started", job="7", restart=0, attempt=1)
    (slurm.folder / "queue").write_text("7|RUNNING|None|1:00|n1\n")
    (slurm.folder / "scontrol-says").write_text(f"JobId=7\n   Command={command}\n")


def test_a_run_that_a_script_trains_is_refused_however_it_was_submitted(slurm: Slurm, capsys: Capture):
    started_in(slurm, f"{HOME}/slurm/train.sbatch a.yaml")
    assert "1 run already in the queue:\n  my runs/a: job 7\n" in refusal(["a.yaml"], capsys)


def test_a_run_that_was_tried_in_a_session_is_submitted_with_a_word_unless_it_ended(slurm: Slurm, capsys: Capture):
    started_in(slurm, "/bin/bash")
    assert main(["submit", "a.yaml"]) == DONE
    said = capsys.readouterr().err
    assert "run my runs/a was begun in the session of job 7 and has not said that it ended; if it trains there" in said
    write_outcome(slurm.here / "my runs" / "a", state="interrupted", step=9, attempt=1)
    assert main(["submit", "a.yaml"]) == DONE
    assert "session" not in capsys.readouterr().err


def test_without_an_answer_about_earlier_jobs_nothing_is_submitted(slurm: Slurm, capsys: Capture):
    words = slurm.pair()
    assert main(["submit", *words]) == DONE
    (slurm.folder / "squeue").write_text("#!/bin/bash\nexit 1\n")
    assert "SLURM does not answer (squeue)" in refusal(words, capsys)
    assert len(slurm.calls()) == 3
    assert main(["submit", *words, "--run.root", "new runs"]) == DONE, "these have had no jobs"


# two at once, rights


def test_the_lock_is_held_from_the_look_at_the_queue_to_the_last_record(slurm: Slurm):
    words = slurm.pair()
    assert main(["submit", *words]) == DONE
    lock = slurm.here / "my runs" / "slurm" / LOCK
    probe = f"/usr/bin/flock -n {shlex.quote(str(lock))} true && echo free || echo held"
    for name in ("squeue", "sbatch-does"):
        (slurm.folder / name).write_text(f"#!/bin/bash\n{{ {probe}; }} >>{slurm.folder}/lock-{name}\n")
    assert main(["submit", *words]) == DONE
    assert (slurm.folder / "lock-squeue").read_text().split() == ["held"]
    assert (slurm.folder / "lock-sbatch-does").read_text().split() == ["held"] * 3
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_second_submission_waits_for_the_first_and_says_so(tmp_path: Path, capsys: Capture):
    order: list[str] = []

    def second() -> None:
        with alone(tmp_path):
            order.append("second")

    with alone(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        said = ""
        while "waits for another `distkd submit`" not in said:
            time.sleep(0.01)  # polling another thread, not waiting for luck
            said += capsys.readouterr().err
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_folders_of_jobs_are_for_this_user_alone(slurm: Slurm):
    words = slurm.pair()
    (slurm.folder / "site.env").write_text("WANDB_API_KEY=secret\n")
    assert main(["submit", *words]) == DONE
    jobs = slurm.here / "my runs" / "slurm"
    [folder] = jobs.glob("submitted-*")
    assert (rights(jobs), rights(folder)) == (0o700, 0o700)
    assert rights(folder / "site.env") == rights(folder / "commands.txt") == 0o600


def test_a_jobs_folder_that_is_there_keeps_its_rights(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISTKD_JOBS", "jobs")
    (slurm.here / "jobs").mkdir()
    (slurm.here / "jobs").chmod(0o750)
    assert main(["submit", *slurm.pair()]) == DONE
    assert rights(slurm.here / "jobs") == 0o750
    assert rights(next((slurm.here / "jobs").glob("submitted-*"))) == 0o700


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777
