"""Which units stay within a budget: an order of units, limits on what they cost, the widest mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from swan_surgery.channels import PINNED, ChannelMap
from swan_surgery.costs.cost import CostTable, cost_table, param_table
from swan_surgery.costs.latency_table import LatencyTable, latency_cost
from swan_surgery.errors import BudgetError, InputError
from swan_surgery.gates import GatedModel


# How many times prices are taken anew while units close one after another.
_PRICE_ROUNDS = 64
# A limit used to this share is met; filling the rest would cost more time than it is worth.
_NEARLY = 0.998


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """At most `most` of what `table` counts: `name` is the argument it came by, `unit` its unit."""

    name: str
    unit: str
    table: CostTable
    share: float

    @property
    def most(self) -> float:
        """The ceiling, in `unit`s."""
        return self.share * self.table.total

    def used(self, mask: Tensor) -> float:
        """What an open mask costs, in `unit`s."""
        return float(self.table.macs(mask.double()))

    def allows(self, mask: Tensor) -> bool:
        """Whether an open mask costs at most `most`, up to the rounding of a share of a total."""
        return self.used(mask) <= self.most * (1 + 1e-12)


def limits_of(
    gated: GatedModel,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    latency_table: LatencyTable | None = None,
) -> tuple[Limit, ...]:
    """The limits that shares of the base model's MACs and parameters, and milliseconds, stand for.

    Raises:
        InputError: a share outside (0, 1]; `latency_ms` not positive, or without its table.
    """
    for name, unit, share in (("macs", "MACs", macs), ("params", "parameters", params)):
        if share is not None and not 0 < share <= 1:
            raise InputError(
                f"{name} is a share of the base model's {unit}, in (0, 1]; got {share}"
            )
    limits = []
    if macs is not None:
        limits.append(Limit("macs", "MACs", cost_table(gated), macs))
    if params is not None:
        limits.append(Limit("params", "parameters", param_table(gated), params))
    if latency_ms is not None or latency_table is not None:
        limits.append(_latency_limit(gated, latency_ms, latency_table))
    return tuple(limits)


def _latency_limit(
    gated: GatedModel, latency_ms: float | None, latency_table: LatencyTable | None
) -> Limit:
    if latency_ms is None or not 0 < latency_ms < float("inf"):
        raise InputError(f"latency_ms is a number of milliseconds above 0; got {latency_ms}")
    if latency_table is None:
        raise InputError(
            f"latency_ms={latency_ms:g} needs measured layers: pass "
            f"latency_table=swan.measure_latencies(gated)"
        )
    table = latency_cost(gated, latency_table)
    return Limit("latency_ms", "ms", table, min(1.0, latency_ms / table.total))


def refuse_unreachable(limit: Limit, least: Tensor) -> None:
    """Raise if even `least`, an open mask, costs more than the limit.

    Raises:
        BudgetError: says what was asked for and what can be reached.
    """
    used = limit.used(least)
    if not limit.allows(least):
        total = limit.table.total
        if limit.unit == "ms":
            raise BudgetError(
                f"{limit.name}={limit.most:.4g} cannot be reached: with every layer at its minimum "
                f"width the model still takes {used:.4g} ms of {total:.4g} by the latency table; "
                f"reachable: {used:.4g} to {total:.4g}",
                reachable=(used, total),
            )
        raise BudgetError(
            f"{limit.name}={limit.share:g} cannot be reached: it asks for at most {limit.most:,.0f} "
            f"{limit.unit}, but with every layer at its minimum width the model still costs "
            f"{used:,.0f} ({used / total:.4f} of {total:,}); reachable: {used / total:.4f} to 1",
            min_macs=int(used),
            max_macs=int(total),
            reachable=(used, total),
        )


def ranking(gated: GatedModel) -> Tensor:
    """Units by falling p; among equals those early in their group first, so that layers share."""
    p = gated.gates.probabilities().detach().double().cpu()
    place = torch.zeros_like(p)
    for group in gated.channels.unit_groups:
        place[list(group)] = torch.arange(len(group), dtype=p.dtype) / len(group)
    by_place = torch.argsort(place, stable=True)
    return by_place[torch.argsort(p[by_place], descending=True, stable=True)]


def round_widths(
    gated: GatedModel, mask: Tensor, round_to: int, order: Tensor | None = None
) -> Tensor:
    """Open the best closed units until every group's width is a multiple of `round_to` channels.

    A group that is too narrow for the next multiple opens whole. The best are the first in `order`,
    by default the ranking by p.
    """
    if round_to == 1:
        return mask
    place = torch.empty(gated.channels.num_units, dtype=torch.int64)
    place[ranking(gated) if order is None else order.cpu()] = torch.arange(len(place))
    channels_of = _channels_per_unit(gated.channels)
    rounded = mask.cpu().clone()
    for group in gated.channels.unit_groups:
        members = torch.tensor(group)
        step = round_to // gcd(round_to, channels_of[group[0]])
        num_open = int(rounded[members].sum())
        wanted = min(-(-num_open // step) * step, len(group))
        closed = members[~rounded[members]]
        best = closed[torch.argsort(place[closed])]
        rounded[best[: wanted - num_open]] = True
    return rounded.to(mask.device)


def _channels_per_unit(channels: ChannelMap) -> list[int]:
    """How many channels of the first layer that makes it one unit stands for."""
    found = [0] * channels.num_units
    for layer in channels.layers:
        fresh = {unit for unit in layer.out_units if unit != PINNED and not found[unit]}
        for unit in layer.out_units:
            if unit in fresh:
                found[unit] += 1
    return found


def prices_within(limits: Sequence[Limit], values: Tensor) -> Tensor:
    """What each unit takes of the limits together, in shares of the base model's, at gate values.

    Never zero: a unit that only meets closed ones costs nothing at the moment, but will.
    """
    price = torch.zeros_like(values)
    for limit in limits:
        price += limit.table.prices(values) / limit.table.total
    return price.clamp(min=1e-12)


def order_by_price(scores: Tensor, limits: Sequence[Limit], least: Tensor) -> Tensor:
    """Units in the order to keep them: what closes first, at the end, gains least per cost.

    Units close in rounds; each takes the units with the lowest score per price, and prices (shares
    of the limits that closing a unit now would save) are taken anew at what is still open, because
    a unit gets cheaper when those it meets have gone. Units of `least` close last.

    Args:
        scores: how much each unit matters, not negative, shape (num_units,).
        limits: whose prices count; without limits every unit costs the same.
        least: open mask that stays as long as possible.
    """
    scores = scores.double()
    mask = torch.ones_like(scores, dtype=torch.bool)
    closed: list[Tensor] = []
    step = -(-len(scores) // _PRICE_ROUNDS)
    for _ in range(_PRICE_ROUNDS):
        candidates = (mask & ~least).nonzero().reshape(-1)
        if not candidates.numel():
            break
        gain = scores[candidates]
        if limits:
            gain = gain / prices_within(limits, mask.double())[candidates]
        worst = candidates[gain.argsort(stable=True)[:step]]
        mask[worst] = False
        closed.append(worst)
    kept = least.nonzero().reshape(-1)
    kept = kept[scores[kept].argsort(stable=True)]
    return torch.cat([*closed, kept]).flip(0)


def widest_mask(
    gated: GatedModel,
    order: Tensor,
    limits: Sequence[Limit],
    *,
    least: Tensor | None = None,
    round_to: int = 1,
) -> Tensor:
    """The open mask of the longest prefix of `order` within all limits, then whatever still fits.

    Where the prefix leaves more than 0.2 % of every limit, further units open, in the same order,
    where one fits, until a limit is used to 99.8 % or no closed unit alone fits any more. With
    `round_to` above 1 only whole steps count, and the prefix is all.

    Args:
        gated: the gated model.
        order: all units, those to keep first.
        limits: what must not be exceeded.
        least: open mask of what stays in any case; by default the minimum widths by p.
        round_to: widths become multiples of this many channels.

    Raises:
        BudgetError: even the narrowest layers cost more; carries the reachable range.
    """
    gates = gated.gates
    floor = gates.least_mask(gates.probabilities().detach()) if least is None else least
    order = order.to(floor.device)

    def mask_of(count: int) -> Tensor:
        mask = floor.clone()
        mask[order[:count]] = True
        return round_widths(gated, mask, round_to, order)

    def fits(mask: Tensor) -> bool:
        return all(limit.allows(mask) for limit in limits)

    for limit in limits:
        refuse_unreachable(limit, mask_of(0))
    low, high = 0, len(order)  # mask_of(low) fits; find the last count that does
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(mask_of(middle)) else (low, middle - 1)
    mask = mask_of(low)
    if round_to == 1:
        _fill_(mask, order[low:], limits)
    return mask


def _fill_(mask: Tensor, order: Tensor, limits: Sequence[Limit]) -> None:
    """Open units of `order`, first ones first, where one fits, until a limit is nearly full."""

    def nearly_full() -> bool:
        return any(limit.used(mask) >= _NEARLY * limit.most for limit in limits)

    if nearly_full():
        return
    value = mask.double()
    small = torch.ones_like(mask)
    for limit in limits:
        # Open units only make the others dearer, so what is too dear now will not fit later.
        small &= limit.table.prices(value) <= limit.most - limit.used(mask)
    for unit in order[small[order] & ~mask[order]].tolist():
        mask[unit] = True
        if not all(limit.allows(mask) for limit in limits):
            mask[unit] = False
        elif nearly_full():
            return


__all__ = [
    "Limit",
    "limits_of",
    "order_by_price",
    "prices_within",
    "ranking",
    "refuse_unreachable",
    "round_widths",
    "widest_mask",
]
