"""What a run tells whoever watches is what happened: counted by hand, and the same whether or not anybody looks."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from distkd import methods
from distkd.base import World
from distkd.comm import world as comm
from distkd.data.dataset import Dataset
from distkd.data.loader import train_batches
from distkd.errors import Interrupted, NonFiniteError
from distkd.files import read_json
from distkd.metrics.jsonl import read_jsonl
from distkd.metrics.ledger import Distribution, Ledger
from distkd.metrics.meters import HostTimeline, Stopwatch
from distkd.metrics.table import OWN_WORK, PHASES, by_name
from distkd.train import loop, observe
from distkd.train.flops import Flops
from distkd.train.job import assemble
from distkd.train.loop import train, train_step
from distkd.train.run import Run, _without_secrets
from distkd.train.tally import _shares, _straggler
from tests.laws.common import before_steps, law_config, settings_of
from tests.pool import JOB_TIMEOUT_S, Ranks
from tests.small import Small

Values = dict[str, dict[tuple[str, ...], Any]]


def _values(ledger: Ledger) -> Values:
    return {metric.name: series for metric, series in ledger.series()}


@contextmanager
def _ledgers() -> Iterator[list[Values]]:
    """What each run in here has told by its end."""
    kept: list[Values] = []
    original = Run.close

    def close(self: Run, error: BaseException | None, *hurry: Any) -> None:
        original(self, error, *hurry)
        kept.append(_values(self.observer.ledger))

    Run.close = close  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        Run.close = original  # type: ignore[method-assign]


def _watched(world: World, config: dict[str, Any]) -> tuple[Values, int]:
    """A whole run; what its ledger holds, and how many numbers learn."""
    observe._EVERY_S = 0.0  # every reading
    comm.counts.clear()
    comm.moved_bytes.clear()
    with _ledgers() as kept:
        train(settings_of(config), world)
    job = assemble(settings_of(config), world)
    return kept[0], sum(p.numel() for p in job.method.trainable.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def study(rank_pool: Any, shards: Path, root: Path) -> tuple[list[tuple[Values, int]], Path]:
    """DC-Distill on two ranks: 15 steps of 16 samples, read every five."""
    run = {"name": "observed", "epochs": 1, "log_every": 5}
    config = law_config("dc_distill", shards, root, run=run)
    return Ranks(rank_pool, 2, JOB_TIMEOUT_S).run(_watched, config=config), settings_of(config).folder


def test_ranks_count_their_own_steps_and_samples(study: Any):
    for values, _ in study[0]:
        assert values["distkd_steps_total"] == {(): 15}
        assert values["distkd_train_step"] == {(): 15}
        assert values["distkd_samples_total"] == {(): 15 * 16 / 2}
        assert values["distkd_shard_errors_total"] == {(): 0}
        assert values["distkd_evaluating"] == {(): 0}


def test_every_step_is_observed_once_in_every_phase(study: Any):
    for values, _ in study[0]:
        phases = values["distkd_step_seconds"]
        assert set(phases) == {(phase,) for phase in PHASES}
        for phase in PHASES:
            distribution = phases[phase,]
            assert isinstance(distribution, Distribution)
            assert sum(distribution.counts) == 15
            assert distribution.total >= 0
        wall = values["distkd_step_wall_seconds"][()]
        assert sum(wall.counts) == 15
        assert sum(phases[phase,].total for phase in PHASES) <= wall.total


def test_collectives_are_counted_with_the_bytes_that_a_rank_hands_in(study: Any):
    for values, n_learning in study[0]:
        calls, moved = values["distkd_collectives_total"], values["distkd_collective_bytes_total"]
        assert calls["gradients",] == 15
        assert moved["gradients",] == 15 * n_learning * 8
        assert calls["all_gather_rows",] >= 15
        assert moved["all_gather_rows",] > 0


def test_the_main_rank_tells_what_metrics_jsonl_says(study: Any):
    (values, _), (of_other, _) = study[0]
    last = [line for line in read_jsonl(study[1] / "metrics.jsonl") if "loss" in line][-1]
    assert values["distkd_loss"] == {("total",): last["loss"], **{(k,): v for k, v in last["parts"].items()}}
    assert values["distkd_grad_norm"] == {(): last["grad_norm"]}
    assert values["distkd_lr"] == {(): last["lr"]}
    told = {
        **{f"weight/{loss}": v for (loss,), v in values["distkd_agreement_weight"].items()},
        **{f"cosine/{loss}|{other}": v for (loss, other), v in values["distkd_agreement_cosine"].items()},
    }
    assert told
    assert told == {name: v for name, v in last["gauges"].items() if name.startswith(("weight/", "cosine/"))}
    for split in ("val", "test"):
        scores = read_json(study[1] / "eval" / f"{split}.json")["metrics"]
        assert {k[1]: v for k, v in values["distkd_eval_metric"].items() if k[0] == split} == {
            name: score for name, score in scores.items() if score is not None
        }
    assert values["distkd_run_finished"] == {(): 1}
    assert values["distkd_checkpoints_total"] == {("written",): 1, ("failed",): 0}
    assert values["distkd_train_steps_planned"] == {(): 15}
    table = by_name()
    assert {name for name in of_other if table[name].of == "run"} == set()


def test_all_ranks_are_in_one_file_for_people(study: Any):
    told = read_json(study[1] / "ranks.json")
    assert told["step"] == 15
    assert [row["rank"] for row in told["ranks"]] == [0, 1]
    for row in told["ranks"]:
        assert row.keys() == {
            "rank", "busy_s", "wall_s", "straggler_index", "phases", "queue", "gpu_memory_bytes",
        }  # fmt: skip
        assert row["busy_s"] == pytest.approx(sum(row["phases"][phase] for phase in told["own_work"]), abs=3e-6)
    assert min(row["straggler_index"] for row in told["ranks"]) == 1.0  # of two ranks the faster one is the median


def test_a_run_resumed_goes_on_and_a_step_done_again_counts_again(small: Small, tmp_path: Path):
    config = small.config("alone", run={"root": str(tmp_path), "name": "again", "checkpoint_every": 3})

    def hook(step: int, _: Any) -> None:
        if step == 5:
            raise RuntimeError("power cut")

    with _ledgers() as kept:
        with pytest.raises(RuntimeError, match="power cut"), before_steps(hook):
            train(settings_of(config), World())
        train(settings_of(config), World())
    first, second = kept
    steps = second["distkd_train_step"][()]
    assert first["distkd_run_finished"] == {(): 0}
    assert (first["distkd_steps_total"], first["distkd_restarts"]) == ({(): 5}, {(): 0})
    assert second["distkd_steps_total"] == {(): steps - 3}  # from the checkpoint on; the exporter adds the earlier ones
    assert second["distkd_restarts"] == {(): 1}


def test_steps_left_out_and_samples_replaced_are_counted(small: Small, tmp_path: Path):
    run = {"root": str(tmp_path), "name": "skips", "nonfinite": "skip"}
    config = small.config("alone", run=run)

    def spoil(step: int, passes: Any) -> None:
        if step in (1, 3):
            passes[0].inputs["gene"].fill_(math.nan)

    original = Dataset.batch

    def batch(self: Dataset, *arguments: Any, **options: Any) -> Any:
        if options["train"]:
            self.unreadable.failures += 2  # as a sample that cannot be read does, and the one tried in its place
            self.unreadable.replaced += 1
        return original(self, *arguments, **options)

    Dataset.batch = batch  # type: ignore[method-assign]
    try:
        with _ledgers() as kept, before_steps(spoil):
            train(settings_of(config), World())
    finally:
        Dataset.batch = original  # type: ignore[method-assign]
    steps = kept[0]["distkd_steps_total"][()]
    assert kept[0]["distkd_skipped_steps_total"] == {(): 2}
    assert kept[0]["distkd_skipped_samples_total"] == {(): steps}
    assert kept[0]["distkd_shard_errors_total"] == {(): 2 * steps}


def test_a_run_that_diverges_says_so_before_it_is_gone(small: Small, tmp_path: Path):
    config = small.config("alone", run={"root": str(tmp_path), "name": "nan"})

    def spoil(step: int, passes: Any) -> None:
        if step == 2:
            passes[0].inputs["gene"].fill_(math.nan)

    with _ledgers() as kept, before_steps(spoil), pytest.raises(NonFiniteError):
        train(settings_of(config), World())
    assert math.isnan(kept[0]["distkd_loss"]["total",])
    assert kept[0]["distkd_run_finished"] == {(): 0}


@pytest.mark.parametrize("method", methods.available())
def test_counting_operations_changes_no_bit_of_a_step(shards: Path, root: Path, method: str):
    config = law_config(method, shards, root, metrics={"export": "local"})
    ends: list[dict[str, torch.Tensor]] = []
    counted: list[int] = []
    for counts in (False, True):
        job = assemble(settings_of(config), World())
        job.method.trainable.train()
        flops = Flops(job)
        assert flops.can_count
        with closing(train_batches(job.dataset, job.plan, World(), 1, 0)) as batches:
            for _ in range(2):
                with flops.counted() if counts else nullcontext():
                    train_step(job, next(batches)[1], Stopwatch())
        weights = {entry.name: entry.read().detach().clone() for entry in job.engine.entries()}
        ends.append(weights | job.method.state.state_dict())
        counted.append(flops.per_step)
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    assert counted[0] == 0
    assert counted[1] > 0


def test_operations_are_those_of_forward_and_backward(small: Small):
    """A linear layer of the 5 genes: 2 operations a weight and sample, and as many again for its gradient."""
    job = assemble(small.settings("alone", metrics={"export": "local"}), World())
    layers = [module for module in job.method.trainable.modules() if isinstance(module, torch.nn.Linear)]
    flops = Flops(job)
    with closing(train_batches(job.dataset, job.plan, World(), 1, 0)) as batches, flops.counted():
        train_step(job, next(batches)[1], Stopwatch())
    products = [2 * 8 * layer.in_features * layer.out_features for layer in layers]
    # the gradient of what comes in is needed by every layer but the first
    assert flops.per_step == 3 * sum(products) - products[0]


def test_a_formula_that_fails_leaves_the_step_alone(small: Small, monkeypatch: pytest.MonkeyPatch):
    from torch.utils.flop_counter import flop_registry

    def fails(*_: Any, **__: Any) -> int:
        raise AssertionError("a shape that nobody thought of")

    job = assemble(small.settings("alone", metrics={"export": "local"}), World())
    monkeypatch.setitem(flop_registry, torch.ops.aten.addmm, fails)
    flops = Flops(job)
    with closing(train_batches(job.dataset, job.plan, World(), 1, 0)) as batches, flops.counted():
        train_step(job, next(batches)[1], Stopwatch())
    assert flops.per_step == 0


def test_a_stop_that_comes_when_a_stage_is_done_keeps_the_next_one_from_starting(small: Small, tmp_path: Path):
    settings = small.settings("alone", run={"root": str(tmp_path), "name": "first", "epochs": 1})
    original = loop.finish

    def finish(run: Run) -> None:
        original(run)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.finish = finish
    try:
        with pytest.raises(Interrupted, match=r"stopped as asked when .*first was done; start again for the stages"):
            train(settings, World(), followed=True)
    finally:
        loop.finish = original
    assert read_json(tmp_path / "first" / "outcome.json")["state"] == "done"


def test_an_evaluation_is_no_part_of_a_step(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(observe.time, "perf_counter", lambda: now[0])
    observer = observe.Observer(assemble(small.settings("alone"), World()), tmp_path)
    observer.begin()
    now[0] = 1.0
    observer.step(1, 8)
    with observer.evaluating():
        now[0] = 101.0
    now[0] = 103.0
    observer.step(2, 8)
    wall = _values(observer.ledger)["distkd_step_wall_seconds"][()]
    assert (sum(wall.counts), wall.total) == (2, 3.0)


def test_a_token_in_the_address_of_shards_stays_on_this_machine(small: Small):
    url = "https://user:SECRET@host/set?X-Sig=TOKEN"
    config = small.config("alone", data={"shards": url})
    told = str(_without_secrets(settings_of(config)))
    assert "https://***@host/set?***" in told
    assert "SECRET" not in told
    assert "TOKEN" not in told


def test_shares_compare_each_rank_with_the_median():
    def row(data: float, *, wait: float = 0.0, n: int = 5, queue: float = -1, memory: float = -1) -> list[float]:
        phases = {"data": data, "forward": 1.0, "backward": 4.0 + wait, "optimizer": 1.0, "checkpoint": 90.0}
        return [9.0, 0.0, 0.0, queue, memory, float(n), *(phases.get(phase, 0.0) for phase in PHASES)]

    shares = _shares(
        [row(2.0, wait=8.0), row(2.0, wait=8.0), row(10.0, queue=1, memory=7), row(2.0, wait=8.0)], 5, OWN_WORK
    )
    assert [share.index for share in shares] == [1.0, 1.0, 2.0, 1.0]  # 16 s a step, 8 s without the wait for the third
    assert [share.busy_s for share in shares] == [4.0, 4.0, 12.0, 4.0]
    fewer = _shares([row(2.0, wait=8.0), row(10.0)], 5, ("data",))
    assert [(share.index, share.busy_s) for share in fewer] == [(1.0, 2.0), (2.0, 10.0)]
    tiny = _shares([row(0.001, wait=0.002), row(0.003)], 5, ("data",))
    assert tiny[1].index == pytest.approx(1 + 0.002 / 6.001)  # three times the median's data, of no weight in a step
    assert (shares[2].queue, shares[2].gpu_memory_bytes, shares[0].queue) == (1, 7, None)
    assert _straggler(shares) == {"straggler_rank": 2, "straggler_index": 2.0}
    assert _straggler(_shares([row(2.0)], 5, OWN_WORK)) == {}
    assert _straggler(_shares([row(2.0), row(8.0, n=0)], 5, OWN_WORK)) == {}  # a device that has not come that far
    assert _straggler(_shares([row(-6.0), row(-6.0)], 5, OWN_WORK)) == {}
    # nobody waited: a step is at least the median's own work
    assert _straggler(_shares([row(2.0), row(14.0)], 5, OWN_WORK)) == {"straggler_rank": 1, "straggler_index": 4.0}


def test_the_loop_takes_the_timeline_of_its_device(small: Small):
    assert isinstance(loop.Tally(assemble(small.settings("alone"), World()), 1).watch._timeline, HostTimeline)
