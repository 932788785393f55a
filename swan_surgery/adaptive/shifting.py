"""Efforts that have learnt stay as they are: their thresholds move together until a budget is met."""

from typing import Any

import torch

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.bisecting import mean_macs, write_lowest_price


# Thresholds move by so many T at most.
_FARTHEST = 64.0


def shift_thresholds_(adapted: AdaptiveModel, batches: list[Any], budget: float) -> None:
    """All finite thresholds by as many T, up or down, so that efforts as they are cost a budget."""
    efforts = [own.effort for own in adapted.blocks().values() if own.effort is not None]
    before = [own.thresholds.clone() for own in efforts]

    def write(price: float) -> None:
        for own, was in zip(efforts, before, strict=True):
            own.thresholds.copy_(was + (price - _FARTHEST) * own.temperature)

    write_lowest_price(adapted, batches, write, budget, 2 * _FARTHEST)
    if mean_macs(adapted, batches) > budget:
        for own in efforts:
            own.thresholds.fill_(torch.inf)


__all__ = ["shift_thresholds_"]
