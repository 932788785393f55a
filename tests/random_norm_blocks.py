"""Blocks around norms over channels: LayerNorm in convnets, RMSNorm, GroupNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import (
    ACTIVATIONS,
    BLOCKS,
    BOTH,
    WIDTHS,
    Shape,
    conv_stack,
    entry,
    register,
)
from tests.random_token_layers import RMS_NORMS, LayerNorm2d, LayerScale


def _channels_last(x: Tensor, norm: nn.Module) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Around(nn.Module):
    """A norm alone, in front of a convolution, or as a pre-norm residual branch."""

    def __init__(self, norm: nn.Module, channels: int, use: str, activation: str = "none") -> None:
        super().__init__()
        self.norm, self.use = norm, use
        self.activation = ACTIVATIONS[activation](channels)
        self.conv = nn.Identity() if use == "plain" else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(self.activation(self.norm(x)))
        return x + out if self.use == "residual" else out


USES = ("plain", "conv", "residual")


class _OverChannels(nn.Module):
    """One way to call layer-norm on the channels of a map."""

    def __init__(self, channels: int, size: tuple[int, int], form: str, options: dict) -> None:
        super().__init__()
        self.form = form
        if form == "torchvision":
            self.norm = LayerNorm2d(channels, eps=1e-6, **options)
        elif form == "full":
            self.norm = nn.LayerNorm([channels, *size], **options)
        else:
            self.norm = nn.LayerNorm(channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.form in ("torchvision", "full"):
            return norm(x)
        if self.form == "functional":
            out = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), norm.weight, norm.bias)
            return out.permute(0, 3, 1, 2)
        if self.form == "tokens":
            return norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        if self.form == "movedim":
            return norm(x.movedim(1, -1)).movedim(-1, 1)
        return _channels_last(x, norm)


AFFINE = {"affine": {}, "no_bias": {"bias": False}, "none": {"elementwise_affine": False}}


@register(
    BLOCKS,
    "layer_norm2d",
    easy=True,
    width=WIDTHS,
    form=("module", "torchvision", "full", "functional", "tokens", "movedim"),
    affine=tuple(AFFINE),
    use=USES,
    activation=("none", "relu", "gelu"),
    own=(True, False),
)
class LayerNormBlock(nn.Module):
    def __init__(self, shape: Shape, *, width, form, affine, use, activation, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        norm = _OverChannels(channels, shape[1:], form, AFFINE[affine])
        self.layers = _Around(norm, channels, use, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.entry(x)).contiguous()


class HandLayerNorm(nn.Module):
    """Mean and variance over dim 1 written out, as in ConvNeXt's and SegFormer's reference code."""

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        self.form, self.eps = form, 1e-6
        shape = (1, channels, 1, 1) if form == "broadcast" else (channels,)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "broadcast":
            var = torch.var(x, dim=1, unbiased=False, keepdim=True)
            return (x - x.mean(1, keepdim=True)) / (var + self.eps).sqrt() * self.weight + self.bias
        if self.form == "var_mean":
            var, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
            x = (x - mean) * torch.rsqrt(var + self.eps)
        elif self.form == "moments":
            mean = x.mean(1, keepdim=True)
            x = (x - mean) / torch.sqrt((x * x).mean(1, keepdim=True) - mean * mean + self.eps)
        else:
            u = x.mean(1, keepdim=True)
            s = (x - u).pow(2).mean(1, keepdim=True)
            x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


@register(
    BLOCKS,
    "layer_norm_by_hand",
    width=WIDTHS,
    form=("convnext", "broadcast", "var_mean", "moments"),
    use=USES,
    own=(True, False),
)
class LayerNormByHand(nn.Module):
    def __init__(self, shape: Shape, *, width, form, use, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        self.layers = _Around(HandLayerNorm(channels, form), channels, use)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.entry(x))


@register(
    BLOCKS,
    "rms_norm",
    easy=True,
    width=WIDTHS,
    form=tuple(RMS_NORMS),
    use=("plain", "mlp", "residual"),
    own=(True, False),
)
class RMSNormBlock(nn.Module):
    def __init__(self, shape: Shape, *, width, form, use, own):
        super().__init__()
        self.entry, dim = entry(shape, width, own=own)
        self.norm = RMS_NORMS[form](dim)
        self.use = use
        self.fc = nn.Identity() if use == "plain" else nn.Linear(dim, dim, bias=False)
        self.scale = LayerScale(dim) if use == "residual" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        out = self.fc(self.norm(x.permute(0, 2, 3, 1)))
        out = self.scale(F.silu(out)).permute(0, 3, 1, 2).contiguous()
        return x + out if self.use == "residual" else out


@register(
    BLOCKS,
    "group_norm",
    easy=True,
    width=WIDTHS,
    groups=("one", "two", "three", "channels"),
    affine=(True, False),
    functional=BOTH,
    activation=("silu", "none", "relu"),
    use=(*USES, "diffusion"),
    own=(True, False),
)
class GroupNormBlock(nn.Module):
    """GroupNorm in every grouping; `diffusion` is the norm-SiLU-conv block of diffusion UNets."""

    def __init__(self, shape: Shape, *, width, groups, affine, functional, activation, use, own):
        super().__init__()
        multiple = {"two": 2, "three": 3}.get(groups, 1)
        self.entry, channels = entry(shape, width, own=own, multiple=multiple)
        num_groups = channels if groups == "channels" else multiple
        self.norm = nn.GroupNorm(num_groups, channels, affine=affine)
        self.functional = functional
        self.layers = None
        if use == "diffusion":
            self.layers = nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(num_groups, channels, eps=1e-6, affine=affine),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
        else:
            self.act = ACTIVATIONS[activation](channels)
            self.conv = (
                nn.Identity() if use == "plain" else conv_stack(channels, channels, bn=False)
            )
        self.is_residual = use in ("residual", "diffusion")

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        norm = self.norm
        if self.functional:
            out = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        else:
            out = norm(x)
        out = self.conv(self.act(out)) if self.layers is None else self.layers(out)
        return x + out if self.is_residual else out
