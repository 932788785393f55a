"""Latency as a cost: fits, the table as data, and budgets in milliseconds."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

import swan_surgery as swan
from swan_surgery.costs.latency_table import (
    LatencyTable,
    LayerLatency,
    MultipleLatency,
    fit_layer,
    fit_rest,
    latency_cost,
)
from swan_surgery.gates import GatedModel
from swan_surgery.selection.limits import limits_of
from tests.test_plan import mlp, zoo_gated


def made_up(gated: GatedModel, *, rest_ms: float = 0.5) -> LatencyTable:
    """A table with other coefficients for every layer, in no proportion to its MACs."""
    generator = torch.Generator().manual_seed(3)
    layers = []
    for layer in gated.channels.layers:
        constant, into, out, both, rest = torch.rand(5, generator=generator).tolist()
        widths = len(layer.in_units), len(layer.out_units)
        fit = LayerLatency(
            layer.name, *widths, constant / 10, into / 50, out / 50, both / 1000, rest / 50
        )
        layers.append(fit)
    return LatencyTable(tuple(layers), rest_ms, "a device", 2, "2.11", "float32[1, 3]", 15)


def taken_by(small: torch.nn.Module, table: LatencyTable) -> float:
    """Milliseconds of a pruned model by the widths of its layers."""
    total = table.rest_ms
    for own in table.layers:
        layer = small.get_submodule(own.module)
        if isinstance(layer, torch.nn.Linear):
            into, out = layer.in_features, layer.out_features
        else:
            into, out = layer.in_channels, layer.out_channels
        total += own.milliseconds(into, out) + own.rest_per_out_ms * out
    return total


def by_hand(gated: GatedModel, table: LatencyTable, mask: torch.Tensor) -> float:
    with gated.gates.holding(mask):
        return taken_by(swan.prune(gated, verify=False), table)


class TestFit:
    WIDTHS = tuple(product((4, 8, 12, 16), (8, 16, 24, 32)))

    def test_recovers_a_bilinear_layer(self) -> None:
        measured = [0.3 + 0.02 * i + 0.01 * o + 0.004 * i * o for i, o in self.WIDTHS]
        fit = fit_layer("a", self.WIDTHS, measured)
        assert (fit.module, fit.in_width, fit.out_width) == ("a", 16, 32)
        found = (fit.constant_ms, fit.per_in_ms, fit.per_out_ms, fit.per_product_ms)
        assert found == pytest.approx((0.3, 0.02, 0.01, 0.004), rel=1e-9)
        assert fit.worst_error < 1e-9
        for (i, o), wanted in zip(self.WIDTHS, measured, strict=True):
            assert fit.milliseconds(i, o) == pytest.approx(wanted, rel=1e-9)

    def test_widths_that_never_change_get_no_term(self) -> None:
        fit = fit_layer("a", [(3, o) for o in (8, 16, 32)], [0.1 + 0.02 * o for o in (8, 16, 32)])
        assert (fit.per_in_ms, fit.per_product_ms) == (0, 0)
        assert (fit.constant_ms, fit.per_out_ms) == pytest.approx((0.1, 0.02), rel=1e-9)
        alone = fit_layer("a", [(3, 8)], [0.7])
        assert alone.milliseconds(3, 8) == pytest.approx(0.7)
        assert (alone.per_in_ms, alone.per_out_ms, alone.per_product_ms) == (0, 0, 0)

    def test_a_depthwise_layer_has_one_width(self) -> None:
        fit = fit_layer("a", [(4, 8), (8, 16), (16, 32)], [0.1 + 0.02 * o for o in (8, 16, 32)])
        assert (fit.per_in_ms, fit.per_product_ms) == (0, 0)
        assert (fit.constant_ms, fit.per_out_ms) == pytest.approx((0.1, 0.02), rel=1e-9)

    def test_nothing_is_negative_and_the_misfit_is_told(self) -> None:
        fit = fit_layer("a", [(3, 8), (3, 16), (3, 32)], [3.0, 2.0, 1.0])  # falls with the width
        assert (fit.constant_ms, fit.per_out_ms) == pytest.approx((2.0, 0.0))
        assert fit.worst_error == pytest.approx(1.0)


class TestFitOfTheRest:
    LAYERS = (
        LayerLatency("a", 3, 8, 0.1, 0, 0.02, 0),
        LayerLatency("b", 8, 4, 0.2, 0, 0, 0.003),
    )
    WIDTHS = tuple([(3, n), (n, 4)] for n in (2, 4, 6, 8))
    SIZES = (100, 10)

    def whole(self, constant: float, growing: float) -> list[float]:
        return [
            sum(layer.milliseconds(*pair) for layer, pair in zip(self.LAYERS, own, strict=True))
            + constant
            + growing * (100 * own[0][1] + 10 * own[1][1])
            for own in self.WIDTHS
        ]

    def test_recovers_a_constant_and_what_follows_the_outputs(self) -> None:
        layers, rest_ms = fit_rest(self.LAYERS, self.SIZES, self.WIDTHS, self.whole(0.7, 0.001))
        assert rest_ms == pytest.approx(0.7, rel=1e-9)
        assert [own.rest_per_out_ms for own in layers] == pytest.approx([0.1, 0.01], rel=1e-9)
        assert [replace(own, rest_per_out_ms=0.0) for own in layers] == list(self.LAYERS)
        table = LatencyTable(layers, rest_ms, "a device", 1, "2.11", "float32[1, 3]", 1)
        assert table.total_ms == pytest.approx(self.whole(0.7, 0.001)[-1], rel=1e-9)

    def test_layers_that_take_longer_alone_leave_no_negative_rest(self) -> None:
        layers, rest_ms = fit_rest(self.LAYERS, self.SIZES, self.WIDTHS, [0.01] * 4)
        assert rest_ms == 0
        assert all(own.rest_per_out_ms == 0 for own in layers)


class TestTable:
    def test_json_round_trip(self) -> None:
        multiples = (MultipleLatency(1, 0.5, 2.0), MultipleLatency(8, 0.48, 1.5))
        table = replace(made_up(zoo_gated("vgg")), multiples=multiples)
        again = LatencyTable.from_json(table.to_json())
        assert again == table
        assert again.total_ms == table.total_ms

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 2, "x": 2}'])
    def test_what_is_no_table(self, text) -> None:
        with pytest.raises(swan.InputError, match="not a latency table"):
            LatencyTable.from_json(text)

    @pytest.mark.parametrize(
        ("taken", "best"),
        [
            ({}, 1),
            ({1: (0.5, 4.0), 8: (0.5, 3.0), 16: (0.5, 3.5)}, 8),
            ({1: (0.5, 4.0), 8: (0.4, 3.5)}, 1),  # less time, but for fewer MACs: slower per MAC
            ({2: (0.5, 3.05), 4: (0.5, 3.0), 8: (0.5, 2.999)}, 2),  # equal to 2 %: the smallest
            ({2: (0.5, 3.1), 4: (0.5, 3.0), 8: (0.5, 2.999)}, 4),
        ],
    )
    def test_the_best_multiple(self, taken, best) -> None:
        multiples = tuple(MultipleLatency(m, *own) for m, own in taken.items())
        assert replace(made_up(mlp(3, 4, 2)), multiples=multiples).best_multiple == best

    def test_another_version(self) -> None:
        data = json.loads(made_up(mlp(3, 4, 2)).to_json()) | {"version": 99}
        with pytest.raises(swan.InputError, match="version 99 is not 2"):
            LatencyTable.from_json(json.dumps(data))

    @pytest.mark.parametrize(
        "name", ["vgg", "resnet_option_a", "inverted_residual", "grouped", "densenet"]
    )
    def test_as_a_cost_it_is_the_sum_of_the_pruned_layers(self, name) -> None:
        gated = zoo_gated(name)
        table = made_up(gated)
        cost = latency_cost(gated, table)
        ones = torch.ones(gated.gates.num_units, dtype=torch.float64)
        assert float(cost.at(ones)) == pytest.approx(table.total_ms, rel=1e-12)
        assert cost.total == table.total_ms
        for seed in range(3):
            drawn = torch.rand(len(ones), generator=torch.Generator().manual_seed(seed))
            mask = gated.gates.least_mask(drawn) | (drawn > 0.4)
            found = float(cost.at(mask.double()))
            assert found == pytest.approx(by_hand(gated, table, mask), rel=1e-12)

    def test_of_another_model_it_is_refused(self) -> None:
        table = made_up(mlp(3, 4, 2))
        with pytest.raises(swan.InputError, match=r"layer '0' of widths 3 -> 4, this model has"):
            latency_cost(mlp(3, 5, 2), table)
        renamed = replace(table, layers=(replace(table.layers[0], module="stem"),))
        with pytest.raises(swan.InputError, match=r"'stem'.*none of that name"):
            latency_cost(mlp(3, 4, 2), renamed)

    def test_what_is_no_table_is_refused(self) -> None:
        with pytest.raises(
            swan.InputError, match=r"must come from swan.measure_latency_table; got dict"
        ):
            latency_cost(mlp(3, 4, 2), {})


class TestBudget:
    @pytest.mark.parametrize("name", ["vgg", "resnet_option_a", "inverted_residual"])
    @pytest.mark.parametrize("share", [0.9, 0.7])
    def test_prune_meets_it(self, name, share) -> None:
        gated = zoo_gated(name)
        table = made_up(gated)
        latency_ms = share * table.total_ms
        small = swan.prune(gated, latency_ms=latency_ms, latency_table=table)
        (limit,) = limits_of(gated, latency_ms=latency_ms, latency_table=table)
        assert (limit.name, limit.table.unit, limit.share) == (
            "latency_ms",
            "ms",
            pytest.approx(share),
        )
        taken = taken_by(small, table)
        assert 0.9 * latency_ms < taken <= latency_ms * (1 + 1e-9)

    def test_scores_meet_it(self) -> None:
        gated = zoo_gated("vgg")
        table = made_up(gated)
        scores = swan.importance(gated, "magnitude")
        wanted = 0.6 * table.total_ms
        small = swan.prune_by_score(gated, scores, latency_ms=wanted, latency_table=table)
        assert 0.9 * wanted < taken_by(small, table) <= wanted * (1 + 1e-9)

    @pytest.mark.parametrize("learning", ["curvature", "gradient"])
    def test_hard_gates_meet_it_along_the_ramp(self, learning) -> None:
        gated = zoo_gated("resnet_option_a").train()
        table = made_up(gated)
        wanted = 0.7 * table.total_ms
        ramp = swan.CosineRamp(1, 3)
        objective = swan.Objective(
            gated, latency_ms=wanted, latency_table=table, learning=learning, ramp=ramp
        )
        assert objective.reachable["latency_ms"][1] == 1
        for epoch in range(6):
            (gated(*gated.own_inputs().args).square().mean() + objective(epoch)).backward()
            log = objective.log()
            ceiling = (1 - ramp(epoch)) * table.total_ms + ramp(epoch) * wanted
            taken = by_hand(gated, table, gated.gates.open_mask())
            assert log["hard_latency_ms"] == pytest.approx(taken, rel=1e-12)
            assert log["latency_ms_budget"] == pytest.approx(ceiling / table.total_ms)
            assert log["hard_latency_ms_ratio"] == pytest.approx(taken / table.total_ms)
            assert taken <= ceiling * (1 + 1e-9)
        assert taken > 0.9 * wanted

    def test_with_macs_both_are_kept(self) -> None:
        gated = zoo_gated("vgg")
        table = made_up(gated)
        budget = {"macs": 0.5, "latency_ms": 0.8 * table.total_ms, "latency_table": table}
        swan.Objective(gated, **budget)(1)
        mask = gated.gates.open_mask()
        assert all(limit.allows(mask) for limit in limits_of(gated, **budget))

    def test_a_ramp_of_its_own(self) -> None:
        gated = mlp(3, 32, 2)
        table = made_up(gated)
        ramp = {"latency_ms": swan.CosineRamp(2, 0)}
        objective = swan.Objective(gated, latency_ms=0.8, latency_table=table, ramp=ramp)
        objective(1)
        assert objective.log()["latency_ms_budget"] == 1
        objective(3)
        assert objective.log()["latency_ms_budget"] == pytest.approx(0.8 / table.total_ms)

    def test_more_than_it_takes_keeps_everything(self) -> None:
        gated = mlp(3, 8, 2)
        table = made_up(gated)
        small = swan.prune(gated, latency_ms=10 * table.total_ms, latency_table=table)
        assert small[0].out_features == 8

    def test_out_of_reach_names_the_range_in_milliseconds(self) -> None:
        gated = mlp(3, 4, 2)
        layers = (LayerLatency("0", 3, 4, 0.25, 0, 0.5, 0), LayerLatency("1", 4, 2, 0, 0, 0, 0.125))
        table = LatencyTable(layers, 1.0, "a device", 1, "2.11", "float32[1, 3]", 1)
        for call in (swan.Objective, swan.prune):
            with pytest.raises(
                swan.BudgetError,
                match=r"^latency_ms=1 cannot be reached: .* still takes 2 ms of 4\.25 by the latency "
                r"table; reachable: 2 to 4\.25$",
            ) as caught:
                call(gated, latency_ms=1, latency_table=table)
            assert (caught.value.unit, caught.value.least, caught.value.most) == ("ms", 2.0, 4.25)

    def test_without_a_table_it_says_where_to_get_one(self) -> None:
        gated = mlp(3, 4, 2)
        scores = swan.importance(gated, "magnitude")
        for call in (
            lambda: swan.Objective(gated, latency_ms=2.5),
            lambda: swan.prune(gated, latency_ms=2.5),
            lambda: swan.prune_by_score(gated, scores, latency_ms=2.5),
        ):
            with pytest.raises(
                swan.InputError, match=r"latency_ms=2.5.*measure_latency_table\(gated\)"
            ):
                call()

    @pytest.mark.parametrize("latency_ms", [0, -1.0, float("nan"), float("inf"), None])
    def test_milliseconds_out_of_range(self, latency_ms) -> None:
        gated = mlp(3, 4, 2)
        with pytest.raises(swan.InputError, match="latency_ms is a number of milliseconds above 0"):
            swan.prune(gated, latency_ms=latency_ms, latency_table=made_up(gated))
