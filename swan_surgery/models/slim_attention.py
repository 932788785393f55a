"""`nn.MultiheadAttention` written out, so that heads and widths can be removed.

torch's own module derives the width of a head from the width of the model, so it cannot have fewer
heads, or a narrower trunk. This one keeps the width of a head, and with it the attention scale, as
it was. Parameters, `state_dict` keys and results are those of `nn.MultiheadAttention`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlimAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with `head_dim` fixed and any number of heads.

    Not constructed by itself: `write_out_` turns existing modules into it.
    """

    # torch's annotations deny that these may be None.
    in_proj_weight: Any
    in_proj_bias: Any

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002 - torch's own signature
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: shapes [L, E], [L, B, E], or [B, L, E] if batch_first."""
        is_batched = query.ndim == 3
        is_self = query is key and key is value
        if not is_batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._by_head(t) for t in self._project(query, key, value, is_self=is_self))
        out, weights = attend(
            (q, k, v),
            score_bias(q, k, key_padding_mask, attn_mask, is_causal=is_causal),
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            average=average_attn_weights,
        )
        out = self.out_proj(out)
        if not is_batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def follow_widths_(self) -> None:
        """Let the attributes that repeat widths follow the parameters."""
        self.num_heads = self.out_proj.in_features // self.head_dim
        self.embed_dim = self.out_proj.out_features
        if self.in_proj_weight is None:
            self.kdim, self.vdim = self.k_proj_weight.shape[1], self.v_proj_weight.shape[1]
        else:
            self.kdim = self.vdim = self.in_proj_weight.shape[1]

    def _by_head(self, x: Tensor) -> Tensor:  # [B, L, H*D] -> [B, H, L, D]
        parted: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return parted.transpose(1, 2)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, *, is_self: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is None:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            own = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = (
                F.linear(t, w, b) for t, w, b in zip((query, key, value), own, biases, strict=True)
            )
            return q, k, v
        if is_self:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(t, w, b)
            for t, w, b in zip(
                (query, key, value), self.in_proj_weight.chunk(3), biases, strict=True
            )
        )
        return q, k, v


def attend(
    heads: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    *,
    dropout: float,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, head by head.

    Args:
        heads: queries, keys and values, [B, H, L, D] and twice [B, H, S, D].
        bias: of `score_bias`.
        dropout: of the weights.
        need_weights: return them, too.
        average: as their mean over the heads.

    Returns:
        [B, L, H*D], and the weights, [B, L, S] or [B, H, L, S], or None.
    """
    q, k, v = heads
    if not need_weights:
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        return out.transpose(1, 2).flatten(2), None
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return out, weights.mean(dim=1) if average else weights


def score_bias(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
) -> Tensor | None:
    """What is added to the scores, broadcastable to [B, H, L, S]; None where nothing is."""
    bias = None
    if is_causal and attn_mask is None:
        shape = (q.shape[2], k.shape[2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=q.device).triu(1)
    if attn_mask is not None:
        bias = _additive(attn_mask, q.dtype)
        if bias.ndim == 3:
            bias = bias.unflatten(0, (q.shape[0], -1))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)
        padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        bias = padding if bias is None else bias + padding
    return bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def write_out_(model: nn.Module) -> nn.Module:
    """Turn every plain `nn.MultiheadAttention` of a private copy into `SlimAttention`; returns it."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and _is_plain(module):
            module.__class__ = SlimAttention
            # torch's fused encoder layers look at this and leave the module alone.
            module._qkv_same_embed_dim = False  # noqa: SLF001
    return model


def _is_plain(module: nn.MultiheadAttention) -> bool:
    return module.bias_k is None and not module.add_zero_attn


def put_back_(model: nn.Module) -> nn.Module:
    """Undo `write_out_` where the widths still fit torch's own module; returns the model."""
    for module in model.modules():
        if type(module) is SlimAttention and _fits(module):
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]  # its base class
            module._qkv_same_embed_dim = module.in_proj_weight is not None  # noqa: SLF001
    return model


def _fits(module: SlimAttention) -> bool:
    inner = module.out_proj.in_features
    packed = module.in_proj_weight
    reads = (module.q_proj_weight if packed is None else packed).shape[1]
    return bool(
        inner == module.out_proj.out_features == reads == module.num_heads * module.head_dim
    )
