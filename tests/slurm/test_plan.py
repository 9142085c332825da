"""Which jobs a submission is made of: names, arrays, what waits for what; numbers in, jobs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distkd.errors import ConfigError
from distkd.slurm.plan import MANY, After, Request, Run, Stage, plan, ranges, report_arguments
from distkd.slurm.site import Site

REQUEST = Request(Site(), Path("/here"), Path("/here/runs/slurm"))
TEACHER, STUDENT = 0, 1


def pair(
    tasks: list[int], done: tuple[list[int], list[int]] = ([], []), *, teacher_of: dict[int, int] | None = None
) -> list[Stage]:
    """A teacher's config and a student's; `done` has the array ids of each, `teacher_of` whom a student learns from."""
    of = {task: task for task in tasks} | (teacher_of or {})
    teachers = {task: Run(Path(f"runs/teacher-{task}"), task in done[0]) for task in tasks}
    students = {task: Run(Path(f"runs/student-{task}"), task in done[1], (TEACHER, of[task])) for task in tasks}
    return [Stage("teacher", "teacher.yaml", teachers), Stage("student", "student.yaml", students)]


def option(name: str, options: tuple[str, ...]) -> str | None:
    found = [word for word in options if word.partition("=")[0] == name]
    assert len(found) <= 1, f"{name} stands twice"
    return found[0].partition("=")[2] if found else None


# what waits for what


def test_a_student_waits_for_its_teacher_and_the_report_for_both_whatever_their_end():
    teacher, student, report = plan(pair([0]), REQUEST, is_array=False)
    assert [job.script for job in (teacher, student, report)] == ["train.sbatch", "train.sbatch", "report.sbatch"]
    assert (teacher.arguments, student.arguments) == (("teacher.yaml",), ("student.yaml",))
    assert teacher.dependency(["17", "18"]) == []
    assert student.dependency(["17", "18"]) == ["--dependency=afterok:17", "--kill-on-invalid-dep=yes"]
    assert report.dependency(["17", "18"]) == ["--dependency=afterany:17:18", "--kill-on-invalid-dep=yes"]
    assert report.arguments == ("runs/teacher-0", "runs/student-0", "--output", "runs/report")


def test_stages_that_need_nothing_of_each_other_run_side_by_side():
    alone = [Stage(name, f"{name}.yaml", {0: Run(Path("runs", name))}) for name in ("a", "b")]
    jobs = plan(alone, REQUEST, is_array=False, report=False)
    assert [(job.name, job.after) for job in jobs] == [("a", ()), ("b", ())]


def test_the_teacher_is_submitted_first_in_whichever_order_they_are_named():
    teacher, student = pair([0])
    jobs = plan(
        [replace(student, runs={0: Run(Path("runs/student-0"), teacher=(1, 0))}), teacher], REQUEST, is_array=False
    )
    assert [job.name for job in jobs] == ["teacher", "student", "report"]
    assert jobs[1].after == (After(0, "afterok"),)


def test_two_students_of_one_teacher_both_wait_for_it_alone():
    teacher, student = pair([0])
    jobs = plan([teacher, student, replace(student, name="other")], REQUEST, is_array=False, report=False)
    assert [job.after for job in jobs] == [(), (After(0, "afterok"),), (After(0, "afterok"),)]


def test_each_fold_of_a_student_waits_for_that_fold_of_its_teacher():
    teacher, student, report = plan(pair([1, 2, 3, 5]), REQUEST, is_array=True)
    assert {job.script for job in (teacher, student)} == {"folds.sbatch"}
    assert option("--array", teacher.options) == option("--array", student.options) == "1-3,5"
    assert student.dependency(["17"]) == ["--dependency=aftercorr:17", "--kill-on-invalid-dep=yes"]
    assert student.waits_for(["17"], 3) == ["17_3"]
    assert student.runs[3] == (Path("runs/student-3"),)
    assert option("--array", report.options) is None


def test_an_array_whose_teacher_is_one_of_another_fold_waits_for_the_whole_array():
    _, student = plan(pair([0, 1, 2], teacher_of={1: 0, 2: 0}), REQUEST, is_array=True, report=False)[:2]
    jobs = plan(pair([0, 1, 2], teacher_of={1: 0, 2: 0}), REQUEST, is_array=True, report=False)
    assert option("--array", student.options) == "0"
    assert [(option("--array", job.options), job.after) for job in jobs[1:]] == [
        ("0", (After(0, "aftercorr"),)),
        ("1-2", (After(0, "afterok"),)),
    ]


# what is done


def test_what_is_done_has_no_job_and_is_waited_for_by_none():
    [student, report] = plan(pair([0], ([0], [])), REQUEST, is_array=False)
    assert (student.name, student.after) == ("student", ())
    assert report.after == (After(0, "afterany"),)
    assert report.arguments[:2] == ("runs/teacher-0", "runs/student-0"), "the report has what is done, too"


def test_only_missing_folds_are_trained_and_only_those_wait_whose_teacher_is_missing():
    jobs = plan(pair([1, 2, 3, 4, 5], ([1, 2, 5], [5])), REQUEST, is_array=True)
    assert [(job.name, option("--array", job.options), job.after) for job in jobs[:-1]] == [
        ("teacher", "3-4", ()),
        ("student", "1-2", ()),
        ("student", "3-4", (After(0, "aftercorr"),)),
    ]
    assert jobs[-1].after == tuple(After(number, "afterany") for number in range(3))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("is_array", [False, True])
def test_nothing_left_is_no_job_and_no_report(is_array: bool, together: bool):
    assert plan(pair([0], ([0], [0])), REQUEST, is_array=is_array, together=together) == []


# together


def test_stages_together_are_one_job_in_order():
    [job] = plan(pair([0]), REQUEST, is_array=False, together=True, report=False, words=["--optim.lr", "1"])
    assert (job.script, job.arguments) == ("stages.sbatch", ("teacher.yaml", "student.yaml", "--optim.lr", "1"))
    assert job.runs == {0: (Path("runs/teacher-0"), Path("runs/student-0"))}


def test_together_without_the_stage_that_is_done_is_a_plain_job():
    [job] = plan(pair([0], ([0], [])), REQUEST, is_array=False, together=True, report=False)
    assert (job.script, job.arguments, job.name) == ("train.sbatch", ("student.yaml",), "student")


def test_together_over_folds_a_task_trains_all_stages_of_its_fold():
    [job] = plan(pair([1, 2, 3], ([1], [1])), REQUEST, is_array=True, together=True, report=False)
    assert (job.script, job.arguments) == ("folds.sbatch", ("teacher.yaml", "student.yaml"))
    assert option("--array", job.options) == "2-3"
    assert list(job.runs) == [2, 3]


def test_together_is_refused_where_a_student_learns_from_another_fold():
    with pytest.raises(ConfigError, match="student-1 learns from teacher-0; leave --together out"):
        plan(pair([0, 1], teacher_of={1: 0}), REQUEST, is_array=True, together=True)


# refusals


def test_folds_that_learn_from_each_other_are_refused():
    chain = Stage("a", "a.yaml", {0: Run(Path("a-0")), 1: Run(Path("a-1"), teacher=(0, 0))})
    with pytest.raises(ConfigError, match=r"learn from each other: a\.yaml -> a\.yaml; an array cannot wait"):
        plan([chain], REQUEST, is_array=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lead_s": 59}, r"--lead 59 is too short: .* use 60 seconds or more"),
        ({"lead_s": 120, "time": "4"}, r"time limit 4 \(240 s\) is too short for a lead of 120 s: .* more than 240 s"),
        ({"lead_s": 600, "site": Site(time="0:20:00")}, r"time limit 0:20:00 \(1200 s\) is too short .* 600 s"),
        ({"time": "soon"}, r"--time 'soon': expected a time limit such as 4:00:00"),
        ({"elastic": 3, "nodes": 2}, r"--elastic 3 is the smallest number of nodes, but the job has 2"),
        ({"elastic": 2}, r"the job has 1"),
    ],
)
def test_what_cannot_be_had_together_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        plan(pair([0]), replace(REQUEST, **changes), is_array=False)


@pytest.mark.parametrize("limit", ["0:04:01", "UNLIMITED", None])
def test_a_lead_below_half_of_the_time_is_taken(limit: str | None):
    [job, *_] = plan(pair([0]), replace(REQUEST, time=limit), is_array=False)
    assert option("--signal", job.options) == "B:USR1@120"


# options


def test_without_settings_only_what_every_job_needs_is_said():
    [job] = plan(pair([0])[:1], REQUEST, is_array=False, report=False)
    assert job.options == (
        "--job-name=teacher", "--chdir=/here", "--output=/here/runs/slurm/%x-%j.out", "--export=ALL",
        "--signal=B:USR1@120",
    )  # fmt: skip


def test_settings_of_the_site_become_options_and_the_command_line_wins():
    site = Site(
        partition="gpu", account="med", qos="long", constraint="a100|h100", reservation="trial", gpus_per_node=4,
        cpus_per_task=32, mem="200G", time="8:00:00", exclusive=True, throttle=4,
        sbatch_options=("--comment=a b", "--gres=nvme:1"),
    )  # fmt: skip
    request = replace(REQUEST, site=site, nodes=2, time="2:00:00", throttle=8, elastic=1)
    job, report = plan(pair([0, 1])[:1], request, is_array=True)
    assert set(job.options) >= {
        "--comment=a b", "--gres=nvme:1", "--partition=gpu", "--account=med", "--qos=long", "--constraint=a100|h100",
        "--reservation=trial", "--nodes=2", "--gpus-per-node=4", "--cpus-per-task=32", "--mem=200G", "--exclusive",
        "--time=2:00:00", "--array=0-1%8", "--no-kill",
    }  # fmt: skip
    assert option("--throttle", job.options) is None
    assert report.options == (
        "--comment=a b", "--job-name=report", "--chdir=/here", "--output=/here/runs/slurm/%x-%j.out", "--export=ALL",
        "--partition=gpu", "--account=med", "--qos=long", "--reservation=trial",
        "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--time=0:30:00",
    ), "one core, no GPU, a time of its own"  # fmt: skip


def test_a_kind_of_gpu_and_memory_per_gpu():
    site = Site(gpu_type="a100", gpus_per_node=2, mem_per_gpu="60G", time="8:00:00", throttle=3)
    [job] = plan(pair([0, 1])[:1], replace(REQUEST, site=site), is_array=True, report=False)
    assert {"--gres=gpu:a100:2", "--mem-per-gpu=60G", "--time=8:00:00", "--array=0-1%3"} < set(job.options)
    assert option("--gpus-per-node", job.options) is None


def test_a_job_of_a_set_that_is_streamed_has_no_folder_for_copies():
    copied, streamed = (
        Stage(name, f"{name}.yaml", {0: Run(Path(name), streamed=name == "url")}) for name in ("set", "url")
    )
    with_scratch = replace(REQUEST, site=Site(scratch="/local"))
    jobs = plan([copied, streamed], with_scratch, is_array=False)
    assert [job.variables for job in jobs] == [{}, {"DISTKD_SCRATCH": ""}, {}]
    [job] = plan([copied, streamed], with_scratch, is_array=False, together=True, report=False)
    assert job.variables == {"DISTKD_SCRATCH": ""}
    assert not any(job.variables for job in plan([copied, streamed], REQUEST, is_array=False))


def test_names_are_fit_for_logs_and_a_percent_sign_in_a_path_is_none_of_slurms():
    stage = Stage("a study/über 5%", "a.yaml", {0: Run(Path("a"))})
    [job] = plan([stage], replace(REQUEST, logs=Path("/my 5%/slurm")), is_array=False, report=False)
    assert option("--job-name", job.options) == "a-study-über-5"
    assert option("--output", job.options) == "/my 5%%/slurm/%x-%j.out"


# small things


@pytest.mark.parametrize(
    "ids, text", [([], ""), ([3], "3"), ([1, 2, 3], "1-3"), ([7, 1, 2, 5, 2], "1-2,5,7"), ([0, 2], "0,2")]
)
def test_ranges_are_as_short_as_slurm_takes_them(ids: list[int], text: str):
    assert ranges(ids) == text


def test_the_report_names_one_run_some_runs_or_the_root_of_many():
    root = Path("runs")
    assert report_arguments([root / "a"], root) == ["runs/a"]
    assert report_arguments([root / "a", root / "b"], root) == ["runs/a", "runs/b", "--output", "runs/report"]
    many = [root / str(number) for number in range(MANY + 1)]
    assert report_arguments(many, root) == ["runs", "--output", "runs/report"]
