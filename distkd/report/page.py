"""The page: sections in order, in one document that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distkd.report.attention import Views, about_views
from distkd.report.html import Safe, details, join, tag
from distkd.report.plots import Panel, share_glyphs, to_svg
from distkd.report.provenance import excluded_notice, f1_table, per_class_table, provenance
from distkd.report.results import difference_table, footnotes, headline, role_table, run_values
from distkd.report.study import Study
from distkd.report.theme import CSS, swatch

__all__ = ["render_page"]

Families = Mapping[str, Sequence[Panel]]


def render_page(study: Study, families: Families, views: Views | None = None) -> str:
    """The whole document; panels are drawn into it. `views` are what the panels of `attention` show."""
    sections = {
        "result": ("Result", _result(study, families)),
        "curves": ("Curves", _curves(study, families)),
        "classes": ("Classes", _classes(study, families)),
        "attention": ("Attention", _attention(study, families, views)),
        "provenance": ("Where this comes from", provenance(study)),
    }
    known = {name: section for name, section in sections.items() if section[1]}
    title = next((str(run.about_data["task"]) for run in study.runs if "task" in run.about_data), "distkd report")
    counts = [
        _count(len(study.runs), "run"),
        _count(len(study.roles), "experiment"),
        f"{study.split} split{_scored(study)}",
    ]
    links = [tag("a", heading, href=f"#{name}") for name, (heading, _) in known.items()]
    head = tag("header", tag("h1", title), tag("p", ", ".join(counts)), tag("nav", *links))
    body = [tag("section", tag("h2", heading), content, id=name) for name, (heading, content) in known.items()]
    return share_glyphs(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', f'{title} - distkd report')}\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{tag('main', head, excluded_notice(study), *body)}\n</body>\n</html>\n"
    )


def _scored(study: Study) -> str:
    """How much of the split the numbers are of; folds may differ."""
    n = sorted({run.evaluation.n for role, _ in study.counted for run in role.counted if run.evaluation})
    if not n:
        return ""
    least = f"{n[0]} to " if len(n) > 1 else ""
    return f" of {least}{_count(n[-1], study.level)}"


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def _figures(panels: Sequence[Panel], class_: str = "") -> Safe:
    drawn = [tag("figure", tag("figcaption", panel.title), Safe(to_svg(panel))) for panel in panels]
    return tag("div", *drawn, class_=f"panels {class_}".strip()) if drawn else Safe("")


def _result(study: Study, families: Families) -> Safe:
    if not study.counted:
        return headline(study)
    return join(
        [
            headline(study),
            role_table(study, study.level),
            run_values(study),
            _figures(families["comparison"], "wide"),
            difference_table(study, study.level),
            footnotes(study),
            *(_other_level(study, level) for level in study.other_levels),
        ]
    )


def _other_level(study: Study, level: str) -> Safe:
    return details(f"The same at {level} level", role_table(study, level), difference_table(study, level))


def _curves(study: Study, families: Families) -> Safe:
    titles = {"loss": "Losses", "validation": "Validation", "optimisation": "Optimisation"}
    shown = [join([tag("h3", title), _figures(families[name])]) for name, title in titles.items() if families[name]]
    if families["agreement"]:
        text = (
            "Weight of each distillation loss in the step, and cosine between the losses' gradients at the student's "
            "feature: below zero they disagree."
        )
        panels = _figures(families["agreement"], "wide")
        shown.append(join([tag("h3", "Agreement of gradients"), tag("p", text, class_="soft"), panels]))
    if not shown:
        return tag("p", "No run has logged a step yet.", class_="soft")
    several = "The line is the mean over runs, the band their range. " if len(study.runs) > len(study.roles) else ""
    text = f"{several}Colours, dashes and markers are those of the tables."
    legend = tag("div", *(tag("span", swatch(style), role.title) for role, style in study.roles), class_="legend")
    return join([tag("p", text, class_="soft"), legend, *shown])


def _classes(study: Study, families: Families) -> Safe:
    if not families["confusion"]:
        return Safe("")
    text = "Share of each label's items by predicted class, and their number, summed over folds and seeds."
    matrices = _figures(families["confusion"], "square" if len(study.class_names) <= 5 else "wide")
    recall = details("Recall and precision of each class", per_class_table(study))
    return join([tag("p", text, class_="soft"), matrices, f1_table(study), recall])


def _attention(study: Study, families: Families, views: Views | None) -> Safe:
    if views is None:
        return Safe("")
    if views.note:
        return tag("p", views.note, class_="soft")
    text = [tag("p", words, class_="soft") for words in about_views(views, study)]
    return join([*text, _figures(families["attention"], "rows")])
