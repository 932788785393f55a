"""Hand-checked channel maps on the smallest network of each coupling."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swan_surgery as swan
from swan_surgery.channels import PINNED, AttributeWidth, ChannelMap
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.small_nets import Net, conv


def mapped(run, *shape: int, **layers: nn.Module) -> ChannelMap:
    """The map, after closed equals cut was checked on the same network."""
    shape = shape or (2, 3, 4, 4)
    model = prepared(Net(run, **layers))
    assert_closed_equals_cut(model, image(*shape))
    return swan.channel_map(model, image(*shape))


def slots(channels: ChannelMap, layer: str, index: int) -> set[tuple[str, int, int]]:
    """Everything that goes with output channel `index` of a layer."""
    return set(channels.slots(channels.layer(layer).out_units[index]))


def produced(layer: str, index: int, *, bias: bool = True) -> set[tuple[str, int, int]]:
    return {(f"{layer}.weight", 0, index)} | ({(f"{layer}.bias", 0, index)} if bias else set())


def read(layer: str, *indices: int) -> set[tuple[str, int, int]]:
    return {(f"{layer}.weight", 1, index) for index in indices}


def norm(layer: str, index: int) -> set[tuple[str, int, int]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {(f"{layer}.{name}", 0, index) for name in names}


def test_plain_chain_has_one_unit_per_channel() -> None:
    channels = mapped(
        lambda m, x: m.c(F.relu(m.bn(m.b(F.relu(m.a(x)))))),
        a=conv(3, 4),
        b=conv(4, 5, bias=False),
        bn=nn.BatchNorm2d(5),
        c=conv(5, 2),
    )
    assert channels.num_units == 9
    assert channels.layer("a").out_units == (0, 1, 2, 3)
    assert channels.layer("a").in_units == (PINNED,) * 3
    assert channels.layer("b").in_units == (0, 1, 2, 3)
    assert channels.layer("b").out_units == (4, 5, 6, 7, 8)
    assert channels.layer("c").out_units == (PINNED,) * 2
    assert slots(channels, "a", 2) == produced("a", 2) | read("b", 2)
    assert slots(channels, "b", 3) == produced("b", 3, bias=False) | norm("bn", 3) | read("c", 3)
    assert channels.unit_groups == ((0, 1, 2, 3), (4, 5, 6, 7, 8))
    assert (channels.num_channels, channels.num_gated_channels) == (11, 9)


def test_residual_add_couples_the_same_positions() -> None:
    def run(m, x):
        x = F.relu(m.stem(x))
        return m.last(F.relu(x + m.b(F.relu(m.a(x)))))

    channels = mapped(run, stem=conv(3, 4), a=conv(4, 3), b=conv(3, 4), last=conv(4, 2))
    assert channels.num_units == 7
    assert slots(channels, "stem", 1) == (
        produced("stem", 1) | produced("b", 1) | read("a", 1) | read("last", 1)
    )
    assert channels.layer("stem").out_units == channels.layer("b").out_units
    assert sorted(map(len, channels.unit_groups)) == [3, 4]


def test_concat_shifts_indices() -> None:
    def run(m, x):
        return m.last(F.relu(torch.cat((m.a(x), m.b(x), m.c(x)), 1)))

    channels = mapped(run, a=conv(3, 2), b=conv(3, 3), c=conv(3, 4), last=conv(9, 2))
    assert slots(channels, "a", 1) == produced("a", 1) | read("last", 1)
    assert slots(channels, "b", 1) == produced("b", 1) | read("last", 3)
    assert slots(channels, "c", 3) == produced("c", 3) | read("last", 8)
    last = channels.layer("last").in_units
    parts = [channels.layer(name).out_units for name in "abc"]
    assert last == parts[0] + parts[1] + parts[2]


def test_concat_with_itself_reads_a_unit_twice() -> None:
    channels = mapped(
        lambda m, x: m.last(torch.cat([m.a(x)] * 2, 1)), a=conv(3, 3), last=conv(6, 2)
    )
    assert slots(channels, "a", 1) == produced("a", 1) | read("last", 1, 4)


def test_flatten_repeats_each_channel_over_its_pixels() -> None:
    channels = mapped(
        lambda m, x: m.fc(torch.flatten(F.relu(m.a(x)), 1)), 2, 3, 2, 2, a=conv(3, 4),
        fc=nn.Linear(16, 5),
    )  # fmt: skip
    assert slots(channels, "a", 0) == produced("a", 0) | read("fc", 0, 1, 2, 3)
    assert slots(channels, "a", 3) == produced("a", 3) | read("fc", 12, 13, 14, 15)


def test_channels_last_flatten_interleaves() -> None:
    def run(m, x):
        return m.fc(F.relu(m.a(x)).permute(0, 2, 3, 1).flatten(1))

    channels = mapped(run, 2, 3, 1, 2, a=conv(3, 4), fc=nn.Linear(8, 5))
    assert slots(channels, "a", 1) == produced("a", 1) | read("fc", 1, 5)


def test_grouped_convolution_ties_positions_across_groups() -> None:
    def run(m, x):
        return m.last(F.relu(m.b(F.relu(m.a(x)))))

    channels = mapped(run, a=conv(3, 6), b=conv(6, 4, groups=2), last=conv(4, 2))
    # Inputs: group 0 reads 0-2, group 1 reads 3-5; outputs: 0-1 and 2-3.
    assert channels.num_units == 5
    assert slots(channels, "a", 1) == produced("a", 1) | produced("a", 4) | read("b", 1)
    assert slots(channels, "b", 0) == produced("b", 0) | produced("b", 2) | read("last", 0, 2)


def test_depthwise_with_multiplier_takes_both_outputs_along() -> None:
    def run(m, x):
        return m.last(F.relu(m.dw(F.relu(m.a(x)))))

    channels = mapped(run, a=conv(3, 3), dw=conv(3, 6, 3, groups=3), last=conv(6, 2))
    assert channels.num_units == 3
    assert slots(channels, "a", 1) == (
        produced("a", 1) | produced("dw", 2) | produced("dw", 3) | read("last", 2, 3)
    )


def shuffle_by_hand(m, x):
    x = F.relu(m.a(x))
    b, c, h, w = x.shape
    return m.last(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


@pytest.mark.parametrize("width", [6, 8, 12])
@pytest.mark.parametrize(
    "run", [shuffle_by_hand, lambda m, x: m.last(F.channel_shuffle(F.relu(m.a(x)), 2))]
)
def test_channel_shuffle_ties_blocks_and_moves_positions(run, width: int) -> None:
    channels = mapped(run, a=conv(3, width), last=conv(width, 2))
    half = width // 2
    # Positions i and half + i of `a` are index i of both blocks; they land on 2i and 2i + 1.
    assert channels.num_units == half
    for i in (0, half - 1):
        tied = produced("a", i) | produced("a", half + i)
        assert slots(channels, "a", i) == tied | read("last", 2 * i, 2 * i + 1)


def test_squeeze_excite_couples_its_last_layer_with_the_trunk() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        scale = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return m.last(x * scale)

    channels = mapped(run, a=conv(3, 4), down=conv(4, 3), up=conv(3, 4), last=conv(4, 2))
    assert channels.num_units == 7
    assert slots(channels, "a", 2) == (
        produced("a", 2) | produced("up", 2) | read("down", 2) | read("last", 2)
    )
    assert slots(channels, "down", 1) == produced("down", 1) | read("up", 1)


def test_chunk_ties_the_halves_by_position() -> None:
    def run(m, x):
        first, second = m.a(x).chunk(2, 1)
        return m.last(F.relu(first) * torch.sigmoid(second))

    channels = mapped(run, a=conv(3, 6), last=conv(3, 2))
    assert channels.num_units == 3
    assert slots(channels, "a", 1) == produced("a", 1) | produced("a", 4) | read("last", 1)


def test_glu_ties_the_halves_by_position() -> None:
    channels = mapped(lambda m, x: m.last(F.glu(m.a(x), 1)), a=conv(3, 6), last=conv(3, 2))
    assert slots(channels, "a", 2) == produced("a", 2) | produced("a", 5) | read("last", 2)


def test_pixel_shuffle_makes_units_of_r_times_r_channels() -> None:
    channels = mapped(
        lambda m, x: m.last(F.pixel_shuffle(F.relu(m.a(x)), 2)), a=conv(3, 16), last=conv(4, 2)
    )
    assert channels.num_units == 4  # at three, narrow models rehearse width 1, where it is pinned
    block = set().union(*(produced("a", index) for index in (4, 5, 6, 7)))
    assert slots(channels, "a", 4) == block | read("last", 1)


def test_pixel_unshuffle_reads_every_channel_r_times_r_times() -> None:
    channels = mapped(
        lambda m, x: m.last(F.pixel_unshuffle(F.relu(m.a(x)), 2)), a=conv(3, 2), last=conv(8, 2)
    )
    assert slots(channels, "a", 1) == produced("a", 1) | read("last", 4, 5, 6, 7)


def test_unflatten_view_makes_a_unit_of_every_block() -> None:
    def run(m, x):
        return m.last(F.relu(m.fc(x)).view(x.shape[0], -1, 2, 2))

    channels = mapped(run, 2, 5, fc=nn.Linear(5, 12), last=conv(3, 2))
    assert channels.num_units == 3
    block = set().union(*(produced("fc", index) for index in (8, 9, 10, 11)))
    assert slots(channels, "fc", 9) == block | read("last", 2)


def test_a_shared_module_ties_its_inputs_to_its_outputs() -> None:
    def run(m, x):
        x = F.relu(m.stem(x))
        return m.last(F.relu(m.both(F.relu(m.both(x)))))

    channels = mapped(run, stem=conv(3, 4), both=conv(4, 4), last=conv(4, 2))
    assert channels.num_units == 4
    assert slots(channels, "stem", 3) == (
        produced("stem", 3) | produced("both", 3) | read("both", 3) | read("last", 3)
    )


def test_tied_weights_are_one_tensor_under_their_first_name() -> None:
    model = Net(
        lambda m, x: m.last(F.relu(m.a(x)) * F.relu(m.b(x))),
        a=conv(3, 4, bias=False),
        b=conv(3, 4, bias=False),
        last=conv(4, 2),
    )
    model.b.weight = model.a.weight
    model = prepared(model)
    gated = assert_closed_equals_cut(model, image(2, 3, 4, 4))
    channels = gated.channels
    assert slots(channels, "a", 1) == produced("a", 1, bias=False) | read("last", 1)
    pruned = swan.prune(gated)
    assert pruned.a.weight is pruned.b.weight


def test_tied_weights_across_axes_tie_two_widths() -> None:
    """An autoencoder that decodes with its encoder's transposed weight."""
    channels = mapped(
        lambda m, x: m.last(F.relu(F.linear(F.relu(m.enc(F.relu(m.a(x)))), m.enc.weight.t()))),
        2, 3, a=nn.Linear(3, 5), enc=nn.Linear(5, 4), last=nn.Linear(5, 2),
    )  # fmt: skip
    assert slots(channels, "a", 2) == produced("a", 2) | read("enc", 2) | read("last", 2)
    assert slots(channels, "enc", 1) == produced("enc", 1)


def test_transposed_convolution_puts_outputs_on_the_second_axis() -> None:
    channels = mapped(
        lambda m, x: m.last(F.relu(m.up(F.relu(m.a(x))))),
        a=conv(3, 4), up=nn.ConvTranspose2d(4, 3, 2, 2), last=conv(3, 2),
    )  # fmt: skip
    assert slots(channels, "a", 1) == produced("a", 1) | {("up.weight", 0, 1)}
    assert slots(channels, "up", 2) == {("up.weight", 1, 2), ("up.bias", 0, 2)} | read("last", 2)


def test_a_buffer_with_a_channel_axis_goes_along() -> None:
    model = Net(lambda m, x: m.last(m.a(x) * m.scale), a=conv(3, 4), last=conv(4, 2))
    model.register_buffer("scale", torch.rand(1, 4, 1, 1))
    model = prepared(model)
    gated = assert_closed_equals_cut(model, image(2, 3, 4, 4))
    assert slots(gated.channels, "a", 2) == (produced("a", 2) | {("scale", 1, 2)} | read("last", 2))


def test_option_a_padding_couples_at_the_offset_and_pins_the_pad() -> None:
    def run(m, x):
        x = F.relu(m.stem(x))
        return m.last(F.relu(F.pad(x, (0, 0, 0, 0, 1, 1)) + m.b(x)))

    channels = mapped(run, stem=conv(3, 3), b=conv(3, 5), last=conv(5, 2))
    stem, wide = channels.layer("stem").out_units, channels.layer("b").out_units
    assert (wide[0], wide[4]) == (PINNED, PINNED)
    assert wide[1:4] == stem
    assert PINNED not in stem
    assert slots(channels, "stem", 1) == (
        produced("stem", 1) | produced("b", 2) | read("b", 1) | read("last", 2)
    )
    (pin,) = (pin for pin in channels.pins if pin.layer == "b")
    assert pin.channels == (0, 4)
    assert pin.reason == "meets padding of a fixed width"


def test_a_functional_convolution_is_a_layer_under_its_parameter_s_name() -> None:
    model = Net(lambda m, x: m.last(F.relu(F.conv2d(x, m.kernel))), last=conv(4, 2))
    model.kernel = nn.Parameter(torch.randn(4, 3, 1, 1))
    gated = assert_closed_equals_cut(prepared(model), image(2, 3, 4, 4))
    units = gated.channels.layer("kernel").out_units
    assert set(gated.channels.slots(units[1])) == {("kernel", 0, 1)} | read("last", 1)


@pytest.mark.parametrize("name", ["layer", "slots"])
def test_unknown_names_and_units_are_key_errors(name: str) -> None:
    channels = mapped(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=conv(4, 2))
    with pytest.raises(KeyError):
        getattr(channels, name)("nothing")


def test_without_pins_units_and_renumbers_the_rest_in_order() -> None:
    channels = mapped(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 3), b=conv(3, 2), c=conv(2, 2)
    )
    fewer = channels.without([1, 3], "because", "test")
    assert fewer.num_units == 3
    assert fewer.layer("a").out_units == (0, PINNED, 1)
    assert fewer.layer("b").in_units == (0, PINNED, 1)
    assert fewer.layer("b").out_units == (PINNED, 2)
    assert set(fewer.slots(2)) == produced("b", 1) | read("c", 1)
    new = [pin for pin in fewer.pins if pin not in channels.pins]
    assert [(pin.layer, pin.channels, pin.reason, pin.op) for pin in new] == [
        ("a", (1,), "because", "test"),
        ("b", (0,), "because", "test"),
    ]
    assert [term.macs for term in fewer.costs] == [term.macs for term in channels.costs]
    for before, after in zip(channels.costs, fewer.costs, strict=True):
        for old, kept in zip(before.axes, after.axes, strict=True):
            assert sum(old.counts) + old.num_fixed == sum(kept.counts) + kept.num_fixed
    assert channels.num_units == 5


def test_without_nothing_is_the_same_map() -> None:
    channels = mapped(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=conv(4, 2))
    assert channels.without([], "because", "test") == channels


def test_every_field_of_a_map_knows_other_unit_numbers() -> None:
    """A new kind of entry cannot be forgotten: it has `renumbered`, or its field says how."""
    hints = get_type_hints(ChannelMap)
    for own in fields(ChannelMap):
        if "renumbered" not in own.metadata:
            kind, rest = get_args(hints[own.name])
            assert rest is ...
            assert callable(kind.renumbered), own.name


def test_a_new_field_of_entries_is_renumbered_and_one_of_plain_values_refused() -> None:
    @dataclass(frozen=True, repr=False)
    class Wider(ChannelMap):
        swaps: tuple[AttributeWidth | int, ...] = ()

    channels = mapped(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=conv(4, 2))
    plain = {own.name: getattr(channels, own.name) for own in fields(channels)}
    wider = Wider(**plain, swaps=(AttributeWidth("a", "width", None, (0, 1, 2, 3)),))
    without = wider.without([1], "because", "test")
    assert isinstance(without, Wider)
    assert without.swaps == (AttributeWidth("a", "width", None, (0, PINNED, 1, 2)),)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'renumbered'"):
        replace(wider, swaps=(1,)).without([1], "because", "test")


def test_no_entry_keeps_a_unit_that_is_gone() -> None:
    def run(m, x):
        x = m.norm(m.a(x).view(-1, 4, 6).view(-1, 4, m.width))
        return m.b(x)

    net = Net(run, a=nn.Linear(3, 6), norm=nn.LayerNorm(6), b=nn.Linear(6, 2))
    net.width = 6
    channels = swan.channel_map(prepared(net), torch.zeros(2, 4, 3).double())
    for entries in (channels.statistics, channels.attributes, channels.numbers, channels.costs):
        assert any(unit >= 0 for entry in entries for unit in units_in(entry))
    nothing = channels.renumbered({})
    assert nothing.num_units == 0
    assert units_in(nothing) <= {PINNED}


def units_in(entry: object) -> set[int]:
    """Every number in a field that holds units, at any depth."""
    found: set[int] = set()
    for own in fields(entry):
        value = getattr(entry, own.name)
        if own.name in ("units", "in_units", "out_units", "ungated_reads"):
            found |= set(value or ())
        elif isinstance(value, tuple):
            found |= {unit for item in value if is_dataclass(item) for unit in units_in(item)}
    return found
