"""Checkpoints as they lie on disk: complete or absent, verified when read, equal for every engine and world size.

A checkpoint is a folder `step-00001200` with `rank-*.safetensors`, written by as many ranks as are worth it, and
`meta.json` with the position, the config and a digest of every file. Tensors are whole and have names:
`trainable/`, `optimizer/` and `engine/` are the engine's entries, `state/` is the method's state (banks, normalisers,
mean teacher), `best/` the best student so far. Which file holds which tensor means nothing, so any number of ranks and
any engine goes on from it. The data position is the step itself: the plan is a pure function of it. No generator is
saved because none is used.
"""

# safetensors leaves the types of its lazy files out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distkd.base import World
from distkd.comm.world import broadcast_object, gather_objects
from distkd.engines import Engine, Entry, under
from distkd.errors import CheckpointError, DiskError, DivergedError
from distkd.files import digest, raise_disk_fault, read_json
from distkd.train.rows import bank_rows, fill_rows, has_rows, is_part, rows_entry

__all__ = [
    "BEST",
    "FORMAT",
    "META",
    "STATE",
    "Best",
    "Tensors",
    "check_equal",
    "complete",
    "find_latest",
    "load",
    "state_entries",
]

FORMAT = 2
META = "meta.json"
STATE, BEST = "state/", "best/"
"""Prefixes of names beside the engine's own."""


@dataclass(slots=True)
class Best:
    """The student with the best validation metric so far; weights on the host, kept by the main rank only."""

    step: int = -1
    value: float = float("-inf")
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for."""

    def __init__(self, folder: Path):
        self._files: dict[str, Any] = {}
        self._key: dict[str, str] = {}
        old = read_json(folder / META)["format"] == 1
        try:
            for path in sorted(folder.glob("*.safetensors")):
                file: Any = safe_open(path, "pt")
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    name = f"{path.stem}/{key}" if old else key
                    self._files[name], self._key[name] = file, key
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError):
                raise_disk_fault(f"checkpoint {folder}", error)
            raise CheckpointError(
                f"cannot read checkpoint {folder}: {error}; remove it to use the older one"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(self._key[name])

    def rows(self, name: str, part: slice) -> Tensor:
        """Some rows of a tensor, without reading the others."""
        return self._files[name].get_slice(self._key[name])[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def under(self, *prefixes: str) -> Tensors:
        """Those whose names start with one of the prefixes."""
        part = object.__new__(Tensors)
        part._files = {name: file for name, file in self._files.items() if name.startswith(prefixes)}
        part._key = self._key
        return part


def check_equal(modules: Sequence[nn.Module], step: int, world: World) -> None:
    """A cheap guard before a checkpoint is worth writing: every rank holds the same values.

    Norm and sum of every tensor stand for its bytes: computed where it lies, read by the host at once.

    Raises:
        DivergedError: on all ranks, naming those that differ from rank 0.

    Collectives: one gather of a digest.
    """
    if world.size == 1:
        return
    sha = hashlib.sha256()
    tensors = [tensor.detach() for module in modules for tensor in _replicated(module)]
    if tensors:
        marks = [mark for tensor in tensors for mark in _marks(tensor)]
        sha.update(torch.stack([mark.to(tensors[0].device) for mark in marks]).cpu().numpy().tobytes())
    digests = gather_objects(sha.hexdigest(), world)
    others = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if others:
        raise DivergedError(
            f"ranks {others} hold other weights or banks than rank 0 after step {step}; the last checkpoint is from "
            "before: start again to resume, and look for code that differs by rank or for failing hardware"
        )


def _replicated(module: nn.Module) -> list[Tensor]:
    apart = {name for name, rows in bank_rows(module).items() if rows.bank.parts > 1}
    return [tensor for name, tensor in module.state_dict().items() if name not in apart]


def _marks(tensor: Tensor) -> tuple[Tensor, Tensor]:
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.float64)
    # summed in float64: in float32 a changed last digit of one row is lost among many
    return torch.linalg.vector_norm(tensor, dtype=torch.float64), tensor.sum(dtype=torch.float64)


def state_entries(state: nn.Module) -> list[Entry]:
    """Everything that a method remembers; of banks that are sharded this rank's rows."""
    apart = bank_rows(state)
    return [
        rows_entry(f"{STATE}{name}", apart[name]) if name in apart else Entry(f"{STATE}{name}", t.nbytes, lambda t=t: t)
        for name, t in state.state_dict().items()
    ]


def _load_state(state: nn.Module, tensors: Tensors) -> None:
    names = list(tensors)
    apart = bank_rows(state)
    known = {name: rows for name, rows in apart.items() if name.endswith("rows_ND") or has_rows(STATE + name, names)}
    for name, rows in known.items():
        fill_rows(rows, f"{STATE}{name}", names, tensors.rows)
    others = [name for name in names if not is_part(name) and name.removeprefix(STATE) not in apart]
    found = under(STATE, {name: tensors[name] for name in others if name.startswith(STATE)})
    state.load_state_dict(found | {name: rows.rows_LX for name, rows in known.items()})


def complete(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, oldest first; one that is being written has another name."""
    return sorted(path for path in checkpoints.glob("step-*") if (path / META).exists())


def find_latest(checkpoints: Path, world: World) -> Path | None:
    """The newest checkpoint whose files all have their digests; damaged ones are passed over.

    Decided by the main rank for all: ranks that look for themselves could resume at different steps.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged; or the newest is of a newer version.
        DiskError: there are checkpoints, none is whole, and one cannot be read at present.

    Collectives: one broadcast.
    """
    answer: Path | CheckpointError | DiskError | None = None
    if world.is_main:
        for partial in checkpoints.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        try:
            answer = _newest_whole(checkpoints)
        except (CheckpointError, DiskError) as error:
            error.local = False  # all ranks raise it
            answer = error
    answer = broadcast_object(answer, world)
    if isinstance(answer, CheckpointError | DiskError):
        raise answer
    return answer


def _newest_whole(checkpoints: Path) -> Path | None:
    found = complete(checkpoints)
    errors: list[OSError] = []
    whole = next((path for path in reversed(found) if _is_whole(path, errors)), None)
    if whole is None and found:
        for error in errors:
            raise_disk_fault(f"checkpoints in {checkpoints}", error)
        raise CheckpointError(
            f"every checkpoint in {checkpoints} is damaged (digests differ); remove the folder to start again"
        )
    if whole is not None:
        read_meta(whole)
    return whole


def _is_whole(folder: Path, errors: list[OSError]) -> bool:
    """Adds to `errors` why it cannot be read."""
    try:
        files: dict[str, str] = read_json(folder / META)["files"]
        return all(digest(folder / name) == expected for name, expected in files.items())
    except OSError as error:
        errors.append(error)
    except (ValueError, KeyError):
        pass
    return False


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint.

    Raises:
        CheckpointError: written by a newer version.
    """
    meta: dict[str, Any] = read_json(folder / META)
    if meta["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {meta['format']}, this version reads up to {FORMAT}; update distkd"
        )
    return meta


def load(folder: Path, *, engine: Engine, state: nn.Module, world: World) -> Best:
    """Put a checkpoint back; every rank reads. Returns the best student so far.

    Raises:
        CheckpointError: the tensors do not fit this run.
    """
    tensors = Tensors(folder)
    try:
        engine.load(tensors.under("trainable/", "optimizer/", "engine/"))
        _load_state(state, tensors)
    except (CheckpointError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} does not fit this run: {error}") from error
    point = read_meta(folder)["best"]
    if point is None or not world.is_main:
        return Best() if point is None else Best(point["step"], point["value"])
    return Best(point["step"], point["value"], under(BEST, tensors))
