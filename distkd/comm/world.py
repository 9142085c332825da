"""Process group and collectives: the only place that talks to `torch.distributed`.

Every function is the identity in a world of one and is then not counted. A failing collective names this rank and what
it was waiting in.
"""

# torch.distributed leaves the types of its tensors out
# pyright: reportUnknownMemberType=false, reportUnknownLambdaType=false, reportUnknownArgumentType=false

# Shapes: R rows of this rank, equal on all ranks

from __future__ import annotations

import importlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distkd.base import World
from distkd.errors import ConfigError, DistkdError, DivergedError, LostRankError

__all__ = [
    "DISAGREEMENT",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_sum",
    "any_rank",
    "barrier",
    "broadcast_object",
    "counts",
    "failure",
    "gather_objects",
    "init",
    "moved_bytes",
    "observed",
    "reduce_scatter_rows",
    "shutdown",
    "start_all_gather_rows",
]

T = TypeVar("T")

DISAGREEMENT = "mismatch between collectives"
"""What torch says in debug mode of ranks that are in different collectives."""

counts: Counter[str] = Counter()
"""Collectives of this process by name, since it started."""

moved_bytes: Counter[str] = Counter()
"""Bytes of tensors that this process handed to collectives by name, since it started."""

_observer: list[tuple[int, Callable[[], AbstractContextManager[None]]]] = []


@contextmanager
def observed(around: Callable[[], AbstractContextManager[None]]) -> Generator[None]:
    """Inside, every collective of this thread runs in a context that `around` makes; those of other threads do not."""
    before = _observer[:]
    _observer[:] = [(threading.get_ident(), around)]
    try:
        yield
    finally:
        _observer[:] = before


_record: list[Path] = []
"""Where the flight recorder's dump goes, rank appended; empty where nobody asked for one."""
_RECORDED = 2000
"""Collectives that it remembers."""


def init(
    world: World,
    *,
    device: torch.device,
    timeout_s: float,
    debug: bool = False,
    record: Path | None = None,
    store: Path | None = None,
) -> None:
    """Meet the other ranks: NCCL on CUDA, gloo elsewhere; nothing to do in a world of one.

    Args:
        world: this rank and how many there are.
        device: where the tensors of the collectives live.
        timeout_s: how long a collective waits for a missing rank.
        debug: compare every collective over the ranks before it starts, those of the engines included.
        record: beginning of the path to which a rank that loses another one writes its last collectives, as torch's
            flight recorder has them.
        store: file to meet over; unset takes the address that the launcher put into the environment.

    Raises:
        LostRankError: not all ranks came.
        ConfigError: there is no address to meet at.
    """
    if world.size == 1:
        return
    method = "env://" if store is None else f"file://{store}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    _record[:] = [] if record is None else [record]
    if _record:
        # read by torch when the group is made; where a kernel hangs, NCCL's watchdog writes the dump by itself
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_RECORDED))
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(record)
    dist.set_debug_level(dist.DebugLevel.DETAIL if debug else dist.DebugLevel.OFF)  # pyright: ignore[reportPrivateImportUsage]

    def meet() -> None:
        dist.init_process_group(
            backend,
            init_method=method,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )

    try:
        _guard("init", world, meet)
    except ValueError as error:
        raise ConfigError(
            f"rank {world.rank} of {world.size} cannot meet the others: {error}; start the ranks with torchrun or srun"
        ) from error


def shutdown() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def failure(what: str, error: BaseException, world: World) -> DistkdError:
    """A failed collective in our words; `what` is what failed, as in "the exchange of gradients"."""
    if DISAGREEMENT in str(error):
        apart = DivergedError(
            f"rank {world.rank} of {world.size}: {what} is not what the other ranks are in: {error}; look for code "
            "that differs by rank"
        )
        apart.local = True  # each rank knows best where it is itself
        return apart
    return LostRankError(
        f"rank {world.rank} of {world.size}: {what} failed: {error}; another rank died or stopped answering, start the "
        f"run again to resume{_dumped(world)}"
    )


def _dumped(world: World) -> str:
    """Write down what this rank's last collectives were, and say where."""
    if not _record or not dist.is_initialized():
        return ""
    path = Path(f"{_record[0]}{world.rank}")
    nccl = dist.get_backend() == "nccl"
    try:
        recorders = importlib.import_module("torch._C._distributed_c10d")
        # gloo's as text: `torchfrtrace` does not read it, and the pickled form takes seconds
        dump: Callable[[], bytes] = getattr(recorders, "_dump_nccl_trace" if nccl else "_dump_fr_trace_json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dump())
    except (AttributeError, OSError, RuntimeError):
        return ""  # the error itself matters more
    reader = f" (torchfrtrace -p {_record[0].name} {path.parent})" if nccl else ""
    return f"; its last collectives are in {path}{reader}"


def _guard(name: str, world: World, call: Callable[[], T], handed: Tensor | None = None) -> T:
    counts[name] += 1
    if handed is not None:
        moved_bytes[name] += handed.nbytes
    return _meet(name, world, call)


def _meet(name: str, world: World, call: Callable[[], T]) -> T:
    try:
        with _observing():
            return call()
    except (RuntimeError, dist.DistError) as error:
        raise failure(f"collective {name!r} number {counts[name]}", error, world) from error


def _observing() -> AbstractContextManager[None]:
    if _observer and _observer[0][0] == threading.get_ident():
        return _observer[0][1]()
    return nullcontext()


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if world.size > 1:
        _guard("all_reduce_sum", world, lambda: dist.all_reduce(tensor, dist.ReduceOp.SUM), tensor)
    return tensor


def all_reduce_max(tensor: Tensor, world: World) -> Tensor:
    """Largest over ranks, in place; returns the tensor."""
    if world.size > 1:
        _guard("all_reduce_max", world, lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX), tensor)
    return tensor


def any_rank(claim: bool, world: World, *, device: torch.device) -> bool:
    """Whether it is true on any rank, known to all; one all-reduce and a host sync."""
    return all_reduce_max(torch.tensor(float(claim), device=device), world).item() > 0


def all_gather_rows(tensor: Tensor, world: World) -> Tensor:
    """Rows of all ranks, (R x size, ...), in rank order; no gradient."""
    if world.size == 1:
        return tensor.detach()
    rows = tensor.detach().contiguous()
    gathered = rows.new_empty(rows.shape[0] * world.size, *rows.shape[1:])
    _guard("all_gather_rows", world, lambda: dist.all_gather_single(gathered, rows), rows)
    return gathered


def start_all_gather_rows(tensor: Tensor, world: World) -> Callable[[], Tensor]:
    """`all_gather_rows` that runs beside what follows; the returned function waits for it and gives the rows.

    Every rank starts it at the same place among its collectives; what is gathered must stay as it is until then.
    """
    rows = tensor.detach().contiguous()
    if world.size == 1:
        return lambda: rows
    gathered = rows.new_empty(rows.shape[0] * world.size, *rows.shape[1:])

    def start() -> dist.Work:
        return cast(dist.Work, dist.all_gather_single(gathered, rows, async_op=True))

    work = _guard("all_gather_rows", world, start, rows)

    def arrived() -> Tensor:
        _meet("all_gather_rows", world, work.wait)
        return gathered

    return arrived


def reduce_scatter_rows(tensor: Tensor, world: World) -> Tensor:
    """This rank's rows, (R / size, ...), of the sum over ranks; no gradient."""
    if world.size == 1:
        return tensor.detach()
    rows = tensor.detach().contiguous()
    own = rows.new_empty(rows.shape[0] // world.size, *rows.shape[1:])
    _guard("reduce_scatter_rows", world, lambda: dist.reduce_scatter_single(own, rows, dist.ReduceOp.SUM), rows)
    return own


def gather_objects(value: T, world: World) -> list[T]:
    """Every rank's object on every rank, in rank order; pickled, so for reports and not for steps."""
    if world.size == 1:
        return [value]
    found: list[Any] = [None] * world.size
    _guard("gather_objects", world, lambda: dist.all_gather_object(found, value))
    return found


def broadcast_object(value: T, world: World) -> T:
    """The main rank's object on every rank; pickled."""
    if world.size == 1:
        return value
    box: list[Any] = [value if world.is_main else None]
    _guard("broadcast_object", world, lambda: dist.broadcast_object_list(box, src=0))
    return box[0]


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        _guard("barrier", world, dist.barrier)
