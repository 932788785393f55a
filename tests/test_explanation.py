"""The explanation of a channel map: who shares gates, what stays and why, what follows."""

import dataclasses
import inspect

import pytest
import torch
import torchvision
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.channels.data.explanation import (
    Coupled,
    FollowingAttribute,
    Pinned,
    WeightedStatistic,
    few,
)
from tests.small_nets import Net, conv
from tests.zoo import ZOO


IMAGE = torch.zeros(2, 3, 8, 8)
TOKENS = torch.zeros(2, 5, 12)


def explained(model: nn.Module, inputs):
    return swan.channel_map(model, inputs).explain()


class Attention(nn.Module):
    """Its heads are an attribute, or a number in its code."""

    def __init__(self, *, literal: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 24), nn.Linear(8, 12)
        self.literal, self.heads = literal, 4

    def forward(self, x: Tensor) -> Tensor:
        heads = 4 if self.literal else self.heads
        q, k, v = self.qkv(x).view(2, 5, 3, heads, 2).permute(2, 0, 3, 1, 4).unbind()
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, *, literal: bool) -> None:
        super().__init__()
        self.stem, self.attn = nn.Linear(12, 12), Attention(literal=literal)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(x + self.attn(x)))


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.renorm(x, 2, 1, 5.0)


def test_counts_are_those_of_the_map_on_the_zoo() -> None:
    for name, build in ZOO.items():
        model, inputs = build()
        channels = swan.channel_map(model, inputs)
        explanation = channels.explain()
        assert [entry.name for entry in explanation.layers] == [la.name for la in channels.layers]
        for entry, layer in zip(explanation.layers, channels.layers, strict=True):
            gated = [unit for unit in layer.out_units if unit != PINNED]
            assert (entry.gated_channels, entry.num_units) == (len(gated), len(set(gated))), name
            stays = sum(pin.num_channels for pin in entry.pinned)
            assert entry.out_channels == entry.gated_channels + stays, name
            for other in entry.coupled:
                partner = set(channels.layer(other.layer).out_units)
                assert other.num_channels == sum(unit in partner for unit in gated), name


def test_a_concat_shares_a_part_of_a_layer_with_each_branch() -> None:
    def run(net, x):
        return net.head(torch.cat([net.one(x), net.two(x)], dim=1) + net.three(x))

    net = Net(run, one=conv(3, 4), two=conv(3, 5), three=conv(3, 9), head=conv(9, 2))
    explanation = explained(net, IMAGE)
    assert explanation.layer("three").coupled == (Coupled("one", 4), Coupled("two", 5))
    assert explanation.layer("one").coupled == (Coupled("three", 4),)
    assert explanation.layer("head").coupled == ()


def test_what_stays_names_operation_module_and_line() -> None:
    net = Net(
        lambda net, x: net.head(net.odd(net.stem(x))),
        stem=conv(3, 6),
        odd=Cumulative(),
        head=conv(6, 2),
    )
    explanation = explained(net, IMAGE)
    (pin,) = explanation.layer("stem").pinned
    lines, first = inspect.getsourcelines(Cumulative)
    number = first + len(lines) - 1
    assert (pin.num_channels, pin.op, pin.module) == (6, "aten.renorm", "odd")
    assert pin.line.endswith(f"test_explanation.py:{number}   return torch.renorm(x, 2, 1, 5.0)")
    assert str(pin) == (
        f"6 stay: an operation without a channel rule (aten.renorm in module 'odd' at {pin.line})"
    )
    assert [(entry.op, entry.module) for entry in explanation.unknown] == [("aten.renorm", "odd")]
    (out,) = explanation.layer("head").pinned
    assert out == Pinned(2, "part of the model's output", "output", "", "")
    assert str(out) == "2 stay: part of the model's output"


def test_ignored_layers_say_so() -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), conv(5, 2))
    explanation = swan.channel_map(model, IMAGE, ignore="2").explain()
    assert "5 stay: listed in ignore=" in str(explanation.layer("2"))
    assert explanation.layer("0").gated_channels == 4


def test_an_attribute_that_follows() -> None:
    explanation = explained(Block(literal=False), TOKENS)
    qkv = explanation.layer("attn.qkv")
    assert (qkv.gated_channels, qkv.num_units) == (24, 4)  # whole heads
    assert qkv.attributes == (FollowingAttribute("attn", "heads", None),)
    assert qkv.numbers == ()
    assert "sets attn.heads" in str(qkv)
    assert explanation.layer("stem").attributes == ()


def test_a_number_in_the_code_that_is_rewritten() -> None:
    explanation = explained(Block(literal=True), TOKENS)
    qkv = explanation.layer("attn.qkv")
    assert qkv.attributes == ()
    (number,) = qkv.numbers
    assert (number.module, number.function, number.call, number.leaf) == ("attn", "view", 1, 4)
    assert "rewrites argument 4 of view() no. 1 in module 'attn'" in str(qkv)
    assert explanation.layer("stem").numbers == ()


def test_a_norm_over_gated_channels_is_weighted() -> None:
    explanation = explained(Block(literal=False), TOKENS)
    assert explanation.layer("stem").statistics == (WeightedStatistic("norm", "layer_norm"),)
    assert explanation.layer("stem").coupled == (Coupled("attn.proj", 12),)
    assert explanation.layer("attn.qkv").statistics == ()
    assert "weighs layer_norm in 'norm'" in str(explanation.layer("stem"))


def test_long_lists_say_how_many_more() -> None:
    assert few([], 3) == ""
    assert few("abc", 3) == "a, b, c"
    assert few("abcd", 3) == "a, b, c and 1 more"
    layers = {f"layer{i}": conv(3, 4) for i in range(16)}

    def run(net, x):
        return net.head(sum(getattr(net, name)(x) for name in layers))

    explanation = explained(Net(run, **layers, head=conv(4, 2)), IMAGE)
    first = explanation.layer("layer0")
    assert len(first.coupled) == 15
    assert "layer1 (4), layer2 (4), layer3 (4) and 12 more" in str(first)


def test_maps_print_in_one_line_however_large() -> None:
    model, inputs = torchvision.models.resnet18(weights=None), torch.zeros(1, 3, 64, 64)
    channels = swan.channel_map(model, inputs)
    for text in (repr(channels), str(channels)):
        assert len(text) < 200
        assert "\n" not in text
        assert "21 layers, 4,800 of 5,800 channels gated by 2,880 units, 1,000 pinned" in text


def test_a_gated_model_explains_itself() -> None:
    gated = swan.swanify(*ZOO["resnet_projection"]())
    assert gated.channels.explain() == gated.channels.explain()
    assert str(gated.channels.explain()).count(" units") == sum(
        layer.gated_channels > 0 for layer in gated.channels.explain().layers
    )


def test_explanations_are_frozen() -> None:
    explanation = explained(Block(literal=False), TOKENS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.layers = ()
    assert hash(explanation.layers) is not None


def test_what_was_said_of_the_same_gates_is_not_repeated() -> None:
    """Only where the gates are the very same: `three` shares with both, and is neither."""

    def run(net, x):
        both = torch.cat([net.one(x), net.two(x)], dim=1)
        return net.head(both + net.three(x)) + net.side(net.one(x) + net.again(x))

    layers = {"one": 4, "two": 5, "three": 9, "again": 4}
    net = Net(
        run,
        **{name: conv(3, width) for name, width in layers.items()},
        head=conv(9, 2),
        side=conv(4, 2),
    )
    explanation = explained(net, IMAGE)
    said = dict(
        zip([layer.name for layer in explanation.layers], explanation.remarks(), strict=True)
    )
    assert said["one"] == ("shares gates with three (4), again (4)",)
    assert said["two"] == ("shares gates with three (5)",)
    assert said["three"] == ("shares gates with one (4), two (5), again (4)",)
    assert said["again"] == ("gates of one",)
    assert said["head"] == ("2 stay: part of the model's output",)
    assert "    gates of one" in str(explanation)


def test_what_no_run_reaches_is_named() -> None:
    """An auxiliary head runs in train mode: that is a run. A branch for large images is none."""

    def run(net, x):
        y = net.aux(net.one(x)) if net.training else net.one(x)
        return net.two(y) if x.shape[-1] < 100 else net.large(y)

    widths = {"one": conv(3, 4), "aux": conv(4, 4), "two": conv(4, 2), "large": conv(4, 2)}
    explanation = explained(Net(run, **widths), IMAGE)
    assert explanation.never_run == ("large",)
    assert "never run on these inputs, kept as they are: large" in str(explanation)
    assert "large" in explanation._repr_html_()
