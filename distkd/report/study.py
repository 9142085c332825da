"""What the page is made of: roles in their colours, what they are compared by, and which runs stay out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distkd.errors import DataError
from distkd.metrics.classification import METRICS
from distkd.report.plots import Style, style_of
from distkd.report.roles import Role, assign_roles, check_comparable, find_baseline
from distkd.report.runs import Run
from distkd.report.stats import Estimate, paired

__all__ = ["Study", "make_study"]


@dataclass(frozen=True)
class Study:
    """Everything that the sections read."""

    split: str
    baseline: str | None
    """Method to compare with instead of the student alone."""
    roles: list[tuple[Role, Style]]
    excluded: list[tuple[Run, str, str]]
    """Run, why it is not in the tables, and the command that helps."""

    @property
    def runs(self) -> list[Run]:
        return [run for role, _ in self.roles for run in role.runs]

    @property
    def counted(self) -> list[tuple[Role, Style]]:
        """Roles that have numbers."""
        return [(role, style) for role, style in self.roles if role.counted]

    @property
    def level(self) -> str:
        return next((run.evaluation.level for run in self.runs if run.evaluation), "sample")

    @property
    def other_levels(self) -> list[str]:
        names: dict[str, None] = {}
        for run in self.runs:
            names |= dict.fromkeys(run.evaluation.levels if run.evaluation else {})
        return [name for name in names if name != self.level]

    @property
    def class_names(self) -> list[str]:
        return next((run.evaluation.class_names for run in self.runs if run.evaluation), [])

    @property
    def unit(self) -> str:
        """What n counts."""
        return "folds" if len({run.fold for role, _ in self.counted for run in role.counted}) > 1 else "seeds"

    def metrics(self, level: str) -> list[str]:
        evaluations = [run.evaluation for role, _ in self.counted for run in role.counted if run.evaluation]
        names = {name for evaluation in evaluations for name in evaluation.metrics_at(level)}
        return [name for name in METRICS if name in names] + sorted(names - set(METRICS))

    @property
    def main_metric(self) -> str:
        """The metric that the configs select weights by, so that it was fixed before the results were seen."""
        known = self.metrics(self.level)
        named = [str(run.get("eval.metric")) for run in self.runs]
        return next(
            (name for name in [*named, "balanced_accuracy"] if name in known), known[0] if known else "accuracy"
        )

    def baseline_of(self, role: Role) -> Role | None:
        return find_baseline(role, [other for other, _ in self.counted], self.baseline)

    def differences(self, role: Role, level: str) -> dict[str, Estimate]:
        """By metric, the paired difference to the role's baseline; empty where there is none."""
        base = self.baseline_of(role)
        if base is None:
            return {}
        found = {name: paired(role.values(name, level), base.values(name, level)) for name in self.metrics(level)}
        return {name: difference for name, difference in found.items() if difference is not None}


def make_study(runs: Sequence[Run], split: str, baseline: str | None) -> Study:
    """Roles, their colours, and which runs stay out of the tables.

    Raises:
        DataError: runs that must not be compared, or a baseline that no run has.
    """
    check_comparable(runs)
    roles, repeated = assign_roles(runs)
    methods = sorted({role.method for role in roles})
    if baseline is not None and baseline not in methods:
        raise DataError(f"no run has the baseline method {baseline!r}; these runs have {', '.join(methods)}")
    styled: list[tuple[Role, Style]] = []
    for role in roles:
        competing = sum(other.kind != "teacher" for other, _ in styled)
        styled.append((role, style_of(competing, is_teacher=role.kind == "teacher")))
    excluded = [(run, *_why_excluded(run, split)) for role in roles for run in role.runs if run not in role.counted]
    excluded += [(run, repeated[run.folder], "") for run in runs if run.folder in repeated]
    return Study(split, baseline, styled, excluded)


def _why_excluded(run: Run, split: str) -> tuple[str, str]:
    if run.is_done:
        return f"no metrics of the {split} split", f"distkd eval {run.folder} --split {split}"
    message = f": {run.outcome['message']}" if run.outcome.get("message") else ""
    resume = f"distkd train {run.folder / 'config.yaml'}"
    if run.state == "unfinished":
        return "it has not said how it ended (still training, or killed)", resume
    return f"{run.state} at step {run.outcome.get('step', 'unknown')}{message}", resume
