"""The `agreement` section: each rule with its own options, and the rule that they make."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from distkd.comm.agreement import LossRule, Rule, RunningLossRule, SampleGate, TrunkRule
from distkd.methods import _agreement
from distkd.methods._agreement import AgreementConfig, make_rule
from distkd.ops.agreement import agreement_counts, conflict_averse_weights, projected_weights, row_sum_weights

KINDS = {
    "gk_refine": LossRule,
    "gkm": RunningLossRule,
    "gate": SampleGate,
    "pcgrad": TrunkRule,
    "mgda": TrunkRule,
    "cagrad": TrunkRule,
}
COSINES = torch.tensor([[1.0, 0.4, 0.05], [0.4, 1.0, -0.6], [0.05, -0.6, 1.0]])
GRAM = COSINES * torch.tensor([1.0, 2.0, 3.0]) * torch.tensor([[1.0], [2.0], [3.0]])


def _config(**options: Any) -> AgreementConfig:
    return TypeAdapter(AgreementConfig).validate_python(options)


def _rule(**options: Any) -> Rule:
    rule = make_rule(_config(**options), ["a", "b"])
    assert rule is not None
    return rule


def test_every_rule_can_be_named_and_none_is_the_plain_sum():
    named = {kind.model_fields["rule"].default for kind in get_args(get_args(AgreementConfig)[0])}
    assert named == {*KINDS, "none"}
    for name, kind in KINDS.items():
        assert type(_rule(rule=name)) is kind
    assert make_rule(_config(rule="none"), ["a"]) is None


def test_every_option_is_explained_and_every_kind_is_public():
    for kind in get_args(get_args(AgreementConfig)[0]):
        assert kind.__name__ in _agreement.__all__
        assert [field for field, info in kind.model_fields.items() if not info.description] == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rule": "gk_refin"}, "does not match any of the expected tags"),
        ({"momentum": 0.5}, "Unable to extract tag"),
        ({"rule": "gk_refine", "threshold": 0.1}, "Extra inputs are not permitted"),
        ({"rule": "mgda", "c": 0.5}, "Extra inputs are not permitted"),
        ({"rule": "gkm", "momentum": 1.0}, "less than 1"),
        ({"rule": "gkm", "threshold": 1.0}, "less than 1"),
        ({"rule": "gate", "threshold": -1.5}, "greater than or equal to -1"),
        ({"rule": "cagrad", "c": -0.1}, "greater than or equal to 0"),
        ({"rule": "pcgrad", "of": "all"}, "'sum' or 'each'"),
        ({"rule": "gkm", "weigh": "sums"}, "'counts' or 'cosines'"),
    ],
)
def test_what_a_rule_does_not_know_is_refused(options: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        _config(**options)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"rule": "gk_refine"}, row_sum_weights(COSINES)),
        ({"rule": "gk_refine", "clamp_min": 2.0}, row_sum_weights(COSINES, clamp_min=2.0)),
        ({"rule": "gk_refine", "normalise": True}, row_sum_weights(COSINES, normalise=True)),
        ({"rule": "gkm"}, torch.tensor([2.0, 2.0])),
        ({"rule": "gkm", "threshold": 0.0}, torch.tensor([3.0, 2.0])),
        ({"rule": "gkm", "count_self": False}, torch.tensor([1.0, 1.0])),
        ({"rule": "gkm", "threshold": 0.5, "drop_alone": True}, torch.tensor([0.0, 0.0])),
        ({"rule": "gkm", "weigh": "cosines"}, row_sum_weights(COSINES)),
    ],
)
def test_options_reach_the_weights_of_losses(options: dict[str, Any], expected: Tensor):
    rule = _rule(**options)
    assert isinstance(rule, LossRule)
    torch.testing.assert_close(rule.weigh(COSINES), expected)


def test_published_defaults_are_those_of_the_cards():
    rule = _rule(rule="gkm")
    assert isinstance(rule, RunningLossRule)
    assert rule.momentum == 0.5
    assert torch.equal(rule.weigh(COSINES), agreement_counts(COSINES, threshold=0.1, count_self=True))
    gate = _rule(rule="gate")
    assert isinstance(gate, SampleGate)
    assert gate.threshold == 0
    assert _config(rule="cagrad").model_dump() == {"rule": "cagrad", "c": 0.5}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"rule": "pcgrad"}, projected_weights(GRAM)),
        ({"rule": "pcgrad", "of": "each"}, projected_weights(GRAM, of="each")),
        ({"rule": "cagrad", "c": 0.3}, conflict_averse_weights(GRAM, c=0.3)),
    ],
)
def test_options_reach_the_factors_at_the_trunk(options: dict[str, Any], expected: Tensor):
    rule = _rule(**options)
    assert isinstance(rule, TrunkRule)
    torch.testing.assert_close(rule.combine(GRAM), expected)


def test_only_a_running_mean_has_something_to_remember():
    for name in KINDS:
        assert list(_rule(rule=name).state_dict()) == (["running_L"] if name == "gkm" else [])
