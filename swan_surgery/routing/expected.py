"""MACs of gated and of routed models in the mean: `expected_macs` and `hard_macs` of either."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from swan_surgery.costs import macs as of_gates
from swan_surgery.costs.table import build_table, share_terms
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.routing.costs import routed_costs, running_shares
from swan_surgery.routing.routed_model import RoutedModel


def expected_macs(model: GatedModel | RoutedModel, shares: Sequence[float] | None = None) -> Tensor:
    """MACs in the mean, of one forward pass over a batch as large as the example inputs; a float64 scalar.

    Of a gated model at its probabilities: sum over layers of macs * (open in / in) * (open out / out), with p in place
    of 0/1; differentiable in the logits. Of a routed model over the ways that inputs take, where a mask at its
    probabilities, too. Divided by the batch it is the mean of a sample; divided by `swan.count_macs(given,
    example_inputs)`, the `macs` of `swan.route_stats`.

    Args:
        model: gated or routed.
        shares: of a routed model: which part of all inputs leaves at each switch, as in `swan.route_stats(...).shares`
            (what takes the full way may stand behind them). By default those that `swan.calibrate_switch` saw; before
            it, all take the full way.

    Raises:
        ModelError: neither gated nor routed.
        InputError: shares that cannot be, of a gated model, or none where thresholds were set by hand.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> routed = swan.add_switch(net, "1", example_inputs=torch.randn(1, 3), light=0.5, decide="margin")
        >>> float(swan.expected_macs(routed)), float(swan.expected_macs(routed, [0.75]))  # net has 104
        (104.0, 84.0)
    """
    if isinstance(model, RoutedModel):
        return _mean(model, shares, is_hard=False)
    _refuse(shares)
    return of_gates.expected_macs(model)


@overload
def hard_macs(model: GatedModel, shares: None = None) -> int: ...


@overload
def hard_macs(model: RoutedModel, shares: Sequence[float] | None = None) -> float: ...


def hard_macs(model: GatedModel | RoutedModel, shares: Sequence[float] | None = None) -> float:
    """MACs at `open_mask()`: what the pruned model will cost, exactly; of a routed model in the mean.

    Args:
        model: gated, or routed: then what `swan.cut_mask` gives costs at these shares.
        shares: of a routed model, as for `swan.expected_macs`.

    Raises:
        ModelError: neither gated nor routed.
        InputError: as `swan.expected_macs`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> gated.gates.logits.data[:5] = -3.0
        >>> swan.hard_macs(gated)
        15
    """
    if isinstance(model, RoutedModel):
        return float(_mean(model, shares, is_hard=True))
    _refuse(shares)
    return of_gates.hard_macs(model)


def _refuse(shares: object) -> None:
    if shares is not None:
        raise InputError(
            "shares say which part of the inputs leaves at each switch of a routed model, and this is none"
        )


def _mean(routed: RoutedModel, shares: Sequence[float] | None, *, is_hard: bool) -> Tensor:
    leaving = _shares_of(routed) if shares is None else _checked(routed, shares)
    costs = routed_costs(routed)
    limits = routed.thresholds if shares is None else None
    whole = costs.batch * costs.expected(leaving, limits)
    body = routed.body
    if not isinstance(body, GatedModel):
        return torch.tensor(whole, dtype=torch.float64)
    terms = of_gates.certified_terms(body)
    runs = running_shares(costs.decide, leaving, limits)
    priced = {name for name in runs for term in terms if f"{term.module}.".startswith(f"{name}.")}
    own = share_terms(terms, {name: runs[name] for name in runs if name in priced})
    table = build_table(own, body.channels.num_units, unit="MACs").to(body.gates.logits.device)
    gates = body.gates
    found = table.at((gates.open_mask() if is_hard else gates.probabilities()).double())
    # A module that runs on both sides of a switch is priced on the first: then in proportion.
    return found if table.total == whole else found * (whole / table.total)


def _shares_of(routed: RoutedModel) -> Sequence[float]:
    """Those under which the thresholds in force were set."""
    found = routed.certificate
    if found is not None and found.is_of(routed.decide, routed.thresholds):
        known: Sequence[float] = found.shares[:-1]
        return known
    if all(threshold == float("-inf") for threshold in routed.thresholds):
        return [0.0] * routed.num_switches
    raise InputError(
        "thresholds were set by hand, so that nobody knows which part of the inputs leaves: pass shares="
        "swan.route_stats(routed, loader).shares"
    )


def _checked(routed: RoutedModel, shares: Sequence[float]) -> Sequence[float]:
    count = routed.num_switches
    try:
        found = [float(share) for share in shares]
    except (TypeError, ValueError):
        found = []
    is_whole = len(found) == count or (len(found) == count + 1 and abs(sum(found) - 1) < 1e-6)
    if not is_whole or not all(share >= 0 for share in found) or sum(found) > 1 + 1e-6:
        raise InputError(
            f"shares are the parts of all inputs that leave at each of {count} switches, 0 or more and at most 1 in "
            f"all (with what takes the full way behind them, 1); got {shares!r}"
        )
    return found[:count]


__all__ = ["expected_macs", "hard_macs"]
