"""The sections about where numbers come from: classes, runs and how they ended, data, configuration, environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from distkd.metrics.classification import PER_CLASS
from distkd.report.html import Safe, details, join, name_cell, table, tag
from distkd.report.results import number, role_cell
from distkd.report.roles import Role
from distkd.report.stats import estimate, units_of
from distkd.report.study import Study

__all__ = ["excluded_notice", "f1_table", "per_class_table", "provenance"]


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


def f1_table(study: Study) -> Safe:
    """F1 of each class by role, and what is averaged over all classes beside it."""
    shared = [name for name in ("balanced_accuracy", "kappa_quadratic") if name in study.metrics(study.level)]
    rows: list[list[str]] = []
    for role, style in study.counted:
        means = [estimate(_class_values(role, name, "f1")) for name in study.class_names]
        means += [estimate(units_of(role.values(metric, study.level))) for metric in shared]
        rows.append([role_cell(role, style), *(number(None if value is None else value.mean) for value in means)])
    header = ["", *(join(["F1 ", name_cell(name)], "") for name in study.class_names), *map(name_cell, shared)]
    return table(header, rows, caption=f"{study.split} split, {study.level} level: means over {study.unit}")


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
    facts["class_names"] = ", ".join(map(str, study.class_names or facts.get("class_names", [])))
    if isinstance(facts.get("excluded"), dict):
        facts["excluded"] = "; ".join(f"{column} ({reason})" for column, reason in facts["excluded"].items())
    facts["labels"] = "; ".join(dict.fromkeys(role.labels for role, _ in study.roles))
    rows = [[title, str(facts[key])] for key, title in _FACTS.items() if facts.get(key) not in (None, "")]
    if "source" not in facts and "licence" not in facts:
        rows.append(["source and licence", "not found: neither the run folders nor a manifest within reach say"])
    return join([tag("h3", "Data"), table(["", ""], rows, class_="left facts")])


_FACTS = {
    "task": "task",
    "class_names": "classes",
    "n_samples": "samples",
    "n_patients": "patients",
    "labels": "labels in training",
    "split_rule": "split rule",
    "split_seed": "split seed",
    "excluded": "excluded columns",
    "source": "source",
    "licence": "licence",
}


def _selection(study: Study) -> Safe:
    rules: dict[str, None] = {}
    for run in study.runs:
        select, metric = run.get("eval.select"), run.get("eval.metric")
        if select == "best":
            rules[f"the weights with the best {metric} on the validation split"] = None
        elif select is not None:
            rules["the weights of the last step" if select == "last" else str(select)] = None
    rule = "; or ".join(rules) or "not stated in the configs"
    text = f"Measured weights: {rule}."
    if rules:
        text += f" The {study.split} split was read for the final metrics only." if study.split != "val" else ""
    main = f"Headline metric: {study.main_metric}, the one that selects; all metrics are in the tables."
    return join([tag("h3", "Selection"), tag("p", text), tag("p", main)])


def _runs(study: Study) -> Safe:
    rows = [
        [
            run.name,
            role.title,
            role.labels.removesuffix(" labels"),
            str(run.fold),
            str(run.seed),
            _ending(run.outcome, run.state),
            "-" if run.evaluation is None else str(run.evaluation.n),
            "-" if run.evaluation is None else str(run.evaluation.selection.get("step", "-")),
            str(run.folder),
        ]
        for role, _ in study.roles
        for run in role.runs
    ]
    header = ["run", "role", "labels", "fold", "seed", "outcome", f"n ({study.split})", "step of the weights", "folder"]
    return details(f"All {len(rows)} runs and how they ended", table(header, rows, class_="left"))


def _ending(outcome: dict[str, Any], state: str) -> Safe:
    words = [f"step {outcome['step']}"] if outcome.get("step") is not None else []
    words += [f"attempt {outcome['attempt']}"] if outcome.get("attempt") is not None else []
    words += [str(outcome["message"])] if outcome.get("message") and state != "done" else []
    return join([state, tag("small", ", ".join(words))], "")


def _configs(study: Study) -> Sequence[Safe]:
    return [
        details(
            f"Configuration: {role.title}",
            tag("p", f"Of {role.runs[0].name}; repeats differ in fold, seed, place and teacher only.", class_="soft"),
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
