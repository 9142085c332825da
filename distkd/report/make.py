"""Run folders in, one page out: `make_report` is what `distkd report` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distkd.files import write_text
from distkd.report import curves
from distkd.report.attention import attention_panels, find_views
from distkd.report.figures import confusion_panel, difference_panel, value_panel
from distkd.report.page import render_page
from distkd.report.plots import Panel, panels_to_png
from distkd.report.runs import find_runs, load_run
from distkd.report.study import Study, make_study

__all__ = ["families", "make_report"]


def make_report(
    run_folders: Sequence[Path], output: Path | None = None, *, split: str = "test", baseline: str | None = None
) -> Path:
    """Writes `index.html`, which needs no other file, and the same pictures as PNG beside it.

    Args:
        run_folders: run folders, or folders that contain run folders.
        output: folder to write to; `report/` in the first of `run_folders` when it is not given.
        split: whose `eval/<split>.json` is reported.
        baseline: a method to compare with instead of the student alone.

    Returns:
        The path of the page.

    Raises:
        DataError: no run is found, a file is damaged, or the runs must not stand in one table.
    """
    folders = find_runs(run_folders)
    study = make_study([load_run(folder, split) for folder in folders], split, baseline)
    output = run_folders[0] / "report" if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    views = find_views(study)
    by_name = families(study) | {"attention": attention_panels(views)}
    legend = [(role.title, style) for role, style in study.roles]
    for name, panels in by_name.items():
        curve = name in ("loss", "validation", "optimisation")
        if panels:
            columns = 3 if curve else 1 if name == "attention" else 2
            png = panels_to_png(panels, legend if curve or name == "comparison" else [], columns=columns)
            (output / f"{name}.png").write_bytes(png)
        else:
            (output / f"{name}.png").unlink(missing_ok=True)  # of an earlier report of other runs
    page = output / "index.html"
    write_text(page, render_page(study, by_name, views))
    return page


def families(study: Study) -> dict[str, list[Panel]]:
    """Panels by the name of their PNG."""
    comparison: list[Panel] = []
    if study.counted:
        comparison.append(value_panel(study.main_metric, study.level, study.counted))
    found = [(style, study.differences(role, study.level)) for role, style in study.counted if role.kind != "teacher"]
    compared = [(style, differences) for style, differences in found if differences]
    if compared:
        base = study.baseline or "student alone"
        comparison.append(difference_panel(f"paired difference to {base}, 95 % interval", compared))
    confusion = [confusion_panel(role, study.class_names) for role, _ in study.counted]
    return {
        "comparison": comparison,
        "loss": curves.loss_panels(study.roles),
        "validation": curves.validation_panels(study.roles),
        "optimisation": curves.optimisation_panels(study.roles),
        "agreement": curves.agreement_panels(study.roles),
        "confusion": [panel for panel in confusion if panel is not None],
    }
