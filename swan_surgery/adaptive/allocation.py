"""How many units of each group a width keeps: the same share everywhere, or what matters most for its MACs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swan_surgery.adaptive.candidates import NestedGroup
from swan_surgery.costs.macs import cost_table
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.selection.diminishing_returns import DiminishingReturns
from swan_surgery.selection.limits import Limit
from swan_surgery.selection.ordering import order_by_price
from swan_surgery.selection.widest_mask import widest_mask


# Open units of every group at every width, the widest included.
Counts = tuple[tuple[int, ...], ...]


def open_units(group: NestedGroup, width: float) -> int:
    """How many units of a group a share of them is; at least one."""
    return max(1, min(len(group.units), round(width * len(group.units))))


def uniform_counts(groups: Sequence[NestedGroup], widths: Sequence[float]) -> Counts:
    """Each width is a share of the units of every group."""
    return tuple(tuple(open_units(group, width) for width in widths) for group in groups)


def scored_counts(
    gated: GatedModel,
    groups: Sequence[NestedGroup],
    *,
    widths: Sequence[float],
    scores: Tensor,
    per_cost: bool = True,
) -> Counts:
    """Each width is a share of the MACs that units of the groups cost: those with most score per MAC stay.

    As `prune_by_score` chooses, with returns that diminish within a group, but nothing outside of the groups closes.
    A width that lies below what one unit of every group costs keeps one of each.

    Args:
        gated: maps and prices the model.
        groups: that adapt.
        widths: ascending, the last one 1.
        scores: how much each unit matters, not negative, (num_units,).
        per_cost: rank by score per MAC; False by the score as it is, as of gates that have learnt.
    """
    table = cost_table(gated).to(torch.device("cpu"))
    inside = torch.zeros(table.num_units, dtype=torch.bool)
    least = torch.ones(table.num_units, dtype=torch.bool)
    for group in groups:
        own = torch.tensor(group.units)
        inside[own], least[own] = True, False
        least[own[scores[own].argmax()]] = True
    worth = scores.double()
    if per_cost:
        worth = DiminishingReturns(gated.channels.unit_groups, table.num_units)(worth)
    without = float(table.at((~inside).double()))
    every = Limit("macs", table, 1.0)
    order = order_by_price(worth, (every,) if per_cost else (), least)
    counts = [torch.tensor([len(group.units) for group in groups])]
    for width in reversed(widths[:-1]):
        limit = Limit("macs", table, (without + width * (table.total - without)) / table.total)
        mask = least
        if limit.allows(least):
            mask = widest_mask(gated, order, (limit,), least=least)
        own_counts = torch.tensor([int(mask[list(group.units)].sum()) for group in groups])
        counts.insert(0, torch.minimum(own_counts, counts[0]))  # a narrower width lies within
    return tuple(tuple(own) for own in torch.stack(counts, 1).tolist())


def checked_counts(
    counts: Counts, groups: Sequence[NestedGroup], widths: Sequence[float]
) -> Counts:
    """Counts that somebody wrote down.

    Raises:
        InputError: they are not of these groups and widths.
    """
    fit = len(counts) == len(groups) and all(
        len(own) == len(widths)
        and all(type(count) is int for count in own)
        and list(own) == sorted(own)
        and own[0] >= 1
        and own[-1] == len(group.units)
        for own, group in zip(counts, groups, strict=False)
    )
    if not fit:
        raise InputError(
            f"units kept at each width, {counts}, are not those of {len(groups)} groups at widths {tuple(widths)}"
        )
    return counts


__all__ = ["Counts", "checked_counts", "open_units", "scored_counts", "uniform_counts"]
