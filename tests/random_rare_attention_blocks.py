"""Attention that may be pinned: sizes repeated as numbers, heads that meet each other, oddities of single models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import BLOCKS, Shape, entry, register
from tests.random_token_layers import LayerScale, Tokens


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out.reshape(out.shape[0], out.shape[1], -1)


def _heads(head_dim: int, *tensors: Tensor):
    return (t.reshape(t.shape[0], t.shape[1], -1, head_dim).transpose(1, 2) for t in tensors)


def _view(h: int, d: int):
    """`view(B, T, 4, 16)`: both numbers stand in the code."""

    def forward(m, x):
        batch, length, _ = x.shape
        q, k, v = m.qkv(x).chunk(3, dim=-1)
        size = (batch, length, h, d)
        return _attend(*(t.reshape(size).transpose(1, 2) for t in (q, k, v)))

    return forward


def _reshape(h: int, d: int):
    def forward(m, x):
        qkv = m.qkv(x).reshape(x.shape[0], -1, 3, h, d).permute(2, 0, 3, 1, 4)
        return _attend(qkv[0], qkv[1], qkv[2])

    return forward


def _c_over_heads(h: int, d: int):
    """The older timm: the head's width is the trunk's width over the number of heads."""

    def forward(m, x):
        batch, length, dim = x.shape
        size = (batch, length, 3, m.num_heads, dim // m.num_heads)
        q, k, v = m.qkv(x).reshape(size).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(batch, length, dim)

    return forward


def _inferred_width(h: int, d: int):
    """`view(B, N, heads, -1)`: without a head, the others would grow."""

    def forward(m, x):
        size = (x.shape[0], x.shape[1], m.num_heads, -1)
        q, k, v = m.qkv(x).chunk(3, dim=-1)
        return _attend(*(t.reshape(size).transpose(1, 2) for t in (q, k, v)))

    return forward


def _split_literal(h: int, d: int):
    def forward(m, x):
        q, k, v = m.qkv(x).split([h * d, h * d, h * d], dim=-1)
        return _attend(*_heads(d, q, k, v))

    return forward


def _split_attribute(h: int, d: int):
    """Phi's: `split([q_size, kv_size, kv_size])` from attributes."""

    def forward(m, x):
        q, k, v = m.qkv(x).split([m.inner_dim, m.inner_dim, m.inner_dim], dim=-1)
        return _attend(*_heads(m.head_dim, q, k, v))

    return forward


def _slices(h: int, d: int):
    def forward(m, x):
        qkv, size = m.qkv(x), m.inner_dim
        return _attend(
            *_heads(m.head_dim, qkv[..., :size], qkv[..., size : 2 * size], qkv[..., -size:])
        )

    return forward


def _folded(h: int, d: int):
    """Bart's: heads are folded into the batch, and the products are bmm."""

    def forward(m, x):
        batch, length, _ = x.shape
        folded = (batch * m.num_heads, -1, m.head_dim)
        q, k, v = m.qkv(x).chunk(3, dim=-1)
        size = (batch, length, m.num_heads, m.head_dim)
        q, k, v = (t.reshape(size).transpose(1, 2).reshape(folded) for t in (q, k, v))
        weights = torch.bmm(q * m.head_dim**-0.5, k.transpose(1, 2)).softmax(-1)
        out = torch.bmm(weights, v).view(batch, m.num_heads, length, m.head_dim)
        return out.transpose(1, 2).reshape(batch, length, m.inner_dim)

    return forward


LITERALS = {
    "view": _view,
    "reshape": _reshape,
    "c_over_heads": _c_over_heads,
    "inferred_width": _inferred_width,
    "split_literal": _split_literal,
    "split_attribute": _split_attribute,
    "slices": _slices,
    "folded": _folded,
}


class _Fused(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner_dim = heads, head_dim, heads * head_dim
        self.qkv = nn.Linear(dim, 3 * self.inner_dim)
        self.proj = nn.Linear(self.inner_dim, dim)


class LiteralSelfAttention(_Fused):
    def __init__(self, dim: int, heads: int, head_dim: int, form: str) -> None:
        super().__init__(dim, heads, head_dim)
        self.attend = LITERALS[form](heads, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self, x))


@register(
    BLOCKS,
    "literal_attention",
    heads=(2, 3, 1),
    head_dim=(2, 1, 3),
    form=tuple(LITERALS),
    own=(True, False),
)
class LiteralAttention(nn.Module):
    def __init__(self, shape: Shape, *, heads, head_dim, form, own):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.tokens, self.norm = Tokens(shape, dim, "plain"), nn.LayerNorm(dim)
        self.attn = LiteralSelfAttention(dim, heads, dim // heads, form)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        tokens = self.tokens(x)
        return self.tokens.back(tokens + self.attn(self.norm(tokens)), x)


ODDITIES = (
    "talking_heads",
    "per_head_weights",
    "head_scale",
    "gated",
    "memory",
    "sink",
    "sigmoid",
    "shared_qk",
    "complex_rotary",
    "sincos",
)


class OddSelfAttention(_Fused):
    """One departure from plain attention each."""

    def __init__(self, dim: int, heads: int, head_dim: int, length: int, form: str) -> None:
        super().__init__(dim, heads, head_dim)
        self.form, inner = form, self.inner_dim
        if form == "talking_heads":
            self.mix_scores = nn.Linear(heads, heads, bias=False)
            self.mix_weights = nn.Conv2d(heads, heads, 1)
        elif form == "per_head_weights":
            self.to_v = nn.Parameter(torch.zeros(heads, dim, head_dim))
        elif form == "head_scale":
            self.head_gamma = nn.Parameter(torch.ones(1, heads, 1, 1))
        elif form == "gated":
            self.gate = nn.Linear(dim, inner)
        elif form == "memory":
            self.memory = nn.Parameter(torch.zeros(2, heads, 3, head_dim))
        elif form == "sink":
            self.sinks = nn.Parameter(torch.zeros(heads))
        elif form == "complex_rotary":
            angles = torch.arange(length)[:, None] / (1.0 + torch.arange(head_dim // 2))
            self.register_buffer("freqs", torch.stack((angles.cos(), angles.sin()), -1))
        elif form == "sincos":
            steps = torch.arange(length)[:, None] / (1.0 + torch.arange(dim))
            self.register_buffer("pos_embed", steps.sin().unsqueeze(0))

    def _turn(self, x: Tensor) -> Tensor:
        batch, heads, length, _ = x.shape
        pairs = torch.view_as_complex(x.reshape(batch, heads, length, -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.view_as_complex(self.freqs)).flatten(3)

    def _project(self, x: Tensor):
        x = x + self.pos_embed if self.form == "sincos" else x
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = _heads(self.head_dim, q, k, v)
        if self.form == "per_head_weights":
            v = torch.einsum("bnc,hcd->bhnd", x, self.to_v)
        elif self.form == "complex_rotary":
            q, k = self._turn(q), self._turn(k)
        elif self.form == "shared_qk":
            k = F.normalize(q, dim=-1)
        elif self.form == "memory":
            size = (x.shape[0], -1, -1, -1)
            k = torch.cat((self.memory[0].expand(size), k), dim=2)
            v = torch.cat((self.memory[1].expand(size), v), dim=2)
        return q, k, v

    def _weights(self, scores: Tensor) -> Tensor:
        if self.form == "talking_heads":
            scores = self.mix_scores(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.mix_weights(scores.softmax(dim=-1))
        if self.form == "sink":
            sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
            return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        if self.form == "sigmoid":
            return torch.sigmoid(scores - 2.0)
        return scores.softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x)
        out = self._weights(q @ k.transpose(-2, -1) * self.head_dim**-0.5) @ v
        if self.form == "head_scale":
            out = out * self.head_gamma
        out = out.transpose(1, 2).flatten(2)
        if self.form == "gated":
            out = out * torch.sigmoid(self.gate(x))
        return self.proj(out)


@register(
    BLOCKS,
    "odd_attention",
    heads=(2, 3, 1),
    head_dim=(2, 4),
    form=ODDITIES,
    own=(True, False),
)
class OddAttention(nn.Module):
    def __init__(self, shape: Shape, *, heads, head_dim, form, own):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.tokens = Tokens(shape, dim, "plain")
        self.norm, self.scale = nn.LayerNorm(dim), LayerScale(dim)
        self.attn = OddSelfAttention(dim, heads, head_dim, self.tokens.num_tokens, form)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        tokens = self.tokens(x)
        return self.tokens.back(tokens + self.scale(self.attn(self.norm(tokens))), x)
