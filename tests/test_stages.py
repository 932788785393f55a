"""Cutting several times: the schedule, and shares of the model before it was ever cut."""

import pytest
import torch
from torch import nn

import swan_surgery as swan


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def _cut(model: nn.Module, **budget: object) -> nn.Module:
    gated = swan.swanify(model, torch.zeros(3, 8))
    return swan.prune_by_score(gated, swan.importance(gated, "magnitude"), **budget)


@pytest.mark.parametrize(
    ("share", "number"), [(1.0, 1), (0.5, 1), (0.2, 1), (0.19, 2), (0.1, 3), (0.05, 4)]
)
def test_one_cut_down_to_a_fifth_then_about_one_per_halving(share: float, number: int) -> None:
    plan = swan.stages(share, steps=1000)
    assert len(plan) == number
    assert (plan[0].step, plan[-1].share) == (0, pytest.approx(share, rel=1e-12))


def test_each_cut_takes_the_same_factor_and_they_are_evenly_spread() -> None:
    plan = swan.stages(0.125, steps=600, number=3, span=0.5)
    assert [stage.step for stage in plan] == [0, 150, 300]
    assert [stage.share for stage in plan] == pytest.approx([0.5, 0.25, 0.125])


def test_cuts_without_a_step_between_become_the_last_of_them() -> None:
    assert swan.stages(0.1, steps=0) == (swan.Stage(0, pytest.approx(0.1)),)


@pytest.mark.parametrize(
    "wrong", [{"share": 0.0}, {"share": 1.5}, {"steps": -1}, {"number": 0}, {"span": 0.0}]
)
def test_a_schedule_that_cannot_be(wrong: dict[str, float]) -> None:
    given = {"share": 0.1, "steps": 10} | wrong
    share = given.pop("share")
    with pytest.raises(swan.InputError):
        swan.stages(share, **given)


def test_shares_of_the_original_do_not_multiply() -> None:
    net, example = _net(), torch.zeros(1, 8)
    model: nn.Module = net
    for share in (0.7, 0.6, 0.5):
        model = _cut(model, macs=share, of="original")
        left = swan.count_macs(model, example) / swan.count_macs(net, example)
        assert share - 0.03 < left <= share
    small = _cut(model, params=0.4, of="original")
    assert 0.37 < swan.count_params(small) / swan.count_params(net) <= 0.4


def test_of_the_original_also_at_other_inputs_and_for_gates() -> None:
    net = _net()
    small = _cut(net, macs=0.5)
    gated = swan.swanify(small, torch.zeros(7, 8))
    objective = swan.Objective(gated, macs=0.3, of="original")
    objective(0.0)
    left = swan.hard_macs(gated) / swan.count_macs(net, torch.zeros(7, 8))
    assert 0.27 < left <= 0.3


def test_compensation_between_changes_no_cost() -> None:
    net, example, data = _net(), torch.zeros(1, 8), [torch.randn(64, 8)]
    model: nn.Module = net
    for share in (0.6, 0.36):
        reference, model = model, _cut(model, macs=share, of="original")
        swan.compensate(model, reference, data)
        left = swan.count_macs(model, example) / swan.count_macs(net, example)
        assert share - 0.03 < left <= share


def test_other_activations_belong_to_the_model_that_is_cut() -> None:
    example = torch.zeros(3, 8)
    swapped = swan.swap_activations(_net(), "fles-dg", example)
    once = _cut(swapped, macs=0.6)
    twice = _cut(once, macs=0.4, of="original")
    left = swan.count_macs(twice, example) / swan.count_macs(swapped, example)
    assert 0.37 < left <= 0.4


def test_what_is_below_the_share_already_stays() -> None:
    small = _cut(_net(), macs=0.3)
    again = _cut(small, macs=0.5, of="original")
    assert [tuple(p.shape) for p in again.parameters()] == [
        tuple(p.shape) for p in small.parameters()
    ]


def test_of_is_one_of_two() -> None:
    with pytest.raises(swan.InputError, match="given, original; got 'first'"):
        _cut(_net(), macs=0.5, of="first")


def test_a_budget_may_be_a_number() -> None:
    net, example = _net(), torch.zeros(3, 8)
    assert 2300 < swan.count_macs(_cut(net, macs=7000), example) / 3 <= 7000 / 3
    assert 1900 < swan.count_params(_cut(net, params=2000)) <= 2000
    gated = swan.swanify(net, example)
    swan.Objective(gated, macs=6000.0)(0.0)
    assert 5500 < swan.hard_macs(gated) <= 6000
    whole = swan.count_params(net)
    assert swan.count_params(_cut(net, params=10**9)) == whole
