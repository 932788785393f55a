"""Code that raises, or fills a cache: who is to blame follows or is pinned, and nothing else is."""

import random
from math import gcd
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.channels.labels.makers import Makers
from swan_surgery.channels.rehearsal.closing_patterns import (
    _close_to_coprime_,
    _close_to_half_,
    closing_pattern,
)
from swan_surgery.channels.rehearsal.failures import Diverged, failure_of
from swan_surgery.channels.solving.mapping import record, start_labels
from swan_surgery.models import as_inputs, shell_of
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.small_nets import Net, PairNet, conv


X = (2, 3, 5, 5)


class Down(nn.Module):
    """A convolution that checks its width first, as diffusion models do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.unused, self.channels = channels, channels
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.conv(x)


class Parent(nn.Module):
    """Checks the width of what its child gets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim = width
        self.child = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(x)
        if x.size(1) != self.dim:
            raise ValueError(f"want {self.dim}")
        return self.child(out)


class Literal(nn.Module):
    """A number that nothing says."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        if x.shape[1] != 7:
            raise KeyError("seven")
        return y


def trunk(inner: nn.Module, width: int) -> nn.Module:
    return prepared(
        Net(
            lambda m, x: m.last(torch.relu(m.c(m.inner(torch.relu(m.b(torch.relu(m.a(x)))))))),
            a=conv(3, 5), b=conv(5, width), inner=inner, c=conv(width, 6), last=conv(6, 2),
        )
    )  # fmt: skip


@pytest.mark.parametrize(("inner", "name"), [(Down(8), "channels"), (Parent(8), "dim")])
def test_a_width_that_is_checked_in_front_follows(inner: nn.Module, name: str) -> None:
    gated = assert_closed_equals_cut(trunk(inner, 8), image(*X))
    assert gated is not None
    assert all(PINNED not in layer.out_units for layer in gated.channels.layers[:-1])
    followers = {(a.module, a.name) for a in gated.channels.attributes}
    assert followers == {("inner", name)}


def test_several_modules_that_check_follow_and_each_once() -> None:
    inner = nn.Sequential(*(Down(8) for _ in range(4)))
    gated = assert_closed_equals_cut(trunk(inner, 8), image(*X))
    assert gated is not None
    assert {a.module for a in gated.channels.attributes} == {f"inner.{i}" for i in range(4)}


def test_what_cannot_follow_pins_its_own_channels_and_says_where() -> None:
    gated = assert_closed_equals_cut(trunk(Literal(), 7), image(*X))
    assert gated is not None
    channels = gated.channels
    assert channels.layer("b").out_units == (PINNED,) * 7
    assert PINNED not in channels.layer("a").out_units
    assert PINNED not in channels.layer("c").out_units
    (pin,) = [pin for pin in channels.pins if pin.layer == "b"]
    assert pin.module == "inner"
    assert pin.reason.startswith("the code refuses another width (KeyError at ")
    assert 'raise KeyError("seven")' in pin.reason


@pytest.mark.parametrize("first", [True, False])
def test_the_input_size_of_a_recurrent_layer_follows(first: bool) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = torch.relu(m.a(x)).flatten(2).transpose(1, 2)
        return m.last(m.rnn(x if first else x.transpose(0, 1))[0])

    rnn = nn.LSTM(8, 4, batch_first=first)
    model = prepared(Net(run, a=conv(3, 8), rnn=rnn, last=nn.Linear(4, 2)))
    gated = assert_closed_equals_cut(model, image(*X))
    assert gated is not None
    assert PINNED not in gated.channels.layer("a").out_units


def test_the_number_of_groups_follows_where_each_holds_one_channel() -> None:
    norm = nn.GroupNorm(8, 8)
    gated = assert_closed_equals_cut(trunk(norm, 8), image(*X))
    assert gated is not None
    assert len(set(gated.channels.layer("b").out_units)) == 8
    assert [(a.module, a.name) for a in gated.channels.attributes] == [("inner", "num_groups")]


class Cached(nn.Module):
    """Makes a grid of positions in its first run, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.grid, self.shape = torch.empty(0), None

    def forward(self, x: Tensor) -> Tensor:
        if self.shape != x.shape[2:]:
            self.grid = x.new_ones(1, 1, *x.shape[2:]).cumsum(2).cumsum(3)
            self.shape = x.shape[2:]
        return x * self.grid


def test_a_cache_that_a_first_run_fills_is_the_same_in_every_run() -> None:
    """Attention with heads is run three times before it counts as recorded."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.cached(torch.relu(m.a(x))).flatten(2).transpose(1, 2)
        q, k, v = (f(x).view(2, -1, 4, 3).transpose(1, 2) for f in (m.q, m.k, m.v))
        out = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return m.last(out.transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(6, 12) for name in "qkv"}
    model = Net(run, a=conv(3, 6), cached=Cached(), last=nn.Linear(12, 2), **layers)
    labelled = start_labels(shell_of(model))
    inputs = as_inputs(torch.zeros(X)).on_meta()
    recorded = [
        record(lambda: shell_of(model), inputs, labelled, training=training)
        for training in (False, True)
    ]
    for recording in recorded:
        assert sum(op.packet == "aten.cumsum" for op in recording.ops) == 2
    gated = assert_closed_equals_cut(prepared(model), image(*X))
    assert gated is not None
    assert PINNED not in gated.channels.layer("a").out_units


class Dropped(nn.Module):
    """Now and then its layer does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(torch.relu(x)) if not self.training or random.random() < 0.5 else x  # noqa: S311


def test_paths_that_python_draws_are_the_same_in_every_run() -> None:
    model = Net(
        lambda m, x: m.last(m.inner(torch.relu(m.a(x)))),
        a=conv(3, 6), inner=nn.Sequential(*(Dropped() for _ in range(6))), last=conv(6, 2),
    )  # fmt: skip
    before = random.getstate()
    channels = swan.channel_map(model, torch.zeros(X))
    assert random.getstate() == before
    assert PINNED not in channels.layer("a").out_units


@pytest.mark.parametrize("in_place", [True, False])
def test_a_table_kept_as_a_plain_attribute_is_cut_like_a_buffer(in_place: bool) -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.randn(25, 6, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            if in_place:
                x += self.table.to(x)
                return x
            return x + self.table

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(F.gelu(m.added(m.a(x.flatten(2).transpose(1, 2)))))

    model = prepared(Net(run, a=nn.Linear(3, 6), added=Added(), last=nn.Linear(6, 2)))
    gated = assert_closed_equals_cut(model, image(*X))
    assert gated is not None
    assert PINNED not in gated.channels.layer("a").out_units
    with torch.no_grad():
        gated.gates.logits.fill_(3.0)
        gated.gates.logits[1] = -3.0
    small = swan.prune(gated)
    assert small.added.table.shape == (25, 5)
    assert model.added.table.shape == (25, 6)


def test_positions_of_a_table_that_always_stay_pin_nothing_else() -> None:
    """A relative shift, as of Transformer-XL: positions of a buffer pass a pad and a view."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.i(x)
        batch, length, _ = x.shape
        table = m.table[:length].repeat(batch, 1, 1)
        q, k, v, p = (
            f(y).view(batch, length, 4, 2).transpose(1, 2)
            for f, y in ((m.q, x), (m.k, x), (m.v, x), (m.p, table))
        )
        r = q @ p.transpose(2, 3)
        heads = r.shape[1]
        r = torch.cat([r.new_zeros(batch, heads, length, 1), r], -1)
        r = r.view(batch, heads, length + 1, length)[:, :, 1:].reshape(batch, heads, length, -1)
        out = ((q @ k.transpose(2, 3) + r).softmax(-1) @ v).transpose(1, 2)
        return m.o(out.reshape(batch, length, -1))

    layers = {name: nn.Linear(8, 8) for name in "qkvp"}
    model = Net(run, i=nn.Linear(3, 8), o=nn.Linear(8, 2), **layers)
    model.register_buffer("table", torch.randn(9, 8))
    gated = assert_closed_equals_cut(prepared(model), image(2, 5, 3))
    assert gated is not None
    assert PINNED not in gated.channels.layer("q").out_units


def test_even_turns_close_to_numbers_without_a_common_factor() -> None:
    for full in range(3, 40):
        for kept in range(2, full + 1):
            stays = np.arange(full) < kept
            _close_to_coprime_(stays, np.arange(full), 2)
            left = int(stays.sum())
            if kept == full:
                assert left == full
                continue
            fits = [n for n in range(2, kept + 1) if gcd(n, full) == 1]
            assert left == max(fits, default=kept)


def test_a_failure_is_blamed_on_the_innermost_module_and_the_tensors_it_holds() -> None:
    makers = Makers()
    mine, other = torch.zeros(2), torch.zeros(2)
    makers.note((mine, other), 3)

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise OverflowError(x.shape)

    model = PairNet(lambda m, x, _unrelated: m.inner(x), inner=Inner())
    names = {id(module): name for name, module in model.named_modules()}
    with pytest.raises(OverflowError) as caught:
        model(mine, other)
    found = failure_of(caught.value, 4, names=names, makers=makers)
    assert found.index == 4
    assert found.raised is not None
    assert (found.raised.module, found.raised.error) == ("inner", "OverflowError")
    assert "raise OverflowError(x.shape)" in found.raised.line
    assert found.raised.at_hand == (((3, 0),),)
    assert failure_of(Diverged(2), 4, names=names, makers=makers).index == 2


def in_fours(x: Tensor) -> Tensor:
    """What einops does with a number that stands in the code."""
    if x.shape[1] % 4:
        raise KeyError("not in fours")
    return x


class Fours(nn.Module):
    """Its forward holds the stream while a function refuses what one of its layers made of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.back = conv(width, 12), conv(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(in_fours(self.inside(x)))


def test_what_a_function_refuses_pins_what_it_was_given_and_not_all_that_its_caller_holds() -> None:
    gated = assert_closed_equals_cut(trunk(Fours(7), 7), image(*X))
    assert gated is not None
    assert gated.channels.layer("inner.inside").out_units == (PINNED,) * 12
    assert PINNED not in gated.channels.layer("inner.back").out_units


@pytest.mark.parametrize(
    ("members", "kept", "least", "left"), [(4, 3, 2, 2), (5, 4, 2, 2), (3, 3, 2, 2), (8, 1, 2, 1)]
)
def test_half_of_a_kind_stays_at_most(members, kept, least, left) -> None:
    """With three of four heads of two channels, `8 // heads` is two, as with all."""
    stays = np.zeros(members, bool)
    stays[:kept] = True
    _close_to_half_(stays, np.arange(members), least)
    assert stays.sum() == left


@pytest.mark.parametrize("pair", [(2, 3), (16, 17)])
def test_two_turns_show_every_kind_by_half(pair) -> None:
    """`pair`: with many kinds, which chance alone would not close so far."""
    sizes = (4, 4, 8) * 6
    solution = solution_of_kinds(sizes)
    kept = [
        np.add.reduceat(closing_pattern(solution, turn, 2), np.cumsum((0, *sizes[:-1])))
        for turn in pair
    ]
    if pair[0] == 2:
        assert (np.minimum(*kept) <= np.array(sizes) // 2).all()
    else:  # each turn closes those whose rank has one bit, and no others
        assert all(((own <= np.array(sizes) // 2) | (own == sizes)).all() for own in kept)


def solution_of_kinds(sizes):
    """What a closing pattern looks at, of axes that share nothing."""
    starts = np.cumsum((0, *sizes[:-1])).tolist()
    labelled = SimpleNamespace(axes=[(f"w{i}", 0, n) for i, n in enumerate(sizes)], starts=starts)
    count = sum(sizes)
    return SimpleNamespace(
        prunable=np.ones(count, bool), component=np.arange(count), labelled=labelled
    )
