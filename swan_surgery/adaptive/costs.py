"""What a sample costs at its levels, in MACs: exact, block by block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swan_surgery.adaptive.candidates import NestedGroup
from swan_surgery.adaptive.levels import open_units
from swan_surgery.adaptive.run import Levels
from swan_surgery.costs.table import CostTable


@dataclass(frozen=True)
class BlockCosts:
    """MACs per sample: those of everything else, and those of each block at each of its levels.

    Attributes:
        dense: the given model.
        fixed: what no level changes, with what looks at the input.
        looking: what looking at the input costs, of that.
        blocks: int64 (levels,), by block.
    """

    dense: int
    fixed: int
    looking: int
    blocks: Mapping[str, Tensor]

    def at(self, levels: Mapping[str, Levels]) -> Tensor:
        """MACs of every sample, int64 (B,), or () where all blocks have one level for all samples."""
        total = torch.tensor(self.fixed)
        for name, own in levels.items():
            total = total + self.blocks[name][torch.as_tensor(own).cpu()]
        return total

    @property
    def least(self) -> int:
        """All blocks at their narrowest."""
        return self.fixed + sum(int(own[0]) for own in self.blocks.values())

    @property
    def most(self) -> int:
        """All blocks at full width."""
        return self.fixed + sum(int(own[-1]) for own in self.blocks.values())


def block_costs(
    table: CostTable,
    groups: Sequence[NestedGroup],
    widths: Sequence[float],
    *,
    batch: int,
    looking: int,
) -> BlockCosts:
    """What each level of each block costs per sample.

    Args:
        table: of the model's MACs, for `batch` samples.
        groups: that adapt.
        widths: ascending, the last one 1.
        batch: samples in the example inputs.
        looking: MACs per sample of what looks at the input.
    """
    ones = torch.ones(table.num_units, dtype=torch.float64)
    names = list(dict.fromkeys(group.block for group in groups))
    total = int(table.at(ones)) // batch
    blocks = {}
    for name in names:
        own = []
        for width in widths:
            values = ones.clone()
            for group in groups:
                if group.block == name:
                    values[list(group.units[open_units(group, width) :])] = 0
            own.append(int(table.at(values)) // batch)
        closed = ones.clone()
        for group in groups:
            if group.block == name:
                closed[list(group.units)] = 0
        without = int(table.at(closed)) // batch
        blocks[name] = torch.tensor(own) - without
    fixed = total - sum(int(own[-1]) for own in blocks.values())
    return BlockCosts(total, fixed + looking, looking, blocks)


__all__ = ["BlockCosts", "block_costs"]
