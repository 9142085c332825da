"""`distkd submit` with stand-ins for SLURM's commands, which keep what they were told."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import distkd
from distkd.allocation import note_job, read_jobs
from distkd.cli import DONE, USER, main
from distkd.config import load, parse_overrides
from distkd.slurm.sbatch import LOCK, alone
from distkd.train.folder import write_config, write_outcome
from tests.small import Small

HOME = Path(distkd.__file__).parent.parent
FIRST = 17
"""Id of the first job."""

SBATCH = f"""\
#!/bin/bash
PATH=/usr/bin:/bin
here=$(dirname "$0")
id=$(({FIRST} + $(ls "$here" | grep -c ^call-)))
printf '%s\\0' "$@" >"$here/call-$id"
env -0 >"$here/environ-$id"
[[ ! -e $here/sbatch-does ]] || . "$here/sbatch-does"
[[ ! -e $here/refuse-$id ]] || {{ echo 'sbatch: error: invalid partition specified: gup' >&2; exit 1; }}
echo "$id"
"""
SQUEUE = """\
#!/bin/bash
while read -r line; do echo "$line"; done <"${0%/*}/queue"
"""
SCANCEL = """\
#!/bin/bash
echo "$@" >>"${0%/*}/cancelled"
"""

Capture = pytest.CaptureFixture[str]


SCONTROL = """\
#!/bin/bash
[[ ! -e ${0%/*}/scontrol-says ]] || echo "$(<"${0%/*}/scontrol-says")"
"""


class Slurm:
    """Commands in a folder, and a folder with spaces to call `distkd submit` in."""

    def __init__(self, folder: Path, here: Path, small: Small):
        self.folder, self.here, self.small = folder, here, small
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "queue").touch()
        for name in ("bash", "env"):  # of the site file's reader
            (folder / name).symlink_to(f"/usr/bin/{name}")

    def write(self, path: str, kind: str, *, name: str | None = None, teacher: str | None = None, **more: Any) -> Path:
        """A config below the folder of the command, whose runs are below `my runs`."""
        config = self.small.config(kind, **more)
        config["run"] = {**config["run"], "root": "my runs", "name": name}
        if name is None:
            del config["run"]["name"]
        config["teacher"] = {"export": teacher}
        (self.here / path).parent.mkdir(parents=True, exist_ok=True)
        (self.here / path).write_text(yaml.safe_dump(config))
        return Path(path)

    def pair(self) -> list[str]:
        """Configs of a teacher and its student, whose runs are named after their files."""
        self.write("my study/teacher.yaml", "teacher")
        self.write("my study/student.yaml", "student", teacher="my study-teacher")
        return ["my study/student.yaml", "my study/teacher.yaml"]

    def calls(self) -> list[list[str]]:
        """What sbatch was told, call by call."""
        return [path.read_text().split("\0")[:-1] for path in sorted(self.folder.glob("call-*"))]

    def environ(self, job: int = FIRST) -> dict[str, str]:
        lines = (self.folder / f"environ-{job}").read_text().split("\0")
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().splitlines() if path.exists() else []

    def end(self, name: str, **changes: Any) -> None:
        """The run is done."""
        folder = self.here / "my runs" / name
        folder.mkdir(parents=True)
        write_outcome(folder, state="done", step=9, attempt=1)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.here)) for path in self.here.rglob("*"))


@pytest.fixture
def slurm(tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder, here = tmp_path / "bin", tmp_path / "my work"
    folder.mkdir()
    here.mkdir()
    for name in [name for name in os.environ if name.startswith(("DISTKD_", "SLURM", "SRUN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DISTKD_SITE", str(folder / "site.env"))  # not the one of who runs the tests
    (folder / "site.env").touch()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(here)
    return Slurm(folder, here, small)


def options_of(call: list[str]) -> list[str]:
    return call[: next(number for number, word in enumerate(call) if word.endswith(".sbatch"))]


def told(call: list[str]) -> list[str]:
    """The script and its arguments."""
    return call[len(options_of(call)) :]


def refusal(words: list[str], capsys: Capture) -> str:
    assert main(["submit", *words]) == USER
    return capsys.readouterr().err


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


# settings of the site that jobs add to the command line


def test_a_streamed_set_is_not_copied_to_the_sites_scratch(slurm: Slurm, capsys: Capture):
    (slurm.folder / "site.env").write_text("DISTKD_SCRATCH='/local/$SLURM_JOB_ID'\nDISTKD_METRICS=local\n")
    slurm.write("url.yaml", "teacher", name="url", data={"shards": "https://host/set"})
    slurm.write("set.yaml", "teacher", name="set")
    words = ["url.yaml", "set.yaml", "--no-report"]
    assert main(["submit", *words, "--dry-run"]) == DONE
    script = capsys.readouterr().out
    assert "JOB1=$(DISTKD_SCRATCH='' sbatch" in script
    assert "JOB2=$(sbatch" in script
    assert main(["submit", *words]) == DONE
    assert slurm.environ(17)["DISTKD_SCRATCH"] == ""
    assert "DISTKD_SCRATCH" not in slurm.environ(18), "the site file of the job names it"
    assert "url reads shards from a URL, nothing is copied to DISTKD_SCRATCH for it" in capsys.readouterr().err


def test_settings_of_the_site_that_would_be_refused_in_the_job_are_refused_here(slurm: Slurm, capsys: Capture):
    (slurm.folder / "site.env").write_text("DISTKD_SCRATCH='/a: 1'\n")
    said = refusal(slurm.pair(), capsys)
    assert "data.scratch" in said
    assert "jobs are given --data.scratch '/a: 1' by the site's settings (DISTKD_SCRATCH, DISTKD_METRICS)" in said
    assert main(["submit", *slurm.pair(), "--data.scratch", "/tmp"]) == DONE, "the command line wins"


# the dry run


def test_a_dry_run_writes_nothing_and_its_commands_do_the_same(slurm: Slurm, tmp_path: Path, capsys: Capture):
    words = [*slurm.pair(), "--folds", "1-2", "--optim.lr", "1e-3", "--ranks-per-node", "2"]
    before = slurm.files()
    assert main(["submit", *words, "--dry-run"]) == DONE
    script = capsys.readouterr().out
    assert slurm.files() == before
    assert slurm.calls() == []
    done = subprocess.run(
        ["/bin/bash", "-c", script], env={"PATH": f"{slurm.folder}:/usr/bin:/bin"}, cwd=tmp_path, text=True,
        capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "submitted: 17 18 19\n"), done.stderr
    typed, environ = slurm.calls(), slurm.environ()

    assert main(["submit", *words]) == DONE
    submitted = slurm.calls()[3:]
    renamed = {"17": "20", "18": "21"}
    for by_hand, by_itself in zip(typed, submitted, strict=True):
        again = [re.sub(r"(?<=:)1[78]", lambda job: renamed[job[0]], word) for word in options_of(by_hand)]
        assert again == options_of(by_itself)
        assert [Path(word).name for word in told(by_hand)] == [Path(word).name for word in told(by_itself)]
    ours = {name for name in environ if name.startswith("DISTKD_") or name in ("FOLDS", "SEEDS")}
    assert {name: environ[name] for name in ours - {"DISTKD_SITE"}} == {
        name: slurm.environ(20)[name] for name in ours - {"DISTKD_SITE"}
    }


def test_a_dry_run_needs_no_sbatch(slurm: Slurm, capsys: Capture):
    words = slurm.pair()
    (slurm.folder / "sbatch").unlink()
    (slurm.folder / "squeue").unlink()
    assert main(["submit", *words, "--dry-run"]) == DONE
    assert "JOB2=$(sbatch --parsable" in capsys.readouterr().out


# refusals


@pytest.mark.parametrize(
    "words, command",
    [
        ([], "launch/workstation.sh 'my study/teacher.yaml'"),
        (
            ["--folds", "1-2", "--ranks-per-node", "2", "--optim.lr", "1"],
            "launch/workstation.sh --nproc 2 'my study/teacher.yaml' --folds 1-2 --optim.lr 1",
        ),
        (
            ["--nodes", "2", "--ranks-per-node", "4"],
            f"MASTER_ADDR=HOST NODES=2 NODE_RANK=I NPROC=4 {HOME}/launch/multinode.sh 'my study/teacher.yaml'",
        ),
    ],
)
def test_without_slurm_the_command_for_this_machine_is_shown(
    slurm: Slurm, capsys: Capture, words: list[str], command: str
):
    slurm.pair()
    before = slurm.files()
    (slurm.folder / "sbatch").unlink()
    said = refusal(["my study/teacher.yaml", *words], capsys)
    assert said.startswith("distkd: there is no SLURM here (no sbatch)")
    assert f"{command}\n" in said
    assert slurm.files() == before


def test_what_slurm_refuses_is_told_in_its_words_and_the_rest_is_taken_back(slurm: Slurm, capsys: Capture):
    (slurm.folder / f"refuse-{FIRST + 1}").touch()
    said = refusal(slurm.pair(), capsys)
    assert "SLURM refused the job my-study-student:\nsbatch: error: invalid partition specified: gup\n" in said
    assert "mend the option that it names" in said
    assert said.endswith("jobs 17, submitted before, were cancelled again\n")
    assert slurm.cancelled() == ["17"]


def test_nothing_is_recorded_of_jobs_that_were_taken_back(slurm: Slurm, capsys: Capture):
    (slurm.folder / f"refuse-{FIRST + 1}").touch()
    refusal(slurm.pair(), capsys)
    assert read_jobs(slurm.here / "my runs" / "my study-teacher") == []


def test_a_refused_report_leaves_the_study_and_says_how_to_go_without(slurm: Slurm, capsys: Capture):
    (slurm.folder / f"refuse-{FIRST + 2}").touch()
    assert main(["submit", *slurm.pair()]) == DONE
    said = capsys.readouterr()
    assert "SLURM refused the job report:\nsbatch: error: invalid partition" in said.err
    assert "the jobs before it stay; without a job for the report: --no-report, and distkd report 'my runs/" in said.err
    assert "cancel:  scancel 17 18\n" in said.out
    assert slurm.cancelled() == []
    assert read_jobs(slurm.here / "my runs" / "my study-student")[0]["after"] == ["17"]


def test_an_answer_of_sbatch_without_a_number_takes_back_what_is_known(slurm: Slurm, capsys: Capture):
    (slurm.folder / "sbatch-does").write_text('[[ $id != 18 ]] || { echo "have a nice day"; exit 0; }\n')
    said = refusal(slurm.pair(), capsys)
    assert "sbatch took the job my-study-student without saying its number, in:\nhave a nice day\n" in said
    assert "look with `squeue --me`" in said
    assert slurm.cancelled() == ["17"]
    assert read_jobs(slurm.here / "my runs" / "my study-teacher") == []


@pytest.mark.parametrize("said", ["Submitted batch job 40", "Welcome\n40;cluster", "40\nthank you"])
def test_an_answer_with_more_than_the_number_is_read(slurm: Slurm, capsys: Capture, said: str):
    (slurm.folder / "sbatch-does").write_text(f"echo {shlex.quote(said)}; exit 0\n")
    slurm.write("a.yaml", "teacher", name="a")
    assert main(["submit", "a.yaml", "--no-report"]) == DONE
    assert "cancel:  scancel 40\n" in capsys.readouterr().out


def test_an_array_beyond_what_the_cluster_takes_is_refused_in_words(slurm: Slurm, capsys: Capture):
    slurm.write("a.yaml", "teacher", name="a")
    (slurm.folder / "scontrol-says").write_text("MaxArraySize            = 3\n")
    assert main(["submit", "a.yaml", "--seeds", "42,1337,5000", "--no-report"]) == DONE
    said = refusal(["a.yaml", "--seeds", "42,1337,5000-5001"], capsys)
    assert "numbered 0 to 3 for these folds and seeds, and this cluster takes 0 to 2 (MaxArraySize)" in said
    (slurm.folder / "scontrol-says").unlink()
    assert main(["submit", "a.yaml", "--seeds", "42,1337,5000-5001", "--no-report"]) == DONE, "sbatch says it, then"


def test_the_first_refusal_leaves_nothing_to_take_back(slurm: Slurm, capsys: Capture):
    (slurm.folder / f"refuse-{FIRST}").touch()
    assert "cancelled" not in refusal(slurm.pair(), capsys)
    assert slurm.cancelled() == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["--optim.lr", "fast"], "optim.lr: input should be a valid number"),
        (["--batch.global_bach", "8"], "unknown key; did you mean 'global_batch'?"),
        (["--lead", "30"], "--lead 30 is too short"),
        (["--time", "0:03:00"], "time limit 0:03:00 (180 s) is too short for a lead of 120 s"),
        (["--nodes", "2", "--elastic", "3"], "--elastic 3 is the smallest number of nodes"),
        (["--site", "absent.env"], "--site names no file: absent.env"),
        (["--nodes", "3", "--ranks-per-node", "1"], "on 3 x 1 ranks: batch.global_batch=8 is not a multiple of"),
        (["--folds", "0-99"], "data.fold=3, the shard set of task 'toy' has folds 0..2"),
        (["--data.shards=null"], "data.shards is missing; name a shard set"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(slurm: Slurm, capsys: Capture, words: list[str], message: str):
    configs = slurm.pair()
    before = slurm.files()
    assert message in refusal([*configs, *words], capsys)
    assert slurm.calls() == []
    assert slurm.files() == before


def test_more_ranks_than_gpus_are_refused(slurm: Slurm, capsys: Capture):
    (slurm.folder / "site.env").write_text("DISTKD_GPUS_PER_NODE=2\n")
    words = [*slurm.pair(), "--ranks-per-node", "4"]
    said = refusal([*words, "--engine.device", "cuda"], capsys)
    assert "--ranks-per-node 4 is more than the 2 GPUs of a node (DISTKD_GPUS_PER_NODE)" in said
    assert main(["submit", *words]) == DONE, "the config's own device is the CPU"


def test_a_student_without_its_teacher_is_refused(slurm: Slurm, capsys: Capture):
    student, teacher = slurm.pair()
    said = refusal([student], capsys)
    assert "run my study-student: no export in my runs/my study-teacher" in said
    assert said.endswith("or name its config here, too\n")
    assert main(["submit", teacher]) == DONE
    (slurm.folder / "queue").write_text("17|RUNNING|None|1:00|n1\n")
    assert "job 17 trains it, submit this after that" in refusal([student], capsys)


def test_a_student_of_a_trained_teacher_waits_for_nobody(slurm: Slurm):
    slurm.write("student.yaml", "student", name="s", teacher=str(slurm.small.root / "teacher"))
    assert main(["submit", "student.yaml", "--no-report"]) == DONE
    assert not any(word.startswith("--dependency") for word in slurm.calls()[0])


def test_a_method_without_its_teacher_is_refused(slurm: Slurm, capsys: Capture):
    slurm.write("student.yaml", "student", name="s")
    assert "method 'logit_kd' needs a teacher; set teacher.export" in refusal(["student.yaml"], capsys)


def test_a_run_folder_of_another_config_is_refused_unless_a_change_is_allowed(slurm: Slurm, capsys: Capture):
    slurm.write("a.yaml", "teacher", name="a")
    write_config(load(Path("a.yaml")))
    words = ["a.yaml", "--optim.lr", "0.5"]
    assert "run folder my runs/a was made with another config:\n  optim.lr" in refusal(words, capsys)
    assert main(["submit", *words, "--allow-change"]) == DONE
    assert told(slurm.calls()[0])[2:] == ["--allow-change", "--optim.lr", "0.5"]


def test_a_root_that_cannot_be_made_is_refused(slurm: Slurm, capsys: Capture):
    slurm.write("a.yaml", "teacher", name="a")
    (slurm.here / "file").touch()
    said = refusal(["a.yaml", "--run.root", "file/deep/runs"], capsys)
    assert f"run root file/deep/runs cannot be made: {slurm.here}/file is a file; name a folder that all nodes" in said


def test_an_installed_package_has_no_job_scripts(slurm: Slurm, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    words = slurm.pair()
    monkeypatch.setattr(distkd, "__file__", str(slurm.here / "site-packages" / "distkd" / "__init__.py"))
    said = refusal(words, capsys)
    assert "`distkd submit` needs the job scripts of the repository" in said
    assert "work in a clone of the repository" in said


def test_shards_that_are_not_there_are_only_a_warning(slurm: Slurm, capsys: Capture):
    slurm.write("a.yaml", "teacher", name="a", data={"shards": "/scratch/elsewhere"})
    assert main(["submit", "a.yaml"]) == DONE
    assert "shard set /scratch/elsewhere is not there for this machine" in capsys.readouterr().err


# what a first attempt runs into


def to_make(slurm: Slurm, **run: Any) -> str:
    """A config whose shard set is made first."""
    path = slurm.write("a.yaml", "teacher", data={"shards": None, "make": "synthetic", "threads": 0})
    config = yaml.safe_load((slurm.here / path).read_text())
    config["run"] |= run
    (slurm.here / path).write_text(yaml.safe_dump(config))
    return str(path)


def test_an_option_of_sbatch_is_answered_with_its_place(slurm: Slurm, capsys: Capture):
    slurm.pair()
    message = refusal(["my study/teacher.yaml", "--partition", "x"], capsys)
    assert "'--partition'" in message
    assert "use DISTKD_PARTITION in slurm/site.env or in the environment" in message


def test_a_dry_run_says_that_folds_of_shards_to_come_are_not_checked(slurm: Slurm, capsys: Capture):
    config = to_make(slurm)
    note = "distkd: folds are not checked: there are no shards yet\n"
    assert main(["submit", config, "--folds", "5-9", "--dry-run"]) == DONE
    assert note in capsys.readouterr().err
    assert main(["submit", config, "--dry-run"]) == DONE
    assert note not in capsys.readouterr().err


def test_shards_are_made_with_a_word_before_and_folds_that_they_lack_are_refused(slurm: Slurm, capsys: Capture):
    message = refusal([to_make(slurm), "--folds", "1,9"], capsys)
    assert message.startswith("distkd: makes shard set my runs/shards/synthetic first (recipe synthetic)\n")
    assert "data.fold=9, the shard set of task 'synthetic_grade' has folds 0..2" in message
    assert slurm.calls() == []


def test_a_run_root_that_cannot_be_made_is_said_before_shards_are(slurm: Slurm, capsys: Capture):
    message = refusal([to_make(slurm, root="/proc/nope")], capsys)
    assert "run root /proc/nope cannot be made: " in message
    assert "--run.root" in message
    assert "--out" not in message
    assert "makes shard set" not in message


def test_a_setup_file_that_is_not_here_is_a_warning(slurm: Slurm, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    slurm.pair()
    monkeypatch.setenv("DISTKD_SETUP", "/nodes/only.sh")
    assert main(["submit", "my study/teacher.yaml", "--dry-run"]) == DONE
    note = "DISTKD_SETUP names no file here: /nodes/only.sh; jobs fail unless their nodes have it\n"
    assert note in capsys.readouterr().err
    monkeypatch.setenv("DISTKD_SETUP", "my study/teacher.yaml")
    assert main(["submit", "my study/teacher.yaml", "--dry-run"]) == DONE
    assert "DISTKD_SETUP names" not in capsys.readouterr().err
