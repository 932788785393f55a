"""What must be pinned is pinned, and the pin names the operation and the module."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

import swan_surgery as swan
from swan_surgery.channels import PINNED, ChannelMap, Pin
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.small_nets import Net, conv


class Inner(nn.Module):
    """The operation under test, in a module with a name of its own."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def between(function, width: int = 4, out: int | None = None, *, exact: bool = True) -> ChannelMap:
    """The map of convolution `a`, the function in module `inner`, convolution `last`."""
    model = prepared(
        Net(
            lambda m, x: m.last(m.inner(m.a(x))),
            a=conv(3, width),
            inner=Inner(function),
            last=conv(out or width, 2),
        )
    )
    x = image(2, 3, 4, 4)
    if exact:
        assert_closed_equals_cut(model, x)
    return swan.channel_map(model, x)


def pins_of(channels: ChannelMap, layer: str) -> list[Pin]:
    return [pin for pin in channels.pins if pin.layer == layer]


def the_pin(channels: ChannelMap, layer: str = "a") -> Pin:
    (pin,) = pins_of(channels, layer)
    return pin


OVER_CHANNELS = {
    "softmax": (lambda x: x.softmax(1), "aten._softmax"),
    "log_softmax": (lambda x: x.log_softmax(1), "aten._log_softmax"),
    "logsumexp": (lambda x: x - x.logsumexp(1, keepdim=True), "aten.logsumexp"),
    "cumsum": (lambda x: x.cumsum(1), "aten.cumsum"),
    "cumprod": (lambda x: x.cumprod(1), "aten.cumprod"),
    "sort": (lambda x: x.sort(1).values, "aten.sort"),
    "topk": (lambda x: x.topk(4, 1).values, "aten.topk"),
    "median": (lambda x: x - x.median(1, keepdim=True).values, "aten.median"),
    "prod": (lambda x: x * x.prod(1, keepdim=True), "aten.prod"),
    "argmax": (lambda x: x * x.argmax(1, keepdim=True), "aten.argmax"),
    "cummax": (lambda x: x - x.cummax(1).values, "aten.cummax"),
    "gather": (lambda x: x.gather(1, x.argsort(2)[:, :, :1, :1].clamp(max=0)), "aten.gather"),
    "index_add": (lambda x: x.index_add(1, torch.arange(4), x), "aten.index_add"),
    "scatter_add": (lambda x: x.scatter_add(1, torch.zeros_like(x).long(), x), "aten.scatter_add"),
    "cummin": (lambda x: x - x.cummin(1).values, "aten.cummin"),
    "boundaries": (
        lambda x: torch.bucketize(x.mean((0, 2, 3)), x[0, :, 0, 0].contiguous()) * x,
        "aten.bucketize",
    ),
}


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_mixing_the_channels_pins_them_all(name: str) -> None:
    """Each of them turns a channel that is zero into something: no gate value could leave it out."""
    function, op = OVER_CHANNELS[name]
    channels = between(function)
    assert channels.num_units == 0
    assert channels.unknown_ops == ()
    assert channels.statistics == ()
    pin = the_pin(channels)
    assert pin.channels == (0, 1, 2, 3)
    assert pin.op == op
    assert pin.module == "inner"
    assert pin.reason
    assert f"a: 4 channels pinned: {pin.reason} ({op} in module 'inner')" == str(pin)


COUNTED = {
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "sum": lambda x: x / (1 + x.square().sum(1, keepdim=True)),
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "amin": lambda x: x - x.amin(1, keepdim=True),
    "var": lambda x: x / (1 + x.var(1, unbiased=False, keepdim=True)),
    "std": lambda x: x / (1 + x.std(1, correction=0, keepdim=True)),
    "var_mean": lambda x: x - torch.var_mean(x, 1, keepdim=True, correction=0)[1],
    "norm": lambda x: x / (1 + x.norm(dim=1, keepdim=True)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[1:]),
    "group_norm": lambda x: F.group_norm(x, 1),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_statistic_over_channels_counts_them_with_their_gates(name: str) -> None:
    channels = between(COUNTED[name])
    assert channels.layer("a").out_units == (0, 1, 2, 3)
    assert pins_of(channels, "a") == []
    found = {(s.module, s.function, s.number, s.training) for s in channels.statistics}
    assert found == {("inner", name, 1, training) for training in (True, False)}
    assert all((s.shape, s.units) == ((1, 4, 1, 1), (0, 1, 2, 3)) for s in channels.statistics)


@pytest.mark.parametrize("p", [1, 2, 3, 0, float("inf"), float("-inf")])
def test_every_norm_over_channels_is_exact(p: float) -> None:
    assert between(lambda x: x / (1 + x.norm(p, dim=1, keepdim=True))).num_units == 4


def test_a_statistic_over_everything_counts_the_channels_too() -> None:
    assert between(lambda x: x / x.square().sum()).num_units == 4
    assert between(lambda x: x - x.mean()).num_units == 4
    assert between(lambda x: x - x.mean((0, 1), keepdim=True)).num_units == 4


@pytest.mark.parametrize("into", [3, 4, 6])
def test_a_module_that_averages_different_channels_in_each_call(into: int) -> None:
    """One gate cannot weigh both calls: exact or pinned, and never the gates of the other call."""

    def run(m, x):
        return m.last(torch.cat((m.inner(m.a(x)), m.inner(m.b(m.inner(x)))), 1))

    inner = Inner(lambda x: x - x.mean(1, keepdim=True))
    model = Net(run, a=conv(3, 4), b=conv(3, into), inner=inner, last=conv(4 + into, 2))
    assert_closed_equals_cut(prepared(model), image(2, 3, 4, 4))


UNKNOWN = {
    "fft": (lambda x: torch.fft.fft(x, dim=1).real, "aten._fft_r2c"),
    "renorm": (lambda x: x.renorm(2, 1, 5.0), "aten.renorm"),
    "cross": (lambda x: torch.linalg.cross(x, x.flip(1), dim=1), "aten.linalg_cross"),
    "tril": (lambda x: x.permute(0, 2, 1, 3).tril().permute(0, 2, 1, 3), "aten.tril"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operation_pins_what_it_touches_and_is_listed(name: str) -> None:
    function, op = UNKNOWN[name]
    width = 3 if name == "cross" else 4
    channels = between(function, width)
    pin = the_pin(channels)
    assert (pin.channels, pin.op, pin.module) == (tuple(range(width)), op, "inner")
    assert "without a channel rule" in pin.reason
    assert (op, "inner") in channels.unknown_ops


def test_an_unknown_operation_pins_only_what_it_touches() -> None:
    def run(m, x):
        return m.last(torch.cat((m.inner(m.a(x)), F.relu(m.b(x))), 1))

    model = Net(
        run, a=conv(3, 2), b=conv(3, 3), inner=Inner(lambda x: x.renorm(2, 1, 5.0)), last=conv(5, 2)
    )
    gated = assert_closed_equals_cut(prepared(model), image(2, 3, 4, 4))
    assert gated.channels.num_units == 3
    assert gated.channels.layer("last").in_units == (PINNED, PINNED, 0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_channels_whose_bits_are_read_stay(dtype: torch.dtype) -> None:
    def signs(x: Tensor) -> Tensor:  # a closed channel may be -0.0
        return x + x.detach().view(dtype).sum().to(x.dtype) * 1e-30

    channels = between(signs)
    reasons = {pin.reason for pin in channels.pins}
    assert any("bits" in reason for reason in reasons)
    assert not any(layer.name == "a" and max(layer.out_units) >= 0 for layer in channels.layers)


def test_an_unknown_operation_that_meets_no_channel_is_no_matter() -> None:
    channels = swan.channel_map(
        Net(lambda m, x: m.b(F.relu(m.a(x.renorm(2, 1, 5.0)))), a=conv(3, 4), b=conv(4, 2)).eval(),
        torch.zeros(2, 3, 4, 4),
    )
    assert channels.num_units == 4
    assert channels.unknown_ops == ()


LITERAL = {
    "slice": lambda x: torch.cat((x[:, 2:6], x[:, :2]), 1),
    "narrow": lambda x: torch.cat((x.narrow(1, 4, 2), x.narrow(1, 0, 4)), 1),
}
MADE = {
    "expand": lambda x: x * x.new_ones(1, 1, 1, 1).expand(2, 6, 4, 4),
    "zeros": lambda x: x + torch.zeros(2, 6, 4, 4, dtype=x.dtype),
}


@pytest.mark.parametrize("name", MADE)
def test_a_constant_made_for_the_channels_follows_by_its_written_width(name: str) -> None:
    inner = Inner(MADE[name])
    model = Net(lambda m, x: m.b(m.inner(m.a(x))), a=conv(3, 6), b=conv(6, 2), inner=inner)
    gated = assert_closed_equals_cut(prepared(model), image(2, 3, 4, 4))
    assert gated.channels.layer("a").out_units == tuple(range(6))


def test_a_split_of_unequal_literal_lengths_follows_even_if_one_is_the_batch() -> None:
    inner = Inner(lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1))
    model = Net(lambda m, x: m.b(m.inner(m.a(x))), a=conv(3, 6), b=conv(6, 2), inner=inner)
    gated = assert_closed_equals_cut(prepared(model), image(2, 3, 4, 4))
    assert gated.channels.layer("a").out_units == tuple(range(6))


@pytest.mark.parametrize("name", LITERAL)
def test_a_literal_that_cannot_be_replaced_pins_and_names_the_module(name: str) -> None:
    channels = between(LITERAL[name], 6)
    assert channels.layer("a").out_units == (PINNED,) * 6
    (pin,) = {(pin.reason, pin.op, pin.module) for pin in pins_of(channels, "a")}
    assert pin[2] == "inner"
    if name == "narrow":  # refused before any operation
        assert pin[0].startswith("the code refuses another width (RuntimeError at tests")
        assert "x.narrow(1, 4, 2)" in pin[0]
        assert pin[1] == "forward"
    else:
        assert pin[0] == "the forward code repeats this width, or depends on it"
        assert pin[1].startswith("aten.")


def test_a_literal_that_splits_the_width_follows_with_blocks_tied() -> None:
    channels = between(lambda x: F.relu(x.reshape(2, 2, 3, 16)).reshape(2, 6, 4, 4), 6)
    assert channels.layer("a").out_units == (0, 1, 2) * 2


REPLACED = {
    "view": (lambda x: F.relu(x.view(2, 6, 16)).view(2, 6, 4, 4), 6, {("view", 1), ("view", 2)}),
    "view keyword": (lambda x: F.relu(x.view(size=(2, 6, 16))).unflatten(2, (4, 4)), 6, {("view", 1)}),
    "reshape": (lambda x: F.relu(torch.reshape(x, (-1, 6, 4, 4))), 6, {("reshape", 1)}),
    "second call": (
        lambda x: F.relu(x.view(2, -1, 16)).view(2, 6, 4, 4),
        6,
        {("view", 2)},
    ),
    "equal parts": (lambda x: torch.cat(x.split(3, 1)[::-1], 1), 3, {("split", 1)}),
    "list of equal parts": (lambda x: torch.cat(x.split([3, 3], 1)[::-1], 1), 3, {("split", 1)}),
    "arithmetic": (lambda x: x * x.shape[1] ** -0.5, 6, {("mul", 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_a_literal_is_replaced_where_it_follows_a_width(name: str) -> None:
    function, units, calls = REPLACED[name]
    channels = between(function, 6)
    assert channels.num_units == units
    assert pins_of(channels, "a") == []
    found = {(n.module, n.function, n.number, n.training) for n in channels.numbers}
    assert found == {("inner", *call, training) for call in calls for training in (True, False)}
    widths = [n.units for n in channels.numbers if n.function != "mul"]
    assert all(set(own) == set(range(units)) for own in widths)
    assert all(n.value == 6**-0.5 for n in channels.numbers if n.function == "mul")


def test_a_constant_ramp_over_the_channels_pins_them() -> None:
    def ramp(x: Tensor) -> Tensor:
        return x * torch.arange(4, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)

    pin = the_pin(between(ramp))
    assert (pin.op, pin.module) == ("aten.mul", "inner")
    assert pin.reason == "meets data that belongs to no channel"


def test_a_ramp_made_to_measure_pins_too() -> None:
    """It follows the width, but position 1 would count as 1 wherever channel 1 came from."""

    def ramp(x: Tensor) -> Tensor:
        return x * torch.arange(x.shape[1], dtype=x.dtype, device=x.device).view(1, -1, 1, 1)

    assert the_pin(between(ramp)).reason == "meets data that belongs to no channel"


def test_a_constant_of_equal_values_fits_any_width() -> None:
    def add(x: Tensor) -> Tensor:
        return x * torch.full((x.shape[1],), 2.0, dtype=x.dtype, device=x.device)[:, None, None]

    assert between(add).num_units == 4


def test_one_channel_picked_by_its_position_is_pinned_and_the_others_are_not() -> None:
    channels = between(lambda x: F.relu(x * x[:, 2:3]), 4)
    assert channels.layer("a").out_units[2] == PINNED


def test_the_model_s_output_is_pinned() -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 4), b=conv(4, 5)).eval()
    pin = the_pin(swan.channel_map(model, torch.zeros(1, 3, 4, 4)), "b")
    assert (pin.channels, pin.op) == (tuple(range(5)), "output")
    assert pin.reason == "part of the model's output"


def test_that_a_channel_is_returned_says_more_than_what_else_pins_it() -> None:
    def run(m, x):
        x = m.b(F.relu(m.a(x)))
        return x.renorm(2, 1, 5.0), x

    model = Net(run, a=conv(3, 4), b=conv(4, 5)).eval()
    assert the_pin(swan.channel_map(model, torch.zeros(1, 3, 4, 4)), "b").op == "output"


def test_everything_returned_is_pinned_however_it_is_returned() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        return {"features": [x], "classes": (m.b(x),)}

    model = Net(run, a=conv(3, 4), b=conv(4, 5)).eval()
    assert swan.channel_map(model, torch.zeros(1, 3, 4, 4)).num_units == 0


def test_image_channels_are_no_units() -> None:
    """Also where the image meets labelled channels: their weight columns stay."""

    def run(m, x):
        return m.last(torch.cat((x, F.relu(m.a(x))), 1))

    gated = assert_closed_equals_cut(
        prepared(Net(run, a=conv(3, 4), last=conv(7, 2))), image(2, 3, 4, 4)
    )
    assert gated.channels.layer("a").in_units == (PINNED,) * 3
    assert gated.channels.layer("last").in_units == (PINNED,) * 3 + (0, 1, 2, 3)


def test_adding_the_image_pins_the_channels_it_meets() -> None:
    model = prepared(Net(lambda m, x: m.last(F.relu(m.a(x) + x)), a=conv(3, 3), last=conv(3, 2)))
    pin = the_pin(swan.channel_map(model, image(2, 3, 4, 4)))
    assert (pin.op, pin.reason) == ("aten.add", "meets data that belongs to no channel")


class Standardised(nn.Conv2d):
    """Weight standardisation, as in big transfer ResNets: statistics over each output row."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(x, weight, self.bias)


def test_weight_standardisation_frees_the_output_axis_and_no_gate_can_close_its_inputs() -> None:
    """The statistics could count them, but scaling the parameter does not scale the weight."""
    model = prepared(
        Net(
            lambda m, x: m.last(F.relu(m.middle(F.relu(m.a(x))))),
            a=conv(3, 4), middle=Standardised(4, 5, 1), last=conv(5, 2),
        )
    )  # fmt: skip
    channels = swan.channel_map(model, image(2, 3, 4, 4))
    assert channels.ungated_reads == set(channels.layer("a").out_units) == {0, 1, 2, 3}
    assert {(s.module, s.function) for s in channels.statistics} == {
        ("middle", "mean"),
        ("middle", "std"),
    }
    gated = assert_closed_equals_cut(model, image(2, 3, 4, 4))
    assert gated.channels.layer("middle").in_units == (PINNED,) * 4
    assert gated.channels.layer("middle").out_units == (0, 1, 2, 3, 4)
    assert the_pin(gated.channels, "a").reason == "no gate can close these channels"
    with pytest.raises(swan.NoGateableChannelsError, match="a graph cannot weigh"):
        swan.swanify(model, image(2, 3, 4, 4), ignore="middle", in_place=False)


class SoftmaxWeight(nn.Conv2d):
    """Weights that are a distribution over the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.softmax(1), self.bias)


def test_a_softmax_over_a_weight_pins_the_input_axis_and_frees_the_output_axis() -> None:
    model = prepared(
        Net(
            lambda m, x: m.last(F.relu(m.middle(F.relu(m.a(x))))),
            a=conv(3, 4), middle=SoftmaxWeight(4, 5, 1), last=conv(5, 2),
        )
    )  # fmt: skip
    gated = assert_closed_equals_cut(model, image(2, 3, 4, 4))
    assert gated.channels.layer("middle").in_units == (PINNED,) * 4
    assert gated.channels.layer("middle").out_units == (0, 1, 2, 3, 4)
    pin = the_pin(gated.channels, "a")
    assert (pin.op, pin.module) == ("aten.convolution", "middle")
    assert pin.reason == "is summed against data that belongs to no channel"


@pytest.mark.parametrize("pattern", ["block.a", "block*", "bloc[k].a", "block"])
def test_ignore_pins_what_it_names_and_the_children_of_it(pattern: str) -> None:
    block = Net(lambda m, x: F.relu(m.b(F.relu(m.a(x)))), a=conv(3, 4), b=conv(4, 5))
    model = Net(lambda m, x: m.last(m.block(x)), block=block, last=conv(5, 2)).eval()
    channels = swan.channel_map(model, torch.zeros(1, 3, 4, 4), ignore=(pattern,))
    pin = the_pin(channels, "block.a")
    assert pin.reason == "listed in ignore="
    assert channels.layer("block.a").out_units == (PINNED,) * 4
    only_a = pattern in ("block.a", "bloc[k].a")
    assert channels.num_units == (5 if only_a else 0)


def test_ignore_takes_a_single_string() -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 4), b=conv(4, 5)).eval()
    assert swan.channel_map(model, torch.zeros(1, 3, 4, 4), ignore="a").num_units == 0


def test_ignore_pins_what_is_coupled_with_it() -> None:
    model = Net(
        lambda m, x: m.last(F.relu(m.a(x) + m.b(x))), a=conv(3, 4), b=conv(3, 4), last=conv(4, 2)
    ).eval()
    channels = swan.channel_map(model, torch.zeros(1, 3, 4, 4), ignore=["a"])
    assert channels.num_units == 0
    assert the_pin(channels, "b").reason == "listed in ignore="


def test_channels_that_nobody_reads_are_pinned() -> None:
    def run(m, x):
        m.unused(x)
        return m.last(F.relu(m.a(x)))

    model = Net(run, unused=conv(3, 3), a=conv(3, 4), last=conv(4, 2)).eval()
    channels = swan.channel_map(model, torch.zeros(1, 3, 4, 4))
    assert the_pin(channels, "unused").reason == "no layer reads these channels"
    assert channels.num_units == 4


def test_every_output_channel_of_every_layer_has_a_unit_or_a_pin() -> None:
    channels = between(lambda x: F.relu(x * x[:, 2:3]), 4)
    for layer in channels.layers:
        pinned = sorted(c for pin in pins_of(channels, layer.name) for c in pin.channels)
        assert pinned == [i for i, unit in enumerate(layer.out_units) if unit == PINNED]
    assert all(pin.reason and pin.op for pin in channels.pins)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrised_weight_pins_the_layer_before_until_it_is_folded(norm):
    layers = [norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), norm(nn.Conv2d(4, 2, 3))]
    model = prepared(nn.Sequential(*layers))
    x = image(2, 3, 6, 6)
    before = model(x)
    assert swan.channel_map(model, x).num_units == 0

    for layer in (model[0], model[2]):
        remove_parametrizations(layer, "weight")

    torch.testing.assert_close(model(x), before)
    assert swan.channel_map(model, x).num_units == 4
    assert_closed_equals_cut(model, x)


def test_positions_to_sample_at_are_pinned_by_name() -> None:
    def run(m, x):
        grid = m.grid(x)
        return m.last(F.grid_sample(m.a(x), grid.permute(0, 2, 3, 1), align_corners=False)), m.read(
            grid
        )

    model = Net(run, a=conv(3, 4), grid=conv(3, 2), last=conv(4, 2), read=conv(2, 3))
    channels = swan.channel_map(prepared(model), image(2, 3, 4, 4))
    assert channels.layer("a").out_units == (0, 1, 2, 3)
    (reason,) = {pin.reason for pin in channels.pins if pin.layer == "grid"}
    assert reason == "used as sampling positions"


@pytest.mark.parametrize("swapped", [False, True])
def test_only_channels_that_meet_plain_data_are_pinned_on_either_side(swapped: bool) -> None:
    def run(m, x):
        mixed, made = torch.cat((m.a(x), x), dim=1), m.b(x)
        return m.last(made + mixed if swapped else mixed + made)

    model = prepared(Net(run, a=conv(3, 4), b=conv(3, 7), last=conv(7, 2)))
    channels = swan.channel_map(model, image(2, 3, 4, 4))
    assert channels.layer("a").out_units == (0, 1, 2, 3)
    assert channels.layer("b").out_units == (0, 1, 2, 3, *[PINNED] * 3)
    assert_closed_equals_cut(model, image(2, 3, 4, 4), channels=channels)


def test_a_statistic_that_another_run_takes_over_plain_data_is_not_weighed() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(1, keepdim=True)

    def run(m, x):
        return m.last(m.centre(m.a(x))) + m.centre(x).sum((1, 2, 3), keepdim=True)

    model = prepared(Net(run, a=conv(4, 4), centre=Centred(), last=conv(4, 2)))
    channels = swan.channel_map(model, image(2, 4, 4, 4))
    assert channels.layer("a").out_units == (PINNED,) * 4
    (reason,) = {pin.reason for pin in channels.pins if pin.layer == "a"}
    assert reason == "a statistic over other channels in each run of its module"


def test_an_embedding_whose_columns_no_layer_makes_is_named() -> None:
    class Looked(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(20, 6), nn.Linear(6, 6)
            self.up, self.last, self.shared = nn.Linear(6, 5), nn.Linear(5, 2), shared

        def forward(self, words: Tensor) -> Tensor:
            x = self.words(words)
            x = x + self.mix(x) if self.shared else x
            return self.last(torch.relu(self.up(x)).mean(1))

    words = torch.zeros(2, 3, dtype=torch.int64)
    alone, shared = (swan.channel_map(Looked(shared), words) for shared in (False, True))
    assert alone.lookups == ("words",)
    assert "columns of words stay" in str(alone.explain())
    assert "columns of words stay" in alone.explain()._repr_html_()
    assert shared.lookups == ()
    assert any(entry.tensor == "words.weight" for entry in shared.tensors)
