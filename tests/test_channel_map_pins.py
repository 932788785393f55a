"""What must be pinned is pinned, and the pin names the operation and the module."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    "mean": (lambda x: x - x.mean(1, keepdim=True), "aten.mean"),
    "amax": (lambda x: x - x.amax(1, keepdim=True), "aten.amax"),
    "softmax": (lambda x: x.softmax(1), "aten._softmax"),
    "norm": (lambda x: F.normalize(x, dim=1), "aten.linalg_vector_norm"),
    "cumsum": (lambda x: x.cumsum(1), "aten.cumsum"),
    "everything": (lambda x: x / x.square().sum(), "aten.sum"),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[1:]), "aten.native_layer_norm"),
    "sort": (lambda x: x.sort(1).values, "aten.sort"),
}


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_mixing_the_channels_pins_them_all(name: str) -> None:
    function, op = OVER_CHANNELS[name]
    channels = between(function)
    assert channels.num_units == 0
    assert channels.unknown_ops == ()
    pin = the_pin(channels)
    assert pin.channels == (0, 1, 2, 3)
    assert pin.op == op
    assert pin.module == "inner"
    assert pin.reason
    assert f"a: 4 channels pinned: {pin.reason} ({op} in module 'inner')" == str(pin)


UNKNOWN = {
    "fft": (lambda x: torch.fft.fft(x, dim=1).real, "aten._fft_r2c"),
    "cummax": (lambda x: x.cummax(1).values, "aten.cummax"),
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
        run, a=conv(3, 2), b=conv(3, 3), inner=Inner(lambda x: x.cummax(1).values), last=conv(5, 2)
    )
    gated = assert_closed_equals_cut(prepared(model), image(2, 3, 4, 4))
    assert gated.channels.num_units == 3
    assert gated.channels.layer("last").in_units == (PINNED, PINNED, 0, 1, 2)


def test_an_unknown_operation_that_meets_no_channel_is_no_matter() -> None:
    channels = swan.channel_map(
        Net(lambda m, x: m.b(F.relu(m.a(x.cummax(1).values))), a=conv(3, 4), b=conv(4, 2)).eval(),
        torch.zeros(2, 3, 4, 4),
    )
    assert channels.num_units == 4
    assert channels.unknown_ops == ()


LITERAL = {
    "view": lambda x: F.relu(x.view(2, 6, 16)).view(2, 6, 4, 4),
    "reshape": lambda x: F.relu(x.reshape(2, 2, 3, 16)).reshape(2, 6, 4, 4),
    "split": lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1),
    "slice": lambda x: torch.cat((x[:, 2:6], x[:, :2]), 1),
    "narrow": lambda x: torch.cat((x.narrow(1, 4, 2), x.narrow(1, 0, 4)), 1),
    "expand": lambda x: x * x.new_ones(1, 1, 1, 1).expand(2, 6, 4, 4),
    "zeros": lambda x: x + torch.zeros(2, 6, 4, 4, dtype=x.dtype),
}


@pytest.mark.parametrize("name", LITERAL)
def test_a_literal_width_pins_and_names_the_module(name: str) -> None:
    channels = between(LITERAL[name], 6)
    assert channels.layer("a").out_units == (PINNED,) * 6
    (pin,) = {(pin.reason, pin.module) for pin in pins_of(channels, "a")}
    assert pin == ("the forward code repeats this width, or depends on it", "inner")
    assert all(pin.op.startswith("aten.") for pin in pins_of(channels, "a"))


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


def test_weight_standardisation_pins_the_input_axis_and_frees_the_output_axis() -> None:
    model = prepared(
        Net(
            lambda m, x: m.last(F.relu(m.middle(F.relu(m.a(x))))),
            a=conv(3, 4), middle=Standardised(4, 5, 1), last=conv(5, 2),
        )
    )  # fmt: skip
    gated = assert_closed_equals_cut(model, image(2, 3, 4, 4))
    assert gated.channels.layer("middle").in_units == (PINNED,) * 4
    assert gated.channels.layer("middle").out_units == (0, 1, 2, 3, 4)
    pin = the_pin(gated.channels, "a")
    assert pin.module == "middle"
    assert pin.op in ("aten.mean", "aten.std")
    assert pin.reason == "a reduction over the channels"


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
