"""Traps that no label shows: Python code that repeats a width. Each is exact or pinned, never wrong."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import PINNED, ChannelMap
from swan_surgery.channels.rehearsal import settling
from swan_surgery.channels.rehearsal.rehearsing import Prediction, RehearsalMode
from tests.closing import (
    assert_closed_equals_cut,
    close_random_,
    gated_by,
    image,
    outputs,
    prepared,
)
from tests.random_attention import Attention
from tests.small_nets import Net, conv


class Trap(nn.Module):
    """Convolution `a`, the trap, convolution `last`."""

    def __init__(self, function, width: int, out: int, kernel: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 1)
        self.function = function
        self.width = width
        self.last = nn.Conv2d(out, 3, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, F.relu(self.a(x))))


def half_slice(_: nn.Module, x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


def swapped_halves(_: nn.Module, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat((x[:, half:], x[:, :half]), 1)


def gated_halves(_: nn.Module, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * torch.sigmoid(x[:, half:])


def quarter(_: nn.Module, x: Tensor) -> Tensor:
    """Partial convolution's split: a quarter is treated, the rest passes."""
    quarter = x.shape[1] // 4
    return torch.cat((F.silu(x[:, :quarter]), x[:, quarter:]), 1)


def every_second(_: nn.Module, x: Tensor) -> Tensor:
    return x[:, ::2] + x[:, 1::2]


def flipped(_: nn.Module, x: Tensor) -> Tensor:
    return x + x.flip(1)


def rolled(_: nn.Module, x: Tensor) -> Tensor:
    return x + x.roll(1, 1)


def neighbour(_: nn.Module, x: Tensor) -> Tensor:
    return x[:, 1:] - x[:, :-1]


def view_attribute(m: nn.Module, x: Tensor) -> Tensor:
    return x.view(x.shape[0], m.width, -1).relu().view(x.shape)


def width_in_arithmetic(m: nn.Module, x: Tensor) -> Tensor:
    return x / m.width


def width_of_the_tensor_in_arithmetic(_: nn.Module, x: Tensor) -> Tensor:
    return x / x.shape[1]


def branch_on_width(_: nn.Module, x: Tensor) -> Tensor:
    return x.sigmoid() if x.shape[1] == 8 else x.tanh()


def branch_on_parity(_: nn.Module, x: Tensor) -> Tensor:
    return torch.cat((x, x), 1) if x.shape[1] % 2 == 0 else torch.cat((x, -x), 1)


def assertion(_: nn.Module, x: Tensor) -> Tensor:
    assert x.shape[1] == 8, "eight channels"
    return x


def assertion_on_divisibility(_: nn.Module, x: Tensor) -> Tensor:
    assert x.shape[1] % 4 == 0, "a multiple of four"
    return x


def squeeze_all(_: nn.Module, x: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(x, 1).squeeze()
    return x * torch.sigmoid(pooled)[:, :, None, None]


def split_literal(_: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([part.relu() for part in x.split(4, 1)][::-1], 1)


def split_by_width(_: nn.Module, x: Tensor) -> Tensor:
    first, second = x.split(x.shape[1] // 2, 1)
    return torch.cat((second, first), 1)


def chunk_three(_: nn.Module, x: Tensor) -> Tensor:
    """8 channels in 3 chunks: 3, 3, 2."""
    return torch.cat(x.chunk(3, 1)[::-1], 1)


def view_literal(_: nn.Module, x: Tensor) -> Tensor:
    return x.view(-1, 8, 4, 4)


def view_groups_literal(_: nn.Module, x: Tensor) -> Tensor:
    return x.view(x.shape[0], 2, 4, 4, 4).flip(1).reshape(x.shape[0], 8, 4, 4)


def view_channels_to_batch(_: nn.Module, x: Tensor) -> Tensor:
    return x.view(-1, 2, 4, 4).relu().view(x.shape)


def transposed_square(_: nn.Module, x: Tensor) -> Tensor:
    """Width 16 = 4 x 4 pixels: swapping both axes fits by chance."""
    return x.flatten(2).transpose(1, 2).reshape(x.shape)


def group_norm_literal(_: nn.Module, x: Tensor) -> Tensor:
    return F.group_norm(x, 2)


def index_list(_: nn.Module, x: Tensor) -> Tensor:
    return x[:, [1, 0, 3, 2, 5, 4, 7, 6]]


def last_channel(_: nn.Module, x: Tensor) -> Tensor:
    return x * x[:, -1:].sigmoid()


def all_but_the_last(_: nn.Module, x: Tensor) -> Tensor:
    return x[:, :-1]


def loop_over_channels(_: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x[:, i : i + 1] * (i + 1) for i in range(x.shape[1])], 1)


def stack_of_channels(_: nn.Module, x: Tensor) -> Tensor:
    return torch.stack(list(x.unbind(1)), 1)


def padded_to_ten(_: nn.Module, x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, 10 - x.shape[1]))


def written_into_zeros(_: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 10, 4, 4, dtype=x.dtype, device=x.device)
    out[:, : x.shape[1]] = x
    return out


def interpolated_along_channels(_: nn.Module, x: Tensor) -> Tensor:
    wide = F.interpolate(x.flatten(2).transpose(1, 2), scale_factor=2.0)
    return wide.transpose(1, 2).reshape(x.shape[0], -1, 4, 4)


def attention_over_channels(_: nn.Module, x: Tensor) -> Tensor:
    """ECA: a convolution that slides over the channels."""
    pooled = x.mean((2, 3))[:, None]
    weight = x.new_full((1, 1, 3), 0.3)
    return x * torch.sigmoid(F.conv1d(pooled, weight, padding=1)).transpose(1, 2)[..., None]


# name: width of `a`, width that `last` reads
TRAPS = {
    half_slice: (8, 4),
    swapped_halves: (8, 8),
    gated_halves: (8, 4),
    quarter: (8, 8),
    every_second: (8, 4),
    flipped: (8, 8),
    rolled: (8, 8),
    neighbour: (8, 7),
    view_attribute: (8, 8),
    width_in_arithmetic: (8, 8),
    width_of_the_tensor_in_arithmetic: (8, 8),
    branch_on_width: (8, 8),
    branch_on_parity: (8, 16),
    assertion: (8, 8),
    assertion_on_divisibility: (8, 8),
    squeeze_all: (8, 8),
    split_literal: (8, 8),
    split_by_width: (8, 8),
    chunk_three: (8, 8),
    view_literal: (8, 8),
    view_groups_literal: (8, 8),
    view_channels_to_batch: (8, 8),
    transposed_square: (16, 16),
    group_norm_literal: (8, 8),
    index_list: (8, 8),
    last_channel: (8, 8),
    all_but_the_last: (8, 7),
    loop_over_channels: (8, 8),
    stack_of_channels: (8, 8),
    padded_to_ten: (8, 10),
    written_into_zeros: (8, 10),
    interpolated_along_channels: (8, 16),
    attention_over_channels: (8, 8),
}
# What the code repeats cannot follow: no channel of `a` may be gated.
HOPELESS = (
    branch_on_width, assertion, index_list, interpolated_along_channels, attention_over_channels,
)  # fmt: skip
# What the code repeats is replaced: the units of `a`, and what follows them.
REPEATED = {
    view_attribute: (8, {("", "width")}, set()),
    view_literal: (8, set(), {("view", 1)}),
    view_groups_literal: (4, set(), {("view", 1), ("reshape", 1)}),
    split_literal: (4, set(), {("split", 1)}),
    group_norm_literal: (4, set(), set()),
    width_of_the_tensor_in_arithmetic: (8, set(), {("div", 1)}),
}


@functools.cache
def map_of(trap) -> tuple[nn.Module, Tensor, ChannelMap]:
    model = prepared(Trap(trap, *TRAPS[trap]))
    x = image(2, 3, 4, 4)
    return model, x, swan.channel_map(model, x)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_a_trap_is_exact_or_pinned(trap) -> None:
    model, x, channels = map_of(trap)
    if not channels.num_units:
        assert all(pin.reason and pin.op for pin in channels.pins)
        return
    try:
        gated = gated_by(channels, model, x)
    except (swan.TraceError, swan.NoGateableChannelsError):
        return  # torch.fx cannot follow a loop over channels, and says so
    for share in (0.2, 0.5, 0.8):
        for seed in range(3):
            close_random_(gated, share, seed)
            swan.prune(gated, verify=True)


@pytest.mark.parametrize("trap", HOPELESS, ids=lambda trap: trap.__name__)
def test_a_repeated_width_pins_all_channels(trap) -> None:
    _, _, channels = map_of(trap)
    assert channels.layer("a").out_units == (PINNED,) * 8


@pytest.mark.parametrize("trap", REPEATED, ids=lambda trap: trap.__name__)
def test_a_repeated_width_follows_the_channels(trap) -> None:
    units, attributes, numbers = REPEATED[trap]
    model, x, channels = map_of(trap)
    assert channels.num_units == units
    assert PINNED not in channels.layer("a").out_units
    # `width` follows where nothing reads it, too: another method might.
    unread = {("", "width")}
    assert {(a.module, a.name) for a in channels.attributes} | unread == attributes | unread
    assert {(n.function, n.number) for n in channels.numbers} == numbers
    gated = assert_closed_equals_cut(
        model, x, shares=(0.2, 0.5, 0.8), seeds=(0, 1, 2), channels=channels
    )
    assert gated is not None
    assert gated.channels.num_units == units


@pytest.mark.parametrize(
    ("trap", "units"),
    [
        (swapped_halves, 4),
        (gated_halves, 4),
        (split_by_width, 4),
        (half_slice, 4),
        (width_in_arithmetic, 8),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_follows_the_width_is_gated(trap, units: int) -> None:
    assert map_of(trap)[2].num_units == units


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_a_squeeze_of_everything_is_safe_at_every_width(width: int) -> None:
    """A width of one would be squeezed away; the batch here has two samples."""
    model = prepared(Net(
        lambda m, x: m.last(F.relu(m.a(x)).mean((2, 3)).squeeze()),
        a=conv(3, width), last=nn.Linear(width, 3),
    ))  # fmt: skip
    x = image(2, 3, 4, 4)
    channels = swan.channel_map(model, x)
    if not channels.num_units:
        return
    gated = gated_by(channels, model, x)
    for seed in range(6):
        close_random_(gated, 0.9, seed)
        swan.prune(gated, verify=True)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_view_whose_factors_could_be_mistaken_for_each_other(size: int) -> None:
    """Channels, height and width all of one size: only labels tell them apart."""
    model = prepared(Net(
        lambda m, x: m.last(F.relu(m.a(x)).permute(0, 3, 1, 2).reshape(x.shape[0], -1)),
        a=conv(3, size), last=nn.Linear(size**3, 3),
    ))  # fmt: skip
    x = image(2, 3, size, size)
    channels = swan.channel_map(model, x)
    if not channels.num_units:
        return
    gated = gated_by(channels, model, x)
    for seed in range(4):
        close_random_(gated, 0.5, seed)
        swan.prune(gated, verify=True)


def test_a_trap_in_train_mode_alone_is_found() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        if m.training:
            x = x.view(-1, 8, 4, 4)
        return m.last(x)

    model = prepared(Net(run, a=conv(3, 8), last=conv(8, 2)))
    channels = swan.channel_map(model, image(2, 3, 4, 4))
    assert channels.num_units == 8
    assert {n.training for n in channels.numbers} == {True}
    gated = gated_by(channels, model, image(2, 3, 4, 4))
    close_random_(gated, 0.5, 0)
    small = swan.prune(gated).train()
    (got,), (wanted,) = (outputs(m, image(2, 3, 4, 4)) for m in (gated.train(), small))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_a_hopeless_trap_in_train_mode_alone_pins() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        return m.last(x[:, [1, 0, 3, 2, 5, 4, 7, 6]] if m.training else x)

    model = Net(run, a=conv(3, 8), last=conv(8, 2)).eval()
    channels = swan.channel_map(model, torch.zeros(2, 3, 4, 4))
    assert channels.layer("a").out_units == (PINNED,) * 8


def test_one_trap_does_not_pin_the_rest_of_the_network() -> None:
    def run(m, x):
        x = F.relu(m.b(F.relu(m.a(x))))
        return m.last(F.relu(m.c(x[:, [1, 0, 3, 2, 5, 4, 7, 6]])))

    model = prepared(Net(run, a=conv(3, 4), b=conv(4, 8), c=conv(8, 5), last=conv(5, 2)))
    channels = swan.channel_map(model, image(2, 3, 4, 4))
    assert PINNED not in channels.layer("a").out_units
    assert PINNED not in channels.layer("c").out_units
    assert channels.layer("b").out_units == (PINNED,) * 8


@pytest.mark.timeout(60)
def test_axes_of_two_that_stay_anyhow_do_not_keep_a_map_from_settling() -> None:
    """Heads of two: what met at the halves of a rotation was blamed, and it was pinned already."""
    attention = Attention(
        4, 3, 2, 5, projection="llama", qk_norm="llama", rotary="half", bias=False
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), attention, nn.Linear(4, 2))
    assert assert_closed_equals_cut(prepared(model), image(2, 5, 3)) is not None


def test_what_never_settles_is_pinned_in_the_end(monkeypatch) -> None:
    """A fault in a rule or an answer must not hang a program."""
    monkeypatch.setattr(settling, "_MAX_SETTLING", 0)
    monkeypatch.setattr(settling, "_follows_by_code", lambda *_: False)
    monkeypatch.setattr(settling, "_answer", lambda *_: True)
    model = Net(lambda m, x: m.b(m.a(x).view(-1, 8)), a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    channels = swan.channel_map(prepared(model), image(2, 3))
    assert set(channels.layer("a").out_units) == {PINNED}
    assert "never settled" in str(channels.explain())


def test_only_channels_that_always_stay_may_lose_their_labels() -> None:
    # By unit + 1: nothing, pinned, unit 0, unit 1; the second unit always stays.
    prunable = torch.tensor([False, False, True, False])
    prediction = Prediction(torch.arange(-1, 3), torch.ones(4, dtype=torch.bool), prunable)
    mode = RehearsalMode([], prediction)
    wanted = torch.tensor([1, 2])
    assert mode._agree(wanted, wanted)
    assert mode._agree(torch.tensor([1, 0]), wanted)
    assert not mode._agree(torch.tensor([0, 2]), wanted)
    assert not mode._agree(torch.tensor([2, 1]), wanted)
