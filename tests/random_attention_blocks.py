"""Blocks of attention over the positions of a map: self, torch's own, on maps, grouped, cross, pooling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_attention import CORES, MERGES, PROJECTIONS, ROTARY, Attention
from tests.random_layers import BLOCKS, BOTH, Shape, conv_stack, entry, register
from tests.random_token_layers import NORMS, SCORE_BIASES, TOKENS, Rotary, Tokens


QUERY_HEADS = (2, 3, 1)
HEAD_DIMS = (2, 1, 3, 4)


@register(
    BLOCKS,
    "attention",
    easy=True,
    heads=QUERY_HEADS,
    head_dim=HEAD_DIMS,
    projection=tuple(PROJECTIONS),
    core=tuple(CORES),
    merge=tuple(MERGES),
    bias=(True, False),
    qk_norm=("none", "layer", "rms", "llama"),
    rotary=ROTARY,
    scores=SCORE_BIASES,
    tokens=TOKENS,
    dropout=(0.0, 0.2),
    residual=(True, False),
    own=(True, False),
)
class AttentionBlock(nn.Module):
    def __init__(self, shape: Shape, *, heads, head_dim, tokens, residual, own, **options):
        super().__init__()
        self.entry, dim = entry(shape, head_dim * heads, own=own)
        self.tokens = Tokens(shape, dim, tokens)
        self.norm = nn.LayerNorm(dim) if residual else nn.Identity()
        self.attn = Attention(dim, heads, head_dim, self.tokens.num_tokens, **options)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        tokens = self.tokens(x)
        out = self.attn(self.norm(tokens))
        return self.tokens.back(tokens + out if self.residual else out, x)


@register(
    BLOCKS,
    "torch_attention",
    easy=True,
    heads=QUERY_HEADS,
    head_dim=HEAD_DIMS,
    form=("self", "causal", "bool_mask", "bias_kv"),
    batch_first=(True, False),
    bias=(True, False),
    need_weights=BOTH,
    average=(True, False),
    dropout=(0.0, 0.2),
    residual=(True, False),
    own=(True, False),
)
class TorchAttention(nn.Module):
    """nn.MultiheadAttention in its usual calls."""

    def __init__(
        self,
        shape: Shape,
        *,
        heads,
        head_dim,
        form,
        batch_first,
        bias,
        need_weights,
        average,
        dropout,
        residual,
        own,
    ):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        length = shape[1] * shape[2]
        future = torch.ones(length, length).triu(1).bool()
        masks = {
            "causal": torch.zeros(length, length).masked_fill(future, float("-inf")),
            "bool_mask": future,
        }
        self.register_buffer("mask", masks.get(form))
        self.norm = nn.LayerNorm(dim) if residual else nn.Identity()
        self.attn = nn.MultiheadAttention(
            dim, heads, dropout, bias, batch_first=batch_first, add_bias_kv=form == "bias_kv"
        )
        self.batch_first, self.residual = batch_first, residual
        self.options = {"need_weights": need_weights, "average_attn_weights": average}

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        order = (0, 2, 1) if self.batch_first else (2, 0, 1)
        tokens = self.norm(x.flatten(2).permute(order))
        out, _ = self.attn(tokens, tokens, tokens, attn_mask=self.mask, **self.options)
        out = out.transpose(1, 2) if self.batch_first else out.permute(1, 2, 0)
        out = out.reshape(x.shape[0], -1, x.shape[2], x.shape[3]).contiguous()
        return x + out if self.residual else out


@register(
    BLOCKS,
    "map_attention",
    easy=True,
    heads=QUERY_HEADS,
    head_dim=HEAD_DIMS,
    form=("conv", "unbind", "depthwise", "non_local", "non_local_dot"),
    norm=("none", "group", "batch"),
    own=(True, False),
)
class MapAttention(nn.Module):
    """Queries, keys and values are 1x1 convolutions, as in CvT, diffusion UNets and non-local nets."""

    def __init__(self, shape: Shape, *, heads, head_dim, form, norm, own):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.form, self.head_dim = form, head_dim
        inner = heads * head_dim
        norms = {"none": nn.Identity, "group": lambda: nn.GroupNorm(1, dim)}
        self.norm = norms.get(norm, lambda: nn.BatchNorm2d(dim))()
        if form == "unbind":
            self.qkv = nn.Conv2d(dim, 3 * inner, 1)
        else:
            self.to_q = nn.Conv2d(dim, inner, 1, bias=False)
            self.to_k = nn.Conv2d(dim, inner, 1, bias=False)
            self.to_v = nn.Conv2d(dim, inner, 1)
        self.dw = nn.Identity()
        if form == "depthwise":
            self.dw = conv_stack(inner, inner, groups=inner, activation="none")
        self.proj = nn.Conv2d(inner, dim, 1)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.flatten(2).transpose(1, 2) @ k.flatten(2)
        if self.form == "non_local":
            scores = scores.softmax(dim=-1)
        else:
            scores = scores / (k.shape[2] * k.shape[3])
        return torch.bmm(v.flatten(2), scores.transpose(1, 2))

    def _by_head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = q.shape[0]
        q, k, v = (t.reshape(batch, -1, self.head_dim, t.shape[2] * t.shape[3]) for t in (q, k, v))
        q, k, v = q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        normed = self.norm(x)
        size = (x.size(0), -1, x.size(2), x.size(3))
        if self.form == "unbind":
            qkv = self.qkv(normed).reshape(x.size(0), 3, -1, self.head_dim, x.size(2) * x.size(3))
            q, k, v = qkv.transpose(3, 4).unbind(1)
            out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        else:
            q, k, v = self.to_q(normed), self.to_k(normed), self.to_v(normed)
            is_whole = self.form.startswith("non_local")
            out = (self._whole if is_whole else self._by_head)(self.dw(q), self.dw(k), v)
        return x + self.proj(out.reshape(size))


def repeat_kv(x: Tensor, repeats: int) -> Tensor:
    """Hugging Face's: every key and value head serves `repeats` query heads."""
    batch, heads, length, head_dim = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, repeats, length, head_dim)
    return x.reshape(batch, heads * repeats, length, head_dim)


def _grouped_matmul(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:
    batch, heads, length, head_dim = k.shape
    q = q.reshape(batch, heads, repeats, length, head_dim)
    scores = torch.einsum("bkgnd,bkmd->bkgnm", q, k) / head_dim**0.5
    return torch.einsum("bkgnm,bkmd->bkgnd", scores.softmax(-1), v).flatten(1, 2)


_SDPA = F.scaled_dot_product_attention
REPEATS = {
    "expand": lambda q, k, v, n: _SDPA(q, repeat_kv(k, n), repeat_kv(v, n)),
    "interleave": lambda q, k, v, n: _SDPA(
        q, torch.repeat_interleave(k, n, dim=1), v.repeat_interleave(n, dim=-3)
    ),
    "enable_gqa": lambda q, k, v, n: _SDPA(q, k, v, enable_gqa=True),
    "matmul": lambda q, k, v, n: (
        (q @ repeat_kv(k, n).transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ repeat_kv(v, n)
    ),
    "grouped": _grouped_matmul,
}


@register(
    BLOCKS,
    "grouped_query",
    easy=True,
    kv_heads=(2, 1),
    repeats=(2, 1, 3),
    head_dim=(2, 1, 4),
    form=tuple(REPEATS),
    bias=BOTH,
    qk_norm=("none", "llama", "layer"),
    rotary=ROTARY,
    residual=(True, False),
    own=(True, False),
)
class GroupedQuery(nn.Module):
    """Grouped-query attention; with one key and value head it is multi-query attention."""

    def __init__(
        self,
        shape: Shape,
        *,
        kv_heads,
        repeats,
        head_dim,
        form,
        bias,
        qk_norm,
        rotary,
        residual,
        own,
    ):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=kv_heads * repeats)
        self.tokens = Tokens(shape, dim, "plain")
        head_dim += head_dim % 2 if rotary != "none" else 0
        self.head_dim, self.num_key_value_groups, self.residual = head_dim, repeats, residual
        self.norm = nn.RMSNorm(dim) if residual else nn.Identity()
        self.q_proj = nn.Linear(dim, kv_heads * repeats * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(kv_heads * repeats * head_dim, dim, bias=False)
        make = (lambda _: nn.Identity()) if qk_norm == "none" else NORMS[qk_norm]
        self.q_norm, self.k_norm = make(head_dim), make(head_dim)
        length = self.tokens.num_tokens
        self.rotary = Rotary(head_dim, length, rotary) if rotary != "none" else nn.Identity()
        self.attend = REPEATS[form]

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        tokens = self.tokens(x)
        normed = self.norm(tokens)
        size = (normed.shape[0], normed.shape[1], -1, self.head_dim)
        q = self.rotary(self.q_norm(self.q_proj(normed).view(size)).transpose(1, 2))
        k = self.rotary(self.k_norm(self.k_proj(normed).view(size)).transpose(1, 2))
        v = self.v_proj(normed).view(size).transpose(1, 2)
        out = self.attend(q, k, v, self.num_key_value_groups).transpose(1, 2).contiguous()
        out = self.o_proj(out.reshape(size[0], size[1], -1))
        return self.tokens.back(tokens + out if self.residual else out, x)
