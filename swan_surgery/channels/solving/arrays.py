"""Arrays of components: found, their distinct values, and their order."""

from importlib import import_module
from typing import Any

import numpy as np


Ints = np.ndarray[Any, np.dtype[np.int64]]
_Labels = np.ndarray[Any, np.dtype[Any]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def components(first: _Labels, second: _Labels, size: int) -> tuple[int, Ints]:
    """The connected components of `size` labels joined in pairs: how many, and which one each is in."""
    # Half a second, which importing the library need not take.
    sparse = import_module("scipy.sparse")
    graph = sparse.coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(size, size))
    count, component = import_module("scipy.sparse.csgraph").connected_components(
        graph, directed=False
    )
    return count, component.astype(np.int64)


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
