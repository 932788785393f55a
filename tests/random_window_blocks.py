"""Attention inside windows of a map: Swin's, shifted and masked, and MaxViT's windows and grids."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import BLOCKS, BOTH, Shape, entry, register
from tests.random_token_layers import Mlp


def window_partition(x: Tensor, window: int) -> Tensor:
    """[B, H, W, C] -> [B * windows, window * window, C], as in Swin's reference code."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    windows = x.permute(0, 1, 3, 2, 4, 5).contiguous()
    return windows.view(-1, window * window, channels)


def window_reverse(windows: Tensor, window: int, height, width) -> Tensor:
    channels = windows.shape[-1]
    x = windows.view(-1, height // window, width // window, window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, channels)


def _relative_index(window: int) -> Tensor:
    steps = torch.arange(window)
    coords = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window - 1
    return relative[:, :, 0] * (2 * window - 1) + relative[:, :, 1]


def _shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    regions = torch.zeros(1, height, width, 1)
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    number = 0
    for rows in parts:
        for columns in parts:
            regions[:, rows, columns, :] = number
            number += 1
    regions = window_partition(regions, window).squeeze(-1)
    difference = regions.unsqueeze(1) - regions.unsqueeze(2)
    return torch.zeros_like(difference).masked_fill(difference != 0, -100.0)


class WindowAttention(nn.Module):
    """Swin's attention: tokens [B * windows, N, dim], a table of relative positions, a mask."""

    def __init__(self, dim, heads, head_dim, window, mask, options) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=options["bias"])
        self.proj = nn.Linear(heads * head_dim, dim)
        self.fused, self.cosine = options["fused"], options["cosine"]
        self.register_buffer("relative_position_index", _relative_index(window), persistent=False)
        self.register_buffer("attn_mask", mask, persistent=False)
        table = torch.zeros((2 * window - 1) ** 2, heads) if options["bias_table"] else None
        self.relative_position_bias_table = None if table is None else nn.Parameter(table)
        if self.cosine:
            self.logit_scale = nn.Parameter(torch.ones(heads, 1, 1))

    def _bias(self, length) -> Tensor | None:
        if self.relative_position_bias_table is None:
            return None
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        return bias.view(length, length, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        if not self.cosine:
            return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return scores * torch.clamp(self.logit_scale, max=4.0).exp()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._bias(self.relative_position_index.shape[0])
        if self.fused and self.attn_mask is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = self._scores(q, k)
            scores = scores if bias is None else scores + bias
            if self.attn_mask is not None:
                num_windows = self.attn_mask.shape[0]
                scores = scores.view(-1, num_windows, self.num_heads, length, length)
                scores = scores + self.attn_mask.unsqueeze(1).unsqueeze(0)
                scores = scores.view(-1, self.num_heads, length, length)
            out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, length, -1))


@register(
    BLOCKS,
    "window_attention",
    easy=True,
    heads=(2, 3, 1),
    head_dim=(2, 1, 3),
    window=(2, 3, 4),
    shift=BOTH,
    mask=BOTH,
    bias_table=(True, False),
    fused=(True, False),
    cosine=BOTH,
    bias=(True, False),
    mlp=BOTH,
    own=(True, False),
)
class WindowAttentionBlock(nn.Module):
    """A Swin block; a map that the window does not divide is padded behind its norm."""

    def __init__(
        self, shape: Shape, *, heads, head_dim, window, shift, mask, mlp, own, **options
    ):  # fmt: skip
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        window = min(window, shape[1], shape[2])
        self.window, self.shift = window, window // 2 if shift else 0
        self.pads = (-shape[1] % window, -shape[2] % window)
        height, width = shape[1] + self.pads[0], shape[2] + self.pads[1]
        has_mask = mask and self.shift
        blocked = _shift_mask(height, width, window, self.shift) if has_mask else None
        options["fused"] = options["fused"] and not options["cosine"]
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, head_dim, window, blocked, options)
        self.norm2 = nn.LayerNorm(dim) if mlp else None
        self.mlp = Mlp(dim, 4) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x).permute(0, 2, 3, 1)
        _, height, width, _ = x.shape
        out = self.norm1(x)
        if any(self.pads):
            out = F.pad(out, (0, 0, 0, self.pads[1], 0, self.pads[0]))
        if self.shift:
            out = torch.roll(out, shifts=(-self.shift, -self.shift), dims=(1, 2))
        padded = (height + self.pads[0], width + self.pads[1])
        out = self.attn(window_partition(out.contiguous(), self.window))
        out = window_reverse(out, self.window, *padded)
        if self.shift:
            out = torch.roll(out, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + (out[:, :height, :width, :] if any(self.pads) else out)
        if self.mlp is not None:
            x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2).contiguous()


@register(
    BLOCKS,
    "partition_attention",
    easy=True,
    heads=(2, 3, 1),
    head_dim=(2, 1, 3),
    form=("window", "grid"),
    core=("einsum", "sdpa"),
    bias_table=BOTH,
    own=(True, False),
)
class PartitionAttention(nn.Module):
    """MaxViT's windows and grids: [B, windows, positions, C] with the windows beside the batch."""

    def __init__(self, shape: Shape, *, heads, head_dim, form, core, bias_table, own):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.sizes = tuple(2 if size % 2 == 0 else size for size in shape[1:])
        self.is_grid, self.core, self.head_dim = form == "grid", core, head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.merge = nn.Linear(heads * head_dim, dim)
        length = self.sizes[0] * self.sizes[1]
        self.scores = nn.Parameter(torch.zeros(heads, length, length)) if bias_table else None

    def _attend(self, x: Tensor) -> Tensor:
        batch, windows, length, _ = x.shape
        size = (batch, windows, length, -1, self.head_dim)
        q, k, v = torch.chunk(self.to_qkv(x), 3, dim=-1)
        q = q.reshape(size).permute(0, 1, 3, 2, 4)
        k = k.reshape(size).permute(0, 1, 3, 2, 4)
        v = v.reshape(size).permute(0, 1, 3, 2, 4)
        if self.core == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.scores)
        else:
            dots = torch.einsum("bghid,bghjd->bghij", q, k * self.head_dim**-0.5)
            dots = dots if self.scores is None else dots + self.scores
            out = torch.einsum("bghij,bghjd->bghid", F.softmax(dots, dim=-1), v)
        return self.merge(out.permute(0, 1, 3, 2, 4).reshape(batch, windows, length, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        batch, channels, height, width = x.shape
        rows, columns = self.sizes
        if self.is_grid:
            parts = x.reshape(batch, channels, rows, height // rows, columns, width // columns)
            order, back = (0, 3, 5, 2, 4, 1), (0, 5, 3, 1, 4, 2)
        else:
            parts = x.reshape(batch, channels, height // rows, rows, width // columns, columns)
            order, back = (0, 2, 4, 3, 5, 1), (0, 5, 1, 3, 2, 4)
        fine = (height // rows, width // columns, rows, columns)
        tokens = parts.permute(order).reshape(batch, -1, rows * columns, channels)
        tokens = tokens + self._attend(self.norm(tokens))
        parts = tokens.reshape(batch, *fine, -1).permute(back)
        return parts.reshape(batch, -1, height, width).contiguous()
