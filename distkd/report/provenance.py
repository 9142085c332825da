"""The sections about where numbers come from: classes, runs and how they ended, data, configuration, environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from distkd.metrics import PER_CLASS
from distkd.report.html import Safe, details, join, name_cell, table, tag
from distkd.report.results import Study, number, role_cell, selection_of
from distkd.report.roles import Role
from distkd.report.stats import estimate, units_of

__all__ = ["excluded_notice", "per_class_table", "provenance"]


def excluded_notice(study: Study) -> Safe:
    """Runs that are here and not in the tables, with the reason and the command that helps."""
    if not study.excluded:
        return Safe("")
    items = [
        tag("li", tag("b", run.name), f" (fold {run.fold}, seed {run.seed}): {reason}", *_advice(advice))
        for run, reason, advice in study.excluded
    ]
    count = len(items)
    title = f"{count} run{'s are' if count > 1 else ' is'} not in the tables of results"
    return tag("div", tag("p", tag("b", title)), tag("ul", *items), class_="notice", role="note")


def _advice(command: str) -> list[str]:
    return ["; ", tag("code", command)] if command else []


def per_class_table(study: Study) -> Safe:
    """Means over folds or seeds of what is known per class."""
    rows: list[list[str]] = []
    for role, style in study.counted:
        for name in study.class_names:
            means = [estimate(_class_values(role, name, metric)) for metric in PER_CLASS]
            support = estimate(_class_values(role, name, "support"))
            cells = ["-" if value is None else number(value.mean) for value in means]
            rows.append([role_cell(role, style), name, *cells, "-" if support is None else f"{support.mean:.4g}"])
    header = ["", "class", *map(name_cell, PER_CLASS), "items"]
    return table(header, rows, caption=f"{study.split} split, {study.level} level: means over {study.unit}")


def _class_values(role: Role, class_name: str, metric: str) -> list[float]:
    found = {
        run.unit: run.evaluation.per_class.get(class_name, {}).get(metric) for run in role.counted if run.evaluation
    }
    return units_of({unit: float(value) for unit, value in found.items() if value is not None})


def provenance(study: Study) -> Safe:
    return tag("section", _data(study), _selection(study), _runs(study), *_configs(study), _environment(study))


def _data(study: Study) -> Safe:
    facts: dict[str, Any] = {}
    for run in study.runs:
        facts = run.about_data | facts
    excluded = facts.get("excluded")
    rows = [
        ("task", facts.get("task")),
        ("classes", ", ".join(study.class_names or map(str, facts.get("class_names", [])))),
        ("samples", facts.get("n_samples")),
        ("patients", facts.get("n_patients")),
        ("split rule", facts.get("split_rule")),
        ("split seed", facts.get("split_seed")),
        (
            "excluded columns",
            "; ".join(f"{k}: {v}" for k, v in excluded.items()) if isinstance(excluded, dict) else excluded,
        ),
        ("source", facts.get("source")),
        ("licence", facts.get("licence")),
    ]
    known = [[name, str(value)] for name, value in rows if value not in (None, "")]
    if len(known) <= 1:
        known.append(["source and licence", "not found: neither the run folders nor the shards' manifest say"])
    return join([tag("h3", "Data"), table(["", ""], known, class_="left")])


def _selection(study: Study) -> Safe:
    stated = sorted({f"{key} = {value}" for run in study.runs for key, value in selection_of(run).items()})
    text = (
        f"Weights were selected on the validation split ({', '.join(stated)}); the {study.split} split was read for the "
        f"final metrics only."
        if stated and "test" not in " ".join(stated)
        else f"Selection as configured: {', '.join(stated)}."
        if stated
        else "The configs name no rule of selection."
    )
    return join([tag("h3", "Selection"), tag("p", text), tag("p", f"Main metric of this page: {study.main_metric}.")])


def _runs(study: Study) -> Safe:
    rows = [
        [
            run.name,
            role.title,
            str(run.fold),
            str(run.seed),
            _ending(run.outcome, run.state),
            "-" if run.evaluation is None else str(run.evaluation.n),
            str(run.folder),
        ]
        for role, _ in study.roles
        for run in role.runs
    ]
    header = ["run", "role", "fold", "seed", "outcome", f"n ({study.split})", "folder"]
    return join([tag("h3", "Runs"), table(header, rows, class_="left")])


def _ending(outcome: dict[str, Any], state: str) -> Safe:
    words = [f"step {outcome['step']}"] if outcome.get("step") is not None else []
    words += [f"attempt {outcome['attempt']}"] if outcome.get("attempt") is not None else []
    words += [str(outcome["message"])] if outcome.get("message") and state != "done" else []
    return join([state, tag("small", ", ".join(words))], "")


def _configs(study: Study) -> Sequence[Safe]:
    return [
        details(
            f"Configuration: {role.title}",
            tag(
                "p", f"Of {role.runs[0].name}; its repeats differ in fold, seed, place and teacher only.", class_="soft"
            ),
            tag("pre", yaml.safe_dump(role.runs[0].config, sort_keys=False, allow_unicode=True).rstrip()),
        )
        for role, _ in study.roles
    ]


def _environment(study: Study) -> Safe:
    known = {run.name: run.environment for run in study.runs if run.environment}
    if not known:
        return tag("p", "No run recorded its environment.", class_="soft")
    name, environment = next(iter(known.items()))
    text = json.dumps(environment, indent=2, ensure_ascii=False, default=str)
    return details(f"Environment: {name}", tag("pre", text))
