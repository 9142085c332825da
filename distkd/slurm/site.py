"""What differs from one cluster to the next: `site.env`, a file of bash assignments, as a typed value.

Bash reads it, here for the options of `sbatch` and in the job for what runs there, so both see the same values. What is
set in the environment wins over it, in both places.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from distkd.errors import ConfigError
from distkd.slurm.words import read_options

__all__ = ["RUN_TIME", "Site", "find_site", "limit_seconds", "read_site"]

READ_S = 30.0
"""A file of assignments takes no time; one that waits for something would wait in every job, too."""

PREFIX = "DISTKD_"
RUN_TIME = (
    "DISTKD_MODULES", "DISTKD_SETUP", "DISTKD_CONTAINER", "DISTKD_PYTHON", "DISTKD_SCRATCH", "DISTKD_INTERFACE",
    "DISTKD_METRICS", "DISTKD_RANKS_PER_NODE", "DISTKD_ELASTIC", "DISTKD_MAX_FAILURES", "DISTKD_MAX_REQUEUES",
)  # fmt: skip
"""Settings that the scripts read where the job runs."""

EXCLUSIVE = ("DISTKD_MEM", "DISTKD_MEM_PER_GPU")
"""SLURM takes only one of them."""


@dataclass(frozen=True, slots=True)
class Site:
    """Settings of a cluster; what is None is left to SLURM's own defaults."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gpu_type: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    """Cores of a node that a job may use: it has one task per node, which starts the ranks."""
    mem: str | None = None
    """Memory per node, as `120G`."""
    mem_per_gpu: str | None = None
    time: str | None = None
    """Time limit as SLURM writes it: `4:00:00`, `1-12`, or minutes."""
    exclusive: bool = False
    throttle: int | None = None
    """Tasks of an array that may run at once."""
    sbatch_options: tuple[str, ...] = ()
    ranks_per_node: int | None = None
    elastic: int | None = None
    """Nodes that are enough to go on after a loss."""
    scratch: str | None = None
    """Folder on a node's own disk for copies of shards; its `$NAMES` are filled in there."""
    metrics: str | None = None
    """Who may scrape the ranks: off, local or network."""
    setup: str | None = None
    """File that the jobs source on their nodes."""
    at_run_time: frozenset[str] = frozenset()
    """Names of the settings for the job itself that are given."""

    def overrides(self, *, streamed: bool) -> list[str]:
        """Words that the scripts put before the user's; a set that is streamed has no folder to copy."""
        words = [] if self.scratch is None or streamed else ["--data.scratch", self.scratch]
        return words + ([] if self.metrics is None else ["--metrics.export", self.metrics])


def find_site(given: Path | None, home: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The site file: `given`, else that of `DISTKD_SITE`, else `slurm/site.env` of the clone where there is one.

    Raises:
        ConfigError: the one that is named does not exist.
    """
    named = given or (Path(environ["DISTKD_SITE"]) if environ.get("DISTKD_SITE") else None)
    default = home / "slurm" / "site.env"
    if named is None:
        return default if default.is_file() else None
    if not named.is_file():
        which = "--site" if given else "DISTKD_SITE"
        raise ConfigError(f"{which} names no file: {named}; copy {default}.example and fill in what your cluster needs")
    return named


def read_site(path: Path | None, environ: Mapping[str, str] = os.environ) -> Site:
    """The settings of a site file, over which those of the environment win; an empty one there takes that of the file
    away.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    known = dict.fromkeys((*_FIELDS, *RUN_TIME))
    of_file = {} if path is None else {name: value for name, value in _run_by_bash(path).items() if value.strip()}
    of_environment = {name: environ[name] for name in known if name in environ}
    problems = [_unknown(name) for name in sorted(of_file) if _unknown(name)]
    if sum(bool(of_environment.get(name, "").strip()) for name in EXCLUSIVE) == 1:
        of_file = {name: value for name, value in of_file.items() if name not in EXCLUSIVE}
    found = {name: value.strip() for name, value in (of_file | of_environment).items() if value.strip()}
    values: dict[str, Any] = {}
    for name, (field, read) in _FIELDS.items():
        if name in found:
            try:
                values[field] = read(found[name])
            except ValueError as error:
                problems.append(f"{name}={found[name]!r}: {error}")
    problems += [
        f"{name}={found[name]!r}: expected a whole number of 0 or more"
        for name in ("DISTKD_MAX_FAILURES", "DISTKD_MAX_REQUEUES")
        if not re.fullmatch(r"\d+", found.get(name, "0"))
    ]
    if "mem" in values and "mem_per_gpu" in values:
        problems.append("DISTKD_MEM and DISTKD_MEM_PER_GPU exclude each other, SLURM takes only one; remove one")
    if "gpu_type" in values and "gpus_per_node" not in values:
        problems.append("DISTKD_GPU_TYPE needs DISTKD_GPUS_PER_NODE, the number of GPUs")
    if problems:
        names = [name for name in of_environment if name in found]
        sources = [] if path is None else [f"site file {path}"]
        sources += [f"{', '.join(names)} of the environment"] if names else []
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise ConfigError(f"{' with '.join(sources)} has {count}:\n" + "\n".join(f"  {line}" for line in problems))
    return Site(**values, at_run_time=frozenset(name for name in RUN_TIME if name in found))


def limit_seconds(limit: str) -> int | None:
    """A time limit of SLURM's in seconds, None for none at all: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ValueError: it is nothing of that.
    """
    if limit.upper() in ("0", "UNLIMITED", "INFINITE"):
        return None
    found = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})", limit)
    if found is None:
        raise ValueError("expected a time limit such as 4:00:00, 1-12:00:00 or 90 (minutes)")
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: parts}[len(parts)]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _run_by_bash(path: Path) -> dict[str, str]:
    """What the file assigns, read where nothing else is set; a word on standard error is a mistake in it."""
    if b"\r\n" in path.read_bytes():
        raise ConfigError(f"site file {path} has Windows line ends; dos2unix {shlex.quote(str(path))}")
    program = 'bash -n -- "$1" && set -a && . "$1"; set +a; env -0'
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "USER") if name in os.environ}
    try:
        done = subprocess.run(
            ["bash", "--norc", "--noprofile", "-c", program, "bash", str(path.resolve())],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=READ_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"site file {path} does not end within {READ_S:.0f} s; only assign values in it") from error
    complaint = done.stderr.decode(errors="replace").replace(str(path.resolve()), path.name).strip()
    if complaint or done.returncode:
        advice = "write NAME=value without spaces around =, and values with spaces in quotes"
        raise ConfigError(f"site file {path} cannot be read: {complaint or f'exit {done.returncode}'}; {advice}")
    pairs = [line.partition("=") for line in done.stdout.decode(errors="replace").split("\0") if line]
    return {name: value for name, _, value in pairs if name not in environment}


def _unknown(name: str) -> str:
    """What is wrong with a name; names without the prefix are variables for the job, such as NCCL_DEBUG."""
    known = tuple(dict.fromkeys((*_FIELDS, *RUN_TIME)))
    if name in known:
        return ""
    if not name.startswith(PREFIX):
        return f"{name} is no setting; did you mean {PREFIX}{name}?" if PREFIX + name in known else ""
    close = get_close_matches(name.removeprefix(PREFIX), [item.removeprefix(PREFIX) for item in known], n=1)
    return f"{name} is no setting; " + (
        f"did you mean {PREFIX}{close[0]}?" if close else f"known are {', '.join(known)}"
    )


def _word(text: str) -> str:
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise ValueError("expected a whole number of 1 or more")
    return int(text)


def _yes(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("expected 1, or nothing")
    return text == "1"


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+[KMGT]?", text):
        raise ValueError("expected a size such as 120G")
    return text


def _limit(text: str) -> str:
    limit_seconds(text)
    return text


def _scratch(text: str) -> str:
    if not text.startswith(("/", "$")):
        raise ValueError("expected a whole path, or one that begins with a $NAME (in single quotes) of the node")
    return text


def _metrics(text: str) -> str:
    if text not in ("off", "local", "network"):
        raise ValueError("expected off, local or network")
    return text


_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "DISTKD_PARTITION": ("partition", _word),
    "DISTKD_ACCOUNT": ("account", _word),
    "DISTKD_QOS": ("qos", _word),
    "DISTKD_CONSTRAINT": ("constraint", _word),
    "DISTKD_RESERVATION": ("reservation", _word),
    "DISTKD_GPU_TYPE": ("gpu_type", _word),
    "DISTKD_GPUS_PER_NODE": ("gpus_per_node", _count),
    "DISTKD_CPUS_PER_TASK": ("cpus_per_task", _count),
    "DISTKD_MEM": ("mem", _memory),
    "DISTKD_MEM_PER_GPU": ("mem_per_gpu", _memory),
    "DISTKD_TIME": ("time", _limit),
    "DISTKD_EXCLUSIVE": ("exclusive", _yes),
    "DISTKD_THROTTLE": ("throttle", _count),
    "DISTKD_SBATCH_OPTIONS": ("sbatch_options", read_options),
    "DISTKD_RANKS_PER_NODE": ("ranks_per_node", _count),
    "DISTKD_ELASTIC": ("elastic", _count),
    "DISTKD_SCRATCH": ("scratch", _scratch),
    "DISTKD_METRICS": ("metrics", _metrics),
    "DISTKD_SETUP": ("setup", _word),
}
"""Settings that `distkd submit` looks at: the field of `Site`, and what makes a value of the text."""
