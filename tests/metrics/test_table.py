"""The table of metrics keeps the rules of Prometheus, and the docs show it as it is."""

from __future__ import annotations

import re

from distkd.metrics.table import BUCKETS_S, METRICS, PHASES, by_name, markdown
from tests.launch.processes import REPOSITORY

# of the target file, and those that Prometheus or the exposition has for itself
TAKEN = {"run", "stage", "rank", "node", "slurm_job", "job", "instance", "le", "quantile"}
UNITS = {"seconds", "bytes", "ratio", "total", "info", "celsius", "joules"}
NO_UNITS = {"ms", "us", "milliseconds", "minutes", "hours", "kb", "mb", "mib", "gib", "kilobytes", "percent", "pct"}
KINDS = {"gauge", "counter", "histogram", "count", "sum", "bucket"}


def test_names_are_unique_and_keep_the_rules_of_prometheus():
    assert len(by_name()) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"distkd(_[a-z]+)+", metric.name), metric.name
        words = metric.name.split("_")
        assert (words[-1] == "total") == (metric.kind == "counter"), metric.name
        assert not (NO_UNITS | KINDS) & set(words), metric.name
        # a unit ends the name, `_total` behind it
        units = [word for word in words if word in UNITS - {"total"}]
        assert units in ([], [words[-2] if words[-1] == "total" else words[-1]], ["seconds", "seconds"]), metric.name
    assert all(metric.name.endswith("_seconds") for metric in METRICS if metric.kind == "histogram")


def test_labels_are_few_and_none_is_the_targets():
    for metric in METRICS:
        assert len(metric.labels) <= 2, metric.name
        assert not TAKEN & set(metric.labels), metric.name
        assert all(re.fullmatch(r"[a-z]+", label) for label in metric.labels), metric.name
        assert not {"step", "epoch", "sample", "index", "path"} & set(metric.labels), metric.name


def test_help_is_a_sentence_that_needs_no_escapes():
    for metric in METRICS:
        assert metric.help.endswith("."), metric.name
        assert metric.help.isascii(), metric.name
        assert not set(metric.help) & set('\\"\n|'), metric.name  # `|` would end a cell of the docs


def test_what_only_the_main_rank_knows_is_said():
    assert {metric.of for metric in METRICS} == {"rank", "run"}
    assert all(metric.of == "rank" for metric in METRICS if metric.kind == "histogram")


def test_buckets_rise_and_phases_are_those_of_the_meter():
    from distkd.metrics.meters import PHASES as measured

    assert list(BUCKETS_S) == sorted(set(BUCKETS_S))
    assert BUCKETS_S[0] > 0
    assert set(measured) == set(PHASES)


def test_the_docs_show_the_table():
    assert markdown() in (REPOSITORY / "docs" / "monitoring.md").read_text()
