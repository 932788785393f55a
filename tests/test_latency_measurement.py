"""What is timed, at which widths, on what; never how long it took."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.costs.latency_table import LatencyTable, MultipleLatency
from swan_surgery.models import Inputs
from swan_surgery.timing import clock as timing_clock, layers as latency_measurement
from swan_surgery.timing.loop import Latency
from tests.closing import learnt_
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.test_plan import mlp, zoo_gated


LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def coefficients(layer: nn.Module) -> tuple[float, float, float, float]:
    """Of the made-up clock: they differ from layer to layer, by what no width changes."""
    if isinstance(layer, nn.Linear):
        return 0.1, 0.01, 0.02, 0.003
    size = float(layer.kernel_size[0])
    depthwise = layer.groups == layer.in_channels > 1
    return 0.2 * size, 0.0 if depthwise else 0.03, 0.01 * size, 0.0 if depthwise else 0.001


def milliseconds(layer: nn.Module) -> float:
    a, b, c, d = coefficients(layer)
    into, out = widths_of(layer)
    return a + b * into + c * out + d * into * out


def rest_of(model: nn.Module, inputs: Inputs) -> float:
    """Of the made-up clock: 7 ms, and 0.002 ms for every element that a layer puts out."""
    sizes = []
    handles = [
        module.register_forward_hook(lambda m, args, out: sizes.append(out.numel()))
        for module in model.modules()
        if isinstance(module, LAYERS)
    ]
    model(*inputs.args, **inputs.kwargs)
    for handle in handles:
        handle.remove()
    return 7 + 0.002 * sum(sizes)


def widths_of(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


@pytest.fixture
def clock(monkeypatch):
    """A clock that runs everything once and then says what a bilinear machine would take."""
    seen: list[tuple[nn.Module, list[torch.Tensor]]] = []

    def of_whole(model: nn.Module, inputs: Inputs) -> float:
        layers = [module for module in model.modules() if isinstance(module, LAYERS)]
        return sum(milliseconds(layer) for layer in layers) + rest_of(model, inputs)

    def times(modules, clock):
        found = []
        for module, calls in modules:
            clock.run_of(module, calls)()
            if isinstance(module, LAYERS):
                seen.append((module, [inputs.args[0] for inputs in calls]))
                found.append(len(calls) * milliseconds(module))
            else:
                found.append(of_whole(module, *calls))
        return [Latency(1, taken, taken, taken, 1) for taken in found]

    monkeypatch.setattr(latency_measurement, "times", times)
    return seen


@pytest.mark.parametrize("name", ["vgg", "inverted_residual", "unet", "densenet"])
def test_the_table_is_the_machine(name, clock) -> None:
    gated = zoo_gated(name)
    table = swan.measure_latency_table(gated)
    base = gated.model
    assert {own.module for own in table.layers} == {
        name for name, module in base.named_modules() if isinstance(module, LAYERS)
    }
    for own in table.layers:
        layer = base.get_submodule(own.module)
        assert (own.in_width, own.out_width) == widths_of(layer)
        a, b, c, d = coefficients(layer)
        units = gated.channels.layer(own.module)
        into, out = (
            {own.in_width // 2, own.in_width} if set(units.in_units) != {-1} else {own.in_width},
            {own.out_width // 2, own.out_width}
            if set(units.out_units) != {-1}
            else {own.out_width},
        )
        for i in into:
            for o in out:
                if b == 0:
                    i = o * own.in_width // own.out_width  # noqa: PLW2901 - depthwise
                assert own.milliseconds(i, o) == pytest.approx(a + b * i + c * o + d * i * o)
        assert own.worst_error < 1e-9
    full = [own.milliseconds(own.in_width, own.out_width) for own in table.layers]
    assert table.rest_ms == pytest.approx(7)
    assert table.total_ms == pytest.approx(sum(full) + rest_of(base.eval(), gated.own_inputs()))


def test_a_handful_of_widths_on_axes_that_have_units(clock) -> None:
    swan.measure_latency_table(mlp(3, 16, 8, 5))
    found = [widths_of(layer) for layer, _ in clock]
    assert found == [
        *((3, out) for out in (4, 8, 12, 16)),
        *((into, out) for into in (4, 8, 12, 16) for out in (2, 4, 6, 8)),
        *((into, 5) for into in (2, 4, 6, 8)),
    ]


def test_grouped_layers_keep_their_groups(clock) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.Conv2d(12, 24, 3, groups=3),
        nn.Conv2d(24, 48, 3, groups=24),
        nn.Conv2d(48, 2, 1),
    )
    swan.measure_latency_table(swan.swanify(model, torch.zeros(1, 3, 8, 8)))
    found = [(*widths_of(layer), layer.groups) for layer, _ in clock]
    grouped = [(into, out, 3) for into in (3, 6, 9, 12) for out in (6, 12, 18, 24)]
    assert found[4:20] == grouped
    assert found[20:24] == [(6, 12, 6), (12, 24, 12), (18, 36, 18), (24, 48, 24)]


def test_the_inputs_are_those_of_the_model(clock) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, dilation=2, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 4, 2, stride=2, output_padding=1, bias=False),
    ).to(torch.float64, memory_format=torch.channels_last)
    x = torch.zeros(2, 3, 17, 15, dtype=torch.float64)
    gated = swan.swanify(model, x.to(memory_format=torch.channels_last))
    swan.measure_latency_table(gated)
    middle = model[0](x).shape[2:]
    layer, (x_full,) = clock[3]
    assert x_full.shape == (2, 3, 17, 15)
    assert x_full.dtype == layer.weight.dtype == torch.float64
    assert x_full.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer(x_full).shape == model[0](x).shape
    layer, (x_half,) = clock[5]
    assert x_half.shape == (2, 4, *middle)
    assert layer.bias is None
    assert layer(x_half).shape == (2, 4, *model[1](model[0](x)).shape[2:])


def test_a_shared_layer_counts_every_call(clock) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.shared(self.shared(self.first(x)).relu()))

    table = swan.measure_latency_table(swan.swanify(Twice(), torch.zeros(1, 3)))
    assert [own.module for own in table.layers] == ["first", "shared", "last"]
    a, b, c, d = coefficients(nn.Linear(1, 1))
    shared = table.layers[1]
    assert shared.milliseconds(8, 8) == pytest.approx(2 * (a + 8 * b + 8 * c + 64 * d))
    # Of what a whole model takes beyond its layers, it answers for the outputs of both calls.
    seen = latency_measurement._watch(Twice(), Inputs((torch.zeros(5, 3),), {}))
    assert {name: own.size for name, own in seen.items()} == {"first": 5, "shared": 10, "last": 5}


@pytest.mark.parametrize("name", ["resnet_projection", "inverted_residual"])
def test_really_measured_and_nothing_is_touched(name) -> None:
    gated = zoo_gated(name)
    before = fingerprint(gated)
    table = swan.measure_latency_table(gated, repeats=2)
    assert_same_fingerprint(before, fingerprint(gated))
    assert table.total_ms > 0
    assert (table.threads, table.torch, table.repeats) == (1, str(torch.__version__), 2)
    assert table.device
    assert table.inputs.startswith("float32[")
    assert LatencyTable.from_json(table.to_json()) == table
    small = swan.prune(gated, latency_ms=table.total_ms, latency_table=table)
    assert swan.count_macs(small, gated.example_inputs) > 0


def test_multiples_are_of_half_the_macs_and_differ(clock) -> None:
    gated = mlp(8, 64, 64, 64, 8)
    table = swan.measure_latency_table(gated)
    found = {own.multiple: own for own in table.multiples}
    assert {1, 8, 16, 32} <= set(found)  # 2 or 4 may happen to be met already
    assert 0.49 < found[1].macs_share <= 0.5
    total = swan.count_macs(gated.model, gated.example_inputs)
    scores = torch.rand(192, generator=torch.Generator().manual_seed(0))
    for multiple, own in found.items():
        assert 0.3 < own.macs_share <= 0.5
        small = swan.prune_by_score(
            gated,
            scores,
            macs=0.5,
            per_cost=False,
            diminishing=False,
            round_to=multiple,
            verify=False,
        )
        widths = [layer.out_features for layer in small.children() if isinstance(layer, nn.Linear)][
            :3
        ]
        assert all(width % multiple == 0 for width in widths)
        assert own.macs_share == swan.count_macs(small, gated.example_inputs) / total
        inputs = gated.own_inputs()
        taken = sum(milliseconds(m) for m in small.children() if isinstance(m, nn.Linear))
        assert own.milliseconds == pytest.approx(taken + rest_of(small, inputs))


def test_multiples_that_are_too_coarse_are_left_out(clock) -> None:
    multiples = swan.measure_latency_table(mlp(3, 4, 4, 2)).multiples
    assert [own.multiple for own in multiples] == [1, 2]


class TestRuntime:
    def test_layers_and_models_run_where_they_ship(self, clock, monkeypatch) -> None:
        """Layers at half and full width, which is all that a bilinear cost needs."""
        ran: list[str] = []

        def in_runtime(module, inputs, runtime):
            ran.append(runtime)
            return lambda: module(*inputs.args)

        monkeypatch.setattr(timing_clock, "forward_pass", in_runtime)
        gated = mlp(3, 16, 8, 5)
        table = swan.measure_latency_table(gated, runtime="onnxruntime")
        assert [widths_of(layer) for layer, _ in clock] == [
            *((3, out) for out in (8, 16)),
            *((into, out) for into in (8, 16) for out in (4, 8)),
            *((into, 5) for into in (4, 8)),
        ]
        assert set(ran) == {"onnxruntime"}
        eager = swan.measure_latency_table(gated)
        for own, same in zip(table.layers, eager.layers, strict=True):
            assert own.milliseconds(5, 7) == pytest.approx(same.milliseconds(5, 7))
        assert (table.runtime, eager.runtime) == ("onnxruntime", "eager")
        assert LatencyTable.from_json(table.to_json()) == table

    def test_another_one_is_refused(self) -> None:
        with pytest.raises(swan.InputError, match=r"runtime must be one of .*got 'compile'"):
            swan.measure_latency_table(mlp(3, 4, 2), runtime="compile")


class TestNoise:
    def noisy(self, gated, clock, *, spread: float) -> LatencyTable:
        multiples = (MultipleLatency(1, 0.5, 1.0, spread), MultipleLatency(8, 0.5, 1.1, 0.01))
        return replace(swan.measure_latency_table(gated, repeats=1), multiples=multiples)

    def test_the_usual_multiple_and_a_word(self, clock) -> None:
        gated = mlp(8, 64, 64, 8)
        gated.close("0", range(50))
        table = self.noisy(gated, clock, spread=0.35)
        with pytest.warns(swan.SwanWarning, match=r"too noisy to choose .* 35% of the median"):
            small = swan.prune(gated, round_to="auto", latency_table=table)
        assert small[0].out_features == 16
        assert self.noisy(gated, clock, spread=0.1).best_multiple == 1

    def test_the_quietest_of_three(self, clock, monkeypatch) -> None:
        quiet: Any = vars(latency_measurement)["times"]
        calls: list[int] = []

        def times(modules, clock):
            calls.append(len(modules))
            spread = {5: 0.5, 6: 0.3, 7: 0.4}.get(len(calls), 0.0)  # 3 layers, 1 for the wholes
            return [
                Latency(1, own.median_ms, own.median_ms, own.median_ms * (1 + spread), 1)
                for own in quiet(modules, clock)
            ]

        monkeypatch.setattr(latency_measurement, "times", times)
        table = swan.measure_latency_table(mlp(8, 64, 64, 8))
        assert len(calls) == 7
        assert table.noise == pytest.approx(0.3)


def test_a_multiple_that_leaves_much_unused_says_so() -> None:
    gated = learnt_(mlp(4, 32, 4))
    with pytest.warns(
        swan.SwanWarning,
        match=r"multiples of 16 channels leave 50\.0% of the MACs, where 70\.0% were",
    ):
        swan.prune(gated, macs=0.7, round_to=16)


class TestRoundToAuto:
    @pytest.mark.parametrize("multiple", [1, 4, 8])
    def test_takes_the_best_of_the_table(self, multiple, clock) -> None:
        gated = learnt_(mlp(8, 64, 64, 8))
        scores = torch.rand(128, generator=torch.Generator().manual_seed(1))
        table = replace(
            swan.measure_latency_table(gated, repeats=1),
            multiples=(MultipleLatency(multiple, 0.5, 1.0), MultipleLatency(32, 0.5, 2.0)),
        )
        for cut, own in ((swan.prune, ()), (swan.prune_by_score, (scores,))):
            auto = cut(gated, *own, macs=0.6, round_to="auto", latency_table=table)
            given = cut(gated, *own, macs=0.6, round_to=multiple)
            assert [m.weight.shape for m in auto.children() if isinstance(m, nn.Linear)] == [
                m.weight.shape for m in given.children() if isinstance(m, nn.Linear)
            ]
            both = {"latency_ms": 0.7 * table.total_ms, "latency_table": table}
            timed = cut(gated, *own, round_to="auto", **both)
            assert timed[0].out_features % multiple == 0

    def test_without_a_budget_open_units_stay(self, clock) -> None:
        gated = mlp(8, 64, 64, 8)
        gated.gates.logits.data[:50] = -3.0
        table = replace(
            swan.measure_latency_table(gated, repeats=1), multiples=(MultipleLatency(8, 0.5, 1.0),)
        )
        assert swan.prune(gated, round_to="auto", latency_table=table)[0].out_features == 16


class TestRoundToAutoUnmeasured:
    """8 where the budget is used by it; else the next smaller power of two that uses it."""

    @pytest.mark.parametrize(
        ("hidden", "macs", "left"), [(64, 0.5, 32), (32, 0.65, 20), (32, 0.7, 22), (24, 0.4, 9)]
    )
    def test_as_coarse_as_the_budget_allows(self, hidden, macs, left) -> None:
        gated = learnt_(mlp(8, hidden, 8))
        scores = torch.rand(hidden, generator=torch.Generator().manual_seed(1))
        by_score = swan.prune_by_score(gated, scores, macs=macs, round_to="auto")
        by_gates = swan.prune(gated, macs=macs, round_to="auto")
        assert by_score[0].out_features == by_gates[0].out_features == left

    def test_a_budget_that_coarse_widths_cannot_reach_is_reached(self) -> None:
        gated = learnt_(mlp(4, 16, 16, 4))
        small = swan.prune(gated, macs=0.1, round_to="auto")
        assert small[0].out_features == swan.prune(gated, macs=0.1)[0].out_features == 3
        with pytest.raises(swan.BudgetError):
            swan.prune(gated, macs=1e-3, round_to="auto")

    def test_without_a_budget_the_open_units_stay(self) -> None:
        gated = mlp(8, 64, 8)
        gated.gates.logits.data[:50] = -3.0
        assert swan.prune(gated, round_to="auto")[0].out_features == 16

    def test_same_widths_in_all_layers(self) -> None:
        gated = learnt_(mlp(8, 64, 64, 8))
        small = swan.prune(gated, macs=0.45, round_to="auto", uniform=True)
        assert small[0].out_features == small[1].out_features == 40  # 42 would fit


class TestBadInput:
    def test_another_word_and_what_is_no_table(self) -> None:
        gated = mlp(8, 64, 8)
        for cut in (
            lambda **own: swan.prune(gated, macs=0.5, **own),
            lambda **own: swan.prune_by_score(gated, torch.ones(64), macs=0.5, **own),
        ):
            with pytest.raises(swan.InputError, match=r"latency_table is what .* got dict"):
                cut(round_to="auto", latency_table={})
            with pytest.raises(swan.InputError, match="or \"auto\"; got 'fast'"):
                cut(round_to="fast")

    @pytest.mark.parametrize("repeats", [0, -1, 1.5])
    def test_repeats(self, repeats) -> None:
        with pytest.raises(swan.InputError, match="repeats must be a whole number >= 1"):
            swan.measure_latency_table(mlp(3, 4, 2), repeats=repeats)

    def test_what_is_not_gated(self) -> None:
        with pytest.raises(swan.ModelError, match="expected a gated model"):
            swan.measure_latency_table(nn.Linear(3, 4))

    def test_without_data(self) -> None:
        with pytest.raises(swan.ModelError, match="cannot measure latencies"):
            swan.measure_latency_table(mlp(3, 4, 2).to("meta"))
