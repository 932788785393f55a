"""MACs: what a model costs, what a gated model would cost, what each unit adds.

One MAC is one multiply-add of a convolution, linear layer or matrix product; bias, normalisation,
activation and pooling are not counted. FLOPs = 2 x MACs. fvcore counts every layer once (it calls MACs
"flops"); from then on a layer's MACs scale with the open units on each of its axes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.channels import CostTerm
from swan_surgery.costs.counting import count_operators
from swan_surgery.costs.freshness import channels_now, kept_table
from swan_surgery.costs.table import CostTable, build_table
from swan_surgery.errors import CostError
from swan_surgery.gates import GatedModel


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


def cost_table(gated: GatedModel) -> CostTable:
    """The MACs of a gated model as a table, certified layer by layer against fvcore.

    Built once, and anew when the model or its example inputs change.

    Raises:
        ModelError: `gated` is not a gated model.
        CostError: fvcore counts other MACs for some layer than the channel map says, or the model was
            changed and its gates no longer fit.
    """

    def make() -> CostTable:
        return build_table(certified_terms(gated), gated.channels.num_units, unit="MACs")

    return kept_table(gated, "MACs", make)


def certified_terms(gated: GatedModel) -> tuple[CostTerm, ...]:
    """The cost terms that fvcore counts too; layers whose output nobody reads cost nothing there.

    Where some modules run for a share of the inputs only, a table of `share_terms(terms, shares)` says
    what that costs.

    Raises:
        CostError: as `cost_table`.
    """
    channels = channels_now(gated)
    counted = count_operators(gated.model, gated.own_inputs()).macs
    terms = tuple(term for term in channels.costs if counted.get(term.module, 1))
    if channels.selects_by_data:
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
    return cost_table(gated).at(gated.gates.probabilities().double())


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
    return int(table.at(gated.gates.open_mask().double()))


def marginal_macs(gated: GatedModel) -> Tensor:
    """The c_i of Eq. 10: MACs saved by closing unit i alone; float64, shape (num_units,)."""
    table = cost_table(gated)
    return table.to(torch.device("cpu")).marginal().to(table.factors.device)
