"""What is on disk of a run: how far it is, what it was doing, and how two finished runs differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distkd.metrics.jsonl import read_jsonl

__all__ = [
    "assert_close", "checkpoints", "differences", "events", "last_line", "metrics", "newest_step",
    "outcome", "partials", "starts", "weights",
]  # fmt: skip

TIMES = {"timings", "time", "straggler"}
"""Keys of a line of metrics that say how long something took, wherever they stand in it."""


def outcome(folder: Path) -> dict[str, Any]:
    """How the last attempt ended; empty where none has."""
    path = folder / "outcome.json"
    return json.loads(path.read_text()) if path.exists() else {}


def starts(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The starts of a rank, in order: attempt, step resumed from, world size."""
    return [event for event in events(folder, rank) if event["event"] == "start"]


def events(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return read_jsonl(folder / "events" / f"rank-{rank:05d}.jsonl")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    return read_jsonl(folder / "metrics.jsonl")


def last_line(folder: Path) -> dict[str, Any]:
    """The last whole line of metrics, step 0 where there is none; quick enough to be polled."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return json.loads(lines[-2]) if len(lines) > 1 else {"step": 0}


def partials(folder: Path) -> list[str]:
    """Checkpoints that are being written, or were when everything was killed."""
    try:
        return sorted(path.name for path in (folder / "checkpoints").glob(".step-*.partial"))
    except OSError:  # renamed while it was listed
        return []


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first.

    Raises:
        AssertionError: one bears the name of a complete checkpoint and is none.
    """
    found = sorted((folder / "checkpoints").glob("step-*"))
    for path in found:
        assert (path / "meta.json").is_file(), f"{path} has no meta.json"
        files = json.loads((path / "meta.json").read_text())["files"]
        for name, expected in files.items():
            digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
            assert digest == expected, f"{path / name} is not the file that meta.json describes"
    return found


def newest_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 where there is none."""
    found = checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint by name: weights, optimizer, banks, best student."""
    files = [load_file(path) for path in sorted(checkpoints(folder)[-1].glob("*.safetensors"))]
    found = {name: tensor for file in files for name, tensor in file.items()}
    assert len(found) == sum(map(len, files)), "a tensor is in two files"
    return found


def differences(found: Path, expected: Path) -> list[str]:
    """In what a finished run differs from another one, bit by bit, in words; times do not count."""
    words: list[str] = []
    if (state := outcome(found).get("state")) != "done":
        words.append(f"outcome is {state}, not done")
    words += [f"left over: {name}" for name in partials(found)]
    words += _unequal("checkpoint", weights(found), weights(expected))
    exports = [load_file(folder / "export" / "student.safetensors") for folder in (found, expected)]
    words += _unequal("export", *exports)
    lines = [_without_times(metrics(folder)) for folder in (found, expected)]
    if len(lines[0]) != len(lines[1]):
        words.append(f"metrics.jsonl has {len(lines[0])} lines, not {len(lines[1])}")
    pairs = zip(*lines, strict=False)
    words += [f"metrics.jsonl line {n}: {a}, not {b}" for n, (a, b) in enumerate(pairs, start=1) if a != b][:3]
    for path in sorted((expected / "eval").iterdir()):
        if (found / "eval" / path.name).read_bytes() != path.read_bytes():
            words.append(f"eval/{path.name} differs")
    return words


def assert_close(found: Path, expected: Path, tolerance: float) -> None:
    """Newest checkpoints and exports of two finished runs are equal up to `tolerance`, absolute and relative."""
    exports = [load_file(folder / "export" / "student.safetensors") for folder in (found, expected)]
    for ours, theirs in ((weights(found), weights(expected)), exports):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(
                tensor, theirs[name], atol=tolerance, rtol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


def _unequal(what: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    words = [f"{what}: {name} is on one side only" for name in sorted(found.keys() ^ expected.keys())]
    shared = sorted(found.keys() & expected.keys())
    return words + [f"{what}: {name} differs" for name in shared if not _same_bits(found[name], expected[name])]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also of values that are not numbers, and of the sign of zero."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if not _is_time(key)}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _is_time(key: str) -> bool:
    return key in TIMES or key.endswith(("_s", "_seconds", "_per_s"))
