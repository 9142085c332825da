"""`distkd submit` with stand-ins for SLURM's commands, which keep what they were told."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import distkd
from distkd.allocation import read_jobs
from distkd.cli import DONE, USER, main
from distkd.config import load, parse_overrides
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


class Slurm:
    """Commands in a folder, and a folder with spaces to call `distkd submit` in."""

    def __init__(self, folder: Path, here: Path, small: Small):
        self.folder, self.here, self.small = folder, here, small
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
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
    for name in ("DISTKD_SITE", "DISTKD_JOBS", "DISTKD_PYTHON", "DISTKD_ELASTIC", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
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


def test_the_sites_interpreter_is_left_to_the_scripts(slurm: Slurm):
    (slurm.folder / "site.env").write_text("DISTKD_CONTAINER='apptainer exec x.sif'\n")
    assert main(["submit", *slurm.pair()]) == DONE
    assert "DISTKD_PYTHON" not in slurm.environ()


def test_each_run_has_its_job_noted_with_its_log_and_what_it_waits_for(slurm: Slurm):
    assert main(["submit", *slurm.pair(), "--folds", "1-2"]) == DONE
    logs = f"{slurm.here}/my runs/slurm"
    [teacher] = read_jobs(slurm.here / "my runs" / "my study-teacher-fold2")
    [student] = read_jobs(slurm.here / "my runs" / "my study-student-fold2")
    assert {**teacher, "time": 0} == {
        "event": "submitted", "time": 0, "job": "17_2", "script": "folds.sbatch",
        "log": f"{logs}/my-study-teacher-17_2.out", "after": [],
    }  # fmt: skip
    assert (student["job"], student["after"]) == ("18_2", ["17_2"])
    assert "--job-name=my-study-teacher" in slurm.calls()[0]
    assert f"--output={logs}/%x-%A_%a.out" in slurm.calls()[0]


@pytest.mark.parametrize(
    "words, folds, seeds, array, names",
    [
        (["--folds", "2,0-1"], "0-2", "", "0-2", {0: "fold0", 2: "fold2"}),
        (["--seeds", "0,4"], "", "0,4", "0,4", {0: "seed0", 4: "seed4"}),
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
    assert read_jobs(trained.folder)[0]["job"] == "17_1"
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
    names = sorted(path.name for path in (slurm.here / "my runs" / "slurm").iterdir())
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


def test_variables_of_the_job_it_is_called_from_are_not_handed_on(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "1", "SLURM_CONF": "/c"}.items():
        monkeypatch.setenv(name, value)
    assert main(["submit", *slurm.pair()]) == DONE
    assert {name for name in slurm.environ() if name.startswith("SLURM_")} == {"SLURM_CONF"}


# what is left out or waits


def test_what_is_done_is_left_out(slurm: Slurm, capsys: Capture):
    slurm.end("my study-teacher-fold1")
    assert main(["submit", *slurm.pair(), "--folds", "1-2", "--throttle", "1"]) == DONE
    teacher, free, waiting, _ = slurm.calls()
    assert "--array=2%1" in teacher
    assert "--array=1%1" in free
    assert not any(word.startswith("--dependency") for word in free)
    assert {"--array=2%1", "--dependency=aftercorr:17"} < set(waiting)
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
        "17_2|RUNNING|None|1:00|n1\n18_2|PENDING|Dependency|1:00|\n99|RUNNING|None|1:00|n\n"
    )
    said = refusal(words, capsys)
    assert "2 runs already in the queue:\n  my runs/my study-student-fold2: job 18_2\n" in said
    assert said.endswith("scancel 18_2 17_2\n")
    assert len(slurm.calls()) == 3, "nothing more was submitted"


def test_a_job_that_has_left_the_queue_is_no_obstacle(slurm: Slurm):
    words = slurm.pair()
    assert main(["submit", *words]) == DONE
    assert main(["submit", *words]) == DONE
    assert [line["job"] for line in read_jobs(slurm.here / "my runs" / "my study-teacher")] == ["17", "20"]


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
