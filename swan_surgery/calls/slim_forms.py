# ruff: noqa: FBT001, FBT002 - the signatures are torch's own, for positional and keyword calls
"""Torch functions that take one width for another, written out so that each may be its own.

They are called as torch's are and compute the same where torch's can be called at all. The channel
map runs them in the place of torch's, and so does a module whose numbers are replaced; a gated model,
which has all its widths, runs torch's own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from swan_surgery.models.slim_attention import attend, score_bias


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` whose heads are as wide as the projections make them.

    Args: as torch's. `query` is [L, B, E] or [L, E]; `num_heads` heads share the rows of the
        projections, whatever E is. More keys and values than projected ones (`bias_k`, `static_k`,
        `add_zero_attn`) are torch's own affair.
    """
    arguments = dict(locals())
    tensors = tuple(own for own in arguments.values() if isinstance(own, Tensor))
    if has_torch_function(tensors):
        result: tuple[Tensor, Tensor | None] = handle_torch_function(
            multi_head_attention_forward, tensors, **arguments
        )
        return result
    if bias_k is not None or static_k is not None or static_v is not None or add_zero_attn:
        return F.multi_head_attention_forward(**arguments)
    is_batched = query.ndim == 3
    sources = [x.transpose(0, 1) if is_batched else x.unsqueeze(0) for x in (query, key, value)]
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    packed: Any = in_proj_weight  # None where the projections are separate
    if not use_separate_proj_weight and query is key and key is value:
        parts = list(F.linear(sources[0], packed, in_proj_bias).chunk(3, dim=-1))
    else:
        separate: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if use_separate_proj_weight else packed.chunk(3)
        parts = [F.linear(x, w, b) for x, w, b in zip(sources, weights, biases, strict=True)]
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in parts)
    out, scores = attend(
        (q, k, v),
        score_bias(q, k, key_padding_mask, attn_mask, is_causal=False),
        dropout=dropout_p if training else 0.0,
        need_weights=need_weights,
        average=average_attn_weights,
    )
    out = F.linear(out, out_proj_weight, out_proj_bias)
    if is_batched:
        return out.transpose(0, 1), scores
    return out.squeeze(0), None if scores is None else scores.squeeze(0)


SLIM_FORMS: Mapping[str, Callable[..., Any]] = {
    "multi_head_attention_forward": multi_head_attention_forward
}
