"""What convolutional networks are made of: residuals, concatenations, groups, norms, resampling."""

import random

import torch
import torch.nn.functional as F
from kinds import Block, conv, kind, width
from torch import Tensor, nn


@kind("conv")
class Conv(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.layers = conv(channels, self.out_channels, rng.choice((1, 3)), norm=rng.random() < 0.7)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@kind("residual")
class Residual(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        hidden = width(rng)
        self.branch = nn.Sequential(
            conv(channels, hidden), nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


@kind("strided_projection")
class StridedProjection(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.main = nn.Conv2d(channels, self.out_channels, 3, 2, 1)
        self.short = nn.Conv2d(channels, self.out_channels, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.main(x)) + self.short(x)


@kind("dense_concat")
class DenseConcat(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        growth = width(rng)
        self.one = conv(channels, growth)
        self.two = conv(channels + growth, growth)
        self.out_channels = channels + 2 * growth

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in (self.one, self.two):
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


@kind("grouped_shuffle")
class GroupedShuffle(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels, self.groups = 8, rng.choice((2, 4))
        self.expand = nn.Conv2d(channels, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(self.expand(x)))
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2)
        return x.reshape(b, c, h, w)


@kind("written_shuffle")
class WrittenShuffle(Block):
    """The same with its width written into the code."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = 8
        self.expand = nn.Conv2d(channels, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(self.expand(x)))
        b, _, h, w = x.shape
        return x.view(b, 2, 4, h, w).transpose(1, 2).reshape(b, 8, h, w)


@kind("inverted_residual")
class InvertedResidual(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        hidden = 2 * channels
        self.expand = conv(channels, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.hardswish(self.norm(self.depthwise(self.expand(x)))))


@kind("squeeze_excite")
class SqueezeExcite(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.down = nn.Linear(channels, 4)
        self.up = nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


@kind("csp_split")
class CspSplit(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.enter = conv(channels, 8)
        self.inner = conv(4, 4)
        self.leave = conv(12, self.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        parts.append(self.inner(parts[-1]))
        return self.leave(torch.cat(parts, 1))


@kind("transposed")
class Transposed(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.up = nn.ConvTranspose2d(channels, self.out_channels, 2, 2)
        self.down = nn.Conv2d(self.out_channels, self.out_channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


@kind("pixel_shuffle")
class PixelShuffle(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.widen = nn.Conv2d(channels, 8, 1)
        self.narrow = nn.Conv2d(2, self.out_channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.relu(F.pixel_shuffle(self.widen(x), 2)))


@kind("gated_linear_unit")
class GatedLinearUnit(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.both = nn.Conv2d(channels, 2 * self.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.both(x), 1)


@kind("maxout")
class Maxout(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.both = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.both(x).split(self.channels, 1)
        return torch.maximum(one, two)


@kind("norms")
class Norms(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = 8
        self.enter = nn.Conv2d(channels, 8, 1)
        self.norm = rng.choice(
            (
                nn.GroupNorm(2, 8),
                nn.GroupNorm(1, 8),
                nn.GroupNorm(8, 8),
                nn.InstanceNorm2d(8, affine=True),
                nn.LocalResponseNorm(3),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.enter(x)))


@kind("convnext")
class ConvNext(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@kind("pyramid_pooling")
class PyramidPooling(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.reduce = conv(channels, 4, 1)
        self.fuse = conv(channels + 12, self.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        pooled = [F.adaptive_avg_pool2d(self.reduce(x), n) for n in (1, 2, 3)]
        pooled = [F.interpolate(p, size, mode="bilinear") for p in pooled]
        return self.fuse(torch.cat([x, *pooled], 1))


@kind("shared_conv")
class SharedConv(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.shared = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.shared(F.relu(self.shared(x))))


@kind("weight_norm")
class WeightNorm(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        layer = nn.Conv2d(channels, self.out_channels, 3, padding=1)
        self.layer = nn.utils.parametrizations.weight_norm(layer)
        self.after = conv(self.out_channels, self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(self.layer(x)))


@kind("weight_standardised")
class WeightStandardised(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.layer = nn.Conv2d(channels, self.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.layer.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.relu(F.conv2d(x, w, self.layer.bias, padding=1))


@kind("conditional_kernels")
class ConditionalKernels(Block):
    """CondConv: kernels mixed per sample, run as groups of one convolution."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = width(rng)
        self.bank = nn.Parameter(torch.randn(3, self.out_channels, channels, 3, 3) * 0.2)
        self.router = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        share = torch.sigmoid(self.router(x.mean((2, 3))))
        kernels = (share @ self.bank.flatten(1)).view(b * self.out_channels, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b)
        return F.relu(y.view(b, self.out_channels, h, w))


@kind("channel_shift")
class ChannelShift(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels, self.mode = 8, rng.choice(("roll", "flip", "slices"))
        self.enter, self.leave = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        if self.mode == "roll":
            return self.leave(x.roll(1, 1))
        if self.mode == "flip":
            return self.leave(x.flip(1))
        parts = [x[:, :3].roll(1, 2), x[:, 3:5].roll(-1, 3), x[:, 5:]]
        return self.leave(torch.cat(parts, 1))


@kind("padded_shortcut")
class PaddedShortcut(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.out_channels = channels + 4
        self.main = conv(channels, channels + 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + F.pad(x, (0, 0, 0, 0, 2, 2))


@kind("max_unpool")
class MaxUnpool(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # Where the cut left a flat map, rounding would choose among ties.
        ramp = torch.linspace(0, 1e-3, x.shape[2] * x.shape[3], dtype=x.dtype)
        small, index = F.max_pool2d(x + ramp.view(x.shape[2:]), 2, return_indices=True)
        return x + F.max_unpool2d(torch.sigmoid(self.inner(small)), index, 2, output_size=x.shape)


@kind("three_axes")
class ThreeAxes(Block):
    """A 3-d convolution over a made axis, then a 1-d convolution over the flattened map."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.volume = nn.Conv3d(channels, 6, (1, 3, 3), padding=(0, 1, 1))
        self.line = nn.Conv1d(6, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.volume(x.unsqueeze(2)).squeeze(2))
        return x + self.line(y.flatten(2)).view_as(x)


@kind("unfold_fold")
class UnfoldFold(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.enter = nn.Conv2d(channels, 4, 1)
        self.mix = nn.Linear(4 * 9, 6)
        self.leave = nn.Conv2d(6, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(F.relu(self.enter(x)), 3, padding=1).transpose(1, 2)
        y = self.mix(columns).transpose(1, 2).reshape(x.shape[0], 6, *x.shape[2:])
        return x + self.leave(y)
