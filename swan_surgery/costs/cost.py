"""MACs and parameters: what a model costs, what a gated model would cost, what each unit adds.

One MAC is one multiply-add of a convolution, linear layer or matrix product; bias, normalisation,
activation and pooling are not counted. FLOPs = 2 x MACs. Costs are for the example inputs as given
(batch included), in eval mode. fvcore counts every layer once (it calls MACs "flops"); from then on
a layer's MACs scale with the open units on each of its axes, which is exact at 0/1 gates.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.channels import PINNED, CostAxis, CostTerm
from swan_surgery.costs.counting import count_operators
from swan_surgery.errors import CostError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """MACs of one forward pass in eval mode, counted by fvcore on a copy.

    Args:
        model: any module; of a gated model the base model is counted.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. The result
            is for this batch size.

    Raises:
        ModelError: not an `nn.Module`, or on the meta device.
        InputError: the model cannot be run on the inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> swan.count_macs(net, torch.zeros(1, 3))
        40
    """
    return count_operators(model, example_inputs).macs[""]


def count_params(model: nn.Module) -> int:
    """Parameters, a tied one once."""
    return sum(parameter.numel() for parameter in model.parameters())


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


_Tables = weakref.WeakKeyDictionary[GatedModel, CostTable]
_MACS: _Tables = weakref.WeakKeyDictionary()
_PARAMS: _Tables = weakref.WeakKeyDictionary()


def cost_table(gated: GatedModel) -> CostTable:
    """The cost table of a gated model, built once and certified layer by layer against fvcore.

    Raises:
        ModelError: `gated` is not a gated model.
        CostError: fvcore counts other MACs for some layer than its channel map says.
    """
    return _kept(gated, _MACS, _certified_terms)


def param_table(gated: GatedModel) -> CostTable:
    """Parameters as a cost table: each is the product of its axes, a tied one counts once.

    Raises:
        ModelError: `gated` is not a gated model.
    """
    return _kept(gated, _PARAMS, _param_terms)


def _kept(
    gated: GatedModel, tables: _Tables, terms_of: Callable[[GatedModel], Sequence[CostTerm]]
) -> CostTable:
    """The table of a gated model on its device, built once."""
    check_gated(gated)
    device = gated.gates.logits.device
    table = tables.get(gated)
    if table is None:
        table = build_table(terms_of(gated), gated.channels.num_units)
    if table.factors.device != device:
        table = table.to(device)
    tables[gated] = table
    return table


def _param_terms(gated: GatedModel) -> list[CostTerm]:
    axes: dict[str, dict[int, CostAxis]] = {}
    for entry in gated.channels.tensors:
        counts = Counter(unit for unit in entry.units if unit != PINNED)
        fixed = len(entry.units) - counts.total()
        axes.setdefault(entry.tensor, {})[entry.axis] = CostAxis(
            tuple(counts), tuple(counts.values()), fixed
        )
    terms = []
    for name, parameter in gated.model.named_parameters():
        own = axes.get(name, {})
        rest = prod(size for axis, size in enumerate(parameter.shape) if axis not in own)
        terms.append(CostTerm(name, "parameter", rest, tuple(own.values()), parameter.numel()))
    return terms


def _certified_terms(gated: GatedModel) -> tuple[CostTerm, ...]:
    """The cost terms that fvcore counts too; layers whose output nobody reads cost nothing there."""
    counted = count_operators(gated.model, gated.own_inputs()).macs
    terms = tuple(term for term in gated.channels.costs if counted.get(term.module, 1))
    if gated.channels.selects_by_data:
        terms = _rescaled(terms, counted)
    ours = module_macs(terms)
    wrong = [name for name, macs in counted.items() if name in ours and ours[name] != macs]
    if counted[""] != ours[""] and not wrong:
        wrong = [""]
    if wrong:
        deepest = max(wrong, key=lambda name: name.count(".") if name else -1)
        raise CostError(
            f"module {deepest!r} costs {counted[deepest]:,} MACs by fvcore but "
            f"{ours.get(deepest, 0):,} by the channel map; please report this model"
        )
    return terms


def _rescaled(terms: tuple[CostTerm, ...], counted: Mapping[str, int]) -> tuple[CostTerm, ...]:
    """How often layers run that work on what was selected by data, as on boxes, is fvcore's to say.

    The map took everything to be selected. Only whole multiples are taken over; the rest stays, and
    is refused.
    """
    ours, below = module_macs(terms), dict.fromkeys(counted, 0)
    for name, macs in counted.items():
        if name and (parent := name.rpartition(".")[0]) in below:
            below[parent] += macs
    own: dict[str, int] = {}
    for term in terms:
        own[term.module] = own.get(term.module, 0) + term.macs
    result = []
    for term in terms:
        wanted = counted.get(term.module, ours[term.module]) - below.get(term.module, 0)
        factor, rest = divmod(term.factor * wanted, own[term.module])
        macs = term.macs // max(term.factor, 1) * factor
        result.append(term if rest else replace(term, factor=factor, macs=macs))
    return tuple(result)


def module_macs(terms: Iterable[CostTerm]) -> Mapping[str, int]:
    """MACs per module at full width, children included, by the channel map's cost terms."""
    totals: dict[str, int] = {"": 0}
    for term in terms:
        totals[""] += term.macs
        parts = term.module.split(".") if term.module else []
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            totals[name] = totals.get(name, 0) + term.macs
    return totals


def expected_macs(gated: GatedModel) -> Tensor:
    """MACs at the current probabilities: a float64 scalar, differentiable, bilinear in p.

    Sum over layers of macs * (open in / in) * (open out / out), with p in place of 0/1.
    """
    return cost_table(gated).macs(gated.gates.probabilities().double())


def hard_macs(gated: GatedModel) -> int:
    """MACs at `open_mask()`: what the pruned model will cost, exactly.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> gated.gates.logits.data[:5] = -3.0
        >>> swan.hard_macs(gated)
        15
    """
    table = cost_table(gated)
    return int(table.macs(gated.gates.open_mask().double()))


def expected_params(gated: GatedModel) -> Tensor:
    """Parameters at the current probabilities: a float64 scalar, differentiable in the logits."""
    return param_table(gated).macs(gated.gates.probabilities().double())


def hard_params(gated: GatedModel) -> int:
    """Parameters at `open_mask()`: what the pruned model will have, exactly."""
    return int(param_table(gated).macs(gated.gates.open_mask().double()))


def marginal_macs(gated: GatedModel) -> Tensor:
    """The c_i of Eq. 10: MACs saved by closing unit i alone; float64, shape (num_units,)."""
    table = cost_table(gated)
    return table.to(torch.device("cpu")).marginal().to(table.factors.device)
