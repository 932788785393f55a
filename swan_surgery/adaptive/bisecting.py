"""The lowest price at which gates keep a budget, found by running them."""

from collections.abc import Callable
from typing import Any

import torch

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.width_stats import taken_by


_ROUNDS = 14


def write_lowest_price(
    adapted: AdaptiveModel,
    batches: list[Any],
    write: Callable[[float], None],
    budget: float,
    dearest: float,
) -> None:
    """Bisect between a price of 0 and the dearest, under the gates that each price makes.

    Args:
        adapted: whose gates are set.
        batches: that it runs.
        write: sets the gates for a price.
        budget: mean MACs of a sample.
        dearest: a price that keeps it.
    """
    low, high = 0.0, dearest
    write(low)
    if mean_macs(adapted, batches) <= budget:
        return
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        write(middle)
        if mean_macs(adapted, batches) > budget:
            low = middle
        else:
            high = middle
    write(high)


def mean_macs(adapted: AdaptiveModel, batches: list[Any]) -> float:
    """MACs of a sample as the gates now stand."""
    return float(torch.cat([taken_by(adapted, batch).macs for batch in batches]).double().mean())


__all__ = ["mean_macs", "write_lowest_price"]
