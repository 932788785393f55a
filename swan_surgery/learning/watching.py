"""What an objective notices while it is called: that it asks for nothing, or that no gate learns."""

import warnings

import torch

from swan_surgery.errors import SwanWarning
from swan_surgery.gates import GatedModel
from swan_surgery.learning.curvature import CurvatureRule


# After so many calls without a change the gates will not learn any more; a step may take some dozen calls, where
# gradients of small batches are accumulated.
_PATIENCE = 100


class Watch:
    """Counts the calls of one objective, and warns once where nothing has reached the gates by then."""

    def __init__(self, gated: GatedModel, rule: CurvatureRule | None, *, asks: bool) -> None:
        """`asks`: whether the objective has a budget or a penalty."""
        self._gated, self._rule, self._asks = gated, rule, asks
        self._start = gated.gates.logits.detach().clone()
        self._calls = 0
        if not asks:
            warnings.warn(
                "this objective asks for nothing: give it a budget (macs=0.5, params=0.5, latency_ms=...) or a "
                "penalty (l0=, flops=, target_active=)",
                SwanWarning,
                stacklevel=3,
            )

    def __call__(self) -> None:
        """One more call."""
        self._calls += 1
        if self._calls != _PATIENCE or not self._asks:
            return
        if self._rule is not None:
            is_idle, how = (
                not self._rule.has_seen,
                "call loss.backward() on outputs of the gated model",
            )
        else:
            logits = self._gated.gates.logits.detach()
            is_idle = torch.equal(logits, self._start.to(logits.device))
            how = "give the optimizer swan.parameter_groups(gated, lr=...), and let it step"
        if is_idle:
            warnings.warn(
                f"the gates have learnt nothing in {_PATIENCE} calls of the objective: {how}. The model that "
                f"is trained must be the gated one",
                SwanWarning,
                stacklevel=4,
            )


__all__ = ["Watch"]
