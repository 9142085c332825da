"""What `squeue` says as values, and nothing where it says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from distkd.slurm.queue import EndedJob, QueuedJob, ended, is_of_scripts, max_task, queued

SAYS = """\
17|RUNNING|None|1-02:03:04|n[1-2]
18_3|PENDING|Dependency|4:00:00|
18_4|PENDING|DependencyNeverSatisfied|UNLIMITED|
19|COMPLETING|None|INVALID|n3
"""


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch, name: str = "squeue") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_jobs_and_tasks_have_state_reason_time_and_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path, f"cat <<'END'\n{SAYS}END", monkeypatch)
    assert queued() == {
        "17": QueuedJob("17", "RUNNING", "", 93784, "n[1-2]"),
        "18_3": QueuedJob("18_3", "PENDING", "Dependency", 14400, ""),
        "18_4": QueuedJob("18_4", "PENDING", "DependencyNeverSatisfied", None, ""),
        "19": QueuedJob("19", "COMPLETING", "", None, "n3"),
    }


def test_some_ids_are_those_and_an_arrays_id_means_all_of_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path, f"cat <<'END'\n{SAYS}END", monkeypatch)
    assert list(queued(["18"]) or ()) == ["18_3", "18_4"]
    assert list(queued(["18_4", "17", "1"]) or ()) == ["17", "18_4"]
    assert queued([]) == {}


def test_settings_of_squeue_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    stand_in(tmp_path, 'echo "17|${SQUEUE_STATES:-unset}|None|1:00|"', monkeypatch)
    assert (queued() or {})["17"].state == "unset"


@pytest.mark.parametrize("script", ["echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", ""])
def test_a_controller_that_does_not_answer_is_not_an_empty_queue(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in(tmp_path, script, monkeypatch)
    assert queued() == (None if script else {})


@pytest.mark.parametrize(
    "answer, known",
    [
        ("Command=/my work/slurm/train.sbatch a.yaml --optim.lr 1", True),
        ("Command=/x/slurm/folds.sbatch", True),
        ("Command=/home/a/jupyter.sbatch", False),
        ("Command=(null)", False),
        ("Command=/bin/bash", False),
    ],
)
def test_a_job_is_of_the_scripts_or_a_session(
    answer: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    says = f"JobId=17 JobName=x\n   BatchFlag=1\n   {answer}\n   WorkDir=/x/slurm/train.sbatch"
    stand_in(tmp_path, f"[ \"$*\" = 'show job 17_3' ] && cat <<'END'\n{says}\nEND", monkeypatch, "scontrol")
    assert is_of_scripts("17_3") == known


@pytest.mark.parametrize(
    "script, most",
    [
        ("printf 'LaunchParameters = (null)\\nMaxArraySize            = 1001\\nMaxBatchRequeue = 5\\n'", 1000),
        ("echo nothing", None),
        ("exit 1", None),
    ],
)
def test_the_largest_task_is_one_less_than_the_largest_array(
    script: str, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in(tmp_path, script, monkeypatch, "scontrol")
    assert max_task() == most


def test_a_year_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path, "echo '17|RUNNING|None|364-23:59:58|n1'; echo '18|RUNNING|None|30-00:00:00|n1'", monkeypatch)
    assert {job.job: job.time_left_s for job in (queued() or {}).values()} == {"17": None, "18": 30 * 86400}


def test_jobs_that_did_not_get_through_have_state_exit_code_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    says = """\
17     FAILED        512  NonZeroExitCode
18_3   CANCELLED     0    DependencyNeverSatisfied
19     CANCELLED     15   None
20     TIMEOUT       0:0  TimeLimit
21     COMPLETED     0    None
22     RUNNING       0    None
23     FAILED        1:0  NonZeroExitCode
24     FAILED        256  NonZeroExitCode
"""
    stand_in(tmp_path, f"cat <<'END'\n{says}END", monkeypatch)
    assert ended({"17", "18_3", "19", "20", "21", "22", "23", "25"}) == {
        "17": EndedJob("17", "FAILED", "NonZeroExitCode", 2),
        "18_3": EndedJob("18_3", "CANCELLED", "DependencyNeverSatisfied", 0),
        "19": EndedJob("19", "CANCELLED", "", 0),
        "20": EndedJob("20", "TIMEOUT", "TimeLimit", 0),
        "23": EndedJob("23", "FAILED", "NonZeroExitCode", 1),
    }


def test_without_squeue_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queued() is None
    assert ended({"17"}) == {}
