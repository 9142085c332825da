"""Which runs are repeats of one experiment, and what each experiment is in the comparison.

Runs that differ in anything but fold, seed and place are never averaged: they become variants of a role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distkd.errors import DataError
from distkd.report.runs import Run
from distkd.report.stats import Unit

__all__ = ["Role", "assign_roles", "check_comparable", "find_baseline", "flatten", "is_baseline", "unlike"]

Kind = Literal["teacher", "alone", "distilled"]

# what may differ between repeats: place, fold and seed, and how the work is cut, which the world-size law makes equal
_REPEATS = {
    "run.root", "run.name", "run.seed", "run.log_every", "run.checkpoint_every", "run.keep_last", "data.fold",
    "data.threads", "data.scratch", "teacher.export", "batch.micro_batch", "engine.device", "engine.timeout_s",
    "metrics.export", "metrics.port",
}  # fmt: skip
# what follows from the other keys, if these tell all variants apart
_FOLLOWS = ("model.encoders.", "data.degraded.")
_TITLES = {"teacher": "teacher", "alone": "student alone"}
_METHOD_TITLES = {"logit_kd": "logit KD"}


@dataclass(frozen=True)
class Role:
    """Repeats of one experiment."""

    kind: Kind
    method: str
    variant: str
    """What sets it apart from other experiments of the same kind and method; empty where there is only one."""
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        name = _TITLES.get(self.kind) or _METHOD_TITLES.get(self.method, self.method)
        return f"{name} ({self.variant})" if self.variant else name

    @property
    def counted(self) -> list[Run]:
        """Runs that are done and evaluated: the only ones that make numbers."""
        return [run for run in self.runs if run.is_done and run.evaluation is not None]

    @property
    def curve_runs(self) -> list[Run]:
        """Runs for curves: the finished ones, or all as long as none has finished."""
        return [run for run in self.runs if run.is_done] or list(self.runs)

    @property
    def data(self) -> str:
        """What it learns from and is scored on."""
        run = self.runs[0]
        return " ".join(str(run.get(key)) for key in ("data.shards", "data.make") if run.get(key) is not None)

    @property
    def labels(self) -> str:
        """How many training samples keep theirs."""
        return _said("data.labelled", self.runs[0].get("data.labelled"))

    @property
    def inputs(self) -> str:
        """What its models need; of a degraded copy what it is made of, and by which protocol."""
        copies = self.runs[0].get("data.degraded", {})
        shown = [f"{name}{_made(copies[name])}" if name in copies else name for name in self.runs[0].modalities]
        return " + ".join(shown) or "inputs not stated"

    @property
    def setting(self) -> dict[str, str]:
        """What a fair comparison shares, in words."""
        return {"data": self.data, "labels": self.labels, "inputs": self.inputs}

    def values(self, metric: str, level: str) -> dict[Unit, float]:
        """The metric by fold and seed, where it is defined."""
        found = {run.unit: run.evaluation.metrics_at(level).get(metric) for run in self.counted if run.evaluation}
        return {unit: float(value) for unit, value in found.items() if value is not None}


def _made(copy: Mapping[str, Any]) -> str:
    return f" ({copy.get('of')} / {copy.get('factor')}, {'restored' if copy.get('restore', True) else 'native'})"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def assign_roles(runs: Sequence[Run]) -> tuple[list[Role], dict[Path, str]]:
    """Roles in the order of the page, and the runs that repeat another run's fold and seed, with the reason."""
    teachers = {run.folder for run in runs if _serves_as_teacher(run, runs)}
    distilled = {run.modalities for run in runs if run.method != "supervised"}
    families: dict[tuple[Kind, str], list[Run]] = {}
    for run in runs:
        if run.method != "supervised":
            kind: Kind = "distilled"
        elif run.folder in teachers or (len(run.modalities) > 1 and run.modalities not in distilled):
            kind = "teacher"
        else:
            kind = "alone"
        families.setdefault((kind, run.method), []).append(run)
    roles: list[Role] = []
    repeated: dict[Path, str] = {}
    for (kind, method), members in families.items():
        for variant, group in _variants(members).items():
            kept = _without_repeats(group, repeated)
            roles.append(Role(kind, method, variant, tuple(kept)))
    return sorted(roles, key=_page_order), repeated


def _page_order(role: Role) -> tuple[Any, ...]:
    """Teachers, then setting by setting, most labels first: the student alone, logit KD, the others."""
    labelled = role.runs[0].get("data.labelled")
    place = 0 if role.kind == "teacher" else 1 if labelled is None else 2
    return place, -(labelled or 0), role.kind == "distilled", role.method != "logit_kd", role.method, role.variant


def _serves_as_teacher(run: Run, runs: Sequence[Run]) -> bool:
    return run.method == "supervised" and any(
        _means(str(other.get("teacher.export")).format_map({"fold": other.fold, "seed": other.seed}), run.folder)
        for other in runs
        if other is not run and other.get("teacher.export") is not None
    )


def _means(export: str, folder: Path) -> bool:
    """Whether `teacher.export` (a run or export folder, or a run's bare name) means this run folder.

    The path may be one of another machine or working folder: then its end decides.
    """
    path = Path(export)
    if path.exists():
        return path.resolve().is_relative_to(folder.resolve())
    parts = [part for part in path.parts if part not in ("export", "model.json", "student.safetensors")]
    tail = parts[-1:] if path.is_absolute() else parts
    return bool(tail) and list(folder.resolve().parts[-len(tail) :]) == tail


def _variants(runs: Sequence[Run]) -> dict[str, list[Run]]:
    flats = [_identity(run) for run in runs]
    keys = sorted({key for flat in flats for key in flat})
    differing = [key for key in keys if len({repr(flat.get(key)) for flat in flats}) > 1]
    for prefix in _FOLLOWS:
        others = [key for key in differing if not f"{key}.".startswith(prefix)]  # also a section that is empty
        if _n_groups(flats, others) == _n_groups(flats, differing):
            differing = others
    seen = {name for run in runs for name in run.modalities if name in run.get("data.degraded", {})}
    copy = seen.pop() if len(seen) == 1 else None
    found: dict[str, list[Run]] = {}
    for run, flat in zip(runs, flats, strict=True):
        found.setdefault(", ".join(_said(key, flat.get(key), copy) for key in differing), []).append(run)
    return found


def _n_groups(flats: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    return len({tuple(repr(flat.get(key)) for key in keys) for flat in flats})


def _identity(run: Run) -> dict[str, Any]:
    return {key: value for key, value in flatten(run.config).items() if key not in _REPEATS}


def _said(key: str, value: Any, copy: str | None = None) -> str:
    """A setting in words; of the degraded copy `copy`, which all models that see one see, without its name."""
    if key == "data.labelled":
        return "all labels" if value is None else f"{value} labels"
    if key.startswith("data.degraded.") and key.count(".") == 3 and value is not None:
        name, field = key.split(".")[2:]
        words = f"{field} {value}" if field != "restore" else "reference" if value else "native"
        return words if name == copy else f"{name} {words}"
    shown = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if key == "model.modalities":
        return f"sees {shown}"
    return f"{key.removeprefix('method.')}={'none' if value is None else shown}"  # the role names the method


def _without_repeats(runs: Sequence[Run], repeated: dict[Path, str]) -> list[Run]:
    """Without finished runs whose fold and seed a finished run has already: a copied run must not count twice."""
    first: dict[Unit, Run] = {}
    kept: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.unit, str(run.folder))):
        makes_numbers = run.is_done and run.evaluation is not None
        if makes_numbers and run.unit in first:
            repeated[run.folder] = f"same experiment, fold and seed as {first[run.unit].name}, which counts"
            continue
        if makes_numbers:
            first[run.unit] = run
        kept.append(run)
    return kept


def is_baseline(role: Role, method: str | None) -> bool:
    """Whether others may be compared with it: the student alone, or `method`."""
    return role.kind == "alone" if method is None else role.kind != "teacher" and role.method == method


def find_baseline(role: Role, roles: Sequence[Role], method: str | None) -> Role | None:
    """What `role` is compared with: the student alone, or `method`, on the same data, labels and inputs.

    Of several the one whose config is nearest. None where there is none, or for the baseline itself.
    """
    wanted = [
        other
        for other in roles
        if is_baseline(other, method)
        and (other.setting == role.setting or (role.kind == "teacher" and other.data == role.data))
    ]
    if role in wanted:
        return None
    own = flatten(role.runs[0].config)
    distance = {id(other): sum(own.get(k) != v for k, v in flatten(other.runs[0].config).items()) for other in wanted}
    return min(wanted, key=lambda other: (distance[id(other)], other.variant), default=None)


def unlike(role: Role, roles: Sequence[Role]) -> str:
    """Why none of `roles` is a fair comparison: what the nearest of them has otherwise; empty without any."""
    differing = [
        (other, [name for name, value in other.setting.items() if value != role.setting[name]]) for other in roles
    ]
    other, names = min(differing, key=lambda pair: len(pair[1]), default=(role, []))
    return ", ".join(f"{name} of {other.title}: {other.setting[name]}" for name in names)


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuses runs whose numbers must not stand in one table.

    Raises:
        DataError: the runs have different tasks, class names or evaluation levels.
    """
    _same("task", {run.folder: run.about_data.get("task") for run in runs})
    measured = {run.folder: run.evaluation for run in runs if run.evaluation is not None}
    known = {run.folder: run.about_data.get("class_names") for run in runs}
    _same("class names", known | {folder: evaluation.class_names for folder, evaluation in measured.items()})
    _same("evaluation level", {folder: evaluation.level for folder, evaluation in measured.items()})


def _same(what: str, by_folder: Mapping[Path, Any]) -> None:
    known = [(folder, value) for folder, value in by_folder.items() if value is not None]
    for folder, value in known[1:]:
        first_folder, first = known[0]
        if value != first:
            raise DataError(
                f"the runs have different {what}: {first_folder} has {first}, {folder} has {value}; "
                f"make one report for each"
            )
