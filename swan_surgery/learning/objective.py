"""What training adds to its loss: SWAN's regularisers, their ramps, and a MAC budget.

Equations of the paper (arXiv:2603.06601). Every term is normalised to [0, 1] before its coefficient:
R0 / N (Eq. 9), RF / sum c (Eq. 10), RT as it is (Eq. 12); the raw values are logged beside. The
gradient on a logit is the chain rule through p = sigmoid(z), so the factor p(1-p) that Eq. 15
prints on its first term stands on every term:

    dL/dz_i = p_i(1-p_i) * (<dL/dh~_i, h_i> + l0/N + flops c_i/sum c + 2 target/N max(0, a - a*))
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from swan_surgery.costs.latency_table import LatencyTable
from swan_surgery.costs.macs import cost_table, marginal_macs
from swan_surgery.costs.table import CostTable
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated
from swan_surgery.learning.curvature import CurvatureRule
from swan_surgery.learning.penalties import Penalties, paper_penalties
from swan_surgery.learning.ramps import CosineRamp, ramps_of
from swan_surgery.learning.watching import Watch
from swan_surgery.selection.limits import Limit, Of, limits_of, refuse_unreachable


Learning = Literal["curvature", "gradient"]
_TERMS = ("l0", "flops", "target_active", "macs", "params", "latency_ms")


# How fast the multiplier of the budget grows with the excess, per call.
_MULTIPLIER_RATE = 0.1
# The threshold is left alone while the hard MACs lie within this share below the budget.
_BUDGET_SLACK = 0.005


class Objective:
    """The penalty of Eq. 8 and, with `macs=`, `params=` or `latency_ms=`, the drive to a budget.

    Attributes:
        gated: the gated model.
        limits: the budgets in full, of the model as it was at the last call; empty without any.
        learning: "curvature" or "gradient", as it was decided.
        reachable: per budget the share of the base model's that the minimum widths cost, and 1.

    Example:
        >>> objective = Objective(gated, macs=0.5, ramp=CosineRamp(1, 4))  # doctest: +SKIP
        >>> loss = task_loss + objective(epoch)  # doctest: +SKIP
    """

    def __init__(
        self,
        gated: GatedModel,
        *,
        macs: float | None = None,
        params: float | None = None,
        latency_ms: float | None = None,
        latency_table: LatencyTable | None = None,
        of: Of = "given",
        learning: Learning | None = None,
        decay: float = 0.98,
        diminishing: bool = True,
        freeze_after: float | None = None,
        l0: float = 0.0,
        flops: float = 0.0,
        target_active: float | None = None,
        target_weight: float = 1.0,
        ramp: CosineRamp | Mapping[str, CosineRamp] | None = None,
        preset: Literal["paper"] | None = None,
    ) -> None:
        """Make an objective.

        Args:
            gated: the gated model.
            macs: share of the base model's MACs to arrive at, in (0, 1], or a number of MACs.
                Each call lowers the budget
                along its ramp and decides which units are open, so that the *hard* gates meet it.
            params: the same for parameters; with several budgets, all are met.
            latency_ms: milliseconds per forward pass to arrive at, by `latency_table`.
            latency_table: from `swan.measure_latency_table(gated)`.
            of: "original" takes the shares of the model before it was ever cut.
            learning: how gates learn under a budget. "curvature": from E[(dL/dg)^2] per cost saved
                (`gate_learning`); the logits are written by the objective, the optimizer sees no
                gradient on them. "gradient": by the optimizer, as in the paper; the threshold moves
                to meet the budget, and the expected cost is penalised with a multiplier that grows
                while it exceeds it. By default "curvature" if a budget is all there is, else
                "gradient".
            decay: of the running mean of "curvature", per step.
            diminishing: "curvature" with returns that diminish within a layer
                (`diminishing_returns`); False adds units up as if each were alone.
            freeze_after: epoch from which on the objective leaves the gates as they are. Where the
                optimizer moves them ("gradient"), set the learning rate of their group to 0 too.
            l0: lambda_0, on the mean probability (Eq. 9).
            flops: lambda_F, on the MAC-weighted mean probability (Eq. 10).
            target_active: alpha* in (0, 1], the mean probability above which Eq. 12 penalises.
            target_weight: lambda_T.
            ramp: one ramp for all terms, or a mapping from "l0", "flops", "target_active", "macs",
                "params", "latency_ms". By default everything acts in full from the start.
            preset: "paper" trains soft gates by the penalties alone, R_F with lambda_F = 1 and R_T
                with lambda_T = 100 towards a mean probability of the share asked for (the paper gives
                no values). Nothing holds the hard gates to the budget until `prune` is given it.

        Raises:
            ModelError: `gated` is not a gated model.
            InputError: a coefficient is negative, a share outside (0, 1], "curvature" without a
                budget or with penalties on the probabilities, which it writes.
            BudgetError: a budget is below what the minimum widths cost; carries what can be reached.
        """
        check_gated(gated)
        penalties = Penalties(l0, flops, target_active, target_weight)
        if preset is not None:
            penalties = _of_preset(preset, penalties, learning, macs if params is None else params)
        if learning is not None and learning not in get_args(Learning):
            raise InputError(f"learning must be one of {get_args(Learning)}; got {learning!r}")
        if not 0 <= decay < 1:
            raise InputError(f"decay must be at least 0 and below 1; got {decay}")
        self.gated = gated
        self._penalties = penalties
        self._holds_budget = preset is None
        self._freeze_after = float("inf") if freeze_after is None else freeze_after
        self._ramps = ramps_of(_TERMS, ramp)
        self._multiplier = 0.0
        self._log: dict[str, float | Tensor] = {}
        self._budgets: dict[str, Any] = {
            "macs": macs,
            "params": params,
            "latency_ms": latency_ms,
            "latency_table": latency_table,
            "of": of,
        }
        self._table = cost_table(gated)
        self._marginal = marginal_macs(gated)
        self.limits = limits_of(gated, **self._budgets)
        least = gated.gates.least_mask(gated.gates.probabilities().detach())
        for limit in self.limits:
            refuse_unreachable(limit, least)
        self.reachable = {
            limit.name: (limit.used(least) / limit.table.total, 1.0) for limit in self.limits
        }
        if learning == "curvature" and (penalties.act or not self.limits):
            raise InputError(
                "learning='curvature' needs a budget (macs=0.5, params=0.5 or latency_ms) and writes the "
                "probabilities that l0, flops and target_active act on; pass learning='gradient'"
            )
        by_default: Learning = "curvature" if self.limits and not penalties.act else "gradient"
        self.learning: Learning = learning or by_default
        self._rule = None
        if self.learning == "curvature":
            self._rule = CurvatureRule(gated, decay=decay, diminishing=diminishing)
        else:
            gated.gates.detach()
        if preset == "paper":
            gated.gates.mode = "soft"
        self._watch = Watch(gated, self._rule, asks=bool(self.limits) or penalties.act)

    def __call__(self, epoch: float) -> Tensor:
        """The penalty at a (fractional) epoch: a scalar, differentiable in the logits.

        Raises:
            GateError: NaN or infinite logits.
        """
        gates = self.gated.gates
        gates.check()
        table = self._follow_model()
        scale = {name: ramp(epoch) for name, ramp in self._ramps.items()}
        limits = tuple(
            replace(limit, share=(1 - scale[limit.name]) + scale[limit.name] * limit.share)
            for limit in self.limits
        )
        if self._rule is not None and epoch < self._freeze_after:
            self._rule.project(limits)
        self._watch()
        p = gates.probabilities()
        terms, raw = self._penalties.terms(p, self._marginal.to(p.device), scale)
        log: dict[str, float | Tensor] = {}
        for limit in limits:
            expected = limit.table.at(p.double()) / limit.table.total
            if self._rule is None and self._holds_budget:
                terms[limit.name] = self._drive(expected, limit.share)
            log |= {
                f"{limit.name}_budget": limit.share,
                f"expected_{limit.name}_ratio": expected.detach(),
            }
        if limits and self._rule is None and self._holds_budget:
            if epoch < self._freeze_after:
                self._move_threshold(limits)
            log["multiplier"] = self._multiplier
        penalty = torch.stack([term.to(p.dtype) for term in terms.values()]).sum()
        is_open = gates.open_mask().double()
        hard = table.at(is_open)
        for limit in limits:
            log[f"hard_{limit.name}"] = limit.table.at(is_open)
            log[f"hard_{limit.name}_ratio"] = log[f"hard_{limit.name}"] / limit.table.total
        expected_macs = table.at(p.detach().double())
        # Tensors until `log()` is called: a float would wait for the device on every step.
        self._log = {
            "penalty": penalty.detach(),
            **{name: term.detach() for name, term in terms.items()},
            **{f"{name}_raw": value.detach() for name, value in raw.items()},
            "active_fraction": p.detach().mean(),
            "open_fraction": is_open.mean(),
            "expected_macs": expected_macs,
            "hard_macs": hard,
            "expected_macs_ratio": expected_macs / table.total,
            "hard_macs_ratio": hard / table.total,
            "threshold": gates.get_buffer("_threshold").clone(),
            **log,
        }
        return penalty

    def _follow_model(self) -> CostTable:
        """Take the tables of the model as it is now, new ones where it was changed; returns the MACs'."""
        self.limits = limits_of(self.gated, **self._budgets)
        of_macs = (limit.table for limit in self.limits if limit.table.unit == "MACs")
        table = next(of_macs, None) or cost_table(self.gated)
        if table is not self._table:
            self._table, self._marginal = table, marginal_macs(self.gated)
        return table

    def __repr__(self) -> str:
        """Budgets, and where the hard gates stand now."""
        is_open = self.gated.gates.open_mask()
        lines = [f"Objective of {type(self.gated.model).__name__}, learning by {self.learning}"]
        lines += [
            f"  {own.name}: {own.used(is_open) / own.table.total:.1%} now, {own.share:.1%} asked for"
            for own in self.limits
        ]
        lines.append(f"  open units: {int(is_open.sum()):,} of {len(is_open):,}")
        return "\n".join(lines)

    def log(self) -> dict[str, float]:
        """Every term of the last call: weighted, raw (`*_raw`), fractions, MACs and budgets."""
        return {name: float(value) for name, value in self._log.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the gated model's own state."""
        state: dict[str, Any] = {"multiplier": self._multiplier}
        if self._rule is not None:
            state["curvature"] = self._rule.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InputError: the state is of an objective that learns in another way.
        """
        if ("curvature" in state) != (self._rule is not None):
            raise InputError("the state is of an objective with another `learning` or no budget")
        self._multiplier = state["multiplier"]
        if self._rule is not None:
            self._rule.load_state_dict(state["curvature"])

    def _drive(self, expected_ratio: Tensor, budget: float) -> Tensor:
        excess = float(expected_ratio.detach()) - budget
        self._multiplier = max(0.0, self._multiplier + _MULTIPLIER_RATE * excess)
        return self._multiplier * expected_ratio

    def _move_threshold(self, limits: Sequence[Limit]) -> None:
        """Move the threshold so that the hard gates come to the budget from below."""
        gates = self.gated.gates

        def fits(mask: Tensor, slack: float = 0.0) -> bool:
            shrunk = (replace(limit, share=(1 - slack) * limit.share) for limit in limits)
            return all(limit.allows(mask) for limit in shrunk)

        now = gates.open_mask()
        if fits(now) and not fits(now, _BUDGET_SLACK):
            return
        levels = gates.probabilities().detach().unique()
        if fits(gates.mask_at(levels[0])):
            gates.threshold = min(0.5, float(levels[0]))
            return
        low, high = 0, len(levels)  # levels[high] fits (past the end: the minimum widths)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(gates.mask_at(levels[middle])) else (middle, high)
        if high < len(levels):
            gates.threshold = float(levels[high])
        else:
            gates.close_to_minimum()


def _of_preset(
    preset: str, given: Penalties, learning: Learning | None, share: float | None
) -> Penalties:
    if preset != "paper" or learning is not None or given != Penalties():
        raise InputError(
            f"preset may be 'paper', and replaces learning, l0, flops, target_active and "
            f"target_weight; got preset={preset!r}, learning={learning!r}, {given}"
        )
    if share is None:
        raise InputError("preset='paper' needs the share to aim at: macs=0.5 or params=0.5")
    return paper_penalties(share)
