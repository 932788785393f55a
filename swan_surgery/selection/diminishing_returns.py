"""What each unit of a layer adds to those that matter more: the last ones are worth the most.

Scores of single units add up only while few units close: nothing in their sum says that a layer is
about to vanish, and a layer whose channels each matter little closes whole, because its costs are
saved whole. Layers act in series, so what a group of interchangeable units passes on is taken as a
share of its total score T, and the loss of closing some as

    -T log(K / T),    K: the total score of what stays

To first order this is the sum of the scores that go, T - K; it grows without bound as the group
closes. A group closes from its lowest score upwards, so a unit with score s is worth

    v = -T log(1 - s / K),    K: its own score and all scores above it in its group

Without T and to first order this is the layer-adaptive score of arXiv:2010.07611.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


# The best unit of a group would be worth infinitely much: this share of K counts instead.
_LARGEST_SHARE = 1 - 1e-9


class DiminishingReturns:
    """Turns scores of units into what they are worth within their groups."""

    def __init__(self, groups: Sequence[Sequence[int]], num_units: int) -> None:
        """Groups of interchangeable units; a unit in none of them is a group of its own."""
        self._group = torch.arange(num_units)
        for units in groups:
            self._group[list(units)] = units[0]
        # In the order of groups: where each unit's own begins.
        _, sizes = self._group.unique(return_counts=True)
        self._start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)

    def __call__(self, scores: Tensor) -> Tensor:
        """The worth of every unit, float64 of shape (num_units,), in the order of its group's scores.

        Args:
            scores: how much each unit matters, not negative, shape (num_units,). A group whose
                scores are all zero is worth nothing.
        """
        scores = scores.double()
        group = self._group = self._group.to(scores.device)
        start = self._start = self._start.to(scores.device)
        total = torch.zeros_like(scores).index_add(0, group, scores)[group]
        share = torch.where(total > 0, scores / total, 0.0)
        order = share.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        ordered = share[order]
        running = ordered.cumsum(0)
        above = running - (running - ordered)[start]  # without what stands before the group
        part = (ordered / above).nan_to_num(0.0).clamp(max=_LARGEST_SHARE)
        worth = torch.empty_like(scores)
        worth[order] = -total[order] * torch.log1p(-part)
        return worth


__all__ = ["DiminishingReturns"]
