"""Rows added, written or read at positions: graph networks, mixtures of experts, point clouds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.closing_costs import assert_cost_is_exact
from tests.small_nets import PairNet


TO = torch.tensor([0, 1, 1, 2, 4])


def wide(index: Tensor, like: Tensor) -> Tensor:
    return index[:, None].expand(-1, like.shape[1])


def added(h: Tensor, m: Tensor, to: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(0, to, m)


def averaged(h: Tensor, m: Tensor, to: Tensor) -> Tensor:
    """As graph networks do: sums of messages by the number of them."""
    count = h.new_zeros(len(h), 1).index_add_(0, to, h.new_ones(len(m), 1))
    return torch.zeros(len(h), m.shape[1], dtype=h.dtype).index_add_(0, to, m) / count.clamp(min=1)


def scattered(h: Tensor, m: Tensor, to: Tensor) -> Tensor:
    return h.new_zeros(7, h.shape[1]).scatter_add_(0, to.view(-1, 1).repeat(1, h.shape[1]), m)[:5]


def softened(h: Tensor, m: Tensor, to: Tensor) -> Tensor:
    """Attention over the neighbours of a node, a softmax of each channel of its own."""
    most = torch.zeros_like(h).scatter_reduce(0, wide(to, m), m, "amax", include_self=False)
    weights = (m - most.gather(0, wide(to, m))).exp()
    total = torch.zeros_like(h).scatter_add(0, wide(to, m), weights)
    return torch.zeros_like(h).index_add(0, to, m * weights / total[to])


def written(h: Tensor, m: Tensor, to: Tensor) -> Tensor:
    return h.index_copy(0, to[:3:2], m[:2]) + h.scatter(0, wide(to[3:], h), m[3:])


def sorted_by_channel(h: Tensor, m: Tensor, to: Tensor) -> Tensor:
    return m.gather(0, h.argsort(0))


@pytest.mark.parametrize("how", [added, averaged, scattered, softened, written, sorted_by_channel])
@pytest.mark.parametrize("width", [3, 8])
def test_channels_beside_the_rows_are_gated(how, width: int) -> None:
    def run(m: nn.Module, x: Tensor, to: Tensor) -> Tensor:
        h = F.relu(m.into(x))
        return m.out(h + how(h, F.relu(m.edge(h)), to))

    model = PairNet(
        run, into=nn.Linear(6, width), edge=nn.Linear(width, width), out=nn.Linear(width, 4)
    )
    gated = assert_closed_equals_cut(prepared(model), (image(5, 6), TO))
    assert gated is not None
    assert gated.channels.num_units == width
    assert gated.channels.unknown_ops == ()
    assert_cost_is_exact(gated)


@pytest.mark.parametrize(
    "how",
    [
        lambda h, m, to: h.index_add(1, to[:2], m[:, :2]),
        lambda h, m, to: h + m.gather(1, torch.zeros(5, 1, dtype=torch.int64)),
        lambda h, m, to: h.scatter(1, to[:, None], 1.0),
        lambda h, m, to: h.scatter_add(0, torch.stack([to, to.flip(0)], 1), m[:, :2]),
    ],
    ids=["added to some", "read at one", "one of each row", "rows of some channels"],
)
def test_positions_along_the_channels_pin(how) -> None:
    def run(m: nn.Module, x: Tensor, to: Tensor) -> Tensor:
        h = F.relu(m.into(x))
        return m.out(how(h, m.edge(h), to))

    model = PairNet(run, into=nn.Linear(6, 6), edge=nn.Linear(6, 6), out=nn.Linear(6, 4))
    assert assert_closed_equals_cut(prepared(model), (image(5, 6), TO)) is None


def test_an_axis_of_a_parameter_used_by_itself_keeps_its_least_width() -> None:
    """Mamba's low-rank step: two of ten outputs are read by a bare weight alone."""

    def run(m: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
        low, rest = m.x(h).split([2, 8], -1)
        return m.out(h * torch.sigmoid((m.dt.weight @ low.transpose(1, 2)).transpose(1, 2))), rest

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.dt, self.out = nn.Linear(16, 10), nn.Linear(2, 16), nn.Linear(16, 3)

        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            return run(self, h)

    gated = swan.swanify(prepared(Step()), image(2, 5, 16))
    units = [unit for unit in gated.channels.layer("x").out_units if unit >= 0]
    assert len(units) == 2
    with torch.no_grad():
        gated.gates.logits[units] = -3.0
    assert swan.prune(gated).dt.weight.shape == (16, 1)
    gated.gates.min_width = 0
    with pytest.raises(swan.EmptyLayerError, match=r"'dt.weight' would keep none of its 2"):
        swan.prune(gated)
