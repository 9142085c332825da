"""The sections with numbers: headline, table of roles, paired differences, values of every run, other levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distkd.metrics import METRICS
from distkd.report.html import Safe, details, join, name_cell, table, tag
from distkd.report.plots import Style
from distkd.report.roles import Role, find_baseline, flatten
from distkd.report.runs import Run
from distkd.report.stats import Estimate, estimate, paired, units_of, verdict
from distkd.report.theme import swatch

__all__ = ["Study", "difference_text", "headline", "number", "role_cell", "selection_of"]


@dataclass(frozen=True)
class Study:
    """All that the page is made of."""

    split: str
    baseline: str | None
    """Method to compare with instead of the student alone."""
    roles: list[tuple[Role, Style]]
    excluded: list[tuple[Run, str, str]]
    """Run, why it is not in the tables, and what to do."""

    @property
    def runs(self) -> list[Run]:
        return [run for role, _ in self.roles for run in role.runs]

    @property
    def counted(self) -> list[tuple[Role, Style]]:
        return [(role, style) for role, style in self.roles if role.counted]

    @property
    def level(self) -> str:
        return next((run.evaluation.level for run in self.runs if run.evaluation), "sample")

    @property
    def class_names(self) -> list[str]:
        return next((run.evaluation.class_names for run in self.runs if run.evaluation), [])

    def metrics(self, level: str) -> list[str]:
        evaluations = [run.evaluation for role, _ in self.counted for run in role.counted if run.evaluation]
        names = {name for evaluation in evaluations for name in evaluation.metrics_at(level)}
        return [name for name in METRICS if name in names] + sorted(names - set(METRICS))

    @property
    def main_metric(self) -> str:
        """The metric that the configs select by; `balanced_accuracy` where they name none."""
        named = [str(value) for run in self.runs for value in selection_of(run).values()]
        known = self.metrics(self.level) or ["balanced_accuracy"]
        chosen = (metric for value in named for metric in sorted(known, key=len, reverse=True) if metric in value)
        return next(chosen, "balanced_accuracy" if "balanced_accuracy" in known else known[0])

    def baseline_of(self, role: Role) -> Role | None:
        return find_baseline(role, [other for other, _ in self.counted], self.baseline)

    @property
    def unit(self) -> str:
        return "folds" if len({run.fold for role, _ in self.counted for run in role.counted}) > 1 else "seeds"


def selection_of(run: Run) -> dict[str, object]:
    """What the config says about choosing weights."""
    return {
        key: value
        for key, value in flatten(run.config).items()
        if "select" in key.rsplit(".", 1)[-1] and value is not None
    }


def number(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _with_interval(value: Estimate | None, *, n_of_role: int | None = None, signed: bool = False) -> Safe:
    if value is None:
        return Safe("-")
    small = (
        "no interval"
        if value.low is None
        else f"[{number(value.low, signed=signed)}, {number(value.high, signed=signed)}]"
    )
    less = f", n = {value.n}" if n_of_role not in (None, value.n) else ""
    return join([number(value.mean, signed=signed), tag("small", small + less)], "")


def difference_text(difference: Estimate) -> str:
    interval = (
        ""
        if difference.low is None
        else f" [{number(difference.low, signed=True)}, {number(difference.high, signed=True)}]"
    )
    t = "" if difference.t is None else f", t = {difference.t:.2f}"
    return f"{number(difference.mean, signed=True)}{interval}{t}, n = {difference.n}"


def role_cell(role: Role, style: Style) -> Safe:
    inputs = " + ".join(role.runs[0].modalities) or "inputs not stated"
    kind = f"{role.method}, " if role.kind == "distilled" and role.method not in role.title else ""
    return join([tag("span", swatch(style), role.title, class_="role"), tag("small", f"{kind}{inputs}")], "")


def headline(study: Study) -> Safe:
    """Section 1: what was distilled into what, whether it helped, and the numbers."""
    if not study.counted:
        return tag("section", _flow(study), tag("p", f"No finished run has metrics of the {study.split} split yet."))
    return tag(
        "section",
        _flow(study),
        _verdicts(study),
        role_table(study, study.level),
        _footnotes(study),
        _values(study),
        *_differences(study),
        *_other_levels(study),
    )


def _flow(study: Study) -> Safe:
    def box(kind: str, title: str) -> Safe:
        inputs = sorted(
            {" + ".join(r.runs[0].modalities) for r, _ in study.roles if (r.kind == "teacher") == (kind == "teacher")}
        )
        return tag("div", tag("b", title), "; ".join(inputs) or "not among these runs") if inputs else Safe("")

    teacher, student = box("teacher", "teacher sees"), box("student", "student needs")
    arrow = [tag("div", "\N{RIGHTWARDS ARROW}", class_="arrow")] if teacher and student else []
    return tag("div", *(part for part in (teacher, *arrow, student) if part), class_="flow")


def _verdicts(study: Study) -> Safe:
    metric, level = study.main_metric, study.level
    items: list[Safe] = []
    for role, _ in study.counted:
        if role.kind != "distilled" or role.method == study.baseline:
            continue
        base = study.baseline_of(role)
        if base is None:
            want = study.baseline or "student alone"
            items.append(
                tag(
                    "li", tag("b", role.title), f": no {want} run with the same data, labels and inputs to compare with"
                )
            )
            continue
        values, reference = role.values(metric, level), base.values(metric, level)
        difference = paired(values, reference)
        text = verdict(difference)
        numbers = "" if difference is None else f"{metric} {difference_text(difference)} {study.unit}"
        items.append(
            tag(
                "li", tag("b", role.title), f" against {base.title}: ", tag("span", text, class_="verdict"),
                tag("small", f" {numbers}{_gap(study, difference, base)}", class_="soft"), class_=_class(text),
            )
        )  # fmt: skip
    return tag("ul", *items, class_="verdicts") if items else Safe("")


def _gap(study: Study, difference: Estimate | None, base: Role) -> str:
    """How much of the way from the baseline to the teacher was gone, where there is a way."""
    teachers = [role for role, _ in study.counted if role.kind == "teacher" and role.setting[:2] == base.setting[:2]]
    if difference is None or len(teachers) != 1:
        return ""
    gap = paired(teachers[0].values(study.main_metric, study.level), base.values(study.main_metric, study.level))
    if gap is None or gap.low is None or gap.low <= 0:
        return ""
    return f"; {100 * difference.mean / gap.mean:.0f} % of the gap to the teacher ({number(gap.mean, signed=True)})"


def _class(text: str) -> str:
    return text if text in ("gain", "loss") else "open"


def role_table(study: Study, level: str) -> Safe:
    metrics = study.metrics(level)
    rows: list[list[str]] = []
    for role, style in study.counted:
        n = len(units_of({run.unit: 0.0 for run in role.counted}))
        cells = [_with_interval(estimate(units_of(role.values(m, level))), n_of_role=n) for m in metrics]
        rows.append([role_cell(role, style), *cells, _runs_text(role)])
    caption = f"{study.split} split, {level} level: mean and 95 % interval (Student t) over {study.unit}"
    return table(["", *map(name_cell, metrics), "runs"], rows, caption=caption)


def _runs_text(role: Role) -> str:
    folds, seeds = {run.fold for run in role.counted}, {run.seed for run in role.counted}
    return f"{len(role.counted)} ({len(folds)} fold{'s' * (len(folds) > 1)}, {len(seeds)} seed{'s' * (len(seeds) > 1)})"


def _footnotes(study: Study) -> Safe:
    if study.unit == "folds":
        text = (
            "Seeds of one fold are averaged first, so n counts folds. Folds share training patients: the true uncertainty "
            "is somewhat larger than these intervals."
        )
    else:
        text = (
            "Seeds repeat the training on the same split: the intervals cover the chance of training, not the choice of "
            "patients or samples."
        )
    notes = sorted({note for run in study.runs if run.is_done and run.evaluation for note in run.evaluation.notes})
    listed = [tag("p", f"Notes of the evaluation: {'; '.join(notes)}.", class_="soft")] if notes else []
    return join([tag("p", text, class_="soft"), *listed])


def _values(study: Study) -> Safe:
    metrics = study.metrics(study.level)
    rows = [
        [
            run.name,
            role.title,
            str(run.fold),
            str(run.seed),
            str(run.evaluation.n),
            *(number(run.evaluation.metrics.get(m)) for m in metrics),
        ]
        for role, _ in study.counted
        for run in role.counted
        if run.evaluation is not None
    ]
    return details(
        "Values of every fold and seed", table(["run", "role", "fold", "seed", "n", *map(name_cell, metrics)], rows)
    )


def _differences(study: Study) -> list[Safe]:
    parts: list[Safe] = []
    for role, style in study.counted:
        base = study.baseline_of(role)
        if base is None:
            continue
        rows: list[list[str]] = []
        for metric in study.metrics(study.level):
            difference = paired(role.values(metric, study.level), base.values(metric, study.level))
            text = verdict(difference)
            shown = "reference" if role.kind == "teacher" else tag("span", text, class_=_class(text))
            t, n = (
                ("-", "0")
                if difference is None
                else ("-" if difference.t is None else f"{difference.t:.2f}", str(difference.n))
            )
            rows.append([name_cell(metric), _with_interval(difference, signed=True), t, n, shown])
        caption = join([swatch(style), f" {role.title} minus {base.title}, paired by fold and seed"], "")
        parts.append(table(["metric", "difference", "t", "n", "evidence"], rows, caption=caption))
    if not parts:
        return []
    return [tag("h3", "Paired differences"), tag("div", *parts, class_="panels wide")]


def _other_levels(study: Study) -> list[Safe]:
    names: dict[str, None] = {}
    for run in study.runs:
        names |= dict.fromkeys(run.evaluation.levels if run.evaluation else {})
    others = [name for name in names if name != study.level]
    return [details(f"The same at {name} level", role_table(study, name)) for name in others]
