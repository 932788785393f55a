"""The widest mask within limits: as many units of an order as fit, widths rounded where asked."""

from collections.abc import Callable, Sequence
from math import gcd

import torch
from torch import Tensor

from swan_surgery.channels import PINNED, ChannelMap
from swan_surgery.gates import GatedModel
from swan_surgery.selection.limits import Limit, refuse_unreachable
from swan_surgery.selection.ordering import ranking


# A limit used to this share is met; filling the rest would cost more time than it is worth.
_NEARLY = 0.998
# Prefixes that are priced at once while the longest is looked for: a GPU takes as long for many as for one.
_AT_ONCE = 64
_MOST_ENTRIES = 2**22  # of the table, for all of them together
# (units, base) -> the open mask of a base with these units, and what opens with them.
_Opening = Callable[[Tensor, Tensor], Tensor]


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


def widest_mask(
    gated: GatedModel,
    order: Tensor,
    limits: Sequence[Limit],
    *,
    least: Tensor | None = None,
    allowed: Tensor | None = None,
    round_to: int = 1,
    widen: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The open mask of the longest prefix of `order` within all limits, then whatever still fits.

    Where the prefix leaves more than 0.2 % of every limit, further units open, in the same order,
    where one fits, until a limit is used to 99.8 % or no closed unit alone fits any more; with
    `round_to` above 1 whole steps of the groups in which one fits.

    Args:
        gated: the gated model.
        order: all units, those to keep first.
        limits: what must not be exceeded.
        least: open mask of what stays in any case; by default the minimum widths by p.
        allowed: mask of what may stay (`within_widths`); by default everything. `least` goes before it.
        round_to: widths become multiples of this many channels.
        widen: in place of `round_to`: what else opens with the units of a mask.

    Raises:
        BudgetError: even the narrowest layers cost more; carries the reachable range.
    """
    gates = gated.gates
    floor = gates.least_mask(gates.probabilities().detach()) if least is None else least
    whole_order = order = order.to(floor.device)
    if allowed is not None:
        order = order[allowed.to(floor.device)[order]]

    def with_(units: Tensor, base: Tensor) -> Tensor:
        mask = base.clone()
        mask[units] = True
        return round_widths(gated, mask, round_to, whole_order) if widen is None else widen(mask)

    def fits(mask: Tensor) -> bool:
        return all(limit.allows(mask) for limit in limits)

    if widen is None and round_to == 1:
        mask = _longest_alone(order, floor, limits)
        _fill_(mask, order, limits)
        return mask
    for limit in limits:
        refuse_unreachable(limit, with_(order[:0], floor))
    mask = _longest(order, floor, with_, fits)
    return mask if widen else _fill_in_steps(gated.channels, mask, order, with_, fits)


def _longest_alone(order: Tensor, base: Tensor, limits: Sequence[Limit]) -> Tensor:
    """The mask of the longest prefix that fits, where nothing opens along; that of none is taken to fit.

    As every step does it while gates learn, nothing here waits for the device.
    """
    count = len(order)
    place = torch.full_like(base, count, dtype=torch.int64)  # where a unit is not in the order
    place[order] = torch.arange(count, device=base.device)
    taken, span = place.new_zeros(()), count
    at_once = _prefixes_at_once(base.device, limits)
    while span:
        step = -(-(span + 1) // (at_once + 1))
        ends = (step * torch.arange(1, at_once + 1, device=base.device) + taken).clamp(max=count)
        values = (base | (place < ends[:, None])).double()
        fits = torch.ones_like(ends, dtype=torch.bool)
        for limit in limits:
            fits &= limit.table.at(values) <= limit.ceiling
        # A longer prefix never costs less.
        taken = (taken + step * fits.sum()).clamp(max=count)
        span = step - 1
    return base | (place < taken)


def _prefixes_at_once(device: torch.device, limits: Sequence[Limit]) -> int:
    if device.type == "cpu":
        return 1
    entries = max((len(limit.table.units) for limit in limits), default=0)
    return max(1, min(_AT_ONCE, _MOST_ENTRIES // (entries + 1)))


def _longest(
    order: Tensor, base: Tensor, with_: _Opening, fits: Callable[[Tensor], bool]
) -> Tensor:
    """The mask of the longest prefix that fits; that of none does."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(with_(order[:middle], base)) else (low, middle - 1)
    return with_(order[:low], base)


def _fill_in_steps(
    channels: ChannelMap,
    mask: Tensor,
    order: Tensor,
    with_: _Opening,
    fits: Callable[[Tensor], bool],
) -> Tensor:
    """Go on in the groups in which a step alone still fits: one coarse step does not end it for all."""
    for _ in channels.unit_groups:
        free = torch.zeros_like(mask)
        closed = order[~mask[order]]
        for group in channels.unit_groups:
            own = torch.zeros_like(mask)
            own[list(group)] = True
            first = closed[own[closed]][:1]
            if len(first) and fits(with_(first, mask)):
                free |= own
        if not bool(free.any()):
            break
        mask = _longest(closed[free[closed]], mask, with_, fits)
    return mask


def _fill_(mask: Tensor, order: Tensor, limits: Sequence[Limit]) -> None:
    """Open units of `order`, first ones first, where one fits, until a limit is nearly full.

    Raises:
        BudgetError: the mask costs more than a limit, as only the narrowest layers may.
    """

    def nearly_full() -> bool:
        return any(limit.used(mask) >= _NEARLY * limit.most for limit in limits)

    used = [limit.used(mask) for limit in limits]
    for limit, own in zip(limits, used, strict=True):
        if own > limit.ceiling:
            refuse_unreachable(limit, mask)
        if own >= _NEARLY * limit.most:
            return
    value = mask.double()
    small = torch.ones_like(mask)
    for limit, own in zip(limits, used, strict=True):
        # Open units only make the others dearer, so what is too dear now will not fit later.
        small &= limit.table.prices(value) <= limit.most - own
    for unit in order[small[order] & ~mask[order]].tolist():
        mask[unit] = True
        if not all(limit.allows(mask) for limit in limits):
            mask[unit] = False
        elif nearly_full():
            return


__all__ = ["round_widths", "widest_mask"]
