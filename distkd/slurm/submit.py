"""`distkd submit`: looks at everything that can be looked at from a login node, then hands the plan to sbatch."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import distkd
from distkd.allocation import note_job
from distkd.data.make import make_shards
from distkd.data.manifest import MANIFEST
from distkd.errors import ConfigError
from distkd.files import write_text
from distkd.slurm.checks import check_folds, check_queue, check_units, sets_to_make
from distkd.slurm.plan import Job, Request, Stage, plan, ranges, report_arguments
from distkd.slurm.site import Site, find_site, read_site
from distkd.slurm.units import Options, Unit, each_run_once, numbers_of, stages_of

__all__ = ["Options", "Unit", "submit"]

KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_CONF_SERVER"}
"""Variables of SLURM that say which cluster is meant; the others belong to the job that somebody submits from."""


def submit(units: Sequence[Unit], options: Options) -> None:
    """Submit the jobs that train what is not done yet, or print them.

    Raises:
        DistkdError: something would not work; nothing has been submitted then, or it has been cancelled again.
    """
    home = _home()
    site_file = find_site(options.site, home)
    site = read_site(site_file)
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
    check_queue([run for run in all_runs if not run.done])
    sets = sets_to_make(units)
    check_folds(units)

    jobs_folder = Path(os.environ.get("DISTKD_JOBS") or root / "slurm").absolute()
    request = Request(
        site, Path.cwd(), jobs_folder, options.nodes, options.time, options.lead_s, options.elastic, options.throttle
    )
    handed = _handed(options, site, home, jobs_folder, site_file, folds, seeds)
    words = [*(["--allow-change"] if options.allow_change else []), *options.words]

    def planned(stages: Sequence[Stage]) -> list[Job]:
        return plan(
            stages, request, is_array=bool(folds or seeds), together=options.together, report=options.report,
            root=root, words=words,
        )  # fmt: skip

    jobs = planned(stages)
    if done:
        print(f"distkd: {_count(done, 'run')} done already, left out", file=sys.stderr)
    if options.dry_run:
        print(_script(jobs, handed, home, jobs_folder, sets), end="")
        return
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no SLURM here (no sbatch); on this machine the same is trained by\n"
            f"  {_without_slurm(units, options, home, folds, seeds, words)}\n"
            "and --dry-run shows the jobs of a cluster"
        )
    for shards, recipe in sets.items():
        make_shards(recipe, shards)
    check_folds(units)  # of these, too
    folder = _submission_folder(jobs_folder)
    copies = _copy_configs(stages, folder)
    jobs = planned([Stage(stage.name, copies[stage.config], stage.runs) for stage in stages])
    handed["DISTKD_SITE"] = str(folder / "site.env")
    write_text(folder / "site.env", "" if site_file is None else site_file.read_text(encoding="utf-8"))
    write_text(folder / "commands.txt", _script(jobs, handed, home, jobs_folder, sets))
    ids = _carry_out(jobs, handed, home, jobs_folder)
    print(_table(jobs, ids))
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


def _handed(
    options: Options, site: Site, home: Path, jobs: Path, site_file: Path | None, folds: set[int], seeds: set[int]
) -> dict[str, str]:
    """Variables that the scripts read; sbatch hands the whole environment on."""
    handed = {"DISTKD_HOME": str(home), "DISTKD_JOBS": str(jobs)}
    if site_file is not None:
        handed["DISTKD_SITE"] = str(site_file.absolute())
    if not site.at_run_time & {"DISTKD_PYTHON", "DISTKD_CONTAINER"} and not os.environ.get("DISTKD_PYTHON"):
        handed["DISTKD_PYTHON"] = sys.executable  # the environment of this command, activated or not
    if options.ranks_per_node is not None:
        handed["DISTKD_RANKS_PER_NODE"] = str(options.ranks_per_node)
    if options.elastic is not None or os.environ.get("DISTKD_ELASTIC"):
        handed["DISTKD_ELASTIC"] = str(options.elastic or "")  # without --no-kill it would do nothing
    if folds or seeds:
        handed |= {"FOLDS": ranges(list(folds)), "SEEDS": ranges(list(seeds))}
    return handed


def _words(job: Job, home: Path, ids: Sequence[str]) -> list[str]:
    options = [*job.options, *job.dependency(ids)]
    return ["sbatch", "--parsable", *options, str(home / "slurm" / job.script), *job.arguments]


def _foreign() -> list[str]:
    """Variables of the job that this is called from, which would be taken for those of the new ones."""
    if "SLURM_JOB_ID" not in os.environ:
        return []
    return sorted(name for name in os.environ if name.startswith("SLURM_") and name not in KEPT)


def _script(
    jobs: Sequence[Job], handed: Mapping[str, str], home: Path, jobs_folder: Path, sets: Mapping[Path, str]
) -> str:
    """The commands as bash runs them."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"cd {shlex.quote(str(Path.cwd()))}"]
    lines += [f"unset {' '.join(_foreign())}"] if _foreign() else []
    lines += [f"mkdir -p {shlex.quote(str(jobs_folder))}  # SLURM ends a job in silence that cannot write its log"]
    for shards, recipe in sets.items():
        make = shlex.join([sys.executable, str(home / "shards" / f"{recipe}.py"), "--out", str(shards)])
        lines += [f"[[ -e {shlex.quote(str(shards / MANIFEST))} ]] || {make}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in handed.items()]
    ids = [f"$JOB{number}" for number in range(1, len(jobs) + 1)]
    for job, variable in zip(jobs, ids, strict=True):
        words = [
            word if word.startswith("--dependency=") else shlex.quote(word)  # the variables in it are to be filled in
            for word in _words(job, home, ids)
        ]
        about = f"{job.name}: {_count(sum(map(len, job.runs.values())), 'run')}" if job.runs else job.name
        lines += ["", f"# {about}", f"{variable[1:]}=$({' '.join(words)})"]
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


def _submission_folder(jobs_folder: Path) -> Path:
    """A new folder for what is submitted now; it makes that of the logs, too."""
    stamp = time.strftime("submitted-%Y%m%d-%H%M%S")
    for name in _tried(stamp):
        try:
            (jobs_folder / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"the jobs' folder {jobs_folder} cannot be written: {error.strerror}; name another one with DISTKD_JOBS"
            ) from error
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


def _carry_out(jobs: Sequence[Job], handed: Mapping[str, str], home: Path, jobs_folder: Path) -> list[str]:
    """Submit the jobs in order and note them in the folders of their runs, all or none; returns the ids."""
    foreign = _foreign()
    environment = {name: value for name, value in os.environ.items() if name not in foreign} | dict(handed)
    ids: list[str] = []
    try:
        for job in jobs:
            ids.append(_sbatch(job, _words(job, home, ids), environment))
            for task, folders in job.runs.items():
                shown = f"{ids[-1]}_{task}" if job.is_array else ids[-1]
                for folder in folders:
                    note_job(
                        folder, "submitted", job=shown, script=job.script,
                        log=str(jobs_folder / f"{job.name}-{shown}.out"), after=job.waits_for(ids, task),
                    )  # fmt: skip
    except BaseException as error:
        cancelled = _cancel(ids)
        if isinstance(error, ConfigError) and cancelled:
            raise ConfigError(f"{error}\n{cancelled}") from error
        raise
    return ids


def _sbatch(job: Job, words: Sequence[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = re.fullmatch(r"(\d+)(;.*)?", done.stdout.strip().rpartition("\n")[2])
    if done.returncode or found is None:
        said = done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}"
        raise ConfigError(
            f"SLURM refused the job {job.name}:\n{said}\n"
            "mend the option that it names, on the command line or in the site file (slurm/site.env, --site); "
            "--dry-run shows the commands, and `sinfo` what there is"
        )
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return found[1]


def _cancel(ids: Sequence[str]) -> str:
    """Take back what was submitted; in words what became of it."""
    if not ids:
        return ""
    command = ["scancel", *ids]
    try:
        failed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0
    except OSError:
        failed = True
    if failed:
        return f"jobs {', '.join(ids)} were submitted before and could not be cancelled:  {shlex.join(command)}"
    return f"jobs {', '.join(ids)}, submitted before, were cancelled again"


# what is said


def _table(jobs: Sequence[Job], ids: Sequence[str]) -> str:
    rows = [("job", "name", "runs", "waits for")]
    how = {"afterok": "", "aftercorr": " (task by task)", "afterany": ""}
    for job, shown in zip(jobs, ids, strict=True):
        waits = " ".join(ids[on.job] for on in job.after) + (how[job.after[0].kind] if job.after else "-")
        runs = str(sum(map(len, job.runs.values())) or "-")
        tasks = f"{shown}_[{ranges(list(job.runs))}]" if job.is_array else shown
        rows.append((tasks, job.name, runs, waits))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _short(path: Path) -> str:
    """From here where it is below here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
