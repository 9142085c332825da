"""The Grafana dashboard: of Grafana's own schema, with queries that parse and ask for what distkd exports."""

from __future__ import annotations

import enum
import itertools
import json
import re
import types
import typing
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as schema
from grafana_foundation_sdk.models import units

from distkd.metrics.table import METRICS, PHASES
from launch.monitoring.dashboard import FILE, Window, panels_of, substituted
from tests.monitoring.alert_table import alerts

DASHBOARD = json.loads(FILE.read_text())
PANELS = panels_of(DASHBOARD)
SHOWN = [panel for panel in PANELS if panel.kind != "row"]
QUERIES = {f"{panel.title}/{target['refId']}": target["expr"] for panel in SHOWN for target in panel.targets}
WINDOW = Window(0.0, 3600.0, 15.0, 60.0)

TARGET_LABELS = {"run", "stage", "rank", "node", "slurm_job"}
ALERT_LABELS = {"alertname", "alertstate", "severity"}

NOT_SHOWN = {
    "distkd_train_epoch": "the step says it finer",
    "distkd_evaluating": "for alerts, which do not fire meanwhile",
    "distkd_run_finished": "for alerts, which do not fire afterwards",
    "distkd_run_stopped": "for alerts, which do not fire afterwards",
    "distkd_last_step_timestamp_seconds": "for the alert on progress",
}


def labels_by_series() -> dict[str, set[str]]:
    """What can be asked for, and by which labels."""
    known: dict[str, set[str]] = {
        "up": TARGET_LABELS,
        "ALERTS": TARGET_LABELS | ALERT_LABELS,
        "process_resident_memory_bytes": TARGET_LABELS,
    }
    for metric in METRICS:
        labels = TARGET_LABELS | set(metric.labels)
        if metric.kind == "histogram":
            known |= {f"{metric.name}_{part}": labels for part in ("sum", "count")}
            known[f"{metric.name}_bucket"] = labels | {"le"}
        else:
            known[metric.name] = labels
    return known


def parsed(expr: str) -> Any:
    return promql_parser.parse(substituted(expr, "a run", WINDOW))


def selectors(tree: Any) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(tree, visit)
    return found


def grouped_by(tree: Any) -> set[str]:
    """Labels of every by, on, ignoring and group_left."""
    found: set[str] = set()

    def visit(node: Any) -> bool:
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
            found.update(modifier.labels)
        if isinstance(node, promql_parser.BinaryExpr) and modifier is not None:
            found.update(modifier.matching.labels if modifier.matching else (), modifier.group_labels or ())
        return True

    promql_parser.walk(tree, visit)
    return found


# ---- the schema


def lost(before: Any, after: Any, path: str = "dashboard") -> list[str]:
    """What is in `before` and not in `after`, which may have defaults besides."""
    if isinstance(before, dict) and isinstance(after, dict):
        missing = [f"{path}.{key}" for key in before if key not in after]
        return missing + [
            one for key in before if key in after for one in lost(before[key], after[key], f"{path}.{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [one for place, (old, new) in pairs for one in lost(old, new, f"{path}[{place}]")]
    return [] if before == after and type(before) is type(after) else [path]


def mistyped(value: Any, hint: Any, path: str = "dashboard") -> list[str]:
    """Where a value is not what Grafana's schema declares; its readers take whatever they are given."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if (option is type(None)) == (value is None)]
        return min((mistyped(value, option, path) for option in options), key=len, default=[path])
    if hint in (typing.Any, object):  # options and custom settings are of a class that the panel's kind decides
        return fields_mistyped(value, path) if type(value).__module__.startswith("grafana") else []
    if hint is type(None) or hint is None:
        return [] if value is None else [path]
    if typing.get_origin(hint) is typing.Literal:
        return [] if value in typing.get_args(hint) else [path]
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            return [path]
        [of] = typing.get_args(hint)
        return [one for place, item in enumerate(value) for one in mistyped(item, of, f"{path}[{place}]")]
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            return [path]
        of = typing.get_args(hint)[1]
        return [one for key, item in value.items() for one in mistyped(item, of, f"{path}.{key}")]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [] if value in [member.value for member in hint] else [path]
    if hint is float:
        return [] if isinstance(value, int | float) and not isinstance(value, bool) else [path]
    if hint in (int, str, bool):
        return [] if type(value) is hint else [path]
    if isinstance(value, dict) and hasattr(hint, "from_json"):  # the SDK leaves lists of these as they are
        inner = hint.from_json(value)
        return lost(value, json.loads(JSONEncoder().encode(inner)), path) + fields_mistyped(inner, path)
    return fields_mistyped(value, path) if isinstance(value, hint) else [path]


def fields_mistyped(value: Any, path: str) -> list[str]:
    hints = typing.get_type_hints(type(value)).items()
    return [one for name, hint in hints for one in mistyped(getattr(value, name, None), hint, f"{path}.{name}")]


@pytest.fixture(scope="module")
def decoded() -> schema.Dashboard:
    register_default_plugins()
    return schema.Dashboard.from_json(DASHBOARD)


def test_grafana_knows_every_key_of_the_dashboard(decoded):
    assert lost(DASHBOARD, json.loads(JSONEncoder().encode(decoded))) == []


def test_every_value_is_of_the_type_that_grafana_declares(decoded):
    assert fields_mistyped(decoded, "dashboard") == []


@pytest.mark.parametrize(
    "place, value",
    [
        (("panels", 0, "options", "colorMode"), "loud"),
        (("panels", 0, "fieldConfig", "defaults", "decimals"), "1"),
        (("panels", 0, "gridPos", "w"), "wide"),
        (("panels", 7, "fieldConfig", "defaults", "custom", "drawStyle"), "crayon"),
        (("panels", 7, "targets", 0, "expr"), 1),
        (("panels", 23, "transformations", 0, "id"), 1),
        (("panels", 23, "fieldConfig", "overrides", 0, "properties", 0, "id"), None),
        (("panels", 23, "fieldConfig", "overrides", 0, "matcher", "id"), 2),
        (("templating", "list", 0, "type"), "guess"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_a_wrong_value_would_be_found(place, value):
    register_default_plugins()
    broken = json.loads(FILE.read_text())
    inner = broken
    for key in place[:-1]:
        inner = inner[key]
    assert place[-1] in inner
    inner[place[-1]] = value
    assert len(fields_mistyped(schema.Dashboard.from_json(broken), "dashboard")) == 1


def test_units_are_those_of_grafana():
    known = {value for name, value in vars(units).items() if not name.startswith("_")}
    used = set(re.findall(r'"unit": "([^"]+)"|"id": "unit", "value": "([^"]+)"', FILE.read_text()))
    assert {one or other for one, other in used} <= known


# ---- what is asked


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_asks_for_what_distkd_exports(name):
    tree, known = parsed(QUERIES[name]), labels_by_series()
    asked = selectors(tree)
    assert asked
    for selector in asked:
        assert selector.name in known
        assert {matcher.name for matcher in selector.matchers.matchers} <= known[selector.name]
    assert grouped_by(tree) <= set.union(*(known[selector.name] for selector in asked))


@pytest.mark.parametrize("panel", SHOWN, ids=lambda panel: panel.title)
def test_a_panel_is_of_the_chosen_runs_and_names_labels_that_it_has(panel):
    for target in panel.targets:
        tree = parsed(target["expr"])
        known = set.union(*(labels_by_series()[selector.name] for selector in selectors(tree)))
        assert set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", ""))) <= known
        is_joined = " and on (run, stage, part) " in target["expr"]  # to series of the chosen runs
        for selector in selectors(tree)[: 1 if is_joined else None]:
            assert "run" in {matcher.name for matcher in selector.matchers.matchers}


def test_every_metric_is_on_the_dashboard_or_left_out_for_a_reason():
    asked = {selector.name for expr in QUERIES.values() for selector in selectors(parsed(expr))}
    shown = {metric.name for metric in METRICS if any(name.startswith(metric.name) for name in asked)}
    assert {metric.name for metric in METRICS} - shown == set(NOT_SHOWN)


def test_the_table_of_ranks_has_a_column_for_each_phase_of_every_step():
    [ranks] = [panel for panel in SHOWN if panel.title == "Ranks"]
    names = ranks.source["transformations"][-1]["options"]["renameByName"]
    for target in ranks.targets:
        phase = re.search(r'phase="(\w+)"', target["expr"])
        assert phase is None or names[f"Value #{target['refId']}"] == phase[1]
    assert [name for name in names.values() if name in PHASES] == [phase for phase in PHASES if phase != "checkpoint"]


@pytest.mark.parametrize("variable", DASHBOARD["templating"]["list"][1:], ids=lambda variable: variable["name"])
def test_a_variable_takes_the_values_of_its_label(variable):
    inner = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
    assert inner is not None
    [selector] = selectors(parsed(inner[1]))
    assert selector.name in labels_by_series()
    assert inner[2] == variable["name"]
    assert inner[2] in TARGET_LABELS


def test_annotations_are_alerts_of_the_chosen_runs():
    [annotation] = DASHBOARD["annotations"]["list"]
    [selector] = selectors(parsed(annotation["expr"]))
    assert selector.name == "ALERTS"
    assert {matcher.name for matcher in selector.matchers.matchers} == {"alertstate", "run"}


@pytest.mark.parametrize(
    "alert, titles",
    [
        ("DistkdStraggler", ["Slowest rank", "Straggler index"]),
        ("DistkdWaitsForData", ["Waiting for data"]),
        ("DistkdStaleCheckpoint", ["Checkpoint age"]),
    ],
)
def test_it_is_red_where_the_alert_fires(alert, titles):
    bounds = {float(bound) for bound in re.findall(r"> (\d+(?:\.\d+)?)", alerts()[alert]["expr"])}
    for panel in SHOWN:
        if panel.title in titles:
            [red] = [step["value"] for step in panel.field("thresholds")["steps"] if step["color"] == "red"]
            assert red in bounds


# ---- how it lies


def test_ids_and_titles_are_unique():
    assert len({panel.source["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel.title for panel in PANELS}) == len(PANELS)


def test_panels_fill_rows_of_24_and_do_not_overlap():
    cells: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        assert panel.x + panel.w <= 24
        for cell in itertools.product(range(panel.x, panel.x + panel.w), range(panel.y, panel.y + panel.h)):
            assert cell not in cells, f"{panel.title!r} lies on {cells[cell]!r}"
            cells[cell] = panel.title
    assert len(cells) == 24 * max(panel.y + panel.h for panel in PANELS)


def test_every_panel_says_what_to_do():
    for panel in SHOWN:
        assert len(panel.source["description"].split()) > 8, panel.title


def test_every_data_source_is_the_chosen_one():
    places = [*SHOWN, *DASHBOARD["templating"]["list"][1:], *DASHBOARD["annotations"]["list"]]
    sources = [place["datasource"] if isinstance(place, dict) else place.source["datasource"] for place in places]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


@pytest.mark.parametrize("kind", ["datasources", "dashboards"])
def test_provisioning_files_are_of_grafanas_form(kind):
    found = yaml.safe_load((FILE.parent / "provisioning" / kind / "distkd.yml").read_text())
    assert found["apiVersion"] == 1
    [entry] = found["datasources" if kind == "datasources" else "providers"]
    assert entry["name"] == "distkd"
    assert entry["type"] == ("prometheus" if kind == "datasources" else "file")
