"""What this machine and this allocation can do, and the command that mends what they can not.

Each check is a function of what was found, so that a test can show it a machine that is not there; `checks` looks at
the real one. Nothing is sent over a network and no process group is made.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distkd.engines.optimizer import find_apex
from distkd.machine import memory_bytes

__all__ = ["Check", "checks", "run"]

State = Literal["ok", "warn", "fail"]
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    state: State
    found: str
    fix: str = ""
    """The command or the setting that mends it; empty where nothing needs mending."""


def checks() -> list[Check]:
    """Everything, looked at now."""
    environ = os.environ
    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apex = find_apex()
    return [
        check_python(sys.version_info[:3]),
        check_torch(torch.__version__, torch.version.cuda, driver=shutil.which("nvidia-smi") is not None, gpus=gpus),
        *(check_gpu(i, torch.cuda.get_device_properties(i)) for i in range(gpus)),
        check_memory(memory_bytes()),
        check_backends(_backends(), gpus),
        check_threads(cores, environ, max(gpus, 1)),
        check_shared_memory(_free_or_none(Path("/dev/shm")), gpus),
        check_disk("disk of this folder", Path.cwd(), shutil.disk_usage(Path.cwd()).free, os.access(".", os.W_OK)),
        *_runs_disk(Path("runs")),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_hostname(socket.gethostname(), _address_of(socket.gethostname()), environ),
        check_clock(time.time(), _file_time()),
        check_tools(_missing_tools()),
        check_compiler(shutil.which("g++", path=environ.get("PATH")), _version("ninja")),
        *(check_optional(name, _version(name), use) for name, use in _OPTIONAL.items()),
        check_apex(_version("apex"), real=apex == "nvidia", broken=apex == "broken"),
        check_slurm(environ, sbatch=shutil.which("sbatch") is not None, gpus=gpus),
    ]


def run() -> int:
    """Print the table; 0 where nothing failed, 1 otherwise."""
    found = checks()
    console = Console()
    if console.is_terminal:
        console.print(_table(found))
    else:
        print(_plain(found))
    count = {state: sum(check.state == state for check in found) for state in _COLOURS}
    print(f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} failed")
    return 1 if count["fail"] else 0


_COLOURS: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def _table(found: list[Check]) -> Table:
    table = Table("", "check", "found, and what mends it", title="distkd doctor", title_justify="left")
    for check in found:
        fix = f"\n[cyan]-> {escape(check.fix)}[/]" if check.fix else ""
        table.add_row(f"[{_COLOURS[check.state]}]{check.state}[/]", check.name, escape(check.found) + fix)
    return table


def _plain(found: list[Check]) -> str:
    """One line a check, for a log file."""
    width = max(len(check.name) for check in found)
    return "\n".join(
        f"{check.state:4}  {check.name:{width}}  {check.found}" + (f"  ->  {check.fix}" if check.fix else "")
        for check in found
    )


def check_python(version: tuple[int, int, int] | tuple[int, ...]) -> Check:
    text = ".".join(str(part) for part in version)
    if tuple(version[:2]) < (3, 11):
        return Check("python", "fail", f"{text}, 3.11 is needed", "make PYTHON=python3.11 venv")
    return Check("python", "ok", f"{text} in {sys.prefix}")


def check_torch(version: str, cuda: str | None, *, driver: bool, gpus: int) -> Check:
    """The build, and whether it fits the machine: a CPU build beside a GPU is slow and says nothing."""
    build = f"{version}, built for {'CUDA ' + cuda if cuda else 'CPU'}"
    if driver and not cuda:
        return Check("torch", "warn", f"{build}, but this machine has an NVIDIA driver", "pip install torch==2.13.0")
    if driver and not gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={hidden!r} hides them" if hidden is not None else "the driver may be too old"
        return Check("torch", "warn", f"{build}, finds no GPU: {why}", "nvidia-smi")
    return Check("torch", "ok", f"{build}, {gpus} GPUs")


def check_gpu(number: int, properties: object) -> Check:
    name, total = getattr(properties, "name", "?"), getattr(properties, "total_memory", 0)
    capability = (getattr(properties, "major", 0), getattr(properties, "minor", 0))
    bf16 = "bf16" if capability >= (8, 0) else "no bf16: use engine.precision fp32"
    state: State = "ok" if capability >= (8, 0) else "warn"
    return Check(f"GPU {number}", state, f"{name}, {total / GIB:.0f} GiB, {bf16}")


def check_memory(available: int) -> Check:
    text = f"{available / GIB:.1f} GiB for this process"
    if available < 2 * GIB:
        return Check("memory", "warn", text, "ask for more, for example sbatch --mem=8G")
    return Check("memory", "ok", text)


def check_backends(backends: Mapping[str, bool], gpus: int) -> Check:
    found = ", ".join(name for name, there in backends.items() if there) or "none"
    if not backends.get("gloo"):
        return Check("collectives", "fail", f"{found}: several ranks need gloo", "pip install torch==2.13.0")
    if gpus and not backends.get("nccl"):
        return Check("collectives", "fail", f"{found}: ranks on GPUs need nccl", "pip install torch==2.13.0")
    return Check("collectives", "ok", found)


def check_threads(cores: int, environ: Mapping[str, str], ranks: int) -> Check:
    """Ranks that each take every core slow one another down many times."""
    text = environ.get("OMP_NUM_THREADS")
    share = max(1, cores // ranks)
    if text is None:
        return Check("threads", "ok", f"{cores} cores, OMP_NUM_THREADS unset: launch/workstation.sh sets it")
    if not text.isdigit() or int(text) < 1:
        fix = f"export OMP_NUM_THREADS={share}"
        return Check("threads", "warn", f"OMP_NUM_THREADS={text!r} is not a positive whole number", fix)
    if int(text) > cores:
        return Check("threads", "warn", f"OMP_NUM_THREADS={text} on {cores} cores", f"export OMP_NUM_THREADS={share}")
    return Check("threads", "ok", f"{cores} cores, OMP_NUM_THREADS={text}")


def check_shared_memory(free: int | None, gpus: int) -> Check:
    """NCCL passes data between the ranks of a node through /dev/shm; containers get 64 MiB of it by default."""
    fix = "docker run --shm-size=8g ... (or --ipc=host); sudo mount -o remount,size=8G /dev/shm"
    if free is None:
        return Check("/dev/shm", "warn", "absent", fix)
    if free < GIB // 2:
        state: State = "fail" if gpus > 1 else "warn"
        return Check("/dev/shm", state, f"{free / 2**20:.0f} MiB free", fix)
    return Check("/dev/shm", "ok", f"{free / GIB:.1f} GiB free")


def check_disk(name: str, path: Path, free: int, writable: bool) -> Check:
    if not writable:
        return Check(name, "fail", f"{path} is not writable", "choose another with --run.root DIR")
    text = f"{free / GIB:.1f} GiB free at {path}"
    if free < GIB:
        return Check(name, "fail" if free < 2**26 else "warn", text, f"make room (du -sh {path}/*), or --run.root DIR")
    return Check(name, "ok", text)


def check_open_files(limits: tuple[int, int]) -> Check:
    """Each rank holds its shards, its sockets to the others and its logs open."""
    soft, hard = limits
    if 0 <= soft < 1024:
        wanted = 4096 if hard < 0 else min(4096, hard)
        return Check("open files", "warn", f"limit {soft}", f"ulimit -n {wanted}")
    return Check("open files", "ok", f"limit {'none' if soft < 0 else soft}")


def check_hostname(name: str, address: str | None, environ: Mapping[str, str]) -> Check:
    """gloo asks for the address of the own host name: loopback works on one node only."""
    interface = environ.get("GLOO_SOCKET_IFNAME")
    fix = "on several nodes: export GLOO_SOCKET_IFNAME=eth0 (`ip -brief address` lists the interfaces)"
    if interface is not None:
        names = [found for _, found in socket.if_nameindex()]
        if interface not in names:
            listed = ", ".join(names)
            return Check("host name", "fail", f"GLOO_SOCKET_IFNAME={interface} is no interface here: {listed}", fix)
        return Check("host name", "ok", f"{name}, gloo uses {interface}")
    if address is None:
        return Check("host name", "warn", f"{name} does not resolve", f"{fix}; or add it to /etc/hosts")
    if address.startswith("127.") or address == "::1":
        return Check("host name", "warn", f"{name} resolves to loopback ({address}): fine on one node", fix)
    return Check("host name", "ok", f"{name} is {address}")


def check_clock(now: float, file_time: float | None) -> Check:
    """A clock years away breaks certificates and logs; one that differs from the file server's breaks ages of files."""
    fix = "sudo timedatectl set-ntp true"
    today = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < Path(__file__).stat().st_mtime - 86400:
        return Check("clock", "warn", f"{today} is before this copy of distkd was made", fix)
    if file_time is not None and abs(file_time - now) > 5:
        return Check("clock", "warn", f"{today}, files written here are {file_time - now:+.0f} s away", fix)
    return Check("clock", "ok", today)


def check_tools(missing: list[str]) -> Check:
    if missing:
        return Check("tools", "warn", f"not beside this Python: {', '.join(missing)}", "make venv")
    return Check("tools", "ok", f"distkd and torchrun in {Path(sys.executable).parent}")


def check_compiler(compiler: str | None, ninja: str | None) -> Check:
    missing = [name for name, found in (("g++", compiler), ("ninja", ninja)) if found is None]
    if missing:
        found = f"no {' and no '.join(missing)}: needed by torch.compile and DeepSpeed's own optimizers only"
        return Check("compiler", "ok", found, "sudo apt-get install g++ ninja-build")
    return Check("compiler", "ok", f"{compiler}, ninja {ninja}")


_OPTIONAL = {
    "deepspeed": "engine.name=deepspeed",
    "onnx": "distkd export --format onnx",
    "tensorboard": "metrics.tensorboard",
    "triton": "torch.compile on GPUs",
    "wandb": "metrics.wandb",
}


def check_optional(name: str, version: str | None, use: str) -> Check:
    if version is not None:
        return Check(name, "ok", version)
    fix = "comes with torch's CUDA build" if name == "triton" else f"pip install -c constraints.txt -e '.[{name}]'"
    return Check(name, "ok", f"not installed; only for {use}", fix)


def check_apex(version: str | None, *, real: bool, broken: bool = False) -> Check:
    """Two packages share a name: NVIDIA's, which is built from source, and a web toolkit on the package index."""
    if real:
        return Check("NVIDIA apex", "ok", f"{version or 'from source'}, with its CUDA extensions")
    if broken:
        found = f"{version or 'from source'}, but its CUDA extensions are missing or do not fit this torch"
        fix = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation . in a clone of github.com/NVIDIA/apex"
        return Check("NVIDIA apex", "warn", found, fix)
    if version is None:
        return Check("NVIDIA apex", "ok", "not installed; torch's own fused optimizers are used")
    found = f"`apex` {version} is not usable: the package of that name on the index is an unrelated web toolkit"
    return Check("NVIDIA apex", "warn", found, "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex")


def check_slurm(environ: Mapping[str, str], *, sbatch: bool, gpus: int) -> Check:
    """Whether this is an allocation, and whether it has a task per GPU."""
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return Check("SLURM", "ok", "sbatch is here, this is no allocation" if sbatch else "not a SLURM machine")
    nodes, tasks = environ.get("SLURM_JOB_NUM_NODES", "1"), environ.get("SLURM_NTASKS", "1")
    per_node = environ.get("SLURM_NTASKS_PER_NODE", "").partition("(")[0]
    cores = environ.get("SLURM_CPUS_PER_TASK", "1")
    text = f"job {job}: {nodes} nodes, {tasks} tasks, {cores} cores a task, {gpus} GPUs here"
    asked_gpus = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_JOB_GPUS")
    if asked_gpus and not gpus:
        return Check("SLURM", "fail", f"{text}, but the job was given GPUs {asked_gpus}", "srun nvidia-smi")
    # one task a node is right under torchrun, which starts the ranks itself
    if gpus and per_node.isdigit() and int(per_node) not in (1, gpus):
        return Check("SLURM", "warn", f"{text}: {per_node} tasks a node", f"sbatch --ntasks-per-node={gpus}")
    return Check("SLURM", "ok", text)


def _backends() -> dict[str, bool]:
    import torch.distributed as dist  # noqa: TID251  # asks what the build has, talks to nobody

    if not dist.is_available():
        return {}
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}


def _free_or_none(path: Path) -> int | None:
    return shutil.disk_usage(path).free if path.is_dir() else None


def _runs_disk(path: Path) -> list[Check]:
    """The run root, where it is a folder (or a link to one) of its own."""
    if not path.is_dir():
        return []
    return [check_disk("disk of runs/", path.resolve(), shutil.disk_usage(path).free, os.access(path, os.W_OK))]


def _address_of(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _file_time() -> float | None:
    """When a file written here now says that it was written; None where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(b"x")
            file.flush()
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _missing_tools() -> list[str]:
    folder = Path(sys.executable).parent
    return [name for name in ("distkd", "torchrun") if not (folder / name).exists()]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
