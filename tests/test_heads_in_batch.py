"""Heads folded into the batch: whole heads are units, whatever the batch the pruned model meets later."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from tests.closing import TOLERANCE, assert_closed_equals_cut, image, outputs, prepared
from tests.closing_costs import assert_cost_is_exact
from tests.small_nets import Net


class Heads(nn.Module):
    """Attention over (B, C, T); `mix` writes out how heads come to lie on the batch axis."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Conv1d(width, 3 * heads * size, 1)
        self.out = nn.Conv1d(heads * size, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.mix(self.qkv(x)))

    def mix(self, qkv: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bct,bcs->bts", q, k).softmax(-1)
        return torch.einsum("bts,bcs->bct", weights, v)


class Interleaved(Heads):
    """The width of a head is computed from the number of heads: guided diffusion, first order."""

    def mix(self, qkv: Tensor) -> Tensor:
        batch, width, length = qkv.shape
        size = width // (3 * self.heads)
        q, k, v = qkv.reshape(batch * self.heads, size * 3, length).split(size, dim=1)
        return self.attend(q * size**-0.5, k, v).reshape(batch, -1, length)


class Apart(Heads):
    """Queries, keys and values side by side: guided diffusion, second order."""

    def mix(self, qkv: Tensor) -> Tensor:
        batch, _, length = qkv.shape
        q, k, v = (t.reshape(batch * self.heads, -1, length) for t in qkv.chunk(3, dim=1))
        return self.attend(q, k, v).reshape(batch, -1, length)


class TimeFirst(Heads):
    """(T, B * heads, size), as in fairseq."""

    def mix(self, qkv: Tensor) -> Tensor:
        time = qkv.permute(2, 0, 1)
        length, batch, _ = time.shape
        q, k, v = (
            t.reshape(length, batch * self.heads, self.size).transpose(0, 1)
            for t in time.chunk(3, dim=2)
        )
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        merged = mixed.transpose(0, 1).reshape(length, batch, self.heads * self.size)
        return merged.permute(1, 2, 0)


class Literal(Heads):
    """The number of heads stands in the code, and the batch is computed from it."""

    def mix(self, qkv: Tensor) -> Tensor:
        batch, _, length = qkv.shape
        q, k, v = (t.reshape(batch * 4, t.shape[1] // 4, length) for t in qkv.chunk(3, dim=1))
        mixed = self.attend(q, k, v)
        folded, size, _ = mixed.shape
        return mixed.reshape(folded // 4, 4 * size, length)


KINDS = (Interleaved, Apart, TimeFirst, Literal)


def network(kind: type[Heads], width: int, heads: int, size: int) -> nn.Module:
    return prepared(
        nn.Sequential(nn.Conv1d(3, width, 1), kind(width, heads, size), nn.Conv1d(width, 2, 1))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_whole_heads_are_units_and_the_batch_is_free(kind: type[Heads], batch: int) -> None:
    model, x = network(kind, 8, 4, 6), image(batch, 3, 5)
    gated = assert_closed_equals_cut(model, x)
    assert gated is not None
    assert gated.channels.num_units == 8 + 4
    assert len(set(gated.channels.layer("1.qkv").out_units)) == 4
    assert_cost_is_exact(gated)
    small = swan.prune(gated)
    for other in (3, 4):
        y = image(other, 3, 7)
        (got,), (wanted,) = outputs(small, y), outputs(gated, y)
        assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize(
    ("kind", "width", "heads", "size", "batch", "length"),
    [(Apart, 3, 2, 3, 3, 6), (TimeFirst, 6, 3, 4, 2, 1), (Interleaved, 3, 3, 3, 3, 4)],
)
def test_other_heads_in_the_batch(kind, width, heads, size, batch, length) -> None:
    gated = assert_closed_equals_cut(network(kind, width, heads, size), image(batch, 3, length))
    assert gated is not None
    assert len(set(gated.channels.layer("1.qkv").out_units)) == heads
    assert_cost_is_exact(gated)


def test_a_head_count_in_a_child_module_follows() -> None:
    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_heads = 3

        def forward(self, qkv: Tensor) -> Tensor:
            batch, width, length = qkv.shape
            assert width % (3 * self.n_heads) == 0
            size = width // (3 * self.n_heads)
            q, k, v = qkv.reshape(batch * self.n_heads, size * 3, length).split(size, dim=1)
            mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            return mixed.transpose(1, 2).reshape(batch, -1, length)

    model = prepared(nn.Sequential(nn.Conv1d(3, 36, 1), Core(), nn.Conv1d(12, 2, 1)))
    gated = assert_closed_equals_cut(model, image(2, 3, 5))
    assert gated is not None
    assert [(a.module, a.name) for a in gated.channels.attributes] == [("1", "n_heads")]
    assert gated.channels.num_units == 3
    assert_cost_is_exact(gated)


def test_a_literal_count_beside_an_inferred_size_stays_where_the_batch_would_be_fixed() -> None:
    def folded(m: nn.Module, x: Tensor) -> Tensor:
        q, k = (f(x).reshape(x.shape[0] * 4, -1, x.shape[2]) for f in (m.q, m.k))
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), m.v(x).reshape(q.shape))
        return m.out(mixed.reshape(x.shape[0], -1, x.shape[2]))

    layers = {name: nn.Conv1d(3, 16, 1) for name in "qkv"}
    model = prepared(Net(folded, out=nn.Conv1d(16, 2, 1), **layers))
    gated = assert_closed_equals_cut(model, image(1, 3, 5))
    if gated is not None:
        small, y = swan.prune(gated), image(3, 3, 5)
        (got,), (wanted,) = outputs(small, y), outputs(gated, y)
        assert (got - wanted).abs().max() <= TOLERANCE
