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

    def least(self, logits: Tensor) -> Tensor:
        """The most probable unit of each group, which stays open: bool [..., units]."""
        parts = logits.detach().split(self.sizes, dim=-1)
        best = [F.one_hot(part.argmax(dim=-1), part.shape[-1]).bool() for part in parts]
        return torch.cat(best, dim=-1)

    def hard(self, logits: Tensor) -> Tensor:
        """Open where p >= 1/2; where that is nowhere in a group, its most probable unit: bool [..., units]."""
        return (logits.detach() >= 0) | self.least(logits)

    @staticmethod
    def with_gradients(hard: Tensor, logits: Tensor) -> Tensor:
        """The masks, 0 or 1 exactly, of the same shape.

        Bool without gradients; else of the type of the logits, whose gradient is that of p (Eq. 6).
        """
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return hard
        p = torch.sigmoid(logits)
        return hard.to(p.dtype) + (p - p.detach())

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.weight.shape[1]} features, {self.weight.shape[0]} units"


__all__ = ["START", "UnitGates"]
