"""Which numbers in a module's code repeat a width, and what they become."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import PINNED, ChannelMap, channel_map
from swan_surgery.channels.rehearsal.numbers import Place, resize_all_
from tests.closing import assert_closed_equals_cut, close_, image, prepared
from tests.small_nets import Net, conv


X = (2, 3, 4, 4)


def exact(function, width: int = 6, batch: int = 2) -> ChannelMap:
    model = prepared(
        Net(lambda m, x: m.last(function(F.relu(m.a(x)))), a=conv(3, width), last=conv(width, 2))
    )
    x = image(batch, 3, 4, 4)
    assert_closed_equals_cut(model, x, shares=(0.2, 0.5, 0.8))
    return channel_map(model, x)


def places(channels: ChannelMap) -> set[tuple[str, int, int]]:
    return {(n.function, n.number, n.leaf) for n in channels.numbers}


def test_the_leaf_that_is_the_width_is_the_one_that_follows() -> None:
    channels = exact(lambda x: x.view(2, 6, 4, 4))
    assert places(channels) == {("view", 1, 2)}
    assert {n.units for n in channels.numbers} == {(0, 1, 2, 3, 4, 5)}


def test_a_size_that_equals_the_width_by_chance_stays() -> None:
    """Four channels, four rows, four columns."""
    channels = exact(lambda x: x.reshape(-1, 4, 4, 4), 4)
    assert places(channels) == {("reshape", 1, 2)}


def test_free_sizes_need_no_replacement() -> None:
    assert exact(lambda x: x.view(2, -1, 16).view(2, -1, 4, 4)).numbers == ()


def test_two_widths_in_one_call_follow_apart() -> None:
    def run(m, x):
        x = torch.einsum("bchw,bdhw->bcd", F.relu(m.a(x)), torch.sigmoid(m.b(x)))
        return m.last(x.reshape(-1, 4, 5, 1))

    model = prepared(Net(run, a=conv(3, 4), b=conv(3, 5), last=conv(4, 2)))
    assert_closed_equals_cut(model, image(*X))


# The third: pieces as long as the batch has samples.
@pytest.mark.parametrize("batch", [1, 5, 2])
@pytest.mark.parametrize(
    ("split", "units"),
    [
        (lambda x: x.split(2, 1), 2),
        (lambda x: torch.split(x, 3, dim=1), 3),
        (lambda x: x.split([3, 3], dim=1), 3),
        (lambda x: torch.split(x, [2, 2, 2], 1), 2),
        (lambda x: x.split_with_sizes([3, 3], 1), 3),
    ],
    ids=["int", "function", "list", "three", "with sizes"],
)
def test_pieces_of_a_split_follow(split, units: int, batch: int) -> None:
    channels = exact(lambda x: torch.cat([F.silu(part) for part in split(x)][::-1], 1), 6, batch)
    assert channels.num_units == units


@pytest.mark.parametrize(
    ("scale", "value"),
    [
        (lambda x: x * x.shape[1] ** -0.5, 6**-0.5),
        (lambda x: x / x.shape[1], 6),
        (lambda x: x + 1 / x.shape[1], 1 / 6),
        (lambda x: (x.shape[1] / 2) * x, 3.0),
        (lambda x: torch.mul(x, x.shape[1]), 6),
        (lambda x: x.mul(x.shape[1]), 6),
    ],
    ids=["mul", "div", "add", "rmul", "torch.mul", "method"],
)
def test_arithmetic_with_a_width_keeps_its_number(scale, value: float) -> None:
    """The base model's scale was made for its own width: at half of it, it is still that scale."""
    channels = exact(scale)
    assert channels.num_units == 6
    assert channels.numbers
    assert all(n.units is None for n in channels.numbers)
    assert {n.value for n in channels.numbers} == {value}


def test_each_mode_has_its_own_numbers() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        x = x.view(-1, 6, 16).view(-1, 6, 4, 4) if m.training else x.view(-1, 6, 4, 4)
        return m.last(x)

    model = prepared(Net(run, a=conv(3, 6), last=conv(6, 2)))
    gated = assert_closed_equals_cut(model, image(*X))
    by_mode = {
        training: {(n.function, n.number) for n in gated.channels.numbers if n.training == training}
        for training in (True, False)
    }
    assert by_mode == {True: {("view", 1), ("view", 2)}, False: {("view", 1)}}
    close_(gated, 1, 2)
    small = swan.prune(gated)
    assert small.train()(image(*X)).shape == small.eval()(image(*X)).shape == (2, 2, 4, 4)


class Twice(nn.Module):
    """The same code for two branches, its width in it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 6, 16).relu().view(-1, 6, 4, 4)


@pytest.mark.parametrize("ties", [True, False])
def test_a_module_with_one_number_for_two_widths_is_exact_or_pinned(ties: bool) -> None:
    def run(m, x):
        first, second = m.twice(m.a(x)), m.twice(m.b(x))
        return m.last(first + second if ties else torch.cat((first, second), 1))

    model = prepared(
        Net(run, a=conv(3, 6), b=conv(3, 6), twice=Twice(), last=conv(6 if ties else 12, 2))
    )  # fmt: skip
    assert_closed_equals_cut(model, image(*X), shares=(0.2, 0.5, 0.8), seeds=(0, 1, 2))
    channels = channel_map(model, image(*X))
    units = channels.layer("a").out_units
    assert units == (tuple(range(6)) if ties else (PINNED,) * 6)


class Literal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x.view(-1, 6, 4, 4))


def test_a_number_belongs_to_the_module_whose_code_it_stands_in() -> None:
    model = prepared(
        Net(lambda m, x: m.last(m.literal(m.a(x))), a=conv(3, 6), literal=Literal(), last=conv(6, 2))
    )  # fmt: skip
    gated = assert_closed_equals_cut(model, image(*X))
    assert {n.module for n in gated.channels.numbers} == {"literal"}
    close_(gated, 0)
    small = swan.prune(gated)
    assert type(small) is Net
    assert isinstance(small.literal, Literal)
    assert type(model.literal) is type(gated.model.literal) is Literal


def test_replacing_on_a_copy_counts_what_stays_and_padding_not() -> None:
    model = nn.Sequential(Literal()).eval()
    stays = torch.tensor([False, True, False, True, True, False, True])
    labels = torch.tensor([1, 2, 3, 4, -1, 6])  # -1: filled with a constant
    resize_all_(model, {Place("0", "view", 1, 2, training=False): labels}, stays)
    assert model(torch.zeros(2, 4, 4, 4)).shape == (2, 4, 4, 4)
    assert model.train()(torch.zeros(2, 6, 4, 4)).shape == (2, 6, 4, 4)


def test_heads_of_width_one_that_come_right_by_chance_are_seen_through() -> None:
    # 3 // 2 heads are 1, as 3 // 3 are, so one head less looks fine; with one head left 3 // 1 is 3.
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave, self.num_heads = nn.Linear(3, 3), nn.Linear(3, 3), 3

        def forward(self, x: Tensor) -> Tensor:
            size = (-1, self.num_heads, x.shape[1] // self.num_heads)
            return self.leave(self.enter(x).reshape(size).flatten(1)).softmax(1)

    torch.manual_seed(0)
    model = Pool().double()
    gated = swan.swanify(model, torch.randn(2, 3, dtype=torch.float64))
    assert gated.gates.num_units == 3
    for count in (1, 2):
        with torch.no_grad():
            gated.gates.logits.copy_(torch.tensor([3.0] * count + [-3.0] * (3 - count)))
        small = swan.prune(gated)  # verified
        assert small.enter.out_features == count
