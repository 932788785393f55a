"""Multi-head self-attention as users write it: how q, k, v are made, how they meet, how heads are merged."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_token_layers import NORMS, Rotary, ScoreBias


def _timm(m: "Attention", x: Tensor):
    batch, length, _ = x.shape
    qkv = m.qkv(x).reshape(batch, length, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4)
    return qkv.unbind(0)


def _dino(m: "Attention", x: Tensor):
    qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, -1, m.head_dim).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def _swin(m: "Attention", x: Tensor):
    batch, length, _ = x.shape
    qkv = m.qkv(x).reshape(batch, length, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return q, k, v


def _views(m: "Attention", batch, length, parts):
    return tuple(t.view(batch, length, -1, m.head_dim).transpose(1, 2) for t in parts)


def _chunk(m: "Attention", x: Tensor):
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    return _views(m, x.shape[0], x.shape[1], (q, k, v))


def _gpt(m: "Attention", x: Tensor):
    batch, length, _ = x.size()
    q, k, v = m.qkv(x).split(m.inner_dim, dim=2)
    return _views(m, batch, length, (q, k, v))


def _neox(m: "Attention", x: Tensor):
    qkv = m.qkv(x).view(x.shape[0], x.shape[1], -1, 3 * m.head_dim).transpose(1, 2)
    return qkv.chunk(3, dim=-1)


def _llama(m: "Attention", x: Tensor):
    batch, length, _ = x.shape
    return _views(m, batch, length, (m.q_proj(x), m.k_proj(x), m.v_proj(x)))


def _vit(m: "Attention", x: Tensor):
    size = (x.shape[0], x.shape[1], m.num_heads, m.head_dim)
    q = m.q_proj(x).view(size).transpose(1, 2)
    return q, m.k_proj(x).view(size).transpose(1, 2), m.v_proj(x).view(size).transpose(1, 2)


def _bert(m: "Attention", x: Tensor):
    def transpose_for_scores(t: Tensor) -> Tensor:
        return t.view(t.size()[:-1] + (m.num_heads, m.head_dim)).permute(0, 2, 1, 3)  # noqa: RUF005

    q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    return transpose_for_scores(q), transpose_for_scores(k), transpose_for_scores(v)


def _unflatten(m: "Attention", x: Tensor):
    q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    return tuple(t.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for t in (q, k, v))


FUSED = {"timm": _timm, "dino": _dino, "swin": _swin, "chunk": _chunk, "gpt": _gpt, "neox": _neox}
SEPARATE = {"llama": _llama, "vit": _vit, "bert": _bert, "unflatten": _unflatten}
PROJECTIONS = FUSED | SEPARATE


def _sdpa(m: "Attention", q, k, v, bias):
    dropout = m.drop.p if m.training else 0.0
    if m.is_causal:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


def _masked(m: "Attention", scores: Tensor, bias):
    if m.is_causal:
        return scores.masked_fill(bias != 0, float("-inf"))
    return scores if bias is None else scores + bias


def _matmul(m: "Attention", q, k, v, bias):
    scores = (q * m.scale) @ k.transpose(-2, -1)
    return m.drop(_masked(m, scores, bias).softmax(dim=-1)) @ v


def _torch_matmul(m: "Attention", q, k, v, bias):
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(m.head_dim)
    weights = F.softmax(_masked(m, scores, bias), dim=-1)
    return torch.matmul(m.drop(weights), v)


def _einsum(m: "Attention", q, k, v, bias):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * m.scale
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(_masked(m, scores, bias), -1), v)


def _einsum_last(m: "Attention", q, k, v, bias):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / k.shape[-1] ** 0.5
    out = torch.einsum("bhnm,bmhd->bnhd", _masked(m, scores, bias).softmax(-1), v)
    return out.transpose(1, 2)


CORES = {
    "sdpa": _sdpa,
    "matmul": _matmul,
    "torch_matmul": _torch_matmul,
    "einsum": _einsum,
    "einsum_last": _einsum_last,
}
MERGES = {
    "reshape": lambda m, x: x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1),
    "flatten": lambda m, x: x.transpose(1, 2).flatten(2),
    "attribute": lambda m, x: x.transpose(1, 2).reshape(x.shape[0], x.shape[2], m.inner_dim),
    "view": lambda m, x: x.permute(0, 2, 1, 3).contiguous().view(x.size(0), x.size(2), m.inner_dim),
    "sizes": lambda m, x: x.transpose(1, 2).reshape(
        x.shape[0], x.shape[2], x.shape[1] * x.shape[3]
    ),
}
ROTARY = ("none", "half", "slices", "pairs")


class Attention(nn.Module):
    """Self-attention of tokens [B, N, dim]; its inner width is heads * head_dim, whatever dim is."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        num_tokens: int,
        *,
        projection: str = "timm",
        core: str = "sdpa",
        merge: str = "reshape",
        bias: bool = True,
        qk_norm: str = "none",
        rotary: str = "none",
        scores: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        head_dim += head_dim % 2 if rotary != "none" else 0
        self.num_heads, self.head_dim, self.inner_dim = heads, head_dim, heads * head_dim
        self.scale = head_dim**-0.5
        self.projection, self.core = PROJECTIONS[projection], CORES[core]
        self.merge = MERGES[merge]
        if projection in FUSED:
            self.qkv = nn.Linear(dim, 3 * self.inner_dim, bias=bias)
        else:
            self.q_proj = nn.Linear(dim, self.inner_dim, bias=bias)
            self.k_proj = nn.Linear(dim, self.inner_dim, bias=False)
            self.v_proj = nn.Linear(dim, self.inner_dim, bias=bias)
        has_norm = qk_norm != "none"
        self.q_norm = NORMS[qk_norm](head_dim) if has_norm else nn.Identity()
        self.k_norm = NORMS[qk_norm](head_dim) if has_norm else nn.Identity()
        self.rotary = Rotary(head_dim, num_tokens, rotary) if rotary != "none" else nn.Identity()
        self.bias = ScoreBias(scores, heads, num_tokens) if scores != "none" else None
        self.is_causal = scores == "causal"
        self.drop = nn.Dropout(dropout)
        self.proj = nn.Linear(self.inner_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(self, x)
        q, k = self.rotary(self.q_norm(q)), self.rotary(self.k_norm(k))
        bias = None if self.bias is None else self.bias()
        return self.proj(self.merge(self, self.core(self, q, k, v, bias)))
