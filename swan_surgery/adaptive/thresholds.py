"""From efforts and what each width loses to levels: ascending with effort, at a price per MAC."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


_BINS = 16
# Prices at which what is left of a budget is spent: each so much of the one before, the last one zero.
_FILLING, _CHEAPER = 48, 0.75
# Samples: a spread on either half.
_FEWEST = 4
# Ridge penalties, in units of the mean variance of a feature.
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True)
class Reading:
    """A linear reading of features: effort = features @ weight + bias.

    `explained` is the share of the target's variance that it explains on samples it has not seen, 0 if
    a constant does better; the weight is then zero. Of several targets: [F, T], [T] and [T].
    """

    weight: Tensor
    bias: Tensor
    explained: Tensor


def fit_reading(features: Tensor, target: Tensor) -> Reading:
    """Ridge regression in closed form, its penalty chosen on every other sample, for each target.

    Args:
        features: [N, F].
        target: [N] or [N, T]; its extremes are drawn in to the 1st and 99th percentile.
    """
    x, y = features.double(), target.double()
    shape = y.shape[1:]
    y = y.reshape(len(y), -1)
    weight, bias = y.new_zeros(x.shape[1], y.shape[1]), y.mean(0)
    explained = torch.zeros_like(bias)
    if len(y) >= _FEWEST:
        ends = [torch.quantile(column, y.new_tensor([0.01, 0.99])) for column in y.T]
        y = y.clamp(*torch.stack(ends, 1))
        bias, best = y.mean(0), torch.full_like(bias, -1)
        tiny = torch.finfo(y.dtype).tiny
        total = (y[1::2] - y[::2].mean(0)).square().sum(0).clamp(min=tiny)
        for index, penalty in enumerate(_PENALTIES):
            own, start = _ridge(x[::2], y[::2], penalty)
            share = 1 - (y[1::2] - x[1::2] @ own - start).square().sum(0) / total
            best = torch.where(share > explained, index, best)
            explained = torch.maximum(share, explained)
        for index, penalty in enumerate(_PENALTIES):
            own, start = _ridge(x, y, penalty)
            weight = torch.where(best == index, own, weight)
            bias = torch.where(best == index, start, bias)
    return Reading(
        weight.reshape(-1, *shape), bias.reshape(shape), explained.clamp(min=0).reshape(shape)
    )


def scaled(reading: Reading, features: Tensor, spread: float) -> Reading:
    """The same order of samples, whose efforts [N] deviate by `spread`; as it is where they are all alike."""
    own = float((features.double() @ reading.weight).std()) if len(features) > 1 else 0.0
    factor = spread / own if own > 0 else 1.0
    return Reading(reading.weight * factor, reading.bias * factor, reading.explained)


def _ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-12)
    z = (x - mean) / spread
    gram = z.T @ z / len(z) + penalty * torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.linalg.solve(gram, z.T @ (y - y.mean(0)) / len(z)) / spread[:, None]
    return weight, y.mean(0) - mean @ weight


@dataclass(frozen=True, slots=True)
class Losses:
    """What a block's levels lose, by effort: bins of samples in ascending order of it.

    `mean` is [bins, levels]; `share` [bins] is the part of the samples in each.
    """

    mean: Tensor
    share: Tensor


def binned(efforts: Tensor, losses: Tensor, *, informed: bool) -> Losses:
    """Mean losses of samples in order of effort; one bin where the effort knows nothing.

    Args:
        efforts: [N].
        losses: [N, levels].
        informed: whether the effort says anything.
    """
    order = efforts.argsort()
    parts = order.tensor_split(min(_BINS, len(order)) if informed else 1)
    mean = torch.stack([losses[part].double().mean(0) for part in parts])
    share = torch.tensor([len(part) / len(order) for part in parts], dtype=torch.float64)
    return Losses(mean, share)


def levels_at(losses: Losses, macs: Tensor, price: float) -> Tensor:
    """The level of each bin, ascending, of least loss + price x MACs: dynamic programming, int64 [bins]."""
    cost = (losses.mean + price * macs.double()) * losses.share[:, None]
    best = cost[0].clone()
    froms = []
    for row in cost[1:]:
        below, where = best.cummin(0)
        froms.append(where)
        best = below + row
    level = int(best.argmin())
    path = [level]
    for where in reversed(froms):
        level = int(where[level])
        path.append(level)
    return torch.tensor(path[::-1])


def mean_macs(losses: Losses, macs: Tensor, levels: Tensor) -> float:
    """MACs of the bins' levels, the mean over samples."""
    return float((macs.double()[levels] * losses.share).sum())


def cheapest(losses: Sequence[Losses], macs: Sequence[Tensor], budget: float) -> list[Tensor]:
    """Levels of all blocks' bins with the least sum of losses whose mean MACs fit the budget.

    One price per MAC for all blocks, found by bisection; what that leaves goes to the blocks whose next step fits, those
    that gain most per MAC first.
    """

    def at(price: float) -> tuple[list[Tensor], float]:
        found = [levels_at(own, m, price) for own, m in zip(losses, macs, strict=True)]
        total = sum(mean_macs(*own) for own in zip(losses, macs, found, strict=True))
        return found, total

    found, total = at(0.0)
    if total <= budget:
        return found
    low, high = 0.0, 1e-12
    while at(high)[1] > budget and high < 1e12:
        low, high = high, high * 10
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high / 2
        if at(middle)[1] > budget:
            low = middle
        else:
            high = middle
    found, total = at(high)
    for step in range(_FILLING):
        price = high * _CHEAPER**step if step < _FILLING - 1 else 0.0
        for place, (own, m) in enumerate(zip(losses, macs, strict=True)):
            wider = levels_at(own, m, price)
            grown = total - mean_macs(own, m, found[place]) + mean_macs(own, m, wider)
            if total < grown <= budget:
                found[place], total = wider, grown
    return found


def shares_below(losses: Losses, levels: Tensor, num_levels: int) -> Tensor:
    """The part of the samples that stays below each level but the narrowest, [levels - 1]."""
    wanted = torch.arange(1, num_levels)
    return ((levels[:, None] < wanted) * losses.share[:, None]).sum(0)


def thresholds_at(efforts: Tensor, shares: Tensor) -> Tensor:
    """Efforts below which these shares of the samples lie; infinite where all or none do.

    Halfway between two samples, so that rounding moves none of them across.
    """
    ordered = efforts.double().sort().values
    places = (shares * len(ordered)).round().long()
    below = ordered[(places - 1).clamp(min=0)]
    found = (below + ordered[places.clamp(max=len(ordered) - 1)]) / 2
    found = torch.where(places == len(ordered), torch.inf, found)
    return torch.where(places == 0, -torch.inf, found)


def temperature_of(efforts: Tensor, spread: float) -> float:
    """T, of which efforts deviate by `spread`; 1 where they are alike but for rounding."""
    own = float(efforts.double().std()) if len(efforts) > 1 else 0.0
    noise = len(efforts) * torch.finfo(efforts.dtype).eps * float(efforts.abs().max())
    return own / spread if own > noise else 1.0


def outside(efforts: Tensor, thresholds: Tensor, step: float) -> Tensor:
    """Infinite thresholds one after the other outside of the efforts seen, `step` apart."""
    low, high = float(efforts.min()), float(efforts.max())
    under, over = thresholds == -torch.inf, thresholds == torch.inf
    below = low - step * under.flip(0).cumsum(0).flip(0)
    found = torch.where(under, below.to(thresholds.dtype), thresholds)
    return torch.where(over, (high + step * over.cumsum(0)).to(found.dtype), found)


__all__ = [
    "Losses",
    "Reading",
    "binned",
    "cheapest",
    "fit_reading",
    "levels_at",
    "mean_macs",
    "outside",
    "scaled",
    "shares_below",
    "temperature_of",
    "thresholds_at",
]
