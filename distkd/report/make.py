"""Run folders in, one page out: `make_report` is what `distkd report` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distkd.errors import DataError
from distkd.metrics import write_atomic
from distkd.report import curves
from distkd.report.figures import confusion_panel, difference_panel, value_panel
from distkd.report.html import Safe, details, join, tag
from distkd.report.plots import Panel, Style, panels_to_png, style_of, to_svg
from distkd.report.provenance import excluded_notice, per_class_table, provenance
from distkd.report.results import Study, headline
from distkd.report.roles import Role, assign_roles, check_comparable
from distkd.report.runs import Run, find_runs, load_run
from distkd.report.stats import paired
from distkd.report.theme import CSS, swatch

__all__ = ["default_output", "make_report"]


def default_output(run_folders: Sequence[Path]) -> Path:
    """`report/` in the run, or in the folder that holds all the runs."""
    return run_folders[0] / "report" if len(run_folders) == 1 else Path(run_folders[0]).resolve().parent / "report"


def make_report(
    run_folders: Sequence[Path], output: Path | None = None, *, split: str = "test", baseline: str | None = None
) -> Path:
    """Writes `index.html`, which needs no other file, and the same pictures as PNG beside it.

    Args:
        run_folders: run folders, or folders that contain run folders.
        output: folder to write to; see `default_output`.
        split: whose `eval/<split>.json` is reported.
        baseline: a method to compare with instead of the student alone.

    Returns:
        The path of the page.

    Raises:
        DataError: no run is found, a file is damaged, or the runs must not stand in one table.
    """
    folders = find_runs(run_folders)
    study = make_study([load_run(folder, split) for folder in folders], split, baseline)
    output = output or default_output(run_folders)
    families = _families(study)
    legend = [(role.title, style) for role, style in study.roles]
    for name, panels in families.items():
        shared = legend if name in ("loss", "validation", "optimisation") else []
        if panels:
            write_atomic(output / f"{name}.png", panels_to_png(panels, shared, columns=3 if shared else 2))
    page = output / "index.html"
    write_atomic(page, _page(study, families))
    return page


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


def _families(study: Study) -> dict[str, list[Panel]]:
    """Panels by the name of their PNG."""
    metrics = study.metrics(study.level)
    differences: list[Panel] = []
    for role, style in study.counted:
        base = study.baseline_of(role)
        if base is not None and role.kind != "teacher":
            found = {m: paired(role.values(m, study.level), base.values(m, study.level)) for m in metrics}
            known = {metric: value for metric, value in found.items() if value is not None}
            if known:
                differences.append(difference_panel(f"{role.title} minus {base.title}", known, style))
    values = [value_panel(study.main_metric, study.level, study.counted)] if study.counted else []
    confusion = [confusion_panel(role, study.class_names) for role, _ in study.counted]
    return {
        "comparison": values + differences,
        "loss": curves.loss_panels(study.roles),
        "validation": curves.validation_panels(study.roles),
        "optimisation": curves.optimisation_panels(study.roles),
        "agreement": curves.agreement_panels(study.roles),
        "confusion": [panel for panel in confusion if panel is not None],
    }


def _figures(panels: Sequence[Panel], class_: str = "") -> Safe:
    drawn = [tag("figure", tag("figcaption", panel.title), Safe(to_svg(panel))) for panel in panels]
    return tag("div", *drawn, class_=f"panels {class_}".strip())


def _page(study: Study, families: dict[str, list[Panel]]) -> str:
    legend = tag("div", *(tag("span", swatch(style), role.title) for role, style in study.roles), class_="legend")
    several = "the line is the mean over runs, the band their range; " if len(study.runs) > len(study.roles) else ""
    parts: list[Safe] = [
        excluded_notice(study),
        tag("h2", "Result", id="result"),
        headline(study),
        _figures(families["comparison"], "wide"),
        tag("h2", "Curves", id="curves"),
        tag("p", f"By training step; {several}colours, dashes and markers are those of the tables.", class_="soft"),
        legend,
    ]
    for name, title in (("loss", "Losses"), ("validation", "Validation"), ("optimisation", "Optimisation")):
        if families[name]:
            parts.append(join([tag("h3", title), _figures(families[name])]))
    if families["agreement"]:
        text = "Weight of each distillation loss in the step, and cosine between the losses' gradients at the student's feature."
        parts.append(
            join(
                [
                    tag("h3", "Agreement of gradients"),
                    tag("p", text, class_="soft"),
                    _figures(families["agreement"], "wide"),
                ]
            )
        )
    if not any(families[name] for name in ("loss", "validation", "optimisation", "agreement")):
        parts.append(tag("p", "No run has logged a step yet.", class_="soft"))
    if families["confusion"]:
        text = "Share of each label's items by predicted class, and their number, summed over folds and seeds."
        parts.append(
            join(
                [
                    tag("h2", "Classes", id="classes"),
                    tag("p", text, class_="soft"),
                    _figures(families["confusion"], "square"),
                ]
            )
        )
        parts.append(details("Per class", per_class_table(study)))
    parts.append(join([tag("h2", "Where this comes from", id="provenance"), provenance(study)]))
    return _document(study, join(parts))


def _document(study: Study, body: Safe) -> str:
    task = next(
        (str(run.about_data["task"]) for run in study.runs if run.about_data.get("task")), "knowledge distillation"
    )
    n = len(study.runs)
    facts = f"{n} run{'s' * (n > 1)}, {len(study.roles)} experiment{'s' * (len(study.roles) > 1)}, {study.split} split"
    if study.class_names:
        facts += f", {len(study.class_names)} classes"
    links = [tag("a", title, href=f"#{name}") for name, title in _SECTIONS if f'id="{name}"' in body]
    head = tag("header", tag("h1", task), tag("p", facts), tag("nav", *links))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', f'distkd report: {task}')}\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{tag('main', head, body)}\n</body>\n</html>\n"
    )


_SECTIONS = (
    ("result", "Result"),
    ("curves", "Curves"),
    ("classes", "Classes"),
    ("provenance", "Where this comes from"),
)
