"""FleS: an activation whose height and steepness the network sets itself, per sample and channel.

Cai et al., "Toward Principled Flexible Scaling for Self-Gated Neural Activation": phi(x) = kappa_ve rho(kappa_ho x) x.
For any f(x) = rho(x) x this is kappa_ve f(kappa_ho x) / kappa_ho, which is f while both kappas are 1, and the
paper's for f = SiLU. Of a positively homogeneous f (ReLU) the horizontal scale cancels; there f is blended
with SiLU, from nothing on.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swan_surgery.activations.places import Axes
from swan_surgery.activations.pointwise import Function


# The poster says "lightweight MLPs" and the issue a reduction of 32; the parameters that it gives for
# Swin, ViT and PoolFormer are those of one first layer that both scales share.
REDUCTION = 32
_NARROWEST = 4

Statistics = Literal["positive", "all", "batch", "token", "none"]


def along(vector: Tensor, axes: Axes, x: Tensor) -> Tensor:
    """A vector of one number per channel, [C], against a tensor and in its type: autocast runs activations in half."""
    for _ in range(x.ndim - 1 - axes.channels):
        vector = vector.unsqueeze(-1)
    return vector.to(x.dtype)


def _times(own: Tensor, factor: Tensor) -> Tensor:
    """A product with a tensor that nobody else reads: in place where no gradient needs it.

    What is new costs as much again as the product on a CPU, and twice the memory.
    """
    return own * factor if torch.is_grad_enabled() else own.mul_(factor)


def _of_own(function: nn.Module, own: Tensor) -> Tensor:
    """A function of a tensor that nobody else reads: in place where no gradient needs it."""
    in_place = isinstance(function, (Function, Blend)) and not torch.is_grad_enabled()
    out: Tensor = function(own, in_place=True) if in_place else function(own)
    return out


class Blend(nn.Module):
    """f + b (g - f) with b per channel, which starts at 0: f itself."""

    def __init__(self, base: nn.Module, other: nn.Module, *, channels: int, axes: Axes) -> None:
        """`base`: f, `other`: g; `channels` lie along `axes.channels` of what they are given."""
        super().__init__()
        self.base, self.other, self.axes = base, other, axes
        self.share = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:  # [...] -> [...]
        """Between the two; with `in_place`, x may be lost."""
        given = self.base(x)
        other = (_of_own(self.other, x) if in_place else self.other(x)).to(given.dtype)
        share = along(self.share, self.axes, given)
        return given.lerp_(other, share) if in_place else torch.lerp(given, other, share)


class PositiveMean(nn.Module):
    """The mean over the positive entries of each channel, 0 where there are none; channels come last."""

    def __init__(self, axes: Axes, statistics: Statistics) -> None:
        """`statistics`: over what the mean is taken."""
        super().__init__()
        self.axes, self.statistics = axes, statistics

    def forward(
        self, x: Tensor
    ) -> Tensor:  # [B, ..., C, ...] -> [B, 1, ..., C], or as x for tokens
        """Per sample; over the batch for "batch", per position for "token"."""
        over = self.axes.of_positions(x.ndim)
        if self.statistics == "batch" and self.axes.samples is not None:
            over = (self.axes.samples, *over)
        if self.statistics == "all":
            mean = x.mean(over, keepdim=True) if over else x
        else:
            positive = F.relu(x)
            mean = positive
            if over and self.statistics != "token":
                total = positive.sum(over, keepdim=True)
                # Six times as fast on a CPU as counting where x > 0.
                ones = positive.detach().sign() if torch.is_grad_enabled() else positive.sign_()
                mean = total / ones.sum(over, keepdim=True).clamp(min=1)
        return mean.transpose(self.axes.channels, -1)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.statistics}, channels on axis {self.axes.channels}"


class Scales(nn.Module):
    """kappa_ve and kappa_ho from channel means: exp of an MLP, both 1 at the start."""

    def __init__(self, channels: int) -> None:
        """`channels`: of what is read and scaled."""
        super().__init__()
        hidden = max(_NARROWEST, -(-channels // REDUCTION))
        self.reduce = nn.Linear(channels, hidden)
        self.vertical, self.horizontal = nn.Linear(hidden, channels), nn.Linear(hidden, channels)
        for last in (self.vertical, self.horizontal):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:  # [..., C] -> twice [..., C]
        """Both scales."""
        hidden = F.relu(self.reduce(mean))
        return self.vertical(hidden).exp(), self.horizontal(hidden).exp()


class FleS(nn.Module):
    """phi(x) = kappa_ve f(kappa_ho x) / kappa_ho, the kappas from the statistics of each sample's channels."""

    def __init__(
        self, base: nn.Module, *, channels: int, axes: Axes, statistics: Statistics = "positive"
    ) -> None:
        """Make one that computes `base`.

        Args:
            base: f.
            channels: how many there are.
            axes: where they lie.
            statistics: what the kappas are made of: the mean of the "positive" entries or of "all" (the
                paper's FleS-P&N), that of the whole "batch" (FleS-Proto), of each "token" by itself.
        """
        super().__init__()
        self.base, self.axes = base, axes
        self.mean = PositiveMean(axes, statistics)
        self.scales = Scales(channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, ..., C, ...] -> the same
        """The activation."""
        vertical, horizontal = self.kappas(x)
        return _times(_of_own(self.base, horizontal * x), vertical / horizontal)

    def kappas(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """kappa_ve and kappa_ho, broadcastable to x."""
        vertical, horizontal = (own.to(x.dtype) for own in self.scales(self.mean(x)))
        channels = self.axes.channels
        return vertical.transpose(channels, -1), horizontal.transpose(channels, -1)


class LearntScales(nn.Module):
    """FleS-DG: the same, but the kappas are learnt per channel and see no statistics."""

    def __init__(self, base: nn.Module, *, channels: int, axes: Axes) -> None:
        """As of `FleS`."""
        super().__init__()
        self.base, self.axes = base, axes
        self.vertical, self.horizontal = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # [..., C, ...] -> the same
        """The activation."""
        vertical, horizontal = self.kappas(x)
        return _times(_of_own(self.base, horizontal * x), vertical / horizontal)

    def kappas(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """kappa_ve and kappa_ho, broadcastable to x."""
        vertical, horizontal = (
            along(own.exp(), self.axes, x) for own in (self.vertical, self.horizontal)
        )
        return vertical, horizontal
