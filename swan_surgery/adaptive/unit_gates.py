"""The paper's gates of single units: p_i(x) = sigmoid(z_i + w_i . f(x)), hard at p >= 1/2."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# Of every gate before anything was fitted: open for all inputs.
START = 3.0


class UnitGates(nn.Module):
    """A linear reading of pooled features for each inner unit of a block (Eq. 1-6).

    Attributes:
        weight: [units, features]: w, zero at first.
        bias: [units]: z.
        sizes: units of each group, one after the other; one unit of each stays open for every sample.
    """

    def __init__(self, num_features: int, sizes: Sequence[int], *, like: Tensor) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.weight = nn.Parameter(like.new_zeros(sum(sizes), num_features))
        self.bias = nn.Parameter(like.new_full((sum(sizes),), START))

    def forward(self, features: Tensor) -> Tensor:
        """Logits, [B, features] -> [B, units]."""
        return F.linear(features, self.weight, self.bias)

    def masks(self, logits: Tensor) -> Tensor:
        """Open units of each sample, [B, units], 0 or 1 exactly.

        Bool without gradients; else of the type of the logits, whose gradient is that of p (Eq. 6).
        """
        own = logits.detach()
        is_open = [_one_open(part) for part in own.split(self.sizes, dim=1)]
        hard = torch.cat(is_open, dim=1)
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return hard
        p = torch.sigmoid(logits)
        return hard.to(p.dtype) + (p - p.detach())

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.weight.shape[1]} features, {self.weight.shape[0]} units"


def _one_open(logits: Tensor) -> Tensor:
    """Open where p >= 1/2; where that is nowhere, the most probable unit."""
    best = F.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
    return (logits >= 0) | (best & (logits < 0).all(dim=1, keepdim=True))


__all__ = ["START", "UnitGates"]
