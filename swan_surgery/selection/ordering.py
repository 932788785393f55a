"""The order in which units stay: by p, or by what they gain per cost."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swan_surgery.gates import GatedModel
from swan_surgery.selection.limits import Limit


# How many times prices are taken anew while units close one after another.
_PRICE_ROUNDS = 64


def ranking(gated: GatedModel) -> Tensor:
    """Units by falling p; among equals those early in their group first, so that layers share."""
    p = gated.gates.probabilities().detach().double().cpu()
    place = torch.zeros_like(p)
    for group in gated.channels.unit_groups:
        place[list(group)] = torch.arange(len(group), dtype=p.dtype) / len(group)
    by_place = torch.argsort(place, stable=True)
    return by_place[torch.argsort(p[by_place], descending=True, stable=True)]


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


__all__ = ["order_by_price", "prices_within", "ranking"]
