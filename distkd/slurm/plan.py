"""Which jobs a submission is made of, and which wait for which: values in, values out, nothing is submitted here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distkd.errors import ConfigError
from distkd.slurm.site import Site, limit_seconds
from distkd.slurm.words import for_report

__all__ = ["After", "Job", "Request", "Run", "Stage", "plan", "ranges"]

Kind = Literal["afterok", "aftercorr", "afterany"]

MIN_LEAD_S = 60
"""SLURM looks at time limits every half minute or so, and a step and a checkpoint must fit in what is left."""
REPORT_TIME = "0:30:00"
MANY = 64
"""More runs than this are named to the report by their root."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a stage."""

    folder: Path
    done: bool = False
    teacher: tuple[int, int] | None = None
    """Number of the stage of this submission whose run is its teacher, and that run's array id."""
    streamed: bool = False
    """Whether its shard set has a URL: no folder that could be copied to a node."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One config with its runs by array id, or the only one as 0."""

    name: str
    config: str
    runs: Mapping[int, Run]


@dataclass(frozen=True, slots=True)
class After:
    """That a job waits for another one of the plan."""

    job: int
    """Its place in the plan."""
    kind: Kind


@dataclass(frozen=True, slots=True)
class Job:
    """One call of sbatch."""

    name: str
    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    """Of sbatch, all but what it waits for."""
    runs: Mapping[int, tuple[Path, ...]]
    """Folders that it trains, by array id."""
    is_array: bool = False
    after: tuple[After, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    """What its environment has beside that of the other jobs."""

    def dependency(self, ids: Sequence[str]) -> list[str]:
        """Options of sbatch for what it waits for, given the ids of the jobs before it in the plan."""
        if not self.after:
            return []
        kinds = dict.fromkeys(after.kind for after in self.after)
        waits = ",".join(":".join([kind, *(ids[on.job] for on in self.after if on.kind == kind)]) for kind in kinds)
        # otherwise a job whose teacher failed waits for ever
        return [f"--dependency={waits}", "--kill-on-invalid-dep=yes"]

    def waits_for(self, ids: Sequence[str], task: int) -> list[str]:
        """Ids of the jobs, or of the one task, that a task waits for."""
        return [f"{ids[on.job]}_{task}" if on.kind == "aftercorr" else ids[on.job] for on in self.after]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of SLURM, on the command line; it wins over the site's."""

    site: Site
    chdir: Path
    logs: Path
    nodes: int | None = None
    time: str | None = None
    lead_s: int = 120
    """Seconds before the time limit in which the job is told to save and go back to the queue."""
    elastic: int | None = None
    """Nodes that are enough to go on after a loss."""
    throttle: int | None = None
    """Tasks of one array that may run at once."""

    def check(self) -> None:
        """
        Raises:
            ConfigError: these cannot be had together.
        """
        limit = self.time or self.site.time
        try:
            limit_s = limit_seconds(limit) if limit is not None else None
        except ValueError as error:
            raise ConfigError(f"--time {limit!r}: {error}") from error
        if self.lead_s < MIN_LEAD_S:
            raise ConfigError(
                f"--lead {self.lead_s} is too short: SLURM's signal is not exact to half a minute, and a step and a "
                f"checkpoint must fit; use {MIN_LEAD_S} seconds or more"
            )
        if limit_s is not None and 2 * self.lead_s >= limit_s:
            raise ConfigError(
                f"time limit {limit} ({limit_s} s) is too short for a lead of {self.lead_s} s: a job that saves so "
                "early trains for less than half of its time; use a time limit of more than "
                f"{2 * self.lead_s} s, or a shorter --lead"
            )
        if self.elastic is not None and self.elastic > (self.nodes or 1):
            raise ConfigError(
                f"--elastic {self.elastic} is the smallest number of nodes, but the job has {self.nodes or 1}; "
                "name as many or more with --nodes, or a smaller --elastic (DISTKD_ELASTIC in the site's settings)"
            )

    def train_options(self, name: str, array: str | None) -> tuple[str, ...]:
        """Options of sbatch for a job that trains; `array` has its ids."""
        site = self.site
        gpus = None if site.gpus_per_node is None else f"--gpus-per-node={site.gpus_per_node}"
        if site.gpu_type is not None:
            gpus = f"--gres=gpu:{site.gpu_type}:{site.gpus_per_node}"
        throttle = self.throttle or site.throttle
        return tuple(
            option
            for option in (
                *self.site.sbatch_options,  # first, so that what follows wins
                *self._common(name, "%x-%A_%a.out" if array else "%x-%j.out"),
                _option("--nodes", self.nodes),
                _option("--constraint", site.constraint),
                gpus,
                _option("--cpus-per-task", site.cpus_per_task),
                _option("--mem", site.mem),
                _option("--mem-per-gpu", site.mem_per_gpu),
                "--exclusive" if site.exclusive else None,
                _option("--time", self.time or site.time),
                f"--signal=B:USR1@{self.lead_s}",
                "--no-kill" if self.elastic else None,
                _option("--array", array and array + (f"%{throttle}" if throttle else "")),
            )
            if option is not None
        )

    def report_options(self) -> tuple[str, ...]:
        """Options of sbatch for a job of one core without a GPU."""
        fixed = ("--nodes=1", "--ntasks=1", "--cpus-per-task=1", f"--time={REPORT_TIME}")
        options = (*for_report(self.site.sbatch_options), *self._common("report", "%x-%j.out"), *fixed)
        return tuple(option for option in options if option is not None)

    def variables(self, runs: Iterable[Run]) -> dict[str, str]:
        """What a job that trains these runs has in its environment: with a URL, data.scratch would be refused."""
        return {"DISTKD_SCRATCH": ""} if self.site.scratch is not None and any(run.streamed for run in runs) else {}

    def _common(self, name: str, log: str) -> tuple[str | None, ...]:
        site = self.site
        return (
            f"--job-name={name}",
            f"--chdir={self.chdir}",
            f"--output={str(self.logs).replace('%', '%%')}/{log}",
            "--export=ALL",
            _option("--partition", site.partition),
            _option("--account", site.account),
            _option("--qos", site.qos),
            _option("--reservation", site.reservation),
        )


def plan(
    stages: Sequence[Stage],
    request: Request,
    *,
    is_array: bool,
    together: bool = False,
    report: bool = True,
    root: Path = Path("runs"),
    words: Sequence[str] = (),
) -> list[Job]:
    """The jobs of a submission, each after those it waits for. Runs that are done have no job.

    Args:
        is_array: whether the runs of a stage are the tasks of an array, as in a study of several folds or seeds.
        together: all stages in one job, or in one task, instead of one job each.
        report: whether a last job makes the report of all runs, also of those that are done.
        root: folder of the runs.
        words: what the scripts hand on to `distkd train`, after the configs.

    Raises:
        ConfigError: stages wait for each other, or for themselves.
    """
    request.check()
    order = _in_order(stages)
    if together:
        jobs = _one_job([stages[number] for number in order], stages, request, is_array, words)
    else:
        jobs = _job_per_stage(order, stages, request, is_array, words)
    if jobs and report:
        folders = [run.folder for stage in stages for run in stage.runs.values()]
        after = tuple(After(number, "afterany") for number in range(len(jobs)))
        arguments = tuple(report_arguments(folders, root))
        jobs.append(Job("report", "report.sbatch", arguments, request.report_options(), {}, after=after))
    return jobs


def report_arguments(folders: Sequence[Path], root: Path) -> list[str]:
    """What `distkd report` is told: the runs, or their root where they are many."""
    if len(folders) == 1:
        return [str(folders[0])]
    named = [root] if len(folders) > MANY else folders
    return [*map(str, named), "--output", str(root / "report")]


def ranges(ids: Sequence[int]) -> str:
    """`1-3,7` for 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(ids)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _job_per_stage(
    order: Sequence[int], stages: Sequence[Stage], request: Request, is_array: bool, words: Sequence[str]
) -> list[Job]:
    jobs: list[Job] = []
    job_of: dict[tuple[int, int], int] = {}
    for number in order:
        stage = stages[number]
        parts: dict[After | None, list[int]] = {}
        for task, run in stage.runs.items():
            if not run.done:
                place = None if run.teacher is None else job_of.get(run.teacher)  # None: that one is done
                kind: Kind = "aftercorr" if is_array and run.teacher == (_teacher(run), task) else "afterok"
                parts.setdefault(None if place is None else After(place, kind), []).append(task)
        for after, tasks in parts.items():
            job_of |= dict.fromkeys([(number, task) for task in tasks], len(jobs))
            name = _job_name(stage.name)
            jobs.append(
                Job(
                    name,
                    "folds.sbatch" if is_array else "train.sbatch",
                    (stage.config, *words),
                    request.train_options(name, ranges(tasks) if is_array else None),
                    {task: (stage.runs[task].folder,) for task in tasks},
                    is_array,
                    () if after is None else (after,),
                    request.variables(stage.runs[task] for task in tasks),
                )
            )
    return jobs


def _one_job(
    ordered: Sequence[Stage], stages: Sequence[Stage], request: Request, is_array: bool, words: Sequence[str]
) -> list[Job]:
    runs: dict[int, tuple[Path, ...]] = {}
    missing: list[Stage] = []
    for stage in ordered:
        for task, run in stage.runs.items():
            if run.done:
                continue
            if run.teacher is not None and run.teacher[1] != task:
                other = stages[run.teacher[0]].runs[run.teacher[1]].folder.name
                raise ConfigError(
                    f"--together trains the stages of one fold and seed after each other, but {run.folder.name} learns "
                    f"from {other}; leave --together out"
                )
            runs[task] = (*runs.get(task, ()), run.folder)
            missing += [] if stage in missing else [stage]
    if not missing:
        return []
    name = _job_name(missing[0].name) if len(missing) == 1 else "stages"
    script = "folds.sbatch" if is_array else "train.sbatch" if len(missing) == 1 else "stages.sbatch"
    arguments = (*(stage.config for stage in missing), *words)
    options = request.train_options(name, ranges(list(runs)) if is_array else None)
    variables = request.variables(run for stage in missing for run in stage.runs.values())
    return [Job(name, script, arguments, options, dict(sorted(runs.items())), is_array, variables=variables)]


def _in_order(stages: Sequence[Stage]) -> list[int]:
    """Numbers of the stages, each after its teachers', otherwise as given."""
    order: list[int] = []

    def place(number: int, waiting: tuple[int, ...]) -> None:
        if number in waiting:
            names = " -> ".join(stages[item].config for item in (*waiting[waiting.index(number) :], number))
            raise ConfigError(
                f"runs of one config learn from each other: {names}; an array cannot wait for itself, so submit the "
                "teachers' folds or seeds first, by themselves"
            )
        if number in order:
            return
        for teacher in sorted({run.teacher[0] for run in stages[number].runs.values() if run.teacher is not None}):
            place(teacher, (*waiting, number))
        order.append(number)

    for number in range(len(stages)):
        place(number, ())
    return order


def _teacher(run: Run) -> int | None:
    return None if run.teacher is None else run.teacher[0]


def _job_name(name: str) -> str:
    """Fit for the name of a log file, too."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "train"


def _option(name: str, value: object) -> str | None:
    return None if value is None else f"{name}={value}"
