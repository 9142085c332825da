"""Law 1: the same samples, losses, gradients, banks and weights at 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distkd import methods
from tests.laws.common import equal_up_to, law_config, run_steps


@pytest.mark.parametrize("method", methods.available())
def test_one_two_and_four_ranks_take_the_same_steps(ranks, shards: Path, root: Path, method: str):
    config = law_config(method, shards, root)
    [alone] = ranks(1).run(run_steps, config=config, steps=20)
    for size in (2, 4):
        traces = ranks(size).run(run_steps, config=config, steps=20)
        for step in range(20):
            together = [sample for trace in traces for sample in trace.samples[step]]
            assert together == alone.samples[step]
        for trace in traces:
            assert trace.losses == pytest.approx(alone.losses, abs=1e-9)
            equal_up_to(trace.weights, alone.weights, 1e-9)
            equal_up_to(trace.state, alone.state, 1e-9)


@pytest.mark.parametrize("method", methods.available())
def test_accumulation_is_the_same_on_any_ranks(ranks, shards: Path, root: Path, method: str):
    traces = []
    for size in (1, 2):
        config = law_config(method, shards, root, batch={"global_batch": 16, "micro_batch": 8 // size})
        traces += ranks(size).run(run_steps, config=config, steps=6)
    for trace in traces[1:]:
        equal_up_to(trace.weights, traces[0].weights, 1e-9)
        equal_up_to(trace.state, traces[0].state, 1e-9)


@pytest.mark.parametrize("method", methods.available())
def test_ranks_are_bit_equal_after_a_hundred_steps(ranks, shards: Path, root: Path, method: str):
    config = law_config(method, shards, root, engine={"precision": "fp32"}, run={"epochs": 12})
    first, second = ranks(2).run(run_steps, config=config, steps=100)
    for name, tensor in {**first.weights, **first.state}.items():
        assert torch.equal(tensor, {**second.weights, **second.state}[name]), name
