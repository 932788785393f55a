"""Attention, recurrent layers, routing: blocks that read the map as tokens."""

import random

import torch
import torch.nn.functional as F
from kinds import Block, kind
from torch import Tensor, nn


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def image(t: Tensor, like: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], *like.shape[2:])


class TokenBlock(Block):
    """Residual around `mix`, which maps tokens [B, T, 8] to [B, T, 8]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.out_channels = 8
        self.enter = nn.Conv2d(channels, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return x + image(self.mix(tokens(x)), x)

    def mix(self, t: Tensor) -> Tensor:
        raise NotImplementedError


@kind("multihead")
class Multihead(TokenBlock):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, rng.choice((2, 4)), batch_first=True)

    def mix(self, t: Tensor) -> Tensor:
        t = self.norm(t)
        return self.attention(t, t, t, need_weights=False)[0]


@kind("fused_heads")
class FusedHeads(TokenBlock):
    """One qkv projection, heads by view, scaled_dot_product_attention or its long form."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.heads, self.fused = rng.choice((2, 4)), rng.random() < 0.5
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.scale = (8 // self.heads) ** -0.5

    def mix(self, t: Tensor) -> Tensor:
        b, n, c = t.shape
        q, k, v = self.qkv(t).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


@kind("heads_in_batch")
class HeadsInBatch(TokenBlock):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.heads = 2

    def split(self, t: Tensor) -> Tensor:
        b, n, c = t.shape
        t = t.reshape(b, n, self.heads, c // self.heads).transpose(1, 2)
        return t.reshape(b * self.heads, n, c // self.heads)

    def mix(self, t: Tensor) -> Tensor:
        b, n, _ = t.shape
        q, k, v = self.split(self.q(t)), self.split(self.k(t)), self.split(self.v(t))
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 2.0, -1), v)
        return self.o(y.view(b, self.heads, n, -1).transpose(1, 2).reshape(b, n, -1))


@kind("grouped_query")
class GroupedQuery(TokenBlock):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.q, self.k, self.v, self.o = (
            nn.Linear(8, 8),
            nn.Linear(8, 4),
            nn.Linear(8, 4),
            nn.Linear(8, 8),
        )

    def mix(self, t: Tensor) -> Tensor:
        b, n, _ = t.shape
        q = self.q(t).view(b, n, 4, 2).transpose(1, 2)
        k = self.k(t).view(b, n, 2, 2).transpose(1, 2).repeat_interleave(2, 1)
        v = self.v(t).view(b, n, 2, 2).transpose(1, 2).repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, n, 8))


@kind("linear_attention")
class LinearAttention(TokenBlock):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 8)

    def mix(self, t: Tensor) -> Tensor:
        q, k = F.elu(self.q(t)) + 1, F.elu(self.k(t)) + 1
        context = torch.einsum("bnd,bne->bde", k, self.v(t))
        return torch.einsum("bnd,bde->bne", q, context) / t.shape[1]


@kind("learned_queries")
class LearnedQueries(TokenBlock):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.queries = nn.Parameter(torch.randn(1, 3, 8))
        self.read = nn.MultiheadAttention(8, 2, batch_first=True)
        self.write = nn.MultiheadAttention(8, 2, batch_first=True)

    def mix(self, t: Tensor) -> Tensor:
        queries = self.queries.expand(t.shape[0], -1, -1)
        latent, _ = self.read(queries, t, t)
        return self.write(t, latent, latent)[0]


@kind("windows")
class Windows(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.mix = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = F.pad(x, (0, w % 2, 0, h % 2))
        hh, ww = x.shape[2] // 2, x.shape[3] // 2
        t = x.view(b, c, hh, 2, ww, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        t = t + self.mix(t, t, t)[0]
        t = t.view(b, hh, ww, 2, 2, c).permute(0, 5, 1, 3, 2, 4)
        return t.reshape(b, c, 2 * hh, 2 * ww)[:, :, :h, :w]


@kind("class_token")
class ClassToken(TokenBlock):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def mix(self, t: Tensor) -> Tensor:
        t = torch.cat((self.token.expand(len(t), -1, -1), t), 1)
        t = self.layer(t)
        return t[:, 1:] * t[:, :1].sigmoid()


@kind("recurrent")
class Recurrent(TokenBlock):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        kind_of = rng.choice((nn.RNN, nn.GRU, nn.LSTM))
        both = rng.random() < 0.4
        self.cells = kind_of(
            8, 6, num_layers=rng.choice((1, 2)), batch_first=True, bidirectional=both
        )
        self.out = nn.Linear(12 if both else 6, 8)

    def mix(self, t: Tensor) -> Tensor:
        return self.out(self.cells(t)[0])


@kind("recurrent_cell")
class RecurrentCell(TokenBlock):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.cell, self.out = nn.GRUCell(8, 6), nn.Linear(6, 8)

    def mix(self, t: Tensor) -> Tensor:
        state, states = t.new_zeros(t.shape[0], 6), []
        for step in t[:, :5].unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return self.out(torch.stack(states, 1).mean(1, keepdim=True)) + t


@kind("top_tokens")
class TopTokens(TokenBlock):
    """The four tokens with the highest score are worked on and scattered back."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.score, self.work = nn.Linear(8, 1), nn.Linear(8, 8)

    def mix(self, t: Tensor) -> Tensor:
        index = self.score(t).squeeze(-1).topk(4, 1).indices[..., None].expand(-1, -1, t.shape[2])
        chosen = F.relu(self.work(t.gather(1, index)))
        return torch.zeros_like(t).scatter(1, index, chosen)


@kind("index_add")
class IndexAdd(TokenBlock):
    """Segment sums, as message passing has them."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.message, self.update = nn.Linear(8, 6), nn.Linear(6, 8)

    def mix(self, t: Tensor) -> Tensor:
        rows = self.message(t).flatten(0, 1)
        target = torch.arange(len(rows)) // 2
        sums = rows.new_zeros((len(rows) + 1) // 2, rows.shape[1]).index_add(0, target, rows)
        return self.update(F.relu(sums)[target]).view_as(t)


@kind("experts")
class Experts(TokenBlock):
    """Top-1 routing with boolean masks; an expert may see no token."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)) for _ in range(3)
        )

    def mix(self, t: Tensor) -> Tensor:
        rows = t.flatten(0, 1)
        share, chosen = self.router(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            out[mine] = share[mine, None] * expert(rows[mine])
        return out.view_as(t)


@kind("codebook")
class Codebook(TokenBlock):
    """Vector quantisation with a straight-through gradient."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.code = nn.Embedding(7, 8)

    def mix(self, t: Tensor) -> Tensor:
        far = (t[..., None, :] - self.code.weight).square().sum(-1)
        return t + (self.code(far.argmin(-1)) - t).detach()


@kind("rotary")
class Rotary(TokenBlock):
    """Half of each head is turned, half is not; angles are made once per length."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.angles: Tensor | None = None

    def turn(self, t: Tensor) -> Tensor:
        turned, rest = t[..., :2], t[..., 2:]
        if self.angles is None or self.angles.shape[0] != t.shape[-2]:
            self.angles = torch.arange(t.shape[-2], dtype=t.dtype, device=t.device)[:, None]
        cos, sin = self.angles.cos(), self.angles.sin()
        half = torch.cat((-turned[..., 1:], turned[..., :1]), -1)
        return torch.cat((turned * cos + half * sin, rest), -1)

    def mix(self, t: Tensor) -> Tensor:
        b, n, _ = t.shape
        q, k, v = (f(t).view(b, n, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return y.transpose(1, 2).reshape(b, n, 8)
