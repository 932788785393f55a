"""The tables of a gated model, built once."""

import weakref
from collections.abc import Callable, Sequence

from swan_surgery.channels import CostTerm
from swan_surgery.costs.table import CostTable, build_table
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated


Tables = weakref.WeakKeyDictionary[GatedModel, CostTable]


def kept_table(
    gated: GatedModel, tables: Tables, terms_of: Callable[[GatedModel], Sequence[CostTerm]]
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
