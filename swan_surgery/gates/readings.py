"""What a gate's value is: one small class for each way to read it off the logits.

A reading is a function of a logit z and of whether its unit is open, element by element, so the same
reading serves all gates at once and those of one layer alone. A bank holds one for training and one
for evaluation; `GateBank.reading_as` puts another in their place for a block.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Reading(Protocol):
    """Values of gates from their logits and whether they are open; both of one shape."""

    def __call__(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values, in the type of the logits."""
        ...

    def forward_alone(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values without what carries gradients, by as few operations as that takes."""
        ...


@dataclass(frozen=True, slots=True)
class Hard:
    """1 where open, else 0; no gradient (Eq. 4)."""

    def __call__(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values."""
        return is_open.to(logits.dtype)

    forward_alone = __call__


@dataclass(frozen=True, slots=True)
class Soft:
    """P = sigmoid(z) (Eq. 3)."""

    def __call__(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values."""
        del is_open
        return torch.sigmoid(logits)

    def forward_alone(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values."""
        return self(logits.detach(), is_open)


@dataclass(frozen=True, slots=True)
class StraightThrough:
    """Forward exactly the hard gate, backward as p (Eq. 6, paper section 2.4)."""

    def __call__(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values."""
        p = torch.sigmoid(logits)
        return is_open.to(p.dtype) + (p - p.detach())

    def forward_alone(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The hard values."""
        return HARD(logits, is_open)


@dataclass(frozen=True, slots=True)
class Measured:
    """Forward as another reading; the gradient on a logit is dL/dg itself, without p(1-p).

    So it stays whatever the logits become before the backward pass.
    """

    forward: Reading

    def __call__(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values."""
        return self.forward_alone(logits, is_open) + (logits - logits.detach())

    def forward_alone(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values of the other reading."""
        return self.forward.forward_alone(logits, is_open)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """As another reading, with a mask of all units in place of what the logits say is open."""

    mask: Tensor
    forward: Reading

    def __call__(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values."""
        return self.forward(logits, is_open)

    def forward_alone(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values of the other reading."""
        return self.forward.forward_alone(logits, is_open)


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """The values are those of a tensor of all units, whose `grad` becomes dL/dg."""

    values: Tensor

    def __call__(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values; the bank hands in `values` where it else hands in logits."""
        del is_open
        return logits

    def forward_alone(self, logits: Tensor, is_open: Tensor) -> Tensor:
        """The values."""
        return self(logits.detach(), is_open)


HARD, SOFT, STRAIGHT_THROUGH = Hard(), Soft(), StraightThrough()
