"""The effort e(x) of a block for a sample, and the thresholds that make a width of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Effort(nn.Module):
    """A linear reading of pooled features, and one threshold per width but the narrowest.

    A sample takes every unit whose threshold its effort reaches: p_i(x) = sigmoid((e(x) - t_i) / T) >= 1/2.

    Attributes:
        weight: [1, features], `bias`: [1].
        thresholds: [levels - 1], ascending; minus infinity opens a level for all samples.
        temperature: T.
    """

    weight: Tensor
    bias: Tensor
    thresholds: Tensor
    temperature: Tensor

    def __init__(self, num_features: int, num_levels: int, *, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(1, num_features))
        self.bias = nn.Parameter(like.new_zeros(1))
        self.register_buffer("thresholds", like.new_full((num_levels - 1,), -torch.inf))
        self.register_buffer("temperature", like.new_ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """[B, features] -> [B]."""
        return F.linear(features, self.weight, self.bias).squeeze(1)

    def levels(self, efforts: Tensor) -> Tensor:
        """The level of each sample, [B] -> int64 [B]: how many thresholds its effort reaches."""
        return (efforts[:, None] >= self.thresholds).sum(1)

    def probabilities(self, efforts: Tensor) -> Tensor:
        """p_i(x) of the units that each level adds, [B] -> [B, levels]; the narrowest are always open."""
        own = torch.sigmoid((efforts[:, None] - self.thresholds) / self.temperature)
        return torch.cat([torch.ones_like(own[:, :1]), own], dim=1)

    def neighbours(self, efforts: Tensor) -> tuple[Tensor, Tensor]:
        """The level on the other side of the nearest threshold, int64 [B], and p of the wider of both, [B].

        p has gradients. Without a finite threshold the level is the effort's own.
        """
        found = efforts.detach()[:, None]
        nearest = self.thresholds[(found - self.thresholds).abs().argmin(1)][:, None]
        below = (self.thresholds < nearest).sum(1)
        above = (self.thresholds <= nearest).sum(1)
        beyond = torch.where((found >= nearest).squeeze(1), below, above)
        has_one = nearest.isfinite().squeeze(1)
        p = torch.sigmoid((efforts - nearest.squeeze(1)) / self.temperature)
        return torch.where(has_one, beyond, self.levels(efforts.detach())), p

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.weight.shape[1]} features, thresholds {self.thresholds.tolist()}"


def features_of(x: Tensor, *, channels_last: bool) -> Tensor:
    """Mean and root mean square of every channel, per sample: [B, C, ...] or [B, ..., C] -> [B, 2C].

    Nothing flows back from here into the network.
    """
    x = x.detach()
    if x.ndim == 2:
        return torch.cat([x, x.abs()], dim=1)
    axis = 1 if channels_last else 2
    rows = x.flatten(1, -2) if channels_last else x.flatten(2)
    length = torch.linalg.vector_norm(rows, dim=axis)
    return torch.cat([rows.mean(axis), length * rows.shape[axis] ** -0.5], dim=1)


__all__ = ["Effort", "features_of"]
