"""What training adds to its loss: SWAN's regularisers, their ramps, and a MAC budget.

Equations of the paper (arXiv:2603.06601). Every term is normalised to [0, 1] before its coefficient:
R0 / N (Eq. 9), RF / sum c (Eq. 10), RT as it is (Eq. 12); the raw values are logged beside. The
gradient on a logit is the chain rule through p = sigmoid(z), so the factor p(1-p) that Eq. 15
prints on its first term stands on every term:

    dL/dz_i = p_i(1-p_i) * (<dL/dh~_i, h_i> + l0/N + flops c_i/sum c + 2 target/N max(0, a - a*))
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from swan_surgery.cost import CostTable, cost_table, marginal_macs
from swan_surgery.errors import BudgetError, InputError
from swan_surgery.gates import GatedModel
from swan_surgery.preconditions import check_gated


@dataclass(frozen=True, slots=True)
class CosineRamp:
    """The delayed cosine ramp of Eq. 14: 0 until `delay`, 1 from `delay + length` on (epochs).

    Example:
        >>> ramp = CosineRamp(delay=2, length=4)
        >>> [round(ramp(t), 3) for t in (0, 2, 4, 6, 9)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    delay: float = 0.0
    length: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative times."""
        if self.delay < 0 or self.length < 0:
            raise InputError(f"delay and length must not be negative; got {self}")

    def __call__(self, epoch: float) -> float:
        """The factor at a (fractional) epoch, in [0, 1]."""
        if epoch <= self.delay:
            return 0.0
        if self.length == 0:
            return 1.0
        return 0.5 * (1 - cos(pi * min(1.0, (epoch - self.delay) / self.length)))


# How fast the multiplier of the budget grows with the excess, per call.
_MULTIPLIER_RATE = 0.1
# The threshold is left alone while the hard MACs lie within this share below the budget.
_BUDGET_SLACK = 0.005


class Objective:
    """The penalty of Eq. 8 and, with `macs=`, the drive to a MAC budget.

    Example:
        >>> objective = Objective(gated, macs=0.5, ramp=CosineRamp(1, 4))  # doctest: +SKIP
        >>> loss = task_loss + objective(epoch)  # doctest: +SKIP
    """

    def __init__(
        self,
        gated: GatedModel,
        *,
        l0: float = 0.0,
        flops: float = 0.0,
        target_active: float | None = None,
        target_weight: float = 1.0,
        macs: float | None = None,
        ramp: CosineRamp | Mapping[str, CosineRamp] = CosineRamp(),
    ) -> None:
        """Make an objective.

        Args:
            gated: the gated model.
            l0: lambda_0, on the mean probability (Eq. 9).
            flops: lambda_F, on the MAC-weighted mean probability (Eq. 10).
            target_active: alpha* in (0, 1], the mean probability above which Eq. 12 penalises.
            target_weight: lambda_T.
            macs: share of the base model's MACs to arrive at, in (0, 1]. Each call lowers the
                budget along its ramp, moves `gated.gates.threshold` so that the hard gates meet it,
                and adds the expected MACs with a multiplier that grows while they exceed it.
            ramp: one ramp for all terms, or a mapping from "l0", "flops", "target_active", "macs".

        Raises:
            ModelError: `gated` is not a gated model.
            InputError: a coefficient is negative, or a share outside (0, 1].
            BudgetError: `macs` is below what the minimum widths cost.
        """
        check_gated(gated)
        coefficients = {"l0": l0, "flops": flops, "target_weight": target_weight}
        for name, value in coefficients.items():
            if not value >= 0:
                raise InputError(f"{name} must not be negative; got {value}")
        for name, share in (("target_active", target_active), ("macs", macs)):
            if share is not None and not 0 < share <= 1:
                raise InputError(f"{name} is a share in (0, 1]; got {share}")
        self._gated = gated
        self._l0, self._flops, self._target_weight = l0, flops, target_weight
        self._target_active, self._macs = target_active, macs
        self._ramps = _ramps(ramp)
        self._multiplier = 0.0
        self._log: dict[str, float | Tensor] = {}
        self._marginal = marginal_macs(gated)
        if macs is not None:
            self._refuse_unreachable(macs)

    def __call__(self, epoch: float) -> Tensor:
        """The penalty at a (fractional) epoch: a scalar, differentiable in the logits.

        Raises:
            GateError: NaN or infinite logits.
        """
        gates = self._gated.gates
        gates.check()
        table = cost_table(self._gated)
        scale = {name: ramp(epoch) for name, ramp in self._ramps.items()}
        p = gates.probabilities()
        active = p.mean()  # Eq. 11
        flops = (p.double() * self._marginal.to(p.device)).sum()  # Eq. 10
        expected = table.macs(p.double())
        terms = {
            "l0": self._l0 * scale["l0"] * active,
            "flops": self._flops * scale["flops"] * flops / self._marginal.sum(),
        }
        raw = {"l0": p.sum(), "flops": flops}
        if self._target_active is not None:
            raw["target"] = (active - self._target_active).clamp(min=0).square()  # Eq. 12
            terms["target"] = self._target_weight * scale["target_active"] * raw["target"]
        log: dict[str, float] = {}
        if self._macs is not None:
            budget = 1 - scale["macs"] * (1 - self._macs)
            terms["macs"] = self._drive(expected / table.total, budget)
            self._project(table, budget)
            log |= {"budget": budget, "multiplier": self._multiplier}
        penalty = torch.stack([term.to(p.dtype) for term in terms.values()]).sum()
        hard = table.macs(gates.open_mask().double())
        # Tensors until `log()` is called: a float would wait for the device on every step.
        self._log = {
            "penalty": penalty.detach(),
            **{name: term.detach() for name, term in terms.items()},
            **{f"{name}_raw": value.detach() for name, value in raw.items()},
            "active_fraction": active.detach(),
            "open_fraction": gates.open_mask().double().mean(),
            "expected_macs": expected.detach(),
            "hard_macs": hard,
            "expected_macs_ratio": expected.detach() / table.total,
            "hard_macs_ratio": hard / table.total,
            "threshold": gates.threshold,
            **log,
        }
        return penalty

    def log(self) -> dict[str, float]:
        """Every term of the last call: weighted, raw (`*_raw`), fractions and MACs."""
        return {name: float(value) for name, value in self._log.items()}

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs besides the gated model's own state."""
        return {"multiplier": self._multiplier}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` gave."""
        self._multiplier = state["multiplier"]

    def _drive(self, expected_ratio: Tensor, budget: float) -> Tensor:
        excess = float(expected_ratio.detach()) - budget
        self._multiplier = max(0.0, self._multiplier + _MULTIPLIER_RATE * excess)
        return self._multiplier * expected_ratio

    def _project(self, table: CostTable, budget: float) -> None:
        """Move the threshold so that the hard MACs come to the budget from below."""
        gates = self._gated.gates
        ceiling = budget * table.total

        def macs_at(threshold: Tensor) -> float:
            return float(table.macs(gates.mask_at(threshold).double()))

        now = float(table.macs(gates.open_mask().double()))
        if (1 - _BUDGET_SLACK) * ceiling <= now <= ceiling:
            return
        levels = gates.probabilities().detach().unique()
        if macs_at(levels[0]) <= ceiling:
            gates.threshold = min(0.5, float(levels[0]))
            return
        low, high = 0, len(levels)  # levels[high] fits (past the end: the minimum widths)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if macs_at(levels[middle]) <= ceiling else (middle, high)
        if high < len(levels):
            gates.threshold = float(levels[high])
        else:
            gates.close_to_minimum()

    def _refuse_unreachable(self, macs: float) -> None:
        table = cost_table(self._gated)
        floor = self._gated.gates.mask_at(torch.tensor(float("inf"))).double()
        least = int(table.macs(floor.to(table.factors.device)))
        if macs * table.total < least:
            raise BudgetError(
                f"macs={macs:g} cannot be reached: with every layer at its minimum width the model "
                f"still costs {least / table.total:.4f} of its {table.total:,} MACs (reachable: "
                f"{least / table.total:.4f} to 1)",
                min_macs=least,
                max_macs=table.total,
            )


_TERMS = ("l0", "flops", "target_active", "macs")


def _ramps(ramp: CosineRamp | Mapping[str, CosineRamp]) -> dict[str, CosineRamp]:
    if isinstance(ramp, CosineRamp):
        return dict.fromkeys(_TERMS, ramp)
    unknown = sorted(set(ramp) - set(_TERMS))
    if unknown:
        raise InputError(f"ramp has no term {unknown[0]!r}; terms are {', '.join(_TERMS)}")
    return {name: ramp.get(name, CosineRamp()) for name in _TERMS}


def parameter_groups(
    gated: GatedModel, *, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the weights, and the gate logits without weight decay.

    Args:
        gated: the gated model.
        lr: of the weights.
        gate_lr: of the logits; 10 x lr by default, because they have less distance to feel.
        weight_decay: of the weights.

    Raises:
        ModelError: `gated` is not a gated model.
    """
    check_gated(gated)
    weights = [p for p in gated.model.parameters() if p.requires_grad]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {
            "params": [gated.gates.logits],
            "lr": 10 * lr if gate_lr is None else gate_lr,
            "weight_decay": 0.0,
        },
    ]
