"""What each unit adds to those that matter more: `DiminishingReturns`."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import swan_surgery as swan
from swan_surgery.selection.diminishing_returns import DiminishingReturns


@st.composite
def scored_groups(draw):
    """Units shuffled into groups, a score each, over many orders of magnitude."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    units = draw(st.permutations(range(sum(sizes))))
    groups = []
    for size in sizes:
        groups.append(list(units[:size]))
        units = units[size:]
    exponents = st.floats(-12, 6)
    scale = [10 ** draw(exponents) for _ in sizes]
    share = st.one_of(st.just(0.0), st.floats(1e-3, 1.0))
    scores = torch.zeros(sum(sizes), dtype=torch.float64)
    for group, own in zip(groups, scale, strict=True):
        for unit in group:
            scores[unit] = own * draw(share)
    return groups, scores


class TestWorth:
    @given(scored_groups())
    def test_is_the_formula_group_by_group(self, case) -> None:
        groups, scores = case
        worth = DiminishingReturns(groups, len(scores))(scores)
        for group in groups:
            above, total = 0.0, float(scores[group].sum())
            for unit in sorted(group, key=lambda u: (-float(scores[u]), u)):
                above += float(scores[unit])
                share = min(float(scores[unit]) / above, 1 - 1e-9) if above else 0.0
                assert float(worth[unit]) == pytest.approx(-total * math.log1p(-share), rel=1e-12)

    @given(scored_groups())
    def test_keeps_the_order_within_a_group(self, case) -> None:
        groups, scores = case
        worth = DiminishingReturns(groups, len(scores))(scores)
        for group in groups:
            order = sorted(group, key=lambda u: (float(scores[u]), -u))
            assert worth[order].diff().ge(0).all()

    def test_many_units_of_little_weight_are_worth_their_score(self) -> None:
        scores = torch.ones(1000, dtype=torch.float64)
        worth = DiminishingReturns([range(1000)], 1000)(scores)
        assert float(worth.min()) == pytest.approx(1.0, rel=1e-3)
        # What the lower half adds up to: the logarithm of one half, not half of the units.
        assert float(worth.sort().values[:500].sum()) == pytest.approx(1000 * math.log(2))

    def test_a_unit_in_no_group_is_one_of_its_own(self) -> None:
        scores = torch.tensor([1.0, 2.0, 3.0])
        listed = DiminishingReturns([[0, 1], [2]], 3)(scores)
        assert torch.equal(DiminishingReturns([[0, 1]], 3)(scores), listed)


class TestLayersStay:
    """Six layers of 16 channels in series to 30 % of the MACs; those of the third weigh half.

    Scores that add up end in wide and closed layers by turns: beside a closed layer units are cheap.
    """

    @pytest.fixture
    def gated(self) -> swan.GatedModel:
        torch.manual_seed(1)
        sizes = [4, *[16] * 6]
        layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
        model = nn.Sequential(*[layer for pair in layers for layer in pair], nn.Linear(16, 3))
        return swan.swanify(model, torch.zeros(1, 4))

    @pytest.fixture
    def scores(self, gated: swan.GatedModel) -> torch.Tensor:
        scores = 1 + torch.rand(gated.gates.num_units, dtype=torch.float64)
        scores[list(gated.channels.layer("4").out_units)] /= 2
        return scores

    @pytest.mark.parametrize("diminishing", [True, False])
    def test_one_shot(self, gated, scores, diminishing) -> None:
        small = swan.prune_by_score(gated, scores, macs=0.3, diminishing=diminishing)
        hidden = [layer.out_features for layer in small.children() if isinstance(layer, nn.Linear)][
            :-1
        ]
        assert (min(hidden) > 1) is diminishing

    @pytest.mark.parametrize("diminishing", [True, False])
    def test_gates_that_learn(self, gated, scores, diminishing) -> None:
        objective = swan.Objective(gated, macs=0.3, diminishing=diminishing)
        for step in range(6):
            objective(step)
            (gated.gates.values() * scores.sqrt()).sum().backward()
        objective(6)
        is_open = gated.gates.open_mask()
        widths = [
            int(is_open[list(gated.channels.layer(str(i)).out_units)].sum())
            for i in range(0, 12, 2)
        ]
        assert (min(widths) > 1) is diminishing
