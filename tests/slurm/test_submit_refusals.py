"""What `distkd submit` refuses or warns of, in which words, and its dry run; SLURM's commands are stand-ins."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import distkd
from distkd.allocation import read_jobs
from distkd.cli import DONE, main
from distkd.config import load
from distkd.train.folder import write_config
from tests.slurm.stand_ins import FIRST, HOME, Capture, Slurm, options_of, refusal, told

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
