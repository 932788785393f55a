"""Python integers that repeat a width follow it, and their namesakes by value do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import PINNED, channel_map
from swan_surgery.models.attributes import Attribute, follow_, repeating
from tests.closing import assert_closed_equals_cut, close_, image, prepared
from tests.small_nets import Net, conv


X = (2, 3, 4, 4)


class Sized(nn.Module):
    """`width`, and one element of `shape`, repeat the channels; `side`, `rows` and `flag` do not."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.width, self.side, self.rows = width, side, [side, width + 1]
        self.shape = (width, side, side)
        self.flag = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.width, self.side * self.side)
        return F.relu(x).view(x.shape[0], *self.shape)


def sized(width: int = 6) -> nn.Module:
    return prepared(
        Net(lambda m, x: m.last(m.size(m.a(x))), a=conv(3, width), size=Sized(width, 4), last=conv(width, 2))
    )  # fmt: skip


class TestAttribute:
    def test_read_and_write(self) -> None:
        model = sized()
        for attribute in (Attribute("size", "width"), Attribute("size", "shape", 0)):
            assert attribute.read(model) == 6
            attribute.write_(model, 5)
            assert attribute.read(model) == 5
        assert model.size.shape == (5, 4, 4)
        Attribute("size", "rows", 1).write_(model, 9)
        assert model.size.rows == [4, 9]

    def test_repeating_finds_values_and_elements_of_this_module_and_its_children(self) -> None:
        model = sized()
        found = {Attribute("size", "width"), Attribute("size", "shape", 0)}
        assert set(repeating(model, "size", 6)) == found
        assert set(repeating(model, "", 6)) == found
        assert set(repeating(model, "size", 4)) == {
            Attribute("size", "side"),
            Attribute("size", "rows", 0),
            Attribute("size", "shape", 1),
            Attribute("size", "shape", 2),
        }

    def test_true_is_not_one_and_layers_follow_their_parameters(self) -> None:
        model = sized()
        assert repeating(model, "size", 1) == []
        assert repeating(model, "a", 6) == []
        assert repeating(nn.Sequential(nn.BatchNorm2d(6)), "0", 6) == []

    def test_following_counts_the_labels_that_remain(self) -> None:
        model = sized()
        stays = torch.tensor([True, True, False, True, False, False, True, True])
        follow_(model, {Attribute("size", "width"): torch.tensor([1, 2, 3, 4, 5, 6])}, stays)
        assert model.size.width == 3
        assert model.size.shape == (6, 4, 4)


def test_attributes_follow_in_the_pruned_model_alone() -> None:
    model = sized()
    gated = assert_closed_equals_cut(model, image(*X), shares=(0.2, 0.5, 0.8))
    own = gated.channels
    assert PINNED not in own.layer("a").out_units
    found = {(a.module, a.name, a.index): a.units for a in own.attributes}
    assert found == dict.fromkeys(
        [("size", "width", None), ("size", "shape", 0)], own.layer("a").out_units
    )
    close_(gated, 0, 5)
    small = swan.prune(gated).size
    assert (small.width, small.shape, small.side, small.rows) == (4, (4, 4, 4), 4, [4, 7])
    assert type(small) is Sized
    for untouched in (model.size, gated.model.size):
        assert (untouched.width, untouched.shape) == (6, (6, 4, 4))
    assert swan.unswanify(gated).size.width == 6


def test_a_number_that_is_the_width_by_chance_stays() -> None:
    """Four channels on a side of four: only rehearsal tells them apart."""
    gated = assert_closed_equals_cut(sized(4), image(*X), shares=(0.3, 0.6), seeds=(0, 1, 2))
    assert gated is not None
    close_(gated, 1)
    small = swan.prune(gated).size
    assert (small.width, small.side, small.shape) == (3, 4, (3, 4, 4))


class Heads(nn.Module):
    """Attention that divides its width by the heads, as most reference code does."""

    def __init__(self, *, keeps_scale: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = 3, 4
        self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)
        self.keeps_scale = keeps_scale

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.head_dim**-0.5 if self.keeps_scale else (12 // self.heads) ** -0.5
        out = (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        return self.out(out.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))


@pytest.mark.parametrize("keeps_scale", [True, False])
def test_heads_are_units_and_their_number_follows(keeps_scale: bool) -> None:
    """A scale that is computed from the number of heads must not follow it."""
    model = prepared(
        Net(lambda m, x: m.last(m.attention(m.first(x))), first=nn.Linear(3, 6),
            attention=Heads(keeps_scale=keeps_scale), last=nn.Linear(6, 2))
    )  # fmt: skip
    gated = assert_closed_equals_cut(model, image(2, 5, 3), shares=(0.3, 0.6), seeds=(0, 1, 2))
    heads = tuple(dict.fromkeys(gated.channels.units_on("attention.out.weight", 1)))
    assert len(heads) == 3
    close_(gated, heads[1])
    small = swan.prune(gated).attention
    assert small.heads == 2
    assert small.head_dim == 4
    assert small.qkv.out_features == 24


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_s_own_shape_follows(affine: bool) -> None:
    """By its parameters where it has any; else the rehearsal finds the number."""
    norm = nn.LayerNorm(6, elementwise_affine=affine)
    model = prepared(
        Net(lambda m, x: m.last(m.norm(m.a(x))), a=nn.Linear(3, 6), norm=norm, last=nn.Linear(6, 2))
    )  # fmt: skip
    gated = assert_closed_equals_cut(model, image(4, 3))
    found = [(a.module, a.name, a.index) for a in gated.channels.attributes]
    assert found == ([] if affine else [("norm", "normalized_shape", 0)])
    close_(gated, 2, 3)
    small = swan.prune(gated)
    assert small.norm.normalized_shape == (4,)
    assert type(small.norm) is nn.LayerNorm
    assert not affine or small.norm.weight.shape == (4,)


def test_pinned_channels_count_as_they_stay() -> None:
    """`ignore` pins the first part of the width; the attribute counts all of it."""

    def run(m, x):
        return m.last(m.size(torch.cat((m.a(x), m.b(x)), 1)))

    model = prepared(Net(run, a=conv(3, 2), b=conv(3, 4), size=Sized(6, 4), last=conv(6, 2)))
    gated = swan.swanify(model, image(*X), ignore="a")
    assert gated.channels.num_units == 4
    close_(gated, 0, 3)
    assert swan.prune(gated).size.width == 4
    attributes = channel_map(model, image(*X), ignore="a").without([1], "a test", "none").attributes
    assert {a.units for a in attributes} == {(PINNED, PINNED, 0, PINNED, 1, 2)}
