"""Which units stay within a budget: the ranking, rounding, limits, prices."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.costs.macs import cost_table
from swan_surgery.costs.params import param_table
from swan_surgery.gates import GatedModel
from swan_surgery.selection import widest_mask as widest
from swan_surgery.selection.limits import Limit, limits_of
from swan_surgery.selection.ordering import order_by_price, ranking
from swan_surgery.selection.widest_mask import round_widths, widest_mask
from tests.strategies import networks
from tests.test_plan import mlp, zoo_gated
from tests.zoo import ZOO


def mask_within(gated: GatedModel, *, round_to: int = 1, **shares: float) -> Tensor:
    limits = limits_of(gated, **shares)
    return widest_mask(gated, ranking(gated), limits, round_to=round_to)


class TestRanking:
    def test_by_falling_probability(self) -> None:
        gated = zoo_gated("densenet")
        p = gated.gates.probabilities().detach()
        order = ranking(gated)
        assert sorted(order.tolist()) == list(range(gated.gates.num_units))
        assert torch.equal(p[order], p.sort(descending=True).values)

    def test_equals_are_shared_among_the_layers(self) -> None:
        gated = mlp(3, 4, 4, 2)
        with torch.no_grad():
            gated.gates.logits.fill_(1.0)
        assert ranking(gated).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


class TestRounding:
    @pytest.mark.parametrize("name", ["vgg", "resnet_option_a", "densenet", "unet", "inception"])
    @pytest.mark.parametrize("round_to", [1, 2, 3, 4, 8, 1000])
    def test_multiples_or_the_whole_group(self, name, round_to) -> None:
        gated = zoo_gated(name)
        mask = gated.gates.open_mask()
        before = mask.clone()
        rounded = round_widths(gated, mask, round_to)
        assert torch.equal(mask, before)
        assert bool((rounded | ~mask).all())  # nothing open is closed
        for group in gated.channels.unit_groups:
            members = list(group)
            was, now = int(mask[members].sum()), int(rounded[members].sum())
            assert now % round_to == 0 or now == len(group)
            assert now - was < round_to
            opened = [u for u in members if rounded[u] and not mask[u]]
            closed = [u for u in members if not rounded[u]]
            p = gated.gates.probabilities().detach()
            assert not opened or not closed or min(p[opened]) >= max(p[closed])

    @pytest.mark.parametrize("round_to", [2, 4, 8])
    def test_widths_of_the_pruned_model(self, round_to) -> None:
        gated = mlp(3, 16, 32, 8, 5)
        with torch.no_grad():
            gated.gates.logits.copy_(torch.randn(56, generator=torch.Generator().manual_seed(0)))
        small = swan.prune(gated, round_to=round_to)
        widths = [layer.out_features for layer in small.children()]
        assert all(width % round_to == 0 for width in widths[:3])
        assert widths[3] == 5

    def test_units_of_several_channels(self) -> None:
        # A unit of this grouped convolution is a position in both groups: two channels each.
        gated = zoo_gated("grouped")
        assert len(set(gated.channels.layer("grouped.0").out_units)) == 3
        with torch.no_grad():
            gated.gates.logits.fill_(-2.0)
        small = swan.prune(gated, round_to=4)
        assert small.grouped[0].out_channels == 4
        assert small.before[0].out_channels == 4
        assert small.after[0].out_channels == 4


class TestBudget:
    @pytest.mark.parametrize("name", sorted(ZOO))
    @pytest.mark.parametrize("budget", [{"macs": 0.25}, {"macs": 0.6}, {"params": 0.5}])
    def test_met_and_no_closed_unit_fits_any_more(self, name, budget) -> None:
        gated = zoo_gated(name)
        try:
            mask = mask_within(gated, **budget)
        except swan.BudgetError as err:
            (share,) = budget.values()
            assert err.least > share * err.most  # noqa: PT017 - narrow models cannot
            return
        (limit,) = limits_of(gated, **budget)
        with gated.gates.holding(mask):
            small = swan.prune(gated)
        count = {
            "macs": lambda: swan.count_macs(small, gated.example_inputs),
            "params": lambda: swan.count_params(small),
        }[limit.name]()
        assert count == limit.used(mask) <= limit.most
        if count >= 0.998 * limit.most:
            return
        for unit in (~mask).nonzero().reshape(-1).tolist():
            wider = mask.clone()
            wider[unit] = True
            assert limit.used(wider) > limit.most

    @pytest.mark.parametrize("name", ["resnet_option_a", "vgg", "densenet"])
    def test_both_budgets_are_kept(self, name) -> None:
        gated = zoo_gated(name)
        mask = mask_within(gated, macs=0.7, params=0.5)
        for limit in limits_of(gated, macs=0.7, params=0.5):
            assert limit.used(mask) <= limit.most

    def test_the_whole_budget_opens_everything(self) -> None:
        gated = zoo_gated()
        assert bool(mask_within(gated, macs=1.0).all())

    def test_the_longest_prefix_of_the_order_is_open(self) -> None:
        gated = zoo_gated("densenet")
        order = ranking(gated)
        mask = mask_within(gated, macs=0.6)
        (limit,) = limits_of(gated, macs=0.6)
        least = gated.gates.least_mask(gated.gates.probabilities().detach())
        first = int((~mask[order]).nonzero()[0])  # the first closed unit
        prefix = least.clone()
        prefix[order[:first]] = True
        assert limit.used(prefix) <= limit.most
        prefix[order[first]] = True
        assert limit.used(prefix) > limit.most

    @pytest.mark.parametrize("name", ["vgg", "densenet"])
    def test_no_whole_step_that_fits_is_left_out(self, name) -> None:
        """A trunk that comes in dear steps does not end it for layers whose steps are cheap."""
        gated = zoo_gated(name)
        (limit,) = limits_of(gated, macs=0.5)
        mask = mask_within(gated, macs=0.5, round_to=2)
        assert limit.allows(mask)
        for group in gated.channels.unit_groups:
            closed = [unit for unit in group if not mask[unit]]
            wider = mask.clone()
            wider[closed[:1]] = True
            assert not closed or not limit.allows(round_widths(gated, wider, 2))

    @pytest.mark.parametrize("round_to", [2, 4])
    def test_with_rounding(self, round_to) -> None:
        gated = mlp(8, 32, 32, 32, 4)
        with torch.no_grad():
            gated.gates.logits.copy_(torch.randn(96, generator=torch.Generator().manual_seed(2)))
        total = swan.count_macs(gated, gated.example_inputs)
        small = swan.prune(gated, macs=0.5, round_to=round_to)
        assert swan.count_macs(small, gated.example_inputs) <= 0.5 * total
        assert all(layer.out_features % round_to == 0 for layer in small.children())

    def test_equal_logits_meet_the_budget_within_one_unit(self) -> None:
        gated = mlp(8, 32, 32, 4)
        with torch.no_grad():
            gated.gates.logits.fill_(40.0)
        total = swan.count_macs(gated, gated.example_inputs)
        with pytest.warns(
            swan.SwanWarning,
            match=r"have not learnt: the 64 open ones all have the logit 40, so which 22 of",
        ):
            small = swan.prune(gated, macs=0.5)
        one_unit = int(swan.marginal_macs(gated).max())
        macs = swan.count_macs(small, gated.example_inputs)
        assert 0.5 * total - one_unit < macs <= 0.5 * total
        assert abs(small[0].out_features - small[1].out_features) <= 1

    @pytest.mark.parametrize("wide", [torch.float32, torch.float64])
    def test_gates_that_never_trained_are_named(self, wide) -> None:
        """Also where others were closed by hand, and the weights have changed since."""
        gated = mlp(8, 32, 32, 4).to(wide)
        gated.close("0", [3, 7])
        with torch.no_grad():
            gated.model[0].weight.copy_(torch.randn(32, 8))
        for narrower in ({"macs": 0.5}, {"widths": {"1": 20}}):
            with pytest.warns(
                swan.SwanWarning,
                match=r"have not learnt: the 62 open ones stand where swanify put them, so the sizes",
            ):
                swan.prune(gated, **narrower)
        with torch.no_grad():
            gated.gates.logits[40] += 1e-3
        swan.prune(gated, macs=0.5)

    def test_gates_that_were_closed_or_trained_choose_without_a_warning(self) -> None:
        gated = mlp(8, 32, 32, 4)
        gated.close("0", range(20))
        swan.prune(gated)
        swan.prune(gated, macs=1.0)
        with torch.no_grad():
            gated.gates.logits += torch.rand(len(gated.gates.logits))
        swan.prune(gated, macs=0.2)

    def test_out_of_reach_with_rounding_names_what_is_reachable(self) -> None:
        gated = mlp(8, 32, 32, 4)
        with pytest.raises(swan.BudgetError, match="minimum width") as narrow:
            mask_within(gated, macs=0.001)
        with pytest.raises(swan.BudgetError, match="minimum width") as rounded:
            mask_within(gated, macs=0.001, round_to=8)
        assert rounded.value.least == 8 * 8 + 8 * 8 + 8 * 4
        assert narrow.value.least == 8 + 1 + 4
        assert narrow.value.most == 8 * 32 + 32 * 32 + 32 * 4


class TestOrderByPrice:
    def test_without_limits_by_score(self) -> None:
        scores = torch.tensor([3.0, 1.0, 2.0, 5.0])
        order = order_by_price(scores, (), torch.zeros(4, dtype=torch.bool))
        assert order.tolist() == [3, 0, 2, 1]

    def test_what_must_stay_comes_first_and_all_units_once(self) -> None:
        gated = zoo_gated("densenet")
        scores = torch.rand(gated.gates.num_units, generator=torch.Generator().manual_seed(0))
        least = gated.gates.least_mask(scores)
        order = order_by_price(scores, limits_of(gated, macs=0.5), least)
        assert sorted(order.tolist()) == list(range(gated.gates.num_units))
        assert bool(least[order[: int(least.sum())]].all())

    def test_dear_units_go_first_among_equals(self) -> None:
        gated = mlp(3, 4, 64, 2)  # a unit of the first width costs 3 + 64, of the second 4 + 2
        limits = limits_of(gated, macs=0.5)
        least = torch.zeros(68, dtype=torch.bool)
        order = order_by_price(torch.ones(68), limits, least)
        assert set(order[-2:].tolist()) <= {0, 1, 2, 3}

    def test_prices_are_taken_anew(self) -> None:
        """At full width a unit of `a` costs 20 + 40, so it would go before one of `d`; without `b`, 20."""

        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(20, 40), nn.Linear(40, 40), nn.Linear(40, 4)
                self.d, self.e = nn.Linear(20, 40), nn.Linear(40, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.c(self.b(self.a(x))) + self.e(self.d(x))

        gated = swan.swanify(Branches(), torch.zeros(1, 20))
        a, b, d = (list(gated.channels.layer(name).out_units) for name in "abd")
        scores = torch.zeros(120)
        scores[a], scores[b], scores[d] = 60 * 0.010, 44 * 0.005, 24 * 0.012
        order = order_by_price(
            scores, limits_of(gated, macs=0.5), torch.zeros(120, dtype=torch.bool)
        )
        closing = order.flip(0).tolist()
        assert [set(closing[k : k + 40]) for k in (0, 40, 80)] == [set(b), set(d), set(a)]


class TestLimits:
    @pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
    def test_shares_out_of_range(self, share) -> None:
        with pytest.raises(swan.InputError, match=r"params is a share of the base model's"):
            limits_of(mlp(3, 4, 2), params=share)

    def test_unreachable_names_the_range(self) -> None:
        with pytest.raises(
            swan.BudgetError, match=r"params=0.01 cannot be reached.*reachable: 0\."
        ) as e:
            swan.Objective(mlp(3, 4, 2), params=0.01)
        # One hidden unit: 3 + 1 weights and bias in, 2 + 2 out.
        assert (e.value.least, e.value.most) == (4 + 4, 16 + 10)


@pytest.mark.law
@settings(max_examples=settings.default.max_examples // 2)
@given(networks(), st.integers(0, 2**16), st.floats(0.05, 1.0), st.integers(1, 80))
def test_the_longest_prefix_is_found_however_many_are_priced_at_once(
    case, seed, share, at_once
) -> None:
    try:
        gated = swan.swanify(case.model, case.inputs)
    except swan.NoGateableChannelsError:
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(gated.gates.num_units, generator=generator)
    order = order[: 1 + seed % len(order)]  # some may not open
    limits = (Limit("macs", cost_table(gated), share), Limit("params", param_table(gated), share))
    base = gated.gates.least_mask(torch.rand(gated.gates.num_units, generator=generator))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(widest, "_prefixes_at_once", lambda *_: at_once)
        found = widest._longest_alone(order, base, limits)
    place = torch.full((gated.gates.num_units,), len(order)).index_copy(
        0, order, torch.arange(len(order))
    )
    masks = base | (place < torch.arange(len(order) + 1)[:, None])
    fits = torch.stack([own.table.at(masks.double()) <= own.ceiling for own in limits]).all(0)
    fitting = masks[fits]
    assert torch.equal(found, fitting[-1] if len(fitting) else base)
