"""Arrays of components: their distinct values, and their order."""

from typing import Any

import numpy as np


Ints = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def distinct(values: Ints) -> Ints:
    """The distinct values, sorted: `np.unique`, quicker where they lie close together."""
    if not values.size:
        return values
    low = int(values.min())
    span = int(values.max()) - low + 1
    if span > 8 * values.size:
        return np.unique(values)
    seen = np.zeros(span, bool)
    seen[values - low] = True
    return np.flatnonzero(seen) + low


def in_order(component: Ints, count: int) -> Ints:
    """Renumber `count` components by their first label, so that the numbering is stable."""
    first = np.empty(count, np.int64)
    first[component[::-1]] = np.arange(len(component))[::-1]  # of equal positions the last is kept
    rank = np.empty(count, np.int64)
    rank[np.argsort(first)] = np.arange(count)
    return rank[component]
