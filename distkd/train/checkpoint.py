"""Checkpoints: complete or absent, verified when read, and everything that the next step depends on.

A checkpoint is a folder `step-00001200` with the engine's weights and optimizer, the method's state (banks,
normalisers, mean teacher), the best student so far, and `meta.json` with the position, the config and a digest of every
file. The data position is the step itself: the plan is a pure function of it. No generator is saved because none is
used.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distkd.base import World
from distkd.comm.world import barrier, broadcast_object, gather_objects
from distkd.engines import Engine
from distkd.errors import CheckpointError, DivergedError
from distkd.files import atomic_folder, digest, read_json, write_json, write_text

__all__ = ["Best", "check_equal", "find_latest", "load", "read_meta", "save"]

FORMAT = 1
META, STATE, BEST = "meta.json", "state.safetensors", "best.safetensors"


@dataclass(slots=True)
class Best:
    """The student with the best validation metric so far; weights on the host, kept by the main rank only."""

    step: int = -1
    value: float = float("-inf")
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def save(
    checkpoints: Path,
    step: int,
    *,
    engine: Engine,
    state: nn.Module,
    best: Best,
    meta: Mapping[str, Any],
    keep_last: int,
    world: World,
) -> Path:
    """Write the checkpoint of the run after `step` steps, then remove all but the last `keep_last`.

    Collectives: one barrier; the main rank writes, every rank holds the same.
    """
    target = folder_of(checkpoints, step)
    if world.is_main:
        with atomic_folder(target) as aside:
            engine.save(aside)
            save_file({name: tensor.contiguous() for name, tensor in state.state_dict().items()}, aside / STATE)
            save_file({name: tensor.contiguous() for name, tensor in best.weights.items()}, aside / BEST)
            files = {path.name: digest(path) for path in sorted(aside.iterdir())}
            best_point = {"step": best.step, "value": best.value} if best.weights else None
            write_json(aside / META, {"format": FORMAT, "step": step, **meta, "best": best_point, "files": files})
        write_text(checkpoints / "latest", target.name + "\n")
        for old in _complete(checkpoints)[:-keep_last]:
            shutil.rmtree(old)
    barrier(world)
    return target


def check_equal(modules: Sequence[nn.Module], step: int, world: World) -> None:
    """A cheap guard before a checkpoint is worth writing: every rank holds the same bytes.

    Raises:
        DivergedError: on all ranks, naming those that differ from rank 0.

    Collectives: one gather of a digest.
    """
    if world.size == 1:
        return
    sha = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digests = gather_objects(sha.hexdigest(), world)
    others = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if others:
        raise DivergedError(
            f"ranks {others} hold other weights or banks than rank 0 after step {step}; the last checkpoint is from "
            "before: start again to resume, and look for code that differs by rank or for failing hardware"
        )


def _complete(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, oldest first; one that is being written has another name."""
    return sorted(path for path in checkpoints.glob("step-*") if (path / META).exists())


def find_latest(checkpoints: Path, world: World) -> Path | None:
    """The newest checkpoint whose files all have their digests; damaged ones are passed over.

    Decided by the main rank for all: ranks that look for themselves could resume at different steps.
    """
    found: Path | None = None
    damaged = False
    if world.is_main:
        for partial in checkpoints.glob(".*.partial"):
            shutil.rmtree(partial)
        found = next((path for path in reversed(_complete(checkpoints)) if _is_whole(path)), None)
        damaged = found is None and bool(_complete(checkpoints))
    found, damaged = broadcast_object((found, damaged), world)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {checkpoints} is damaged (digests differ); remove the folder to start again"
        )
    return found


def _is_whole(folder: Path) -> bool:
    try:
        files: dict[str, str] = read_json(folder / META)["files"]
        return all(digest(folder / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError):
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
    engine.load(folder)
    try:
        state.load_state_dict(load_file(folder / STATE))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the state in checkpoint {folder} does not fit this run: {error}") from error
    point = read_meta(folder)["best"]
    if point is None or not world.is_main:
        return Best() if point is None else Best(point["step"], point["value"])
    return Best(point["step"], point["value"], load_file(folder / BEST))
