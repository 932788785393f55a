"""Constants made on the spot meet channels: what is the same for every channel gates, what is not pins."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_channel_map_pins import between, pins_of


def ones(x: Tensor, *shape: int) -> Tensor:
    return x.new_ones(*(shape or (x.shape[1],)))


def along_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def with_slice_set(values: Tensor) -> Tensor:
    values[:2] = 3
    return values


def with_slice_zeroed(values: Tensor) -> Tensor:
    values[1:].zero_()
    return values


def with_sibling_set(values: Tensor) -> Tensor:
    other = values.view(-1)
    values[:2] = 3
    return other


def at_zero(x, count):
    return torch.zeros(count, dtype=torch.int64, device=x.device)


def degrees(x):
    """How many rows came together: the same for every channel."""
    count = torch.zeros(2, x.shape[1]).to(x).index_add(0, at_zero(x, 3), ones(x, 3, x.shape[1]))
    return along_channels(count[0])


# The values differ from channel to channel: position i would count for another channel after a cut.
VARYING = {
    "cumsum": lambda x: ones(x).cumsum(0),
    "cumprod": lambda x: (2 * ones(x)).cumprod(0),
    "cumsum in place": lambda x: ones(x).cumsum_(0),
    "logcumsumexp": lambda x: ones(x).logcumsumexp(0),
    "cummax": lambda x: ones(x).cummax(0)[1],
    "cummin": lambda x: ones(x).cummin(0)[1],
    "buckets of what differs": lambda x: torch.bucketize(ones(x).cumsum(0), ones(x, 3)),
    "sort": lambda x: ones(x).sort()[1],
    "index_add": lambda x: ones(x).index_add(0, at_zero(x, 1), ones(x, 1)),
    "gather": lambda x: ones(x).cumsum(0).gather(0, at_zero(x, x.shape[1])),
    "topk": lambda x: ones(x).topk(x.shape[1])[1],
    "tril": lambda x: torch.tril(ones(x, x.shape[1], x.shape[1])).sum(0),
    "pad": lambda x: F.pad(ones(x, x.shape[1] - 1), (0, 1)),
    "concat": lambda x: torch.cat([ones(x, x.shape[1] - 1), x.new_zeros(1)]),
    "slice set": lambda x: with_slice_set(ones(x)),
    "slice zeroed": lambda x: with_slice_zeroed(ones(x)),
    "sibling set": lambda x: with_sibling_set(ones(x)),
    "scatter_": lambda x: ones(x).scatter_(0, torch.zeros(1, dtype=torch.int64, device=x.device), 5.0),
    "index_fill": lambda x: ones(x).index_fill(0, torch.zeros(1, dtype=torch.int64, device=x.device), 5.0),
    "one_hot": lambda x: F.one_hot(torch.zeros((), dtype=torch.int64), x.shape[1]).to(x.device),
    "average with a border": lambda x: F.avg_pool1d(ones(x, 1, 1, x.shape[1]), 3, 1, 1),
}  # fmt: skip

# Of equal values these tell how many there are: as many as channels, which the cut changes.
COUNTING = {
    "sum": lambda x: ones(x).sum(),
    "prod": lambda x: (2 * ones(x)).prod(),
    "norm": lambda x: ones(x).norm(),
    "softmax": lambda x: along_channels(ones(x).softmax(0)),
    "logsumexp": lambda x: ones(x).logsumexp(0),
    "count_nonzero": lambda x: ones(x).count_nonzero(),
    "dot": lambda x: torch.dot(ones(x), ones(x)),
    "matmul": lambda x: (ones(x, 1, x.shape[1]) @ ones(x, x.shape[1], 1)).view(1, 1, 1, 1),
    "einsum": lambda x: torch.einsum("i,i->", ones(x), ones(x)),
    "normalize": lambda x: along_channels(F.normalize(ones(x), dim=0)),
    "trace, which has no rule": lambda x: ones(x, x.shape[1], x.shape[1]).trace(),
    "boundaries": lambda x: 1 + torch.bucketize(2 * ones(x, 1), ones(x)),
    "boundaries of a number": lambda x: 1 + torch.bucketize(2.0, ones(x)),
    "rows added up": lambda x: ones(x, 1).index_add(0, at_zero(x, x.shape[1]), ones(x)).sum(),
    "rows scattered": lambda x: ones(x, 1).scatter_add(0, at_zero(x, x.shape[1]), ones(x)).sum(),
    "sum of a detached copy": lambda x: ones(x).detach().sum(),
}

# The same for every channel, however many there are.
EQUAL = {
    "mean": lambda x: ones(x).mean(),
    "amax": lambda x: along_channels(ones(x) * ones(x).amax()),
    "outer": lambda x: along_channels(torch.outer(ones(x), ones(x))[0]),
    "filled": lambda x: along_channels(torch.empty(x.shape[1]).fill_(2.0).to(x)),
    "all set through a view": lambda x: along_channels(ones(x).view(-1).fill_(3.0)),
    "spatial sum": lambda x: ones(x, *x.shape[2:]).sum(),
    "rows added up beside the channels": degrees,
    "spatial ramp": lambda x: ones(x, x.shape[3]).cumsum(0),
}


@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize("name", VARYING)
def test_what_differs_by_position_pins(name: str, width: int) -> None:
    channels = between(lambda x: x * along_channels(VARYING[name](x)), width)
    assert sum(len(pin.channels) for pin in pins_of(channels, "a")) == width


@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize("name", COUNTING)
def test_what_counts_the_channels_pins(name: str, width: int) -> None:
    channels = between(lambda x: x / COUNTING[name](x), width)
    assert sum(len(pin.channels) for pin in pins_of(channels, "a")) == width


@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize("name", EQUAL)
def test_what_is_equal_everywhere_gates(name: str, width: int) -> None:
    channels = between(lambda x: x * EQUAL[name](x), width)
    assert not pins_of(channels, "a")
