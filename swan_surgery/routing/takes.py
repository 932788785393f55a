"""Which way each observed sample takes, and means over those ways."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swan_surgery.routing.observing import Observed


def ways_taken(observed: Observed, decide: Sequence[str], thresholds: Sequence[float]) -> Tensor:
    """By sample the switch at which it leaves; as many as there are switches for the full way. int64 [N]."""
    takes = torch.full((observed.num_samples,), len(decide))
    for level in reversed(range(len(decide))):
        takes[observed.scores[decide[level]][level] <= thresholds[level]] = level
    return takes


def apart_of(observed: Observed, takes: Tensor) -> float:
    """Mean discrepancy to the full branch, over all samples."""
    return mean_of_those_who_leave(observed.apart, takes)


def mean_of_those_who_leave(values: Tensor, takes: Tensor) -> float:
    """Over all samples; the full way counts 0. `values` [switches, N]."""
    table = torch.cat([values, torch.zeros_like(values[:1])])
    return float(table.gather(0, takes[None]).mean())


__all__ = ["apart_of", "mean_of_those_who_leave", "ways_taken"]
