"""What a map cannot or can hardly follow: sizes in numbers, statistics, sorting, other libraries."""

import random

import torch
import torch.nn.functional as F
from kinds import Block, conv, kind
from torch import Tensor, nn
from torchvision.ops import DeformConv2d


@kind("numel_in_numbers")
class NumelInNumbers(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.form = conv(channels, channels), rng.choice(("chw", "numel", "root"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        _, c, h, w = y.shape
        if self.form == "chw":
            return y * (y.sum((1, 2, 3), keepdim=True) / (c * h * w))
        if self.form == "numel":
            return y - y.sum() / y.numel()
        return y / (c * h * w) ** 0.5


@kind("flat_statistics")
class FlatStatistics(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.form = conv(channels, channels), rng.choice(("mean", "std", "norm", "max"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        flat = y.flatten(1)
        if self.form == "mean":
            s = flat.mean(1)
        elif self.form == "std":
            s = flat.std(1) + 0.1
        elif self.form == "norm":
            s = flat.norm(dim=1) + 0.1
        else:
            s = flat.amax(1) + 0.1
        return y / (s.abs() + 0.5).view(-1, 1, 1, 1)


@kind("tied_reshape")
class TiedReshape(Block):
    """A view that mixes channels with columns and back."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        b, c, h, w = y.shape
        return y.transpose(1, 3).reshape(b, c, h, w) + x


@kind("channel_softmax")
class ChannelSoftmax(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.form = conv(channels, channels), rng.choice(("softmax", "cumsum", "sort"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.form == "softmax":
            return x * y.softmax(1)
        return y.cumsum(1) if self.form == "cumsum" else y.sort(1).values


@kind("normalised_channels")
class NormalisedChannels(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.normalize(self.layer(x), dim=1)
        near = (y * F.normalize(x, dim=1)).sum(1, keepdim=True)
        return x * near


@kind("deformable")
class Deformable(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.offset = nn.Conv2d(channels, 18, 3, padding=1)
        self.layer = DeformConv2d(channels, 6, 3, padding=1)
        self.out_channels = 6

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x, 0.1 * self.offset(x)))


@kind("spectrum")
class Spectrum(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.layer(x), norm="ortho")
        return x + torch.fft.irfft2(spectrum * 0.5, s=x.shape[-2:], norm="ortho")


@kind("through_numpy")
class ThroughNumpy(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.form = conv(channels, channels), rng.choice(("numpy", "item", "list"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.form == "numpy":
            return y * float(y.detach().numpy().mean())
        if self.form == "item":
            return y * (1 + abs(y.detach().amax().item()))
        return y + torch.tensor(y.detach().mean((0, 2, 3)).tolist(), dtype=y.dtype)[:, None, None]


@kind("conditional")
class Conditional(Block):
    """torch.cond on the data."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.one, self.two = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.one, lambda t: self.two(t).relu(), (x,))


@kind("data_in_python")
class DataInPython(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.one, self.two = conv(channels, channels), conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y) if bool((y.mean() > 1e3).item()) else y


@kind("fake_quantised")
class FakeQuantised(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = conv(channels, channels)
        self.step = nn.Parameter(torch.full((channels, 1, 1), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        rounded = (y / self.step).round() * self.step
        return y + (rounded - y).detach()


@kind("learned_threshold")
class LearnedThreshold(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)
        self.low = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.where(y > self.low, y, self.low * 0.1 + torch.zeros_like(y))


@kind("gram_matrix")
class GramMatrix(Block):
    """Sums over channels that nothing else reads, and a channel-by-channel product."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.form = conv(channels, 6), rng.choice(("energy", "gram"))
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.form == "energy":
            return self.out(x) * y.square().sum(1, keepdim=True).sigmoid()
        flat = y.flatten(2)
        gram = flat @ flat.transpose(1, 2) / flat.shape[2]
        return self.out(x) * gram.square().mean((1, 2)).view(-1, 1, 1, 1).sigmoid()


@kind("mask_of_mixture")
class MaskOfMixture(Block):
    """Separation: masks [B, 2, C, H, W] times the encoded mixture, summed."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.encode = conv(channels, 6)
        self.masks, self.decode = nn.Conv2d(6, 12, 1), nn.Conv2d(6, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixture = self.encode(x)
        b, c, h, w = mixture.shape
        masks = torch.sigmoid(self.masks(mixture)).view(b, 2, c, h, w)
        sources = masks * mixture.unsqueeze(1)
        return self.decode(sources.flatten(0, 1)).view(b, 2, -1, h, w).sum(1)


@kind("batch_statistics")
class BatchStatistics(Block):
    """The standard deviation over the batch as one more channel (StyleGAN's discriminator)."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.after = conv(channels, 6), nn.Conv2d(7, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        spread = (y.var(0, unbiased=False) + 1e-8).sqrt().mean()
        return self.after(torch.cat((y, spread.expand(len(y), 1, *y.shape[2:])), 1))


@kind("demodulated")
class Demodulated(Block):
    """StyleGAN2: weights scaled per sample by a style and brought back to unit norm."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.randn(6, channels, 3, 3) * 0.3)
        self.style = nn.Linear(channels, channels)
        self.out_channels = 6

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        style = self.style(x.mean((2, 3))) + 1
        weight = self.weight[None] * style[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight.flatten(0, 1), padding=1, groups=b)
        return F.leaky_relu(y.view(b, 6, h, w), 0.2)


@kind("correlation")
class Correlation(Block):
    """A cost volume: products of shifted maps, averaged over channels."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.features, self.read = conv(channels, 6), nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        volume = [(y * y.roll(shift, 3)).mean(1, keepdim=True) for shift in (-1, 0, 1)]
        return x + self.read(torch.cat(volume, 1))


@kind("complex_numbers")
class ComplexNumbers(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.layer, self.leave = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).permute(0, 2, 3, 1)
        z = torch.view_as_complex(y.reshape(*y.shape[:-1], 4, 2).contiguous())
        z = z * torch.polar(torch.ones_like(z.real), torch.ones_like(z.real))
        return x + self.leave(torch.view_as_real(z).flatten(-2).permute(0, 3, 1, 2))


@kind("bilinear_pair")
class BilinearPair(Block):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.pair = nn.Bilinear(channels, channels, 5)
        self.scale = nn.Linear(5, channels)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.mean((2, 3)), x.amax((2, 3))
        return x * torch.sigmoid(self.scale(self.pair(one, two)))[..., None, None]


@kind("recursive_scan")
class RecursiveScan(Block):
    """A state-space scan over columns, one state per channel."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels)
        self.enter = nn.Conv2d(channels, channels, 1)
        self.decay = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        state, states = torch.zeros_like(y[..., 0]), []
        for column in y.unbind(-1):
            state = state * torch.sigmoid(self.decay)[:, None] + column
            states.append(state)
        return torch.stack(states, -1)
