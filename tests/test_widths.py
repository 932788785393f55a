"""Ceilings on single layers, beside a budget or alone."""

import numpy as np
import pytest
import torch
from torch import nn

import swan_surgery as swan
from tests.closing import learnt_


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 20),
        nn.ReLU(),
        nn.Linear(20, 30),
        nn.ReLU(),
        nn.Linear(30, 40),
        nn.ReLU(),
        nn.Linear(40, 3),
    )


class Residual(nn.Module):
    """Two layers whose outputs are one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.head(x + self.second(x).relu())


def _widths(model: nn.Module) -> list[int]:
    return [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)][:-1]


def _gated(net: nn.Module) -> tuple[swan.GatedModel, torch.Tensor]:
    gated = swan.swanify(net, torch.zeros(1, 6))
    return gated, swan.importance(gated, "magnitude")


def test_the_best_units_of_a_layer_stay_and_others_are_left_alone() -> None:
    gated, scores = _gated(_net())
    small = swan.prune_by_score(gated, scores, widths={"2": 0.5})
    assert _widths(small) == [20, 15, 40]
    units = torch.tensor(gated.channels.layer("2").out_units)
    best = units[scores[units].argsort(descending=True)[:15]]
    kept = torch.tensor(swan.kept(small)["2.weight"][0])
    assert torch.equal(units[kept].sort().values, best.sort().values)


def test_a_pattern_for_all_makes_widths_uniform() -> None:
    gated, scores = _gated(_net())
    assert _widths(swan.prune_by_score(gated, scores, widths={"*": 0.5})) == [10, 15, 20]
    assert _widths(swan.prune_by_score(gated, scores, widths={"0": 7, "*": 1.0})) == [7, 30, 40]
    rounded = swan.prune_by_score(gated, scores, widths={"*": 0.5}, round_to=4)
    assert _widths(rounded) == [8, 12, 20]


def test_a_ceiling_goes_with_a_budget() -> None:
    net = _net()
    gated, scores = _gated(net)
    small = swan.prune_by_score(gated, scores, widths={"4": 4}, macs=0.6)
    assert _widths(small)[2] <= 4
    share = swan.count_macs(small, torch.zeros(1, 6)) / swan.count_macs(net, torch.zeros(1, 6))
    assert share <= 0.6
    free = swan.prune_by_score(gated, scores, macs=share)
    assert _widths(free)[2] > 4


def test_a_coupled_layer_is_held_by_the_ceiling_of_the_other() -> None:
    gated, scores = _gated(Residual())
    assert _widths(swan.prune_by_score(gated, scores, widths={"second": 9})) == [9, 9]


def test_for_gates_too() -> None:
    gated = learnt_(_gated(_net())[0])
    with torch.no_grad():
        gated.gates.logits[torch.tensor(gated.channels.layer("0").out_units)[:5]] = -4.0
    assert _widths(swan.prune(gated, widths={"2": 11})) == [15, 11, 40]
    assert _widths(swan.prune(gated, widths={"0": 18})) == [15, 30, 40]
    small = swan.prune(gated, widths={"2": 11}, macs=0.7)
    assert _widths(small)[1] <= 11


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"9": 3}, "names '9', but no layer"),
        ({"0": 0}, "at most 0 units"),
        ({"0": 1.5}, "at most 1.5 units"),
        ({"0": True}, "at most True units"),
    ],
)
def test_a_ceiling_that_cannot_be(widths: dict[str, float], message: str) -> None:
    gated, scores = _gated(_net())
    with pytest.raises(swan.InputError, match=message):
        swan.prune_by_score(gated, scores, widths=widths)


def test_channels_are_closed_by_layer_and_number() -> None:
    net = _net()
    gated, _ = _gated(net)
    gated.close("2", [3, 7, 29])
    kept = swan.kept(swan.prune(gated))
    assert kept["2.weight"][0] == tuple(i for i in range(30) if i not in (3, 7, 29))
    assert kept["4.weight"][1] == kept["2.weight"][0]
    assert "0.weight" not in kept
    with pytest.raises(swan.InputError, match="no layer '1'"):
        gated.close("1", [0])
    with pytest.raises(swan.InputError, match="has 30 output channels; got 30"):
        gated.close("2", [30])
    with pytest.raises(swan.InputError, match="channel 0 of '6' has no gate"):
        gated.close("6", [0])


@pytest.mark.parametrize("kind", [torch.tensor, list, np.array])
def test_a_mask_closes_what_it_marks_and_not_channels_0_and_1(kind) -> None:
    gated, _ = _gated(_net())
    gated.close("2", kind([number in (3, 7) for number in range(30)]))
    kept = swan.kept(swan.prune(gated))
    assert kept["2.weight"][0] == tuple(i for i in range(30) if i not in (3, 7))
    for wrong in ([True, False], [1.5], torch.ones(30, 1, dtype=torch.int64)):
        with pytest.raises(swan.InputError, match="whole numbers, or a mask of 30 bools"):
            gated.close("2", wrong)
    gated.close("2", [])


@pytest.mark.parametrize("macs", ["half", True, float("nan"), 0])
def test_a_budget_is_a_number(macs) -> None:
    gated, scores = _gated(_net())
    with pytest.raises(swan.InputError, match=r"macs is a share .* got "):
        swan.prune_by_score(gated, scores, macs=macs)


def test_what_two_cuts_kept_is_told_of_the_first_model() -> None:
    net = _net()
    gated, _ = _gated(net)
    gated.close("0", [0, 1])
    once = swan.prune(gated)
    again = swan.swanify(once, torch.zeros(1, 6))
    again.close("0", [0, 17])
    kept = swan.kept(swan.prune(again))
    assert kept["0.weight"][0] == tuple(range(3, 19))
    assert swan.kept(net) == {}
