"""Blocks of attention between two sets of tokens: cross attention, and pooling with learned queries."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import BLOCKS, WIDTHS, Shape, conv_stack, entry, register, stride_for
from tests.random_token_layers import Mlp, Tokens


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


class CrossAttention(nn.Module):
    """Queries of one stream, keys and values of another one of a different width."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, form: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.form = heads, head_dim, form
        inner = heads * head_dim
        self.q = nn.Linear(dim, inner)
        if form == "separate":
            self.k = nn.Linear(context_dim, inner, bias=False)
            self.v = nn.Linear(context_dim, inner)
        else:
            self.kv = nn.Linear(context_dim, 2 * inner)
        self.proj = nn.Linear(inner, dim)

    def _keys_and_values(self, context: Tensor):
        batch, length, _ = context.shape
        if self.form == "separate":
            size = (batch, length, self.num_heads, self.head_dim)
            return (t.view(size).transpose(1, 2) for t in (self.k(context), self.v(context)))
        if self.form == "pvt":
            kv = self.kv(context).reshape(batch, -1, 2, self.num_heads, self.head_dim)
            kv = kv.permute(2, 0, 3, 1, 4)
            return kv[0], kv[1]
        k, v = self.kv(context).chunk(2, dim=-1)
        size = (batch, length, -1, self.head_dim)
        return k.reshape(size).transpose(1, 2), v.reshape(size).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)
        k, v = self._keys_and_values(context)
        if self.form == "pvt":
            out = ((q @ k.transpose(-2, -1)) * self.head_dim**-0.5).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(_merge(out))


@register(
    BLOCKS,
    "cross_attention",
    easy=True,
    heads=(2, 3, 1),
    head_dim=(2, 1, 3),
    form=("separate", "pvt", "chunk", "torch"),
    context=("branch", "reduced", "pooled"),
    width=WIDTHS,
    tokens=("plain", "position"),
    own=(True, False),
)
class CrossAttentionBlock(nn.Module):
    """The context is a branch of its own, or the same map made smaller as in PVT."""

    def __init__(self, shape: Shape, *, heads, head_dim, form, context, width, tokens, own):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.tokens = Tokens(shape, dim, tokens)
        self.norm, self.context = nn.LayerNorm(dim), context
        context_dim = width if context == "branch" else dim
        self.reads = nn.AdaptiveAvgPool2d(2)
        if context == "branch":
            self.reads = conv_stack(shape[0], width, stride=stride_for(shape, 2))
        elif context == "reduced":
            size = [min(2, pixels) for pixels in shape[1:]]
            self.reads = nn.Conv2d(dim, dim, kernel_size=size, stride=size)
        self.context_norm = nn.LayerNorm(context_dim)
        self.is_torch = form == "torch"
        if self.is_torch:
            self.attn = nn.MultiheadAttention(
                dim, heads, batch_first=True, kdim=context_dim, vdim=context_dim
            )
        else:
            self.attn = CrossAttention(dim, context_dim, heads, head_dim, form)

    def forward(self, x: Tensor) -> Tensor:
        own = self.entry(x)
        source = self.reads(x if self.context == "branch" else own)
        context = self.context_norm(source.flatten(2).transpose(1, 2))
        tokens = self.tokens(own)
        query = self.norm(tokens)
        if self.is_torch:
            out = self.attn(query, context, context, need_weights=False)[0]
        else:
            out = self.attn(query, context)
        return self.tokens.back(tokens + out, own)


@register(
    BLOCKS,
    "attention_pool",
    easy=True,
    heads=(2, 3, 1),
    head_dim=(2, 1, 3),
    form=("latent", "probe", "mean_token", "scores"),
    output=("gate", "latents"),
    own=(True, False),
)
class AttentionPool(nn.Module):
    """Learned queries read the map; one gates its channels, four become a 2x2 map."""

    def __init__(self, shape: Shape, *, heads, head_dim, form, output, own):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.form, self.is_gate = form, output == "gate" or form == "mean_token"
        num_latents = 1 if self.is_gate else 4
        self.tokens = Tokens(shape, dim, "position")
        if form in ("latent", "probe"):
            self.latent = nn.Parameter(torch.zeros(1, num_latents, dim))
        if form == "probe":
            self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        elif form == "scores":
            self.score = nn.Linear(dim, num_latents)
        else:
            self.attn = CrossAttention(dim, dim, heads, head_dim, "pvt")
        self.norm, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4)

    def _pool(self, tokens: Tensor) -> Tensor:
        if self.form == "probe":
            probe = self.latent.repeat(tokens.shape[0], 1, 1)
            return self.attn(probe, tokens, tokens)[0]
        if self.form == "scores":
            weights = self.score(tokens).softmax(dim=1)
            return weights.transpose(1, 2) @ tokens
        if self.form == "mean_token":
            return self.attn(tokens.mean(dim=1, keepdim=True), tokens)
        return self.attn(self.latent.expand(tokens.shape[0], -1, -1), tokens)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        pooled = self._pool(self.tokens(x))
        pooled = pooled + self.mlp(self.norm(pooled))
        if self.is_gate:
            return x * torch.sigmoid(pooled[:, 0])[:, :, None, None]
        return pooled.transpose(1, 2).reshape(x.shape[0], -1, 2, 2).contiguous()


@register(
    BLOCKS, "clip_pool", heads=(2, 3, 1), head_dim=(2, 1, 3), fused=(True, False), own=(True, False)
)
class ClipPool(nn.Module):
    """CLIP's attention pool: torch's function on the weights of four linears, or timm's version."""

    def __init__(self, shape: Shape, *, heads, head_dim, fused, own):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        length = shape[1] * shape[2] + 1
        self.positional_embedding = nn.Parameter(torch.randn(length, dim) / dim**0.5)
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.c_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.num_heads, self.fused = heads, fused

    def _fused(self, x: Tensor) -> Tensor:
        pooled, _ = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.num_heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return pooled.squeeze(0)

    def _by_hand(self, x: Tensor) -> Tensor:
        size = (-1, x.shape[1], self.num_heads, x.shape[2] // self.num_heads)
        q, k, v = self.q_proj(x[:1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.reshape(size).permute(1, 2, 0, 3) for t in (q, k, v))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).squeeze(2).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = torch.cat((tokens.mean(dim=0, keepdim=True), tokens), dim=0)
        tokens = tokens + self.positional_embedding[:, None, :]
        pooled = self._fused(tokens) if self.fused else self._by_hand(tokens)
        return x * torch.sigmoid(pooled)[:, :, None, None]
