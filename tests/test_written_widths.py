"""Widths that stand in the code: of a shuffle, of a part that is empty; and sums that alone read channels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swan_surgery.channels import PINNED
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.closing_costs import assert_cost_is_exact
from tests.small_nets import Net, conv


SHUFFLES = {
    "view": lambda m, x: x.view(x.shape[0], 2, 4, 5, 5).transpose(1, 2).reshape(-1, 8, 5, 5),
    "unflatten": lambda m, x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "unflatten from behind": lambda m, x: x.unflatten(-3, (2, 4)).transpose(1, 2).flatten(1, 2),
    "module": lambda m, x: m.parts(x).transpose(1, 2).flatten(1, 2),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_the_written_width_of_a_shuffle_follows(name: str) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(F.relu(m.mixed(SHUFFLES[name](m, F.relu(m.first(x))))))

    layers = {"first": conv(3, 8, 3), "mixed": conv(8, 5), "last": conv(5, 2)}
    model = prepared(Net(run, parts=nn.Unflatten(1, (2, 4)), **layers))
    gated = assert_closed_equals_cut(model, image(2, 3, 5, 5))
    assert gated is not None
    assert len(set(gated.channels.layer("first").out_units) - {PINNED}) == 4
    assert_cost_is_exact(gated)


class Rotary(nn.Module):
    """Rotates the first `rotated` of a head's channels; the rest, if there is any, passes by."""

    def __init__(self, heads: int, size: int, rotated: int) -> None:
        super().__init__()
        self.heads, self.size, self.rotated = heads, size, rotated
        self.qkv = nn.Linear(6, 3 * heads * size)
        self.out = nn.Linear(heads * size, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, self.size).transpose(1, 2)
            for t in self.qkv(x).chunk(3, -1)
        )
        mixed = (self.turn(q) @ self.turn(k).transpose(2, 3)).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))

    def turn(self, x: Tensor) -> Tensor:
        turned, rest = x[..., : self.rotated], x[..., self.rotated :]
        first, second = turned.chunk(2, -1)
        angle = 0.3 * torch.arange(x.shape[2], dtype=x.dtype)[:, None]
        crossed = torch.cat([-second, first], -1)
        return torch.cat([turned * angle.cos() + crossed * angle.sin(), rest], -1)


@pytest.mark.parametrize("rotated", [2, 6])
def test_an_empty_rest_of_a_rotation_pins_nothing(rotated: int) -> None:
    model = nn.Sequential(nn.Linear(3, 6), Rotary(4, 6, rotated), nn.Linear(6, 2))
    gated = assert_closed_equals_cut(prepared(model), image(2, 5, 3))
    assert gated is not None
    assert gated.channels.num_units == 6 + 4
    assert_cost_is_exact(gated)


READERS = {
    "sum": lambda x, y: (x * y).sum(1),
    "mean": lambda x, y: torch.sigmoid(x * y).mean(1),
    "norm": lambda x, y: (x - y).norm(dim=1),
    "max": lambda x, y: (x + y).amax(1),
}


@pytest.mark.parametrize("name", READERS)
def test_channels_that_only_a_statistic_reads_are_gated(name: str) -> None:
    """Correlation of two feature maps: no layer sums over the channels, the sum itself does."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return READERS[name](m.one(x), m.two(x))

    gated = assert_closed_equals_cut(
        prepared(Net(run, one=conv(3, 6), two=conv(3, 6))), image(2, 3, 4, 4)
    )
    assert gated is not None
    assert gated.channels.num_units == 6
    assert gated.channels.layer("one").out_units == gated.channels.layer("two").out_units
    assert_cost_is_exact(gated)


class Separator(nn.Module):
    """Conv-TasNet: one mask per source and feature, sources decoded as if they were samples."""

    def __init__(self, features: int, sources: int) -> None:
        super().__init__()
        self.features, self.sources = features, sources
        self.encoder = nn.Conv1d(1, features, 4, stride=2, bias=False)
        self.inner = nn.Conv1d(features, 5, 1)
        self.masks = nn.Conv1d(5, features * sources, 1)
        self.decoder = nn.ConvTranspose1d(features, 1, 4, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixture = self.encoder(x)
        masks = torch.sigmoid(self.masks(F.relu(self.inner(mixture))))
        masked = masks.view(len(x), self.sources, self.features, -1) * mixture.unsqueeze(1)
        decoded = self.decoder(masked.view(len(x) * self.sources, self.features, -1))
        return decoded.view(len(x), self.sources, -1)


@pytest.mark.parametrize(("features", "sources", "batch"), [(6, 2, 1), (5, 3, 2)])
def test_masks_of_sources_that_lie_on_the_batch(features: int, sources: int, batch: int) -> None:
    gated = assert_closed_equals_cut(prepared(Separator(features, sources)), image(batch, 1, 20))
    assert gated is not None
    encoded = gated.channels.layer("encoder").out_units
    assert len(set(encoded)) == features
    assert gated.channels.layer("masks").out_units == encoded * sources
    assert gated.channels.num_units == features + 5
    assert_cost_is_exact(gated)


def test_one_linear_layer_for_every_block_of_channels_ties_their_positions() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(F.relu(m.shared(F.relu(m.first(x)).view(x.shape[0], 3, 4))).sum(1))

    model = Net(run, first=nn.Linear(2, 12), shared=nn.Linear(4, 5), last=nn.Linear(5, 2))
    gated = assert_closed_equals_cut(prepared(model), image(2, 2))
    assert gated is not None
    assert gated.channels.num_units == 4 + 5
    assert_cost_is_exact(gated)
