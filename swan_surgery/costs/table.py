"""A cost as a table: a sum of products of axes, evaluated at any gate values.

Costs are for the example inputs as given (batch included), in eval mode. A layer's cost scales with the
open units on each of its axes, which is exact at 0/1 gates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from swan_surgery.channels import CostTerm


@dataclass(frozen=True)
class CostTable:
    """The cost terms of a gated model as flat tensors, for any gate values at once.

    MACs = sum over terms of factor * product over axes of (fixed + sum of count * value).
    """

    factors: Tensor  # float64, shape (terms,)
    units: Tensor  # int64, shape (entries,)
    counts: Tensor  # float64, shape (entries,)
    rows: Tensor  # int64, shape (entries,): which axis an entry belongs to
    fixed: Tensor  # float64, shape (axes,)
    axes_of_term: Tensor  # int64, shape (terms, most axes); the last axis is the constant 1
    num_units: int
    total: float  # an int where the factors are whole

    def lengths(self, values: Tensor) -> Tensor:
        """Open positions of every axis, shape (axes,); `values` float64 of shape (num_units,)."""
        return self.fixed.index_add(0, self.rows, self.counts * values[self.units])

    def macs(self, values: Tensor) -> Tensor:
        """MACs at gate values, a float64 scalar; exact (below 2**53) when the values are 0 or 1."""
        return (self.factors * self.lengths(values)[self.axes_of_term].prod(dim=1)).sum()

    def marginal(self) -> Tensor:
        """MACs saved by closing each unit alone, all others open; float64, shape (num_units,)."""
        values = torch.ones(self.num_units, dtype=torch.float64, device=self.factors.device)
        # A unit on both axes of a term (a layer whose input and output are coupled) counts once.
        return self.prices(values) - self._overlap(self.lengths(values))

    def prices(self, values: Tensor) -> Tensor:
        """The derivative of `macs` by each unit's value; float64, shape (num_units,)."""
        lengths = self.lengths(values)
        taken = torch.zeros_like(values)
        for column in range(self.axes_of_term.shape[1] - 1):
            axis = self.axes_of_term[:, column]
            others = self.factors.clone()
            for other in range(self.axes_of_term.shape[1]):
                if other != column:
                    others = others * lengths[self.axes_of_term[:, other]]
            price = torch.zeros_like(self.fixed).index_add(0, axis, others)
            taken.index_add_(0, self.units, self.counts * price[self.rows])
        return taken

    def _overlap(self, lengths: Tensor) -> Tensor:
        """Counted twice above: factor * count on one axis * count on another, same unit."""
        overlap = torch.zeros(self.num_units, dtype=torch.float64)
        entries: dict[int, dict[int, float]] = {}
        axes = zip(self.rows.tolist(), self.units.tolist(), self.counts.tolist(), strict=True)
        for row, unit, count in axes:
            entries.setdefault(row, {})[unit] = count
        for factor, columns in zip(self.factors.tolist(), self.axes_of_term.tolist(), strict=True):
            first, second = (entries.get(axis, {}) for axis in (*columns, -1)[:2])
            rest = prod(float(lengths[axis]) for axis in columns[2:])
            for unit in first.keys() & second.keys():
                overlap[unit] += factor * first[unit] * second[unit] * rest
        return overlap

    def to(self, device: torch.device) -> "CostTable":
        """The same table on another device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("factors", "units", "counts", "rows", "fixed", "axes_of_term")
        }
        return CostTable(**moved, num_units=self.num_units, total=self.total)


def build_table(terms: Sequence[CostTerm], num_units: int) -> CostTable:
    """Flatten cost terms of a channel map."""
    units: list[int] = []
    counts: list[int] = []
    rows: list[int] = []
    fixed: list[int] = []
    known: dict[Any, int] = {}
    columns = []
    most = max((len(term.axes) for term in terms), default=0)
    for term in terms:
        own = []
        for axis in term.axes:
            if axis not in known:
                known[axis] = len(fixed)
                units += axis.units
                counts += axis.counts
                rows += [len(fixed)] * len(axis.units)
                fixed.append(axis.num_fixed)
            own.append(known[axis])
        columns.append(own)
    one = len(fixed)
    fixed.append(1)
    padded = [own + [one] * (most + 1 - len(own)) for own in columns]
    return CostTable(
        factors=torch.tensor([term.factor for term in terms], dtype=torch.float64),
        units=torch.tensor(units, dtype=torch.int64),
        counts=torch.tensor(counts, dtype=torch.float64),
        rows=torch.tensor(rows, dtype=torch.int64),
        fixed=torch.tensor(fixed, dtype=torch.float64),
        axes_of_term=torch.tensor(padded, dtype=torch.int64).reshape(len(padded), most + 1),
        num_units=num_units,
        total=sum(term.macs for term in terms),
    )
