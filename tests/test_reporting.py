"""The report's figures against numbers worked out by hand, and its three forms."""

import dataclasses
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swan_surgery as swan
from swan_surgery.models import as_inputs
from swan_surgery.reporting import Report, format_macs
from swan_surgery.reporting.measurement import size_bytes, uncounted_ops
from swan_surgery.reporting.rendering import milliseconds
from swan_surgery.timing import runtimes
from swan_surgery.timing.loop import Latency, paired_latencies
from swan_surgery.timing.memory import peak_activation_bytes
from tests.closing import learnt_


class Net(nn.Module):
    """conv 3 -> 8, batch-norm, linear 8 -> 5, on 4x4 images."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured():
    return swan.report(Net(8), Net(4), X, evaluate=lambda m: 90.0 + m.conv.out_channels)


def test_figures_are_those_worked_out_by_hand(measured):
    before, after = measured.before, measured.after
    assert before.macs == 2 * (16 * 8 * 3 * 9 + 8 * 5)  # two images, 16 positions
    assert after.macs == 2 * (16 * 4 * 3 * 9 + 4 * 5)
    assert before.flops == 2 * before.macs
    assert before.params == 8 * 27 + 2 * 8 + 8 * 5 + 5
    # Running mean and variance, and an int64 counter.
    assert before.size_bytes == 4 * (before.params + 2 * 8) + 8
    assert (before.accuracy, after.accuracy) == (98.0, 94.0)
    assert measured.input_shapes == ((2, 3, 4, 4),)
    assert measured.environment.threads == torch.get_num_threads()


def test_layers_show_widths_macs_and_params_on_both_sides(measured):
    conv, head = measured.layers
    assert (conv.name, head.name) == ("conv", "head")
    assert (conv.before.in_channels, conv.before.out_channels) == (3, 8)
    assert (conv.after.in_channels, conv.after.out_channels) == (3, 4)
    assert (conv.after.macs, conv.after.params) == (2 * 16 * 4 * 27, 4 * 27)
    assert (head.before.in_channels, head.after.in_channels) == (8, 4)
    total = sum(layer.before.macs for layer in measured.layers)
    assert total == measured.before.macs


def test_latency_is_measured_at_the_batch_and_at_one(measured):
    for figures in (measured.before, measured.after):
        assert [latency.batch for latency in figures.latencies] == [2, 1]
        for latency in figures.latencies:
            assert latency.repeats >= 30
            assert 0 < latency.lower_quartile_ms <= latency.median_ms <= latency.upper_quartile_ms


def test_latency_stops_at_the_time_limit_and_takes_turns():
    calls = []

    class Slow(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    runs = [(Slow("a"), as_inputs(X)), (Slow("b"), as_inputs(X))]
    latencies = paired_latencies(runs, 2, seconds_per_model=0.0)
    assert [latency.repeats for latency in latencies] == [3, 3]
    assert calls[-6:] == ["a", "b"] * 3


def test_peak_memory_counts_what_is_alive_at_once():
    class Chain(nn.Module):
        def forward(self, x):
            y = x + 1  # 1 alive
            z = torch.cat([y, y])  # 3 alive: y and twice its size
            del y
            return z * 2  # 4 alive: z and the result

    x = torch.zeros(256)
    assert peak_activation_bytes(Chain(), as_inputs(x)) == 4 * x.numel() * 4


def test_peak_memory_leaves_out_inputs_weights_and_views():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64))

        def forward(self, x):
            return x.view(8, 8), self.weight[None], (x + self.weight).view(4, 16)

    assert peak_activation_bytes(Views(), as_inputs(torch.zeros(64))) == 64 * 4


def test_tied_weights_are_stored_once():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert size_bytes(tied) == 16 * 4


def test_uncounted_operations_are_named_and_free_ones_are_not():
    class Odd(nn.Module):
        def forward(self, x):
            y = F.max_pool2d(F.gelu(x), 2).flatten(2) * 3
            return F.scaled_dot_product_attention(y, y, y) + torch.cdist(y, y).mean()

    assert uncounted_ops(Odd(), as_inputs(X)) == (("aten::_cdist_forward", 1),)


def test_attention_is_counted():
    class Attention(nn.Module):
        def forward(self, x):
            y = x.flatten(2)
            return F.scaled_dot_product_attention(y, y, y)

    batch, channels, pixels = X.shape[0], X.shape[1], X[0, 0].numel()
    assert uncounted_ops(Attention(), as_inputs(X)) == ()
    assert swan.count_macs(Attention(), X) == 2 * batch * channels * channels * pixels


def test_uncounted_operations_reach_the_text():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x).flatten(2)
            return torch.cdist(y, F.scaled_dot_product_attention(y, y, y))

    text = str(swan.report(Distances(), Distances(), X[:1]))
    assert "not counted in the MACs before: aten::_cdist_forward (1x)" in text
    assert "scaled_dot_product" not in text


def test_a_gated_model_stands_for_its_hard_gated_form():
    gated = swan.swanify(Net(8), X)
    with torch.no_grad():
        gated.gates.logits[:3] = -5.0
    measured = swan.report(gated, swan.prune(gated), X)
    assert measured.before.macs == swan.hard_macs(gated) == measured.after.macs
    assert measured.layers[0].before.out_channels == 5
    assert measured.before.params == measured.after.params


def test_latencies_of_the_runtime_that_ships(monkeypatch):
    seen = []

    def timed(run, inputs, runtime):
        seen.append(runtime)
        return lambda: None

    monkeypatch.setattr(runtimes, "forward_pass", timed)
    small, large = nn.Linear(4, 2), nn.Linear(4, 8)
    found = swan.report(large, small, torch.zeros(2, 4), runtime="onnxruntime")
    assert seen == ["onnxruntime"] * 4
    assert "batch 2, onnxruntime" in str(found)
    assert Report.from_json(found.to_json()) == found


def test_models_the_wrong_way_round_are_named():
    with pytest.warns(
        swan.SwanWarning, match=r"second model is the larger one.*report\(dense, small"
    ):
        swan.report(nn.Linear(4, 2), nn.Linear(4, 8), torch.zeros(1, 4))


def test_noise_is_named():
    quiet, noisy = Latency(1, 1.0, 0.95, 1.05, 9), Latency(1, 1.0, 0.8, 1.2, 9)
    assert not quiet.is_noisy
    given = swan.report(nn.Linear(4, 8), nn.Linear(4, 2), torch.zeros(1, 4))
    for latency, is_named in ((quiet, False), (noisy, True)):
        before, after = (replace(own, latencies=(latency,)) for own in (given.before, given.after))
        text = str(replace(given, before=before, after=after))
        assert (
            "too noisy to compare latencies by: IQR up to 40% of the median" in text
        ) == is_named


def test_the_given_models_are_untouched():
    model = Net(8).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    swan.report(model, model, X, evaluate=lambda m: float(m.norm.running_mean.add_(1).sum()))
    assert model.training
    assert model.norm.training
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert torch.get_rng_state().equal(rng)


def test_layers_on_one_side_only_are_kept():
    class Longer(Net):
        def __init__(self):
            super().__init__()
            self.added = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return super().forward(self.added(x))

    layers = {layer.name: layer for layer in swan.report(Net(), Longer(), X[:1]).layers}
    assert layers["added"].before is None
    assert layers["added"].after.macs == 16 * 9


def test_json_round_trip_and_its_errors(measured):
    text = measured.to_json()
    assert swan.Report.from_json(text) == measured
    newer = {**json.loads(text), "version": 99}
    with pytest.raises(swan.InputError, match="another version"):
        swan.Report.from_json(json.dumps(newer))
    for broken in ("{", "[]", "{}", '{"version": 1}'):
        with pytest.raises(swan.InputError, match="not a report"):
            swan.Report.from_json(broken)


def test_text_never_shows_a_bare_number(measured):
    text = str(measured)
    macs = format_macs(measured.before.macs)
    assert macs == "6.99 kMACs (14.0 kFLOPs)"
    assert macs in text
    assert "8 -> 4" in text
    assert "batch 2" in text
    assert "latency, batch 1" in text
    assert "94" in text
    assert "\x1b" not in text


def test_markdown_has_both_tables_of_even_rows(measured):
    lines = measured.to_markdown().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert [line.count("|") for line in tables if "conv" in line] == [6]
    summary = tables[: tables.index("| layer | inputs | outputs | MACs | parameters |")]
    assert {line.count("|") for line in summary} == {5}
    assert re.search(r"\| cost \| 6\.99 kMACs \(14\.0 kFLOPs\) \|", measured.to_markdown())


@pytest.mark.parametrize(
    ("macs", "text"),
    [
        (1_814_073_344, "1.81 GMACs (3.63 GFLOPs)"),
        (999, "999 MACs (2.00 kFLOPs)"),
        (0, "0 MACs (0 FLOPs)"),
        (25_600_000, "25.6 MMACs (51.2 MFLOPs)"),
        (312 * 10**12, "312 TMACs (624 TFLOPs)"),
    ],
)
def test_macs_are_written_with_their_flops(macs, text):
    assert format_macs(macs) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.03921, 3, "0.0392"),
        (99.97, 3, "100"),
        (231.4, 2, "231"),
        (9.96, 2, "10"),
        (99.96, 2, "100"),
        (1689.8, 3, "1,690"),
    ],
)
def test_slow_passes_are_written_without_powers_of_ten(value, digits, text):
    assert milliseconds(value, digits) == text


def test_report_is_frozen(measured):
    with pytest.raises(dataclasses.FrozenInstanceError):
        measured.batch = 3


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(swan.ModelError, match="got str"):
        swan.report("resnet18", Net(), X)
    with pytest.raises(swan.InputError, match="Net"):
        swan.report(Net(), Net(), torch.randn(1, 7, 4, 4))
    with pytest.raises(swan.InputError, match="holds no tensor"):
        swan.report(Net(), Net(), (1,))


@pytest.mark.parametrize(
    ("both", "projected", "widths"), [(False, 0, 16), (True, 0, 32), (True, 4, 8)]
)
def test_recurrent_layers_have_widths(both: bool, projected: int, widths: int) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 16, bidirectional=both, proj_size=projected)
            self.cell = nn.GRUCell(widths, 8)
            self.last = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.cell(self.rnn(x)[0][-1]))

    model, x = Reads(), torch.randn(7, 2, 5)
    small = swan.prune(learnt_(swan.swanify(model, x)), macs=0.5)
    layers = {layer.name: layer for layer in swan.report(model, small, x).layers}
    before, after = layers["rnn"].before, layers["rnn"].after
    assert before is not None
    assert after is not None
    assert (before.in_channels, before.out_channels) == (5, widths)
    assert after.out_channels == small.cell.weight_ih.shape[1]
    cell = layers["cell"].before
    assert cell is not None
    assert (cell.in_channels, cell.out_channels) == (widths, 8)
