"""How gates learn under a budget: by the curvature of the loss, priced by what each unit costs.

A gate moves by a whole step, from 1 to 0, so its gradient alone does not say what closing it costs.
To second order, closing unit i changes the loss by -dL/dg_i + F_i / 2, with F_i = E[(dL/dg_i)^2], the
Fisher information, in place of the Hessian's diagonal. While the weights train along, the mean of
dL/dg_i stays near zero (scaling a unit is a direction the weights move in anyway) and F_i decides.
Within a layer returns diminish (`diminishing_returns`): v_i is what unit i adds to those that matter
more. It is worth its price at the exchange rate r, loss per share of the budget, where v_i > r c_i:

    z_i = log v_i - log(r c_i),    p_i = sigmoid(z_i) = v_i / (v_i + r c_i)

and r is what makes the open units fit the budget. Closed units keep their gradient (straight-through),
so F_i goes on being measured and a unit that turns out to be worth its price opens again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swan_surgery.gates import GatedModel
from swan_surgery.selection.diminishing_returns import DiminishingReturns
from swan_surgery.selection.limits import Limit
from swan_surgery.selection.ordering import prices_within
from swan_surgery.selection.widest_mask import widest_mask


# A probability of 0.2 % or 99.8 % is clear enough; beyond, soft gates would no longer tell units apart.
_LARGEST_LOGIT = 6.0
# How far a logit lies from the threshold at least, so that rounding cannot cross it.
_MARGIN = 1e-3


class CurvatureRule:
    """Writes the logits of a gated model from a running mean of (dL/dg)^2.

    Between calls the optimizer sees a zero gradient on the logits.
    """

    def __init__(self, gated: GatedModel, *, decay: float, diminishing: bool = True) -> None:
        """Attach to a gated model, which keeps this rule; one that was attached before hands over what it measured.

        Args:
            gated: the gated model; its logits are written by `project` from now on.
            decay: of the running mean, per call of `project`.
            diminishing: whether returns diminish within a layer; else v_i = F_i.
        """
        self._gated = gated
        self._decay = decay
        logits = gated.gates.logits
        self._pending = torch.zeros_like(logits, dtype=torch.float64)
        self._mean = torch.zeros_like(self._pending)
        self._weight = torch.zeros((), dtype=torch.float64)  # 0 until a gradient was seen
        self._returns: Callable[[Tensor], Tensor] | None = None
        if diminishing:
            self._returns = DiminishingReturns(gated.channels.unit_groups, gated.gates.num_units)
        # Until the first gradients: the order that the gates start in.
        self._start = gated.gates.probabilities().detach().double()
        before = gated.gates.rule
        if isinstance(before, CurvatureRule):
            # An objective made anew in every step, kept in no variable, goes on learning.
            self.load_state_dict(before.state_dict())
        gated.gates.attach(self)

    def observe(self, grad: Tensor) -> Tensor:
        """Take in a gradient on the gates; returns the zero gradient that the optimizer sees.

        In place: a captured CUDA graph goes on adding to the tensor that was here when it was captured.
        """
        if self._pending.device != grad.device:
            self._pending = self._pending.to(grad.device)
        self._pending += grad.detach()
        return torch.zeros_like(grad)

    @property
    def has_seen(self) -> bool:
        """Whether a gradient has reached it yet."""
        return bool(self._weight)

    def scores(self) -> Tensor:
        """F_i, float64 of shape (num_units,); only ratios of it matter."""
        device = self._gated.gates.logits.device
        weight = self._weight.to(device)
        return torch.where(weight > 0, self._mean.to(device) / weight, self._start.to(device))

    def _take_in(self) -> None:
        """One step of the running mean; all ranks of a process group agree on it."""
        device = self._gated.gates.logits.device
        if self._pending.device != device:
            self._pending = self._pending.to(device)
        grad = self._pending
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            grad = grad / torch.distributed.get_world_size()
            torch.distributed.all_reduce(grad)
            if not self.has_seen:
                # Every rank saw the weights it drew, before they were all given those of rank 0.
                self._start = self._start.to(grad.device)
                torch.distributed.broadcast(self._start, src=0)
        squares = grad.square()
        self._pending.zero_()
        # Not where there was no backward pass yet, or one that overflowed under a gradient scaler; asked
        # on the device, which a step does not wait for.
        is_new = squares.isfinite().all() & (squares > 0).any()
        mean, weight = self._mean.to(device), self._weight.to(device)
        self._mean = torch.where(is_new, self._decay * mean + (1 - self._decay) * squares, mean)
        self._weight = torch.where(is_new, self._decay * weight + 1 - self._decay, weight)

    @torch.no_grad()
    def project(self, limits: Sequence[Limit]) -> None:
        """Write the logits for limits: open are the units worth their price, as many as fit."""
        self._take_in()
        gates = self._gated.gates
        scores = self.scores()
        if self._returns is not None:
            scores = self._returns(scores)
        scores = scores.clamp(min=torch.finfo(torch.float64).tiny)
        worth = scores / prices_within(limits, gates.open_mask().double())
        order = worth.argsort(descending=True, stable=True)
        mask = widest_mask(self._gated, order, limits, least=gates.least_mask(worth))
        # The price at which the best closed unit stays closed; cheaper ones that fill the rest, and
        # those of minimum widths, are open below it.
        closed = worth.masked_fill(mask, -torch.inf).max()
        rate = torch.where(mask.all(), worth.min(), closed)
        z = (worth / rate).log().clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        z = torch.where(mask, z.clamp(min=_MARGIN), z.clamp(max=-_MARGIN))
        gates.logits.copy_(z)
        gates.threshold = 0.5

    def state_dict(self) -> dict[str, float | Tensor]:
        """What a resumed run needs."""
        return {
            "pending": self._pending.clone(),
            "mean": self._mean.clone(),
            "weight": float(self._weight),
            "start": self._start.clone(),
        }

    def load_state_dict(self, state: dict[str, float | Tensor]) -> None:
        """Restore what `state_dict` gave."""
        device = self._gated.gates.logits.device
        self._pending, self._mean, self._start = (
            torch.as_tensor(state[name], dtype=torch.float64, device=device).clone()
            for name in ("pending", "mean", "start")
        )
        self._weight = torch.as_tensor(state["weight"], dtype=torch.float64, device=device)
