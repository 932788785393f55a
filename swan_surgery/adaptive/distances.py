"""How far the outputs at some levels lie from those at others."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.budgets import Distance
from swan_surgery.adaptive.run import Levels
from swan_surgery.errors import InputError
from swan_surgery.models.batches import run_on_batch


def outputs_of(
    adapted: AdaptiveModel, batches: list[Any], levels: Levels | Mapping[str, Levels]
) -> list[Any]:
    """What the model gives at these levels, batch by batch."""
    with adapted.holding(levels):
        return [run_on_batch(adapted, batch) for batch in batches]


def distances_of(
    adapted: AdaptiveModel,
    batches: list[Any],
    levels: Levels | Mapping[str, Levels],
    wanted: list[Any],
    distance: Distance,
) -> Tensor:
    """How far its outputs at these levels lie from those wanted: float64 [N].

    Raises:
        InputError: not one finite number per sample.
    """
    outputs = outputs_of(adapted, batches, levels)
    found: list[Any] = [distance(out, own) for out, own in zip(outputs, wanted, strict=True)]
    for apart in found:
        if not isinstance(apart, Tensor) or apart.ndim != 1:
            seen = list(apart.shape) if isinstance(apart, Tensor) else type(apart).__name__
            raise InputError(f"distance must return one number per sample, [B]; got {seen}")
    joined = torch.cat([own.detach().double().cpu() for own in found])
    if not bool(joined.isfinite().all()):
        raise InputError("the distance between outputs is not finite")
    return joined


__all__ = ["distances_of", "outputs_of"]
