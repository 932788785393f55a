"""What became of one weight."""

from dataclasses import dataclass

import torch


# Relative squared errors below are rounding of the sums (products in float32 or float64).
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}


@dataclass(frozen=True, slots=True)
class LayerCompensation:
    """One weight.

    Attributes:
        name: the parameter.
        before: squared error on held-out rows over their variance, with the old weights.
        after: the same with those it has now.
        reason: why it stayed as it was; empty where it was solved for anew.
    """

    name: str
    before: float
    after: float
    reason: str = ""

    def __str__(self) -> str:
        """One line."""
        if self.reason:
            return f"{self.name}: as it was ({self.reason})"
        return f"{self.name}: error {self.before:.3g} -> {self.after:.3g}"
