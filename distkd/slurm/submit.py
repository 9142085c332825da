"""`distkd submit`: looks at everything that can be looked at from a login node, then hands the plan to sbatch."""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import distkd
from distkd.data.make import make_shards
from distkd.data.manifest import MANIFEST
from distkd.errors import ConfigError
from distkd.files import write_text
from distkd.slurm.checks import (
    check_array,
    check_folds,
    check_folds_to_come,
    check_queue,
    check_setup,
    check_units,
    sets_to_make,
)
from distkd.slurm.plan import Job, Request, Stage, plan, ranges, report_arguments
from distkd.slurm.sbatch import alone, carry_out, words_of
from distkd.slurm.site import RUN_TIME, Site, find_site, read_site
from distkd.slurm.surroundings import foreign, surroundings
from distkd.slurm.units import Options, Unit, each_run_once, numbers_of, stages_of
from distkd.train.folder import make_root

__all__ = ["Options", "Unit", "Where", "submit", "where"]

OWN_PYTHON = {"DISTKD_PYTHON", "DISTKD_CONTAINER", "DISTKD_SETUP", "DISTKD_MODULES"}
"""Settings of a site that say which interpreter its jobs have."""


@dataclass(frozen=True, slots=True)
class Where:
    """The clone and the cluster that a submission is for."""

    home: Path
    site_file: Path | None
    site: Site
    environ: Mapping[str, str]
    """Variables that the jobs are given, without those of a job that this is called from."""


def where(site: Path | None) -> Where:
    """
    Raises:
        ConfigError: there are no job scripts, or the site's settings have mistakes.
    """
    home, environ = _home(), surroundings()
    path = find_site(site, home, environ)
    return Where(home, path, read_site(path, environ), environ)


def submit(units: Sequence[Unit], options: Options, place: Where) -> None:
    """Submit the jobs that train what is not done yet, or print them.

    Raises:
        DistkdError: something would not work; nothing has been submitted then, or it has been cancelled again.
    """
    site, home = place.site, place.home
    options = replace(
        options, ranks_per_node=options.ranks_per_node or site.ranks_per_node, elastic=options.elastic or site.elastic
    )
    units = each_run_once(units)
    root = units[0].settings.run.root
    folds, seeds = ({number for number in numbers if number is not None} for numbers in numbers_of(units))
    check_units(units, options, site)
    stages = stages_of(units, options.allow_change)
    all_runs = [run for stage in stages for run in stage.runs.values()]
    done = sum(run.done for run in all_runs)
    if done == len(all_runs):
        advice = shlex.join(["distkd", "report", *report_arguments([run.folder for run in all_runs], root)])
        print(f"nothing to submit: {_count(done, 'run')} of {done} done; see  {advice}")
        return
    sets = sets_to_make(units)
    check_folds(units)

    jobs_folder = Path(place.environ.get("DISTKD_JOBS") or root / "slurm").absolute()
    request = Request(
        site, Path.cwd(), jobs_folder, options.nodes, options.time, options.lead_s, options.elastic, options.throttle
    )
    handed = _handed(options, place, jobs_folder, folds, seeds)
    words = [*(["--allow-change"] if options.allow_change else []), *options.words]

    def planned(stages: Sequence[Stage]) -> list[Job]:
        return plan(
            stages, request, is_array=bool(folds or seeds), together=options.together, report=options.report,
            root=root, words=words,
        )  # fmt: skip

    def missing() -> None:
        check_queue([run for run in all_runs if not run.done])

    jobs = planned(stages)
    check_array(jobs)
    check_setup(site)
    if done:
        print(f"distkd: {_count(done, 'run')} done already, left out", file=sys.stderr)
    for name in dict.fromkeys(job.name for job in jobs if job.variables):
        print(f"distkd: {name} reads shards from a URL, nothing is copied to DISTKD_SCRATCH for it", file=sys.stderr)
    if options.dry_run:
        missing()
        check_folds_to_come(units, sets)
        print(_script(jobs, handed, home, jobs_folder, sets), end="")
        return
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no SLURM here (no sbatch); on this machine the same is trained by\n"
            f"  {_without_slurm(units, options, home, folds, seeds, words)}\n"
            "and --dry-run shows the jobs of a cluster"
        )
    for folder in dict.fromkeys(unit.settings.run.root for unit in units):
        make_root(folder)
    _make_jobs_folder(jobs_folder)
    with alone(jobs_folder):
        missing()
        for shards, recipe in sets.items():
            print(f"distkd: makes shard set {shards} first (recipe {recipe})", file=sys.stderr, flush=True)
            make_shards(recipe, shards)
        check_folds(units)  # of these, too
        folder = _submission_folder(jobs_folder)
        copies = _copy_configs(stages, folder)
        jobs = planned([Stage(stage.name, copies[stage.config], stage.runs) for stage in stages])
        handed["DISTKD_SITE"] = str(folder / "site.env")
        settings = "" if place.site_file is None else place.site_file.read_text(encoding="utf-8")
        write_text(folder / "site.env", settings)
        write_text(folder / "commands.txt", _script(jobs, handed, home, jobs_folder, sets))
        for name in ("site.env", "commands.txt"):  # there may be a token in a value
            (folder / name).chmod(0o600)
        ids = carry_out(jobs, {**place.environ, **handed}, home, jobs_folder)
    print(_table(jobs, ids))
    if folds or seeds:
        print(f"\ntasks:   {_tasks(folds, seeds)}", end="")
    print(f"\nwatch:   {shlex.join(['distkd', 'status', str(root)])}")
    print(f"cancel:  {shlex.join(['scancel', *ids])}")
    print(f"logs:    {_short(jobs_folder)}; what was submitted: {_short(folder)}")


def _home() -> Path:
    home = Path(distkd.__file__).resolve().parent.parent
    if not (home / "slurm" / "train.sbatch").is_file():
        raise ConfigError(
            "`distkd submit` needs the job scripts of the repository, which are not installed: no folder "
            f"{str(home / 'slurm')!r}; work in a clone of the repository, or call `distkd train` in a job of your own"
        )
    return home


# what is handed to sbatch


def _handed(options: Options, place: Where, jobs: Path, folds: set[int], seeds: set[int]) -> dict[str, str]:
    """Variables that the scripts read; sbatch hands the whole environment on."""
    handed = {name: place.environ[name] for name in RUN_TIME if name in place.environ}  # for the script of a dry run
    handed |= {"DISTKD_HOME": str(place.home), "DISTKD_JOBS": str(jobs), "DISTKD_LEAD": str(options.lead_s)}
    if place.site_file is not None:
        handed["DISTKD_SITE"] = str(place.site_file.absolute())
    if not place.site.at_run_time & OWN_PYTHON:
        handed["DISTKD_PYTHON"] = sys.executable  # the environment of this command, activated or not
    if options.ranks_per_node is not None:
        handed["DISTKD_RANKS_PER_NODE"] = str(options.ranks_per_node)
    if options.elastic is not None:
        handed["DISTKD_ELASTIC"] = str(options.elastic)
    if folds or seeds:
        handed |= {"FOLDS": ranges(list(folds)), "SEEDS": ranges(list(seeds))}
    return handed


def _script(
    jobs: Sequence[Job], handed: Mapping[str, str], home: Path, jobs_folder: Path, sets: Mapping[Path, str]
) -> str:
    """The commands as bash runs them."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"cd {shlex.quote(str(Path.cwd()))}"]
    lines += [f"unset {' '.join(foreign())}"] if foreign() else []
    lines += [f"mkdir -p -m 700 {shlex.quote(str(jobs_folder))}  # a job that cannot write its log ends in silence"]
    for shards, recipe in sets.items():
        make = shlex.join([sys.executable, str(home / "shards" / f"{recipe}.py"), "--out", str(shards)])
        lines += [f"[[ -e {shlex.quote(str(shards / MANIFEST))} ]] || {make}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in handed.items()]
    ids = [f"$JOB{number}" for number in range(1, len(jobs) + 1)]
    for job, variable in zip(jobs, ids, strict=True):
        words = [
            word if word.startswith("--dependency=") else shlex.quote(word)  # the variables in it are to be filled in
            for word in words_of(job, home, ids)
        ]
        own = [f"{name}={shlex.quote(value)}" for name, value in job.variables.items()]
        about = f"{job.name}: {_count(sum(map(len, job.runs.values())), 'run')}" if job.runs else job.name
        lines += ["", f"# {about}", f"{variable[1:]}=$({' '.join([*own, *words])})"]
    lines += ["", f'echo "submitted: {" ".join(ids)}"', ""]
    return "\n".join(lines)


def _without_slurm(
    units: Sequence[Unit], options: Options, home: Path, folds: set[int], seeds: set[int], words: Sequence[str]
) -> str:
    script, variables = home / "launch" / "workstation.sh", []
    ranks = [] if options.ranks_per_node is None else ["--nproc", str(options.ranks_per_node)]
    if (options.nodes or 1) > 1:
        script = home / "launch" / "multinode.sh"
        variables = ["MASTER_ADDR=HOST", f"NODES={options.nodes}", "NODE_RANK=I"]
        variables += [] if options.ranks_per_node is None else [f"NPROC={options.ranks_per_node}"]
        ranks = []
    configs = dict.fromkeys(str(unit.config) for unit in units)
    study = [*(["--folds", ranges(list(folds))] if folds else []), *(["--seeds", ranges(list(seeds))] if seeds else [])]
    return shlex.join([*variables, str(script), *ranks, *configs, *study, *words])


def _make_jobs_folder(jobs_folder: Path) -> None:
    """For this user alone, as logs name samples; one that is there keeps its rights."""
    try:
        jobs_folder.parent.mkdir(parents=True, exist_ok=True)
        jobs_folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _unwritable(jobs_folder, error) from error


def _unwritable(jobs_folder: Path, error: OSError) -> ConfigError:
    why = f"the jobs' folder {jobs_folder} cannot be written: {error.strerror}"
    return ConfigError(f"{why}; name another one with DISTKD_JOBS")


def _submission_folder(jobs_folder: Path) -> Path:
    """A new folder for what is submitted now."""
    stamp = time.strftime("submitted-%Y%m%d-%H%M%S")
    for name in _tried(stamp):
        try:
            (jobs_folder / name).mkdir(mode=0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(jobs_folder, error) from error
        return jobs_folder / name
    raise AssertionError("names do not end")


def _tried(stamp: str) -> Iterator[str]:
    yield stamp
    yield from (f"{stamp}-{number}" for number in itertools.count(2))


def _copy_configs(stages: Sequence[Stage], folder: Path) -> dict[str, str]:
    """Where each config now has a copy, which later changes leave alone, and which names the same run.

    A run without a name has that of its file and the folder around it, so both stay; the number keeps files of equal
    names apart, and a `config.yaml` too deep to be taken for a run.
    """
    copies: dict[str, str] = {}
    for number, stage in enumerate(stages, start=1):
        config = Path(stage.config)
        copy = folder / "configs" / str(number) / (config.resolve().parent.name or "configs") / config.name
        write_text(copy, config.read_text(encoding="utf-8"))
        copies[stage.config] = str(copy)
    return copies


# what is said


def _table(jobs: Sequence[Job], ids: Sequence[str]) -> str:
    rows = [("job", "name", "runs", "waits for")]
    how = {"afterok": "", "aftercorr": " (task by task)", "afterany": ""}
    for job, shown in zip(jobs, ids, strict=False):  # perhaps without the report
        waits = " ".join(ids[on.job] for on in job.after) + (how[job.after[0].kind] if job.after else "-")
        runs = str(sum(map(len, job.runs.values())) or "-")
        tasks = f"{shown}_[{ranges(list(job.runs))}]" if job.is_array else shown
        rows.append((tasks, job.name, runs, waits))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _tasks(folds: set[int], seeds: set[int]) -> str:
    """What the ids of an array mean."""
    names = [f"{word} {ranges(list(numbers))}" for word, numbers in (("folds", folds), ("seeds", seeds)) if numbers]
    return f"numbered from 0 through {', for each through '.join(names)}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _short(path: Path) -> str:
    """From here where it is below here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
