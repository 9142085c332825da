"""The run folder: the resolved config, how the last attempt ended, and what each rank has to say."""

from __future__ import annotations

import logging
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from distkd import __version__
from distkd.base import World
from distkd.data.volumes import VolumeView
from distkd.errors import ConfigError
from distkd.files import add_event, raise_disk_fault, read_json, write_json, write_text
from distkd.train.settings import Settings

__all__ = [
    "Events",
    "changes",
    "check_config",
    "check_selected",
    "environment",
    "leave_note",
    "make_root",
    "write_config",
    "write_outcome",
]

log = logging.getLogger(__name__)

FREE = {
    "run.root", "run.name", "run.log_every", "run.keep_last", "run.keep_best", "run.checkpoint_every", "run.save",
    "batch.micro_batch", "data.threads", "data.shards", "data.cache_mib", "data.check", "data.on_error",
    "data.max_skipped", "data.stream.cache", "data.stream.cache_gib", "data.stream.ahead", "teacher.export",
    "data.scratch", "engine.name", "engine.zero_stage", "engine.compile", "engine.device", "engine.timeout_s",
    "engine.debug", "metrics.export", "metrics.port", "metrics.linger_s", "metrics.textfile", "metrics.tls_cert",
    "metrics.tls_key", "metrics.password_file", "metrics.tensorboard", "metrics.wandb", "optim.fused",
    "method.bank.placement", "method.bank.memory_share", "method.bank.check_every",
}  # fmt: skip
"""Keys that may differ when a run is resumed: they do not change what is learned, or are checked by digest. Another
engine or another kernel adds in another order, as another number of ranks does."""

FIXED = (
    "model.modalities", "data.degraded", "data.augment.crop", "data.image_mean", "data.image_std",
    *(f"data.volume.{name}" for name in VolumeView.model_fields),
    "eval.metric", "eval.level", "eval.patient_rule",
)  # fmt: skip
"""Keys and sections that may not differ where a checkpoint is gone on from, whatever is allowed: the best student so
far was trained on these inputs and selected by this metric, and would be exported under the new ones."""


class Events:
    """What happened to one rank, one JSON object a line."""

    def __init__(self, folder: Path, world: World):
        self.path = folder / "events" / f"rank-{world.rank:05d}.jsonl"

    def attempt(self) -> int:
        """Number of this attempt, from 1: how often this rank has started before, plus one."""
        if not self.path.exists():
            return 1
        return 1 + sum('"event": "start"' in line for line in self.path.read_text().splitlines())

    def add(self, event: str, **values: Any) -> None:
        """One line more; a disk that does not take it is no reason to stop."""
        add_event(self.path, event, **values)


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def make_root(root: Path) -> None:
    """Make the folder of all runs.

    Raises:
        ConfigError: it cannot be made.
        DiskError: the file system has a fault.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise_disk_fault(f"run root {root}", error)
        raise ConfigError(
            f"run root {root} cannot be made: {error.strerror}; name a folder that all nodes share with --run.root"
        ) from error


def write_config(settings: Settings) -> None:
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    write_text(settings.folder / "config.yaml", text)


def check_config(settings: Settings, *, allow_change: bool = False) -> None:
    """Refuse a run folder that belongs to another config.

    Raises:
        ConfigError: keys that matter differ from those the folder was made with; all are listed.
    """
    path = settings.folder / "config.yaml"
    if not path.exists() or allow_change:
        return
    differing = changes(yaml.safe_load(path.read_text()), settings)
    if differing:
        lines = "".join(f"\n  {key}: {old!r} in the folder, {new!r} now" for key, (old, new) in differing.items())
        advice = "use another --run.name, remove the folder, or pass --allow-change to go on with the new values"
        if any(_is_fixed(key) for key in differing):
            advice = "use another --run.name, or remove the folder"
        raise ConfigError(f"run folder {settings.folder} was made with another config:{lines}\n{advice}")


def changes(written: dict[str, Any], settings: Settings) -> dict[str, tuple[Any, Any]]:
    """Keys that matter, with what a written config has and what the settings have, where these differ."""
    old, new = flatten(_as_resolved(written, settings)), flatten(settings.model_dump(mode="json"))
    keys = sorted((old.keys() | new.keys()) - FREE)
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def check_selected(changed: dict[str, tuple[Any, Any]], checkpoint: str) -> None:
    """Refuse to go on from a checkpoint whose best student was trained on other inputs, or selected otherwise.

    Raises:
        ConfigError: it was; all keys are listed.
    """
    fixed = {key: values for key, values in changed.items() if _is_fixed(key)}
    if fixed:
        lines = "".join(f"\n  {key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in fixed.items())
        raise ConfigError(
            f"checkpoint {checkpoint} was trained on other inputs, or its best student selected otherwise:{lines}\n"
            "put these back, or use another --run.name"
        )


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def _as_resolved(written: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A config that an older version wrote, with the defaults of what came later."""
    try:
        return type(settings).model_validate(written).model_dump(mode="json")
    except ValidationError:  # of another method, or of keys that are gone: they show in the difference
        return written


def environment(settings: Settings, world: World, **extra: Any) -> dict[str, Any]:
    """Versions and layout of this attempt, for whoever has to explain a number later."""
    packages = ("torch", "numpy", "pydantic", "safetensors", "scikit-learn")
    return {
        "distkd": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "world_size": world.size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **extra,
    }


def write_outcome(
    folder: Path, *, state: str, step: int, attempt: int, kind: str | None = None, message: str = ""
) -> None:
    """How this attempt ended; the truth for scripts, since launchers lose the ranks' exit codes."""
    outcome = {"state": state, "kind": kind, "step": step, "attempt": attempt, "message": message}
    try:
        write_json(folder / "outcome.json", outcome)
    except OSError as error:
        log.warning("%s cannot be written: %s", folder / "outcome.json", error.strerror)


def leave_note(folder: Path, world: World) -> None:
    """Tell whoever launched this rank which run it works on: `run-<rank>` in the folder `DISTKD_NOTES`.

    One rank of each machine does, so that no launcher has to guess whose `outcome.json` to read.
    """
    notes = os.environ.get("DISTKD_NOTES")
    if notes and world.local_rank == 0:
        write_text(Path(notes) / f"run-{world.rank}", str(folder.resolve()))


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """`outcome.json`, or None where no attempt has ended."""
    path = folder / "outcome.json"
    return read_json(path) if path.exists() else None
