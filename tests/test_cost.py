"""MACs against published numbers, against torch's own counter, and against the pruned model."""

import copy
import weakref

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import swan_surgery as swan
from swan_surgery.channels import CostAxis, CostTerm
from swan_surgery.costs import macs as macs_module
from swan_surgery.costs.macs import certified_terms, cost_table, module_macs
from swan_surgery.costs.params import param_table
from swan_surgery.costs.table import build_table, share_terms
from swan_surgery.gates import GatedModel
from swan_surgery.selection.limits import limits_of
from tests.gated_zoo import drawn_zoo, fresh_zoo
from tests.zoo import ZOO


# At 1 x 3 x 224 x 224: MACs of convolutions and linear layers, parameters. Source: STYLE 4.3; the
# parameters are torchvision's published num_params, the MACs agree with its published _ops and are
# half of torch's FlopCounterMode.
GOLDEN = {
    "resnet18": (1_814_073_344, 11_689_512),
    "mobilenet_v2": (300_774_272, 3_504_872),
    "vgg16": (15_470_264_320, 138_357_544),
    "densenet121": (2_834_161_664, 7_978_856),
}


def torch_macs(model: nn.Module, *inputs: torch.Tensor) -> float:
    """The independent oracle: torch counts two FLOPs per MAC."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2


def zoo_gated(name: str) -> GatedModel:
    return drawn_zoo(name, dtype=torch.float32)


class TestCounts:
    @pytest.mark.golden
    @pytest.mark.parametrize("name", GOLDEN)
    def test_published_numbers(self, name) -> None:
        model = getattr(torchvision.models, name)()
        macs, params = GOLDEN[name]
        assert swan.count_macs(model, torch.zeros(1, 3, 224, 224)) == macs
        assert swan.count_params(model) == params

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("alexnet", (1, 3, 96, 96)),
            ("squeezenet1_1", (2, 3, 64, 64)),
            ("shufflenet_v2_x0_5", (2, 3, 64, 64)),
            ("mnasnet0_5", (3, 3, 64, 64)),
            ("efficientnet_b0", (1, 3, 64, 64)),
            ("regnet_y_400mf", (1, 3, 64, 64)),
            ("resnext50_32x4d", (1, 3, 64, 64)),
        ],
    )
    def test_half_of_torchs_flops(self, name, shape) -> None:
        model, x = getattr(torchvision.models, name)(), torch.zeros(shape)
        assert swan.count_macs(model, x) == torch_macs(model, x)

    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_half_of_torchs_flops_on_the_zoo(self, name) -> None:
        model, inputs = ZOO[name]()
        assert swan.count_macs(model, inputs) == torch_macs(model, *inputs)

    def test_by_hand_and_proportional_to_the_batch(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(96, 5)
        )
        one = 4 * 4 * 6 * (4 // 2) * 9 + 96 * 5
        assert swan.count_macs(model, torch.zeros(1, 4, 8, 8)) == one
        assert swan.count_macs(model, torch.zeros(7, 4, 8, 8)) == 7 * one

    def test_bias_norm_activation_and_pooling_are_free(self) -> None:
        plain = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
        dressed = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1), nn.AvgPool2d(2)
        )
        x = torch.zeros(1, 3, 8, 8)
        assert swan.count_macs(plain, x) == swan.count_macs(dressed, x) == 64 * (12 + 8)

    def test_eval_mode_is_counted_whatever_the_mode(self) -> None:
        model, inputs = ZOO["multi_output"]()  # its auxiliary head runs in training only
        assert swan.count_macs(model.train(), inputs) == swan.count_macs(model.eval(), inputs)

    def test_a_gated_model_counts_as_its_base(self) -> None:
        model, inputs = ZOO["vgg"]()
        gated = swan.swanify(model, inputs)
        with torch.no_grad():
            gated.gates.logits.fill_(-3.0)
        assert swan.count_macs(gated, inputs) == swan.count_macs(model, inputs)

    def test_a_tied_parameter_counts_once(self) -> None:
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        assert swan.count_params(nn.Sequential(first, second)) == 16 + 4 + 4


class TestExpected:
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_exact_at_zero_and_one(self, name) -> None:
        gated = zoo_gated(name)
        hard = swan.hard_macs(gated)
        mask = gated.gates.open_mask()
        with torch.no_grad():  # sigmoid is exactly 0 and 1 there
            gated.gates.logits.copy_(torch.where(mask, 200.0, -200.0))
        expected = swan.expected_macs(gated)
        assert expected.dtype == torch.float64
        assert float(expected.detach()) == hard
        with torch.no_grad():
            gated.gates.logits.fill_(200.0)
        total = swan.count_macs(gated, gated.example_inputs)
        assert float(swan.expected_macs(gated).detach()) == total == swan.hard_macs(gated)

    def test_sum_over_layers_of_open_in_times_open_out(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 2)).double()
        gated = swan.swanify(model)
        with torch.no_grad():
            gated.gates.logits.copy_(torch.randn(9))
        p = gated.gates.probabilities().detach()
        first, second = p[:4].sum(), p[4:].sum()
        wanted = 3 * first + first * second + second * 2
        torch.testing.assert_close(swan.expected_macs(gated).detach(), wanted, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("name", ["resnet_projection", "densenet", "grouped", "unet", "vgg"])
    def test_differentiable(self, name) -> None:
        gated = zoo_gated(name)
        table = cost_table(gated)
        values = torch.rand(gated.gates.num_units, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(table.at, (values,), rtol=1e-6, atol=1e-3)
        swan.expected_macs(gated).backward()
        p = gated.gates.probabilities().detach().double()
        (slope,) = torch.autograd.grad(table.at(leaf := p.requires_grad_()), leaf)
        wanted = slope * (p * (1 - p)).detach()
        torch.testing.assert_close(gated.gates.logits.grad.double(), wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", ["resnet_projection", "densenet", "inception", "grouped"])
    def test_linear_in_each_group_alone(self, name) -> None:
        gated = zoo_gated(name)
        table = cost_table(gated)
        values = torch.rand(gated.gates.num_units, dtype=torch.float64)
        coupled = {
            unit
            for layer in gated.channels.layers
            for unit in set(layer.out_units) & set(layer.in_units)
        }
        for group in gated.channels.unit_groups:
            if coupled & set(group):
                continue  # on both axes of a layer: quadratic, as it should be
            ends = [values.clone(), values.clone()]
            ends[0][list(group)], ends[1][list(group)] = 0.0, 1.0
            for t in (0.25, 0.5):
                between = (1 - t) * ends[0] + t * ends[1]
                straight = (1 - t) * table.at(ends[0]) + t * table.at(ends[1])
                torch.testing.assert_close(table.at(between), straight, rtol=1e-12, atol=1e-6)


class TestHard:
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_equals_the_count_of_the_pruned_model(self, name) -> None:
        gated = zoo_gated(name)
        small = swan.prune(gated)
        inputs = gated.example_inputs
        hard = swan.hard_macs(gated)
        assert type(hard) is int
        assert hard == swan.count_macs(small, inputs) == torch_macs(small, *inputs.args)
        assert hard < swan.count_macs(gated, inputs)

    @pytest.mark.parametrize("share", [0.3, 0.7])
    def test_on_resnet18(self, share) -> None:
        x = torch.zeros(2, 3, 64, 64)
        gated = swan.swanify(torchvision.models.resnet18(), x)
        drawn = torch.rand(gated.gates.num_units)
        with torch.no_grad():
            gated.gates.logits.copy_(torch.where(drawn < share, -3.0, 3.0))
        small = swan.prune(gated, verify=False)
        assert swan.hard_macs(gated) == swan.count_macs(small, x) == torch_macs(small, x)
        assert swan.hard_params(gated) == sum(p.numel() for p in small.parameters())

    def test_follows_threshold_and_min_width(self) -> None:
        gated = zoo_gated("vgg")
        costs = []
        for threshold in (0.0, 0.3, 0.6, 0.9, 1.0):
            gated.gates.threshold = threshold
            costs.append(swan.hard_macs(gated))
        assert costs == sorted(costs, reverse=True)
        assert costs[0] == swan.count_macs(gated, gated.example_inputs)
        gated.gates.min_width = 4
        assert swan.hard_macs(gated) > costs[-1]


class TestMarginal:
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_count_before_minus_after_closing_each_unit_alone(self, name) -> None:
        gated = fresh_zoo(name, dtype=torch.float32)
        inputs = gated.example_inputs
        marginal = swan.marginal_macs(gated)
        assert marginal.shape == (gated.gates.num_units,)
        assert marginal.dtype == torch.float64
        total = swan.count_macs(gated, inputs)
        for unit in range(gated.gates.num_units):
            with torch.no_grad():
                gated.gates.logits.fill_(3.0)
                gated.gates.logits[unit] = -3.0
            small = swan.prune(gated, verify=False)
            assert total - torch_macs(small, *inputs.args) == float(marginal[unit])

    def test_does_not_depend_on_the_gates(self) -> None:
        gated = fresh_zoo("vgg", dtype=torch.float32)
        before = swan.marginal_macs(gated)
        with torch.no_grad():
            gated.gates.logits.fill_(-1.0)
        assert torch.equal(swan.marginal_macs(gated), before)


class TestTable:
    def test_a_unit_on_both_axes_of_a_layer_counts_once(self) -> None:
        # A 3 x 3 layer whose inputs and outputs are the same units: 9 -> 4 when one closes.
        axis = CostAxis((0, 1, 2), (1, 1, 1), 0)
        table = build_table([CostTerm("layer", "mm", 1, (axis, axis), 9)], 3, unit="MACs")
        assert table.marginal().tolist() == [5, 5, 5]
        assert float(table.at(torch.tensor([1.0, 0, 1], dtype=torch.float64))) == 4

    def test_fixed_positions_and_repeats(self) -> None:
        out, into = CostAxis((0,), (4,), 2), CostAxis((1,), (3,), 1)
        table = build_table([CostTerm("layer", "mm", 5, (out, into), 120)], 2, unit="MACs")
        assert float(table.at(torch.ones(2, dtype=torch.float64))) == 5 * 6 * 4
        assert table.marginal().tolist() == [5 * 4 * 4, 5 * 6 * 3]

    def test_no_terms(self) -> None:
        table = build_table([], 2, unit="MACs")
        assert float(table.at(torch.ones(2, dtype=torch.float64))) == 0
        assert table.marginal().tolist() == [0, 0]

    def test_modules_add_up(self) -> None:
        terms = [CostTerm("a.b", "mm", 1, (), 3), CostTerm("a.c", "mm", 1, (), 4)]
        assert module_macs([*terms, CostTerm("", "mm", 1, (), 5)]) == {
            "": 12,
            "a": 7,
            "a.b": 3,
            "a.c": 4,
        }

    def test_says_what_it_counts(self) -> None:
        gated = zoo_gated("vgg")
        macs, params = cost_table(gated), param_table(gated)
        assert (macs.unit, params.unit) == ("MACs", "parameters")
        assert macs.total == swan.count_macs(gated, gated.example_inputs)
        assert params.total == swan.count_params(gated.model)
        ones = torch.ones(gated.gates.num_units, dtype=torch.float64)
        assert (float(macs.at(ones)), float(params.at(ones))) == (macs.total, params.total)

    def test_built_once_and_dropped_with_the_model(self) -> None:
        gated = zoo_gated("vgg")
        table = cost_table(gated)
        assert cost_table(gated) is table
        gone = weakref.ref(gated)
        del gated
        assert gone() is None

    def test_a_map_that_disagrees_with_the_run_is_scaled_and_said(self) -> None:
        gated = zoo_gated("vgg")
        gated.gates.logits.data.fill_(3.0)
        other = swan.swanify(ZOO["vgg"]()[0], torch.zeros(2, 3, 12, 12))
        gated.channels = other.channels  # the map of another input size
        with pytest.warns(
            UserWarning, match=r"module 'features\.\d' costs .* as it runs but .* report"
        ):
            assert swan.hard_macs(gated) == swan.count_macs(gated, gated.example_inputs)


class TestLeadingAxes:
    """Gates per sample: one call for all of them gives what a loop gives."""

    @pytest.mark.parametrize("name", ["resnet_projection", "densenet", "grouped", "squeeze_excite"])
    @pytest.mark.parametrize("table_of", [cost_table, param_table])
    def test_as_in_a_loop(self, name, table_of) -> None:
        gated = zoo_gated(name)
        table = table_of(gated)
        values = torch.rand(2, 3, gated.gates.num_units, dtype=torch.float64)
        for method in (table.at, table.prices, table.lengths):
            looped = torch.stack([torch.stack([method(v) for v in row]) for row in values])
            assert torch.equal(method(values), looped)

    def test_exact_for_every_sample(self) -> None:
        gated = zoo_gated("resnet_projection")
        masks = torch.rand(5, gated.gates.num_units) < 0.5
        masks |= gated.gates.open_mask()
        wanted = []
        for mask in masks:
            with torch.no_grad():
                gated.gates.logits.copy_(torch.where(mask, 3.0, -3.0))
            wanted.append(swan.hard_macs(gated))
        assert len(set(wanted)) > 1
        assert cost_table(gated).at(masks.double()).tolist() == wanted

    def test_differentiable(self) -> None:
        out, into = CostAxis((0, 1), (4, 1), 2), CostAxis((1,), (3,), 1)
        table = build_table([CostTerm("layer", "mm", 5, (out, into), 140)], 2, unit="MACs")
        values = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(table.at, (values,))
        (slope,) = torch.autograd.grad(table.at(values).sum(), values)
        torch.testing.assert_close(slope, table.prices(values.detach()), rtol=1e-12, atol=0)

    def test_no_samples_and_no_terms(self) -> None:
        table = build_table([], 2, unit="MACs")
        assert table.at(torch.ones(3, 2, dtype=torch.float64)).tolist() == [0, 0, 0]
        assert table.at(torch.ones(0, 2, dtype=torch.float64)).shape == (0,)


class TestShares:
    def test_each_module_counts_as_often_as_it_runs(self) -> None:
        gated = zoo_gated("vgg")
        terms = certified_terms(gated)
        ones = torch.ones(gated.gates.num_units, dtype=torch.float64)
        by_module = module_macs(terms)
        first = next(term.module for term in terms)
        shares = {"classifier": 0.25, first: 0.5}
        table = build_table(share_terms(terms, shares), gated.gates.num_units, unit="MACs")
        wanted = by_module[""] - 0.75 * by_module["classifier"] - 0.5 * by_module[first]
        assert by_module["classifier"] > 0
        assert table.total == float(table.at(ones)) == wanted

    def test_marginal_and_prices_follow(self) -> None:
        gated = zoo_gated("densenet")
        units, terms = gated.gates.num_units, certified_terms(gated)
        whole = build_table(terms, units, unit="MACs")
        half = build_table(share_terms(terms, 0.5), units, unit="MACs")
        values = torch.rand(units, dtype=torch.float64)
        assert torch.equal(half.marginal(), whole.marginal() / 2)
        assert torch.equal(half.prices(values), whole.prices(values) / 2)
        assert half.total == whole.total / 2

    def test_nested_shares_multiply_and_none_changes_nothing(self) -> None:
        terms = [CostTerm("a.b", "mm", 8, (), 8), CostTerm("ab", "mm", 4, (), 4)]
        shared = share_terms(share_terms(terms, {"a": 0.5, "a.b": 0.5}), {"": 0.5})
        assert [term.share for term in shared] == [0.125, 0.5]
        assert build_table(shared, 0, unit="MACs").total == 3
        assert share_terms(terms, {}) == tuple(terms)
        assert type(build_table(terms, 0, unit="MACs").total) is int

    @pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
    def test_out_of_range(self, share) -> None:
        terms = share_terms([CostTerm("a", "mm", 1, (), 3)], share)
        with pytest.raises(swan.InputError, match=r"share of module 'a' .* in \[0, 1\]; got"):
            build_table(terms, 0, unit="MACs")

    def test_a_module_that_costs_nothing(self) -> None:
        with pytest.raises(swan.InputError, match="module 'b' has a share, but nothing in it"):
            share_terms([CostTerm("a", "mm", 1, (), 3)], {"b": 0.5})


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def swap_head(gated: GatedModel) -> None:
    gated.model[5] = nn.Linear(64, 50)


def double_inputs(gated: GatedModel) -> None:
    gated.example_inputs = gated.example_inputs.map(lambda x: torch.cat([x, x]))


def pad(gated: GatedModel) -> None:
    gated.model[0].padding, gated.model[2].dilation = (1, 1), (2, 2)


CHANGES = {
    "head": swap_head,
    "example inputs": double_inputs,
    "settings": pad,
    "activation": lambda gated: gated.model.__setitem__(1, nn.Tanh()),
    "frozen": lambda gated: gated.model.requires_grad_(False),
    "dtype": lambda gated: gated.double(),
    "layer of the same kind": lambda gated: gated.model.__setitem__(
        0, nn.Conv2d(3, 6, 5, padding=1)
    ),
}


class TestAChangedModel:
    """A table belongs to the model it was made of."""

    def gated(self) -> GatedModel:
        gated = swan.swanify(small_net(), torch.zeros(1, 3, 8, 8))
        with torch.no_grad():
            gated.gates.logits[[0, 3, 7]] = -3.0
        return gated

    @pytest.mark.parametrize("change", CHANGES)
    def test_costs_are_those_of_the_model_as_it_is(self, change) -> None:
        gated = self.gated()
        before = (swan.hard_macs(gated), swan.hard_params(gated))
        CHANGES[change](gated)
        small = swan.prune(gated, verify=False)
        after = (swan.hard_macs(gated), swan.hard_params(gated))
        assert after == (swan.count_macs(small, gated.own_inputs()), swan.count_params(small))
        assert (after != before) == (change not in ("activation", "frozen", "dtype"))
        total = swan.count_macs(gated, gated.own_inputs())
        (limit,) = limits_of(gated, macs=0.5)
        assert limit.table.total == total

    @pytest.mark.parametrize("change", ["frozen", "dtype"])
    def test_what_changes_no_cost_counts_nothing_anew(self, change) -> None:
        gated = self.gated()
        tables = cost_table(gated), param_table(gated)
        CHANGES[change](gated)
        gated.train().eval()
        assert (cost_table(gated), param_table(gated)) == tables or all(
            now is old
            for now, old in zip((cost_table(gated), param_table(gated)), tables, strict=True)
        )

    def test_the_objective_follows(self) -> None:
        gated = self.gated()
        objective = swan.Objective(gated, macs=0.6, params=0.9)
        objective(0.0)
        swap_head(gated)
        objective(1.0)
        total = swan.count_macs(gated, gated.example_inputs)
        log = objective.log()
        assert log["hard_macs"] == swan.hard_macs(gated) <= 0.6 * total
        assert log["hard_params"] == swan.hard_params(gated)
        assert objective.limits[0].table.total == total

    def test_copies_keep_their_tables(self, monkeypatch) -> None:
        gated = self.gated()
        wanted = swan.hard_macs(gated)
        twin = copy.deepcopy(gated)
        monkeypatch.setattr(macs_module, "count_operators", None)
        assert swan.hard_macs(twin) == wanted

    def test_nothing_is_counted_while_nothing_changes(self, monkeypatch) -> None:
        gated = self.gated()
        objective = swan.Objective(gated, macs=0.6)
        monkeypatch.setattr(macs_module, "count_operators", None)
        for step in range(3):
            gated.train()(torch.randn(2, 3, 8, 8)).sum().backward()
            objective(step)

    @pytest.mark.parametrize(
        "layer", [nn.Conv2d(3, 5, 3), nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))]
    )
    @pytest.mark.parametrize("cost", [swan.hard_macs, swan.hard_params])
    def test_a_model_that_the_gates_no_longer_fit(self, layer, cost) -> None:
        gated = self.gated()
        cost(gated)
        gated.model[0] = layer
        with pytest.raises(
            swan.CostError, match=r"changed since it was gated.*gate it anew: swan\.swa"
        ):
            cost(gated)
