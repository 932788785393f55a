"""Easy blocks, second part: depthwise and grouped convolutions, squeeze-excite, channel shuffle."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from tests.random_layers import (
    ACTIVATIONS,
    BLOCKS,
    WIDTHS,
    Shape,
    conv_stack,
    entry,
    register,
    stride_for,
)


@register(
    BLOCKS,
    "depthwise",
    easy=True,
    width=WIDTHS,
    form=("separable", "bare", "inverted"),
    multiplier=(1, 2),
    stride=(1, 2),
    own=(True, False),
    activation=("relu", "relu6", "hardswish"),
)
class Depthwise(nn.Module):
    """Depthwise convolution alone, with a pointwise one behind it, or as an inverted residual."""

    def __init__(self, shape: Shape, *, width, form, multiplier, stride, own, activation):
        super().__init__()
        self.is_residual = form == "inverted"
        stride = 1 if self.is_residual else stride_for(shape, stride)
        self.entry, channels = entry(shape, width, own=own)
        out = channels * multiplier
        self.depthwise = conv_stack(
            channels, out, stride=stride, groups=channels, activation=activation
        )
        last = shape[0] if self.is_residual else width
        self.pointwise = (
            nn.Identity() if form == "bare" else conv_stack(out, last, kernel=1, activation="none")
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.pointwise(self.depthwise(self.entry(x)))
        return x + out if self.is_residual else out


@register(
    BLOCKS,
    "grouped",
    easy=True,
    width=WIDTHS,
    groups=(2, 3),
    form=("dense", "bare", "residual", "twice"),
    own=(True, False),
)
class Grouped(nn.Module):
    """Grouped convolution fed by a dense one (or the trunk) and feeding a dense one (or the trunk)."""

    def __init__(self, shape: Shape, *, width, groups, form, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own, multiple=groups)
        self.form = form
        out = channels if form == "residual" else groups * 2
        self.grouped = conv_stack(channels, out, groups=groups)
        self.exit = nn.Identity()
        if form == "dense":
            self.exit = conv_stack(out, width, kernel=1)
        elif form == "twice":
            self.exit = conv_stack(out, groups * width, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        out = self.exit(self.grouped(x))
        return out + x if self.form == "residual" else out


@register(
    BLOCKS,
    "squeeze_excite",
    easy=True,
    width=WIDTHS,
    form=("conv", "linear", "torchvision"),
    gate=("sigmoid", "hardsigmoid", "none"),
    combine=("multiply", "add", "residual"),
    own=(True, False),
)
class SqueezeExcite(nn.Module):
    def __init__(self, shape: Shape, *, width, form, gate, combine, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        self.form, self.combine = form, combine
        if form == "torchvision":
            self.squeeze = SqueezeExcitation(channels, width)
            return
        is_linear = form == "linear"
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Linear(channels, width) if is_linear else nn.Conv2d(channels, width, 1)
        self.expand = nn.Linear(width, channels) if is_linear else nn.Conv2d(width, channels, 1)
        self.gate = ACTIVATIONS[gate](channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.form == "torchvision":
            return self.squeeze(x)
        pooled = x.mean((2, 3)) if self.form == "linear" else self.pool(x)
        scale = self.gate(self.expand(F.relu(self.reduce(pooled))))
        if self.form == "linear":
            scale = scale.view(x.size(0), -1, 1, 1)
        if self.combine == "add":
            return x + scale
        return x * scale if self.combine == "multiply" else x + x * scale


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Torchvision's channel shuffle: every size is read from the tensor."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


@register(
    BLOCKS,
    "shuffle",
    easy=True,
    width=WIDTHS,
    form=("unit", "dynamic", "shape", "module", "downsampling"),
    groups=(2, 3),
    own=(True, False),
)
class Shuffle(nn.Module):
    """Channel shuffle behind a grouped convolution, or the two units of ShuffleNetV2."""

    def __init__(self, shape: Shape, *, width, form, groups, own):
        super().__init__()
        is_unit = form in ("unit", "downsampling")
        groups = 2 if is_unit else groups
        self.form, self.groups = form, groups
        self.entry, channels = entry(shape, width, own=own, multiple=groups)
        if form == "unit":
            half = channels // 2
            self.branch = nn.Sequential(
                conv_stack(half, half, kernel=1),
                conv_stack(half, half, groups=half, activation="none"),
                conv_stack(half, half, kernel=1),
            )
        elif form == "downsampling":
            stride = stride_for(shape, 2)
            self.left = nn.Sequential(
                conv_stack(channels, channels, stride=stride, groups=channels, activation="none"),
                conv_stack(channels, width, kernel=1),
            )
            self.right = conv_stack(channels, width, stride=stride)
        else:
            self.grouped = conv_stack(channels, channels, groups=groups)
            self.module = nn.ChannelShuffle(groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.form == "unit":
            left, right = x.chunk(2, dim=1)
            return shuffle_channels(torch.cat((left, self.branch(right)), dim=1), 2)
        if self.form == "downsampling":
            return shuffle_channels(torch.cat((self.left(x), self.right(x)), dim=1), 2)
        x = self.grouped(x)
        if self.form == "module":
            return self.module(x)
        if self.form == "dynamic":
            return shuffle_channels(x, self.groups)
        split = (x.shape[0], self.groups, -1, x.shape[2], x.shape[3])
        return x.reshape(split).transpose(1, 2).reshape(x.shape)
