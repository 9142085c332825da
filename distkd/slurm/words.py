"""Options of sbatch that a site asks for (DISTKD_SBATCH_OPTIONS): which are taken, for which jobs, and other places."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

__all__ = ["advice_for", "for_report", "read_options"]

_SITE = "in slurm/site.env or in the environment"
_OWN = "it is given by `distkd submit` itself; remove it"
_TASKS = "a job has one task on each node, which starts the ranks; use DISTKD_RANKS_PER_NODE"
_GPUS = "use DISTKD_GPUS_PER_NODE"

_REFUSED = {
    "--array": "use --folds and --seeds of `distkd submit`",
    "--dependency": _OWN,
    "--kill-on-invalid-dep": _OWN,
    "--parsable": _OWN,
    "--job-name": "a job has the name of its run; use --run.name",
    "--chdir": "jobs run where `distkd submit` is called",
    "--output": "use DISTKD_JOBS, the folder of the logs",
    "--export": "jobs have the environment of `distkd submit`; set variables there or in the site file",
    "--signal": "use --lead of `distkd submit`",
    "--wrap": _OWN,
    "--test-only": "use --dry-run of `distkd submit`",
    "--wait": "`distkd submit` would not come back; `distkd status --watch` waits",
    "--no-requeue": "a job could not go on after its time limit or a pre-emption; use DISTKD_MAX_REQUEUES",
    "--nodes": "use --nodes of `distkd submit`",
    "--ntasks": _TASKS,
    "--ntasks-per-node": _TASKS,
    "--gpus": _GPUS,
    "--gpus-per-node": _GPUS,
    "--gpus-per-task": f"it hides all but one GPU from the ranks; {_GPUS}",
    "--time": "use DISTKD_TIME, or --time of `distkd submit`",
    "--partition": "use DISTKD_PARTITION",
    "--account": "use DISTKD_ACCOUNT",
    "--qos": "use DISTKD_QOS",
    "--constraint": "use DISTKD_CONSTRAINT",
    "--reservation": "use DISTKD_RESERVATION",
    "--cpus-per-task": "use DISTKD_CPUS_PER_TASK",
    "--mem": "use DISTKD_MEM",
    "--mem-per-gpu": "use DISTKD_MEM_PER_GPU",
}
"""Options that `distkd submit` gives itself, or that its jobs cannot bear, with what to do."""

_SHORT = {
    "-a": "--array", "-d": "--dependency", "-J": "--job-name", "-D": "--chdir", "-o": "--output", "-W": "--wait",
    "-N": "--nodes", "-n": "--ntasks", "-G": "--gpus", "-t": "--time", "-p": "--partition", "-A": "--account",
    "-q": "--qos", "-C": "--constraint", "-c": "--cpus-per-task",
}  # fmt: skip

_OTHERS = {
    "--gres", "--exclusive", "--mem-per-cpu", "--nodelist", "--exclude", "--mail-type", "--mail-user", "--comment",
    "--wckey", "--licenses", "--clusters", "--begin", "--deadline", "--nice", "--priority", "--hint", "--switches",
    "--tmp", "--requeue", "--error", "--input", "--open-mode", "--get-user-env", "--gpu-bind", "--gpu-freq",
    "--cores-per-socket", "--sockets-per-node", "--threads-per-core", "--distribution", "--ntasks-per-gpu",
    "--time-min", "--overcommit", "--oversubscribe", "--prefer", "--propagate", "--hold", "--uid", "--verbose",
    "-w", "-x", "-L", "-M", "-e", "-i", "-m", "-O", "-s", "-H", "-B", "-b", "-F",
}  # fmt: skip
"""Others that sbatch knows, and that a site may give."""

_FOR_REPORT = ("--mail-type", "--mail-user", "--comment", "--wckey", "--licenses", "-L", "--clusters", "-M")
"""What says nothing of nodes: the report needs one core and no GPU."""


def read_options(text: str) -> tuple[str, ...]:
    """The words, as bash takes them.

    Raises:
        ValueError: one of them is an option that is not taken here.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{error}; close the quotes") from error
    for word in words:
        option = _option(word)
        if option in _REFUSED:
            raise ValueError(f"{word.partition('=')[0]} is not taken here: {_REFUSED[option]}")
    return words


def advice_for(word: str) -> str:
    """What to do instead of giving `distkd submit` this option of sbatch; empty where it is none."""
    if not word.startswith("-") or "." in word.partition("=")[0]:
        return ""  # more like an override
    option = _option(word)
    name = word.partition("=")[0] if word.startswith("--") else word[:2]
    if option not in _REFUSED:
        known = name in _OTHERS
        return f"{name} is an option of sbatch: add it to DISTKD_SBATCH_OPTIONS {_SITE}" if known else ""
    what = _REFUSED[option]
    return f"{name} is an option of sbatch: {what}{f' {_SITE}' if what.startswith('use DISTKD_') else ''}"


def for_report(words: Sequence[str]) -> tuple[str, ...]:
    """Those of the words, with their values, that a job of one core can bear."""
    kept: list[str] = []
    is_kept = False
    for word in words:
        if word.startswith("-"):
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            is_kept = name in _FOR_REPORT
        if is_kept:
            kept.append(word)
    return tuple(kept)


def _option(word: str) -> str:
    """The long form: sbatch takes `-t5`, and `--tim=5` for `--time=5`, too."""
    if not word.startswith("--"):
        return _SHORT.get(word[:2], word)
    name = word.partition("=")[0]
    return name if name in _REFUSED else next((known for known in _REFUSED if known.startswith(name)), name)
