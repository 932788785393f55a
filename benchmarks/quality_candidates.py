"""Other ways to learn gates by their gradient, from the literature; `quality.py` compares them.

Each changes one thing about `learning="gradient"` (straight-through gates, SGD on the logits, a
multiplier on the expected cost, a threshold that meets the budget); none is part of the package.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.gates.readings import Reading


# Louizos et al. (arXiv:1712.01312), section 4: the temperature and the stretch they used.
_HARD_CONCRETE = {"temperature": 2 / 3, "low": -0.1, "high": 1.1}
# The logits end this many times as steep as they began.
_STEEPEST = 10.0


@dataclass(frozen=True)
class HardConcrete:
    """A reading: gates sampled from the stretched and clipped concrete distribution (Eqs. 10-11)."""

    def __call__(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values."""
        del is_open
        beta, low, high = _HARD_CONCRETE.values()
        noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).logit()
        return (((noise + logits) / beta).sigmoid() * (high - low) + low).clamp(0, 1)

    forward_alone = __call__


def hard_concrete(gated: swan.GatedModel, steps: int) -> None:
    """In training gates are read as samples; the logits learn as they do elsewhere."""
    del gated, steps


def annealed(gated: swan.GatedModel, steps: int) -> Callable[[nn.Module], None]:
    """Soft gates sigmoid(z / T) with T falling from 1 to 0.1: the logits grow by a factor per step."""
    gated.gates.mode = "soft"
    factor = _STEEPEST ** (1 / steps)

    @torch.no_grad()
    def each(model: nn.Module) -> None:
        del model
        gated.gates.logits.mul_(factor)

    return each


def normalised_steps(gated: swan.GatedModel, steps: int) -> Callable[[nn.Module], None]:
    """Each logit's gradient over the running root mean square of it, as in RMSprop."""
    del steps
    square = torch.zeros_like(gated.gates.logits)

    @torch.no_grad()
    def each(model: nn.Module) -> None:
        del model
        gradient = gated.gates.logits.grad
        if gradient is not None:
            square.mul_(0.9).addcmul_(gradient, gradient, value=0.1)
            gradient.div_(square.sqrt() + 1e-12)

    return each


# What gates are read as in training, where it is not their mode.
READINGS: dict[str, Reading] = {"hard-concrete": HardConcrete()}
CANDIDATES: dict[str, Callable[[swan.GatedModel, int], Callable[[nn.Module], None] | None]] = {
    "hard-concrete": hard_concrete,
    "annealed": annealed,
    "normalised": normalised_steps,
}
