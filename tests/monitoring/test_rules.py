"""The configuration and the rules of launch/monitoring, as promtool and the docs see them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from distkd.metrics.table import METRICS
from tests.launch.processes import REPOSITORY
from tests.monitoring.alert_table import WHEN, alerts, in_docs, markdown
from tests.monitoring.server import MONITORING, shortened

RULES = sorted(path for path in (MONITORING / "rules").glob("*.yml") if not path.stem.endswith("_test"))
RULE_TESTS = sorted((MONITORING / "rules").glob("*_test.yml"))
DOCS = REPOSITORY / "docs" / "monitoring.md"

pytestmark = [pytest.mark.prometheus, pytest.mark.usefixtures("prometheus_programs")]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """launch/monitoring where a run root `runs` is, as in a checkout."""
    folder = tmp_path / "launch" / "monitoring"
    shutil.copytree(MONITORING, folder)
    targets = tmp_path / "runs" / "prometheus"
    targets.mkdir(parents=True)
    (targets / "a.rank-00000.json").write_text('[{"targets": ["127.0.0.1:1"], "labels": {"run": "a", "rank": "0"}}]')
    return folder


def test_the_configuration_is_taken_without_a_warning(copy):
    assert "WARNING" not in promtool("check", "config", copy / "prometheus.yml")


def test_the_examples_in_its_comments_can_be_taken_as_they_are(copy):
    # prose has a blank behind its #; lines of YAML have none, or those that they are indented by
    text = re.sub(r"^( *)#(?! \S)", r"\1", (copy / "prometheus.yml").read_text(), flags=re.MULTILINE)
    (copy / "prometheus.yml").write_text(text)
    promtool("check", "config", "--syntax-only", copy / "prometheus.yml")
    config = yaml.safe_load(text)
    assert [job["job_name"] for job in config["scrape_configs"]] == ["distkd", "distkd-static"]
    assert config["scrape_configs"][0]["basic_auth"]
    assert config["alerting"]


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_rules_are_well_formed(path):
    assert "FAILED" not in promtool("check", "rules", path)


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_rules_of_the_test_server_differ_in_durations_only(path):
    rules = yaml.safe_load(path.read_text())
    durations = re.compile(r"(?<=\[)\w+(?=\])|(?<=offset )\w+")
    before = [durations.sub("D", rule["expr"]) for group in rules["groups"] for rule in group["rules"]]
    after = [durations.sub("D", rule["expr"]) for group in shortened(rules)["groups"] for rule in group["rules"]]
    assert before == after


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_rules_say_what_they_should_and_nothing_else(path):
    promtool("test", "rules", path)


@pytest.mark.parametrize("name", alerts())
def test_every_alert_is_tested_to_fire(name):
    fires = re.compile(rf'labels: .ALERTS\{{alertname="{name}",alertstate="firing"')
    assert any(fires.search(path.read_text()) for path in RULE_TESTS)


@pytest.mark.parametrize("name", alerts())
def test_every_alert_says_what_was_found_and_what_to_do(name):
    rule = alerts()[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "action"}
    assert "$labels.run" in rule["annotations"]["summary"]
    assert "$labels.run" in rule["annotations"]["description"]
    assert "{{" not in rule["annotations"]["action"]


def test_rules_ask_for_metrics_of_the_table_only():
    series = set()
    for metric in METRICS:
        ends = ("_sum", "_count", "_bucket") if metric.kind == "histogram" else ("",)
        series |= {metric.name + end for end in ends}
    recorded = set()
    asked = set()
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                recorded.add(rule.get("record"))
                asked |= set(re.findall(r"(?:\w+:)?\bdistkd_\w+(?::\w+)?", rule["expr"]))
    assert asked <= series | recorded


def test_the_docs_list_every_alert_and_what_to_do():
    assert set(WHEN) == set(alerts())
    text = DOCS.read_text()
    assert in_docs(text) == set(alerts())
    assert markdown() in text
