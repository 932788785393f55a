"""Attention over channels or in linear time, which may be pinned: CBAM, ECA, cross-covariance, kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import BLOCKS, BOTH, WIDTHS, Shape, entry, register
from tests.random_token_layers import LayerNorm2d, Tokens


class ChannelGate(nn.Module):
    """CBAM's first half: one MLP on the mean and on the maximum over space."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        scale = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        return x * torch.sigmoid(scale)[:, :, None, None]


class SpatialGate(nn.Module):
    """CBAM's second half: mean and maximum over channels, as a map of two channels."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.mean(1, keepdim=True), torch.max(x, 1, keepdim=True)[0]), dim=1)
        return x * torch.sigmoid(self.conv(pooled))


class MeanGate(nn.Module):
    """A gate per position from the mean over channels alone."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.factor * x.mean(dim=1, keepdim=True))


class EfficientGate(nn.Module):
    """ECA: a 1-d convolution slides over the channels."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        scale = self.conv(pooled.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(scale).expand_as(x)


class GlobalContext(nn.Module):
    """GCNet: one softmax over positions pools the map; a bottleneck adds it back."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.mask = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            LayerNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.mask(x).flatten(2).softmax(dim=-1)
        context = torch.matmul(x.flatten(2), weights.transpose(1, 2)).unsqueeze(-1)
        return x + self.add(context)


class CBAM(nn.Sequential):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(ChannelGate(channels, hidden), SpatialGate(channels, hidden))


GATES = {
    "channel": ChannelGate,
    "spatial": SpatialGate,
    "cbam": CBAM,
    "mean": MeanGate,
    "eca": EfficientGate,
    "global_context": GlobalContext,
}


@register(
    BLOCKS, "attention_gate", width=WIDTHS, form=tuple(GATES), residual=BOTH, own=(True, False)
)
class AttentionGate(nn.Module):
    def __init__(self, shape: Shape, *, width, form, residual, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        self.gate, self.residual = GATES[form](channels, 3), residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return x + self.gate(x) if self.residual else self.gate(x)


class CrossCovariance(nn.Module):
    """XCiT: attention between the channels of a head, over normalised queries and keys."""

    def __init__(self, dim: int, heads: int, form: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.form = heads, dim // heads, form
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _split(self, x: Tensor):
        batch, length, dim = x.shape
        qkv = self.qkv(x)
        if self.form == "literal":
            qkv = qkv.reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
            return qkv.permute(2, 0, 3, 4, 1).unbind(0)
        q, k, v = qkv.chunk(3, dim=-1)
        size = (batch, length, -1, self.head_dim)
        return tuple(t.reshape(size).permute(0, 2, 3, 1) for t in (q, k, v))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(x)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Keys meet values before queries: a positive feature map, or two softmaxes."""

    def __init__(self, dim: int, heads: int, form: str) -> None:
        super().__init__()
        self.head_dim, self.form = dim // heads, form
        self.to_q, self.to_k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.to_v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def _meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.form == "softmax":
            return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-2, -1) @ v)
        if self.form == "relu":
            q, k = F.relu(q), F.relu(k)
            v = F.pad(v, (0, 1), value=1.0)
            out = q @ (k.transpose(-1, -2) @ v)
            return out[..., :-1] / (out[..., -1:] + 1.0)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhnd,bhne->bhde", k, v)
        total = torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=2)) + 1e-6
        return torch.einsum("bhnd,bhde,bhn->bhne", q, state, 1.0 / total)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[0], x.shape[1], -1, self.head_dim)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (t.view(size).transpose(1, 2) for t in (q, k, v))
        return self.proj(self._meet(q, k, v).transpose(1, 2).flatten(2))


class _MixerBlock(nn.Module):
    def __init__(self, shape: Shape, *, heads, head_dim, form, own):
        super().__init__()
        self.entry, dim = entry(shape, head_dim, own=own, multiple=heads)
        self.tokens, self.norm = Tokens(shape, dim, "plain"), nn.LayerNorm(dim)
        self.attn = self.mixer(dim, heads, form)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        tokens = self.tokens(x)
        return self.tokens.back(tokens + self.attn(self.norm(tokens)), x)


WIDE = {"heads": (2, 3, 1), "head_dim": (2, 1, 3), "own": (True, False)}


@register(BLOCKS, "cross_covariance", form=("dynamic", "literal"), **WIDE)
class CrossCovarianceBlock(_MixerBlock):
    mixer = CrossCovariance


@register(BLOCKS, "linear_attention", form=("elu", "relu", "softmax"), **WIDE)
class LinearAttentionBlock(_MixerBlock):
    mixer = LinearAttention
