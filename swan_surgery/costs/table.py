"""A cost as a table: a sum of products of axes, evaluated at any gate values.

Costs are for the example inputs as given (batch included), in eval mode. A layer's cost scales with the
open units on each of its axes, which is exact at 0/1 gates. What it counts is the table's `unit`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from swan_surgery.channels import CostTerm
from swan_surgery.errors import InputError


Unit = Literal["MACs", "parameters", "ms"]


@dataclass(frozen=True)
class CostTable:
    """The cost terms of a gated model as flat tensors, for any gate values at once.

    Cost = sum over terms of factor * product over axes of (fixed + sum of count * value), in `unit`s.
    """

    factors: Tensor  # float64, shape (terms,)
    units: Tensor  # int64, shape (entries,)
    counts: Tensor  # float64, shape (entries,)
    rows: Tensor  # int64, shape (entries,): which axis an entry belongs to
    fixed: Tensor  # float64, shape (axes,)
    axes_of_term: Tensor  # int64, shape (terms, most axes); the last axis is the constant 1
    num_units: int
    total: float  # in `unit`s; an int where the factors are whole
    unit: Unit

    def lengths(self, values: Tensor) -> Tensor:
        """Open positions of every axis, [..., num_units] -> [..., axes]; float64."""
        start = self.fixed.expand(*values.shape[:-1], -1)
        return start.index_add(-1, self.rows, self.counts * values[..., self.units])

    def at(self, values: Tensor) -> Tensor:
        """The cost at gate values, in `unit`s; exact (below 2**53) when they are 0 or 1.

        Args:
            values: float64, [..., num_units]; leading axes are gates of as many samples.

        Returns:
            float64, [...]; differentiable.
        """
        lengths = self.lengths(values)[..., self.axes_of_term]
        return (self.factors * lengths.prod(dim=-1)).sum(-1)

    def marginal(self) -> Tensor:
        """What closing each unit alone saves, all others open; float64, shape (num_units,)."""
        values = torch.ones(self.num_units, dtype=torch.float64, device=self.factors.device)
        # A unit on both axes of a term (a layer whose input and output are coupled) counts once.
        return self.prices(values) - self._overlap(self.lengths(values))

    def prices(self, values: Tensor) -> Tensor:
        """The derivative of `at` by each unit's value, [..., num_units] -> [..., num_units]."""
        lengths = self.lengths(values)
        leading = values.shape[:-1]
        taken = torch.zeros_like(values)
        for column in range(self.axes_of_term.shape[1] - 1):
            axis = self.axes_of_term[:, column]
            others = self.factors.expand(*leading, -1)
            for other in range(self.axes_of_term.shape[1]):
                if other != column:
                    others = others * lengths[..., self.axes_of_term[:, other]]
            price = torch.zeros_like(lengths).index_add(-1, axis, others)
            taken.index_add_(-1, self.units, self.counts * price[..., self.rows])
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
        return replace(self, **moved)


def build_table(terms: Sequence[CostTerm], num_units: int, *, unit: Unit) -> CostTable:
    """Flatten cost terms; each counts as often as its share says.

    Raises:
        InputError: a share outside [0, 1].
    """
    for term in terms:
        if not 0 <= term.share <= 1:
            raise InputError(
                f"the share of module {term.module!r} says how often it runs, in [0, 1]; got {term.share}"
            )
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
        factors=torch.tensor([term.factor * term.share for term in terms], dtype=torch.float64),
        units=torch.tensor(units, dtype=torch.int64),
        counts=torch.tensor(counts, dtype=torch.float64),
        rows=torch.tensor(rows, dtype=torch.int64),
        fixed=torch.tensor(fixed, dtype=torch.float64),
        axes_of_term=torch.tensor(padded, dtype=torch.int64).reshape(len(padded), most + 1),
        num_units=num_units,
        total=sum(term.macs * term.share for term in terms),
        unit=unit,
    )


def share_terms(
    terms: Iterable[CostTerm], shares: float | Mapping[str, float]
) -> tuple[CostTerm, ...]:
    """Terms of modules that run for a share of the inputs only.

    Args:
        terms: as in a channel map.
        shares: in [0, 1]; one for all, or by module name, which stands for everything inside it too
            (`""` is the whole model). Shares of nested modules multiply, as do those the terms have.

    Raises:
        InputError: a module that no term lies in.
    """
    terms = tuple(terms)
    given = shares if isinstance(shares, Mapping) else {"": shares}
    for name in given:
        if not any(_lies_in(term.module, name) for term in terms):
            raise InputError(f"module {name!r} has a share, but nothing in it costs anything")
    return tuple(
        replace(
            term,
            share=prod(
                (own for at, own in given.items() if _lies_in(term.module, at)), start=term.share
            ),
        )
        for term in terms
    )


def _lies_in(module: str, name: str) -> bool:
    return not name or module == name or module.startswith(f"{name}.")
