"""MACs: what a model costs, what a gated model would cost, what each unit adds.

One MAC is one multiply-add of a convolution, linear layer or matrix product; bias, normalisation,
activation and pooling are not counted. FLOPs = 2 x MACs. Every layer is counted in one run; from then on
its MACs scale with the open units on each of its axes.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.channels import CostTerm
from swan_surgery.costs.counting import count_operators
from swan_surgery.costs.freshness import channels_now, kept_table
from swan_surgery.costs.table import CostTable, build_table
from swan_surgery.gates import GatedModel


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """MACs of one forward pass in eval mode, counted as a copy runs.

    Args:
        model: any module; of a gated model the base model is counted, of a routed one what these inputs take.
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


def cost_table(gated: GatedModel) -> CostTable:
    """The MACs of a gated model as a table, certified layer by layer by a run.

    Built once, and anew when the model or its example inputs change.

    Raises:
        ModelError: `gated` is not a gated model.
        CostError: the model was changed and its gates no longer fit.
    """

    def make() -> CostTable:
        return build_table(certified_terms(gated), gated.channels.num_units, unit="MACs")

    return kept_table(gated, "MACs", make)


def certified_terms(gated: GatedModel) -> tuple[CostTerm, ...]:
    """The cost terms of the channel map, each certified by what its module costs in a real run.

    What the run shows is right: rows that data selects are priced as selected, what only the map has
    costs nothing, what only the run has stays whatever is closed. Where some modules run for a share
    of the inputs only, a table of `share_terms(terms, shares)` says what that costs.

    Raises:
        CostError: the model was changed and its gates no longer fit.

    Warns:
        UserWarning: the run and the map differ although nothing is selected by data.
    """
    channels = channels_now(gated)
    counted = count_operators(gated.model, gated.own_inputs()).calls
    by_module: dict[str, list[CostTerm]] = {name: [] for name in counted}
    for term in channels.costs:
        by_module.setdefault(term.module, []).append(term)
    differs = [name for name, own in by_module.items() if _sum(own) != sum(counted.get(name, ()))]
    if not differs:
        return channels.costs
    if not channels.selects_by_data:
        first = differs[0]
        warnings.warn(
            f"module {first!r} costs {sum(counted.get(first, ())):,} MACs as it runs but "
            f"{_sum(by_module[first]):,} by the channel map ({len(differs)} such modules): it is priced "
            f"in proportion, and a budget may be missed by a little; swan.count_macs(small, inputs) "
            f"says what a pruned model costs. Please report this model",
            UserWarning,
            stacklevel=2,
        )
    return tuple(
        term
        for name, own in by_module.items()
        for term in as_counted(own, counted.get(name, ()), module=name)
    )


def _sum(terms: Iterable[CostTerm]) -> int:
    return sum(term.macs for term in terms)


def as_counted(
    terms: Sequence[CostTerm], calls: Sequence[int], *, module: str
) -> tuple[CostTerm, ...]:
    """The terms of one module, priced at what its calls cost in a run.

    Call by call where there are as many calls as terms, else all in proportion.
    """
    if _sum(terms) == sum(calls):
        return tuple(terms)
    if len(terms) == len(calls):
        pairs = zip(terms, calls, strict=True)
    else:
        pairs = zip(terms, _parts(sum(calls), [term.macs for term in terms]), strict=True)
    found = [_priced(term, macs) for term, macs in pairs if macs]
    rest = sum(calls) - _sum(found)
    return (*found, CostTerm(module, "run", rest, (), rest)) if rest else tuple(found)


def _parts(total: int, shares: Sequence[int]) -> list[int]:
    """A whole number in whole parts that are in proportion; nothing where all shares are 0."""
    ends = [total * end // (sum(shares) or 1) for end in accumulate(shares, initial=0)]
    return [end - start for start, end in pairwise(ends)]


def _priced(term: CostTerm, macs: int) -> CostTerm:
    """The term at other MACs; a rest that is no whole multiple of its axes is left out."""
    once = prod(sum(axis.counts) + axis.num_fixed for axis in term.axes)
    factor = macs // max(once, 1)
    return replace(term, factor=factor, macs=factor * once)


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
    """MACs at the current probabilities: a float64 scalar, differentiable, bilinear in p."""
    return cost_table(gated).at(gated.gates.probabilities().double())


def hard_macs(gated: GatedModel) -> int:
    """MACs at `open_mask()`: what the pruned model will cost, exactly."""
    table = cost_table(gated)
    return int(table.at(gated.gates.open_mask().double()))


def marginal_macs(gated: GatedModel) -> Tensor:
    """The c_i of Eq. 10: MACs saved by closing unit i alone; float64, shape (num_units,)."""
    table = cost_table(gated)
    return table.to(torch.device("cpu")).marginal().to(table.factors.device)
