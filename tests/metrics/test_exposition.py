"""What is served is what the client library would write, in both formats, and promtool finds no fault with it."""

from __future__ import annotations

import gzip
import math
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from distkd.metrics.exposition import Families, Page, Renderer, process_registry
from distkd.metrics.ledger import Ledger, Snapshot
from tests.metrics.scraping import full_ledger, values
from tests.require import program_path, require


def _reference(snapshot: Snapshot, *, openmetrics: bool) -> bytes:
    registry = CollectorRegistry()
    registry.register(Families(snapshot))
    return generate_openmetrics(registry) if openmetrics else generate_latest(registry)


_LABEL = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_NUMBER = st.one_of(st.floats(), st.integers(-(10**20), 10**20), st.sampled_from([999_999, 1_000_000, 12345678.5]))
_COUNT = st.one_of(st.floats(0, 1e18), st.integers(0, 10**9))


@given(
    gauges=st.dictionaries(_LABEL, _NUMBER, max_size=3),
    pairs=st.dictionaries(st.tuples(_LABEL, _LABEL), _NUMBER, max_size=3),
    counters=st.dictionaries(_LABEL, _COUNT, max_size=3),
    observed=st.dictionaries(_LABEL, st.lists(st.floats(0, 1e9), min_size=1, max_size=5), max_size=3),
    alone=st.one_of(st.none(), _COUNT),
)
def test_our_lines_are_those_of_the_library(
    gauges: dict[str, float],
    pairs: dict[tuple[str, str], float],
    counters: dict[str, float],
    observed: dict[str, list[float]],
    alone: float | None,
):
    ledger, renderer = Ledger(), Renderer()
    for _ in range(2):  # once with nothing kept from the last time, once with everything
        ledger.replace("distkd_loss", gauges)
        ledger.replace("distkd_agreement_cosine", pairs)
        for name, amount in counters.items():
            ledger.add("distkd_collective_bytes_total", amount, name)
        for name, times in observed.items():
            for seconds in times:
                ledger.observe("distkd_step_seconds", seconds, name)
        if alone is not None:
            ledger.add("distkd_steps_total", alone)
        snapshot = ledger.snapshot()
        for openmetrics in (False, True):
            page = Page(snapshot, renderer)
            assert page.body(openmetrics=openmetrics) == _reference(snapshot, openmetrics=openmetrics)
            assert gzip.decompress(page.body(openmetrics=openmetrics, compressed=True)) == page.body(
                openmetrics=openmetrics
            )


def test_every_metric_is_written_as_the_library_does_also_with_millions_of_steps():
    ledger = full_ledger()
    kept = ledger.counters()
    counts, total = kept["distkd_step_seconds"][0][1]
    counts[3:5] = [999_990, 12_345_678]
    kept["distkd_step_seconds"][0][1] = [counts, total]
    ledger.restore(kept)
    snapshot = ledger.snapshot()
    for openmetrics in (False, True):
        page = Page(snapshot, Renderer())
        assert page.body(openmetrics=openmetrics) == _reference(snapshot, openmetrics=openmetrics)
    assert b"_created" not in page.body(openmetrics=True)


@pytest.mark.parametrize("openmetrics", [False, True])
def test_a_parser_finds_kinds_names_and_numbers(openmetrics: bool):
    ledger = Ledger()
    ledger.add("distkd_samples_total", 16)
    ledger.set("distkd_lr", 1e-3)
    ledger.set("distkd_grad_norm", math.inf)
    ledger.replace("distkd_loss", {'a "b" \\ c\nd': 0.5})
    ledger.observe("distkd_step_wall_seconds", 0.005)
    found = values(Page(ledger.snapshot(), Renderer()).body(openmetrics=openmetrics).decode(), openmetrics=openmetrics)
    assert {name: number for name, number in found.items() if "_bucket" not in name} == {
        "counter distkd_samples_total": 16,
        "gauge distkd_lr": 1e-3,
        "gauge distkd_grad_norm": math.inf,
        'gauge distkd_loss a "b" \\ c\nd': 0.5,
        "histogram distkd_step_wall_seconds_count": 1,
        "histogram distkd_step_wall_seconds_sum": 0.005,
    }
    assert found["histogram distkd_step_wall_seconds_bucket 0.002"] == 0
    assert found["histogram distkd_step_wall_seconds_bucket 0.005"] == 1
    assert found["histogram distkd_step_wall_seconds_bucket +Inf"] == 1


def test_labels_for_all_series_come_to_those_of_each():
    ledger = Ledger()
    ledger.set("distkd_lr", 1.0)
    ledger.observe("distkd_step_seconds", 1.0, "data")
    text = Page(ledger.snapshot(), Renderer({"run": "a", "rank": "3"})).body().decode()
    assert 'distkd_lr{rank="3",run="a"} 1.0' in text
    assert 'distkd_step_seconds_bucket{le="+Inf",phase="data",rank="3",run="a"} 1.0' in text
    assert 'distkd_step_seconds_sum{phase="data",rank="3",run="a"} 1.0' in text


def test_a_name_of_bytes_that_are_no_text_spoils_nothing():
    ledger = Ledger()
    ledger.set("distkd_method_value", 1.0, "caf\udce9")
    assert b'{name="caf?"} 1.0' in Page(ledger.snapshot(), Renderer()).body()


def test_labels_that_are_gone_are_forgotten():
    ledger, renderer = Ledger(), Renderer()
    for number in range(1000):
        ledger.replace("distkd_method_value", {f"name {number}": 1.0})
        Page(ledger.snapshot(), renderer).body()
    assert len(renderer._kept) == 1


def test_the_process_shows_its_memory_and_time():
    page = Page(Snapshot(), Renderer(), process_registry())
    for openmetrics in (False, True):
        text = page.body(openmetrics=openmetrics).decode()
        assert "\nprocess_resident_memory_bytes " in text
        assert "\nprocess_cpu_seconds_total " in text
        assert text.endswith("# EOF\n") == openmetrics


@pytest.mark.prometheus
@pytest.mark.parametrize("labels", [{}, {"run": "study/fold-1", "rank": "0"}])
def test_promtool_has_nothing_to_say_about_a_full_exposition(labels: dict[str, str]):
    require("prometheus", ["promtool"])
    promtool = shutil.which("promtool", path=program_path())
    page = Page(full_ledger().snapshot(), Renderer(labels), None if labels else process_registry())
    done = subprocess.run([str(promtool), "check", "metrics"], input=page.body(), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
