"""The sections with numbers: headline, table of roles, paired differences, values of every run, other levels."""

from __future__ import annotations

from collections import Counter

from distkd.report.html import Safe, details, join, name_cell, table, tag
from distkd.report.plots import Style
from distkd.report.roles import Role, is_baseline, unlike
from distkd.report.stats import Estimate, estimate, paired, units_of, verdict
from distkd.report.study import Study
from distkd.report.theme import swatch

__all__ = ["difference_table", "footnotes", "headline", "number", "role_cell", "role_table", "run_values"]


def number(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _interval(value: Estimate, *, signed: bool = False) -> str:
    if value.low is None:
        return "no interval"
    return f"[{number(value.low, signed=signed)}, {number(value.high, signed=signed)}]"


def role_cell(role: Role, style: Style, *facts: str) -> Safe:
    """The role's name with its line sample; below it the inputs that its models need, and the labels if not all."""
    labels = () if role.runs[0].get("data.labelled") is None else (role.labels,)
    lines = [tag("small", line) for line in (role.inputs, *labels, *facts)]
    return join([tag("span", swatch(style), role.title, class_="role"), *lines], "")


def headline(study: Study) -> Safe:
    """What was distilled into what, and whether it helped."""
    if not study.counted:
        return join([_flow(study), tag("p", f"No finished run has metrics of the {study.split} split yet.")])
    return join([_flow(study), _verdicts(study)])


def _flow(study: Study) -> Safe:
    boxes: list[Safe] = []
    for title, is_teacher in (("teacher sees", True), ("student needs", False)):
        roles = [role for role, _ in study.roles if (role.kind == "teacher") == is_teacher]
        inputs = sorted({role.inputs for role in roles})
        if roles:
            boxes.append(tag("div", tag("b", title), "; ".join(inputs)))
    if len(boxes) == 2:
        boxes.insert(1, tag("div", Safe("&rarr;"), class_="arrow"))
    return tag("div", *boxes, class_="flow")


def _verdicts(study: Study) -> Safe:
    shown = [role for role, _ in study.counted if role.kind == "distilled" and role.method != study.baseline]
    return tag("ul", *(_verdict(study, role) for role in shown), class_="verdicts") if shown else Safe("")


def _verdict(study: Study, role: Role) -> Safe:
    base = study.baseline_of(role)
    if base is None:
        want = study.baseline or "student alone"
        others = [other for other, _ in study.counted if is_baseline(other, study.baseline)]
        why = unlike(role, others)
        text = f": no {want} with the same data, labels and inputs to compare with"
        return tag("li", tag("b", role.title), text, *([tag("small", why)] if why else []))
    difference = study.differences(role, study.level).get(study.main_metric)
    text = verdict(difference)
    said = tag("span", text, class_="verdict")
    numbers = ""
    if difference is not None:
        t = "" if difference.t is None else f", t = {difference.t:.2f}"
        numbers = (
            f"{study.main_metric} {number(difference.mean, signed=True)} {_interval(difference, signed=True)}{t}, "
            f"n = {difference.n} {study.unit}{_gap(study, difference, base) if text == 'gain' else ''}"
        )
    sentence = [tag("b", role.title), f" against {base.title}: ", said, tag("small", numbers)]
    return tag("li", *sentence, class_=_class(text))


def _gap(study: Study, difference: Estimate, base: Role) -> str:
    """How much of the way from the baseline to the teacher was gone, where there is one teacher and a way."""
    teachers = [role for role, _ in study.counted if role.kind == "teacher" and role.data == base.data]
    if len(teachers) != 1:
        return ""
    metric, level = study.main_metric, study.level
    gap = paired(teachers[0].values(metric, level), base.values(metric, level))
    if gap is None or gap.low is None or gap.low <= 0:
        return ""
    return f"; {100 * difference.mean / gap.mean:.0f} % of the gap to the teacher ({number(gap.mean, signed=True)})"


def _class(text: str) -> str:
    return text if text in ("gain", "loss") else "open"


def role_table(study: Study, level: str) -> Safe:
    """Mean and interval of every metric by role."""
    metrics = study.metrics(level)
    rows: list[list[str]] = []
    for role, style in study.counted:
        n = len(units_of({run.unit: 0.0 for run in role.counted}))
        cells = [_cell(estimate(units_of(role.values(metric, level))), n) for metric in metrics]
        rows.append([role_cell(role, style, _repeats(role)), *cells])
    caption = f"{study.split} split, {level} level: mean and 95 % interval (Student t) over {study.unit}"
    return table(["", *map(name_cell, metrics)], rows, caption=caption)


def _cell(value: Estimate | None, n_of_role: int) -> Safe:
    if value is None:
        return Safe("-")
    fewer = "" if value.n == n_of_role else f", n = {value.n}"
    return join([number(value.mean), tag("small", _interval(value) + fewer)], "")


def _repeats(role: Role) -> str:
    folds, seeds = len({run.fold for run in role.counted}), len({run.seed for run in role.counted})
    return f"n = {_count(folds, 'fold')} x {_count(seeds, 'seed')}" if folds > 1 else f"n = {_count(seeds, 'seed')}"


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def difference_table(study: Study, level: str) -> Safe:
    """Paired differences to the baseline with their evidence; the teacher as a reference without verdict."""
    metrics = study.metrics(level)
    rows: list[list[str]] = []
    for role, style in study.counted:
        base, found = study.baseline_of(role), study.differences(role, level)
        if base is None:
            continue
        n = max((difference.n for difference in found.values()), default=0)
        words = role.kind != "teacher"
        cells = [_difference(found.get(metric), n, words=words) for metric in metrics]
        rows.append([role_cell(role, style, f"minus {base.title}", f"n = {_count(n, study.unit[:-1])}"), *cells])
    if not rows:
        return Safe("")
    caption = f"{level} level: paired by fold and seed; mean, 95 % interval (Student t), t, evidence"
    return join([tag("h3", "Paired differences"), table(["", *map(name_cell, metrics)], rows, caption=caption)])


def _difference(difference: Estimate | None, n_of_role: int, *, words: bool) -> Safe:
    if difference is None:
        return Safe("-")
    t = "-" if difference.t is None else f"{difference.t:.2f}"
    fewer = "" if difference.n == n_of_role else f", n = {difference.n}"
    text = verdict(difference)
    lines = [tag("small", _interval(difference, signed=True)), tag("small", f"t = {t}{fewer}")]
    if words:
        lines.append(tag("small", text, class_=f"evidence {_class(text)}"))
    return join([number(difference.mean, signed=True), *lines], "")


def footnotes(study: Study) -> Safe:
    """What the intervals cover and what they do not."""
    if study.unit == "folds":
        text = (
            "Seeds of one fold are averaged first, so n counts folds. Folds share training patients: the true "
            "uncertainty is somewhat larger than these intervals."
        )
    else:
        text = (
            "Seeds repeat the training on the same split: the intervals cover the chance of training, not the choice "
            "of patients or samples."
        )
    notes = _notes(study)
    listed = [tag("p", f"Notes of the evaluation: {'; '.join(notes)}.", class_="soft")] if notes else []
    chance = "Of intervals about nothing, one in twenty excludes zero by chance: read the headline metric first."
    return join([tag("p", f"{text} {chance}", class_="soft"), *listed])


def _notes(study: Study) -> list[str]:
    """Each with the roles that it is of, and of how many of their runs."""
    found: dict[str, list[str]] = {}
    for role, _ in study.counted:
        noted = Counter(note for run in role.counted if run.evaluation for note in set(run.evaluation.notes))
        for note, n in noted.items():
            found.setdefault(note, []).append(f"{role.title}, {n} of {_count(len(role.counted), 'run')}")
    return [f"{note} ({'; '.join(of)})" for note, of in sorted(found.items())]


def run_values(study: Study) -> Safe:
    """Every run's own numbers, to be opened."""
    metrics = study.metrics(study.level)
    rows = [
        [
            run.name,
            role.title,
            *(str(value) for value in (run.fold, run.seed, run.evaluation.n)),
            *(number(run.evaluation.metrics.get(metric)) for metric in metrics),
        ]
        for role, _ in study.counted
        for run in role.counted
        if run.evaluation is not None
    ]
    header = ["run", "role", "fold", "seed", "n", *map(name_cell, metrics)]
    return details("Values of every fold and seed", table(header, rows))
