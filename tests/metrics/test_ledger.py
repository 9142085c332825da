"""A ledger: what the trainer says is what is read, whole, counted on over restarts, and never without bound."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest

from distkd.metrics.ledger import MAX_SERIES, Distribution, Ledger, Snapshot
from distkd.metrics.table import BUCKETS_S
from tests.metrics.scraping import full_ledger


def _standing(source: Ledger | Snapshot) -> dict[str, Any]:
    snapshot = source.snapshot() if isinstance(source, Ledger) else source
    return {metric.name: series for metric, series in snapshot.series}


def test_what_was_said_last_is_what_stands():
    ledger = Ledger()
    ledger.set("distkd_lr", 0.5)
    ledger.set("distkd_lr", 0.25)
    ledger.set("distkd_grad_norm", 1.0)
    ledger.set("distkd_grad_norm", None)
    ledger.set("distkd_teacher_loss", 2.0, "ce")
    ledger.replace("distkd_loss", {"total": 1.0, "kl": 0.5})
    ledger.replace("distkd_loss", {"total": 2.0})
    ledger.replace("distkd_agreement_cosine", {("ce", "kl"): -0.5})
    ledger.add("distkd_samples_total", 8)
    ledger.add("distkd_samples_total", 4)
    ledger.add("distkd_collectives_total", 0, "gradients")
    assert _standing(ledger) == {
        "distkd_lr": {(): 0.25},
        "distkd_teacher_loss": {("ce",): 2.0},
        "distkd_loss": {("total",): 2.0},
        "distkd_agreement_cosine": {("ce", "kl"): -0.5},
        "distkd_samples_total": {(): 12.0},
        "distkd_collectives_total": {("gradients",): 0.0},
    }


def test_a_value_falls_into_the_bucket_that_ends_with_it():
    ledger = Ledger()
    for value in (0.0, BUCKETS_S[0], BUCKETS_S[0] * 1.5, BUCKETS_S[-1], 1e9):
        ledger.observe("distkd_step_wall_seconds", value)
    [found] = _standing(ledger)["distkd_step_wall_seconds"].values()
    assert found.counts == (2, 1, *[0] * (len(BUCKETS_S) - 3), 1, 1)
    assert found.total == pytest.approx(1e9 + BUCKETS_S[-1] + 2.5 * BUCKETS_S[0])


def test_a_snapshot_stands_still():
    ledger = full_ledger()
    snapshot, text = ledger.snapshot(), repr(ledger.snapshot())
    ledger.observe("distkd_step_seconds", 1.0, "data")
    ledger.add("distkd_samples_total", 1)
    ledger.set("distkd_lr", 7.0)
    assert repr(snapshot) == text
    assert repr(ledger.snapshot()) != text


def test_a_live_gauge_is_asked_when_somebody_reads_and_costs_nobody_else(caplog: pytest.LogCaptureFixture):
    ledger = Ledger()
    ages = iter([1.0, 2.0, None])
    ledger.live("distkd_checkpoint_age_seconds", lambda: next(ages))
    ledger.live("distkd_loader_queue_depth", lambda: 1 / 0)
    ledger.set("distkd_lr", 0.5)
    seen = [_standing(ledger).get("distkd_checkpoint_age_seconds") for _ in range(3)]
    assert seen == [{(): 1.0}, {(): 2.0}, None]
    assert _standing(ledger) == {"distkd_lr": {(): 0.5}}  # by now the other one fails, too
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "distkd_loader_queue_depth cannot be read and is left out: ZeroDivisionError: division by zero",
        "distkd_checkpoint_age_seconds cannot be read and is left out: StopIteration: ",
    ]


def test_counters_go_on_from_what_was_kept():
    first = full_ledger()
    kept = json.loads(json.dumps(first.counters(), allow_nan=False))
    second = Ledger()
    second.add("distkd_samples_total", 0.5)
    second.restore(kept)
    second.observe("distkd_step_seconds", BUCKETS_S[0], "data")
    before, after = _standing(first), _standing(second)
    assert after.keys() == {metric.name for metric, _ in first.series() if metric.kind != "gauge"}
    assert after["distkd_samples_total"] == {(): 1235.0}
    old, new = before["distkd_step_seconds"][("data",)], after["distkd_step_seconds"][("data",)]
    assert new == Distribution((old.counts[0] + 1, *old.counts[1:]), old.total + BUCKETS_S[0])
    del before["distkd_step_seconds"][("data",)], after["distkd_step_seconds"][("data",)]
    assert {name: after[name] for name in after if name != "distkd_samples_total"} == {
        name: series for name, series in before.items() if name in after and name != "distkd_samples_total"
    }


@pytest.mark.parametrize(
    "foreign",
    [
        [], 3, {"distkd_steps_total": 3}, {"distkd_steps_total": [[[], "many"]]}, {"distkd_steps_total": [[[], -1]]},
        {"distkd_steps_total": [[[], float("nan")]]}, {"distkd_steps_total": [[["data"], 1]]},
        {"distkd_step_seconds": [[["data"], 1]]}, {"distkd_step_seconds": [[["data"], [[1, 2], 0.5]]]},
        {"distkd_step_seconds": [[["data"], [[-1] * (len(BUCKETS_S) + 1), 0.5]]]},
    ],
)  # fmt: skip
def test_what_is_no_count_is_refused_as_a_whole(foreign: Any):
    ledger = Ledger()
    good = {"distkd_samples_total": [[[], 1.0]]}
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
        ledger.restore({**good, **foreign} if isinstance(foreign, dict) else foreign)
    assert _standing(ledger) == {}


def test_metrics_of_other_versions_are_no_fault():
    ledger = Ledger()
    ledger.restore({"distkd_gone_total": [[[], 1.0]], "distkd_lr": [[[], 1.0]], "distkd_steps_total": [[[], 2.0]]})
    assert _standing(ledger) == {"distkd_steps_total": {(): 2.0}}


def test_gauges_of_one_moment_go_with_counters_of_another():
    early, late = Ledger(), Ledger()
    for number, ledger in enumerate((early, late), start=1):
        ledger.set("distkd_lr", number)
        ledger.add("distkd_steps_total", number)
        ledger.observe("distkd_step_wall_seconds", number)
    late.add("distkd_samples_total", 1)
    mixed = late.snapshot().with_counters_of(early.snapshot())
    assert mixed.counters() == early.counters()
    assert _standing(mixed)["distkd_lr"] == {(): 2}
    order = [metric.name for metric, _ in early.snapshot().series]
    assert [metric.name for metric, _ in mixed.series] == order


def test_no_config_can_flood_a_server(caplog: pytest.LogCaptureFixture):
    ledger = Ledger()
    for number in range(MAX_SERIES + 5):
        ledger.set("distkd_method_value", number, f"name {number}")
        ledger.add("distkd_collectives_total", 1, f"kind {number}")
        ledger.observe("distkd_step_seconds", 1, f"phase {number}")
    ledger.set("distkd_method_value", 7.0, "name 0")  # who is there stays
    ledger.replace("distkd_loss", {f"part {number}": 1.0 for number in range(MAX_SERIES + 5)})
    assert [len(series) for series in _standing(ledger).values()] == [MAX_SERIES] * 4
    assert _standing(ledger)["distkd_method_value"][("name 0",)] == 7.0
    names = ("distkd_method_value", "distkd_collectives_total", "distkd_step_seconds", "distkd_loss")
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} has more than {MAX_SERIES} label values; the others are not exported" for name in names
    ]


def test_a_name_or_a_label_that_the_table_does_not_have_is_our_mistake():
    ledger = Ledger()
    with pytest.raises(AssertionError, match=r"metric 'distkd_typo' is not in the table"):
        ledger.set("distkd_typo", 1.0)
    with pytest.raises(AssertionError, match=r"metric 'distkd_steps_total' has labels \(\), not \('data',\)"):
        ledger.add("distkd_steps_total", 1.0, "data")
    with pytest.raises(AssertionError, match=r"metric 'distkd_loss' has labels \('part',\), not \('a', 'b'\)"):
        ledger.replace("distkd_loss", {("a", "b"): 1.0})
    with pytest.raises(AssertionError, match=r"metric 'distkd_step_seconds' has labels \('phase',\), not \(\)"):
        ledger.observe("distkd_step_seconds", 1.0)


def test_a_reader_sees_whole_histograms_and_rising_counters_while_the_trainer_writes():
    ledger, done = Ledger(), threading.Event()
    value = 0.25  # whose sums are exact

    def train() -> None:
        number = 0
        while not done.is_set():
            number += 1
            ledger.observe("distkd_step_seconds", value, f"phase {number % 7}")
            ledger.add("distkd_samples_total", 8)
            ledger.set("distkd_loss", number, f"part {number % 7}")

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        last: dict[Any, float] = {}
        for _ in range(300):
            standing = _standing(ledger)
            for labels, found in standing.get("distkd_step_seconds", {}).items():
                seen = sum(found.counts)
                assert seen >= last.get(labels, 0)
                assert abs(found.total - seen * value) <= value  # the last one may be on its way
                last[labels] = seen
            samples = standing.get("distkd_samples_total", {(): 0})[()]
            assert samples >= last.get("samples", 0)
            last["samples"] = samples
    finally:
        done.set()
        trainer.join()


def test_scripts_read_the_table_and_the_ledger_without_torch():
    code = (
        "import sys; from distkd.metrics import ledger, table, targets; print({'torch', 'pydantic'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout == "set()\n", said.stderr
