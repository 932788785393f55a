"""What a sample costs at its levels, in MACs: exact, block by block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swan_surgery.adaptive.allocation import Counts, uniform_counts
from swan_surgery.adaptive.candidates import NestedGroup
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


@dataclass(frozen=True)
class UnitCosts(BlockCosts):
    """The same where units are free: `blocks` are MACs with one unit open in each group, and with all.

    Attributes:
        table: of the given model's MACs, for `batch` samples.
        batch: samples in the example inputs.
        units: of each block, as the table numbers them.
    """

    table: CostTable = field(repr=False)
    batch: int
    units: Mapping[str, Sequence[int]] = field(repr=False)

    def at(self, levels: Mapping[str, Levels]) -> Tensor:
        """MACs of every sample at masks by block, (units,) or (B, units); int64 (B,), or ()."""
        with torch.no_grad():
            return self.priced(levels).round().long()

    def priced(self, values: Mapping[str, Levels]) -> Tensor:
        """The same for gates in [0, 1]: float64 (B,), differentiable (Eq. 10, each x of its own).

        Exact where gates are 0 or 1.
        """
        shapes = [torch.as_tensor(own).shape[:-1] for own in values.values()]
        leading = max(shapes, key=len)
        gates = torch.ones(*leading, self.table.num_units, dtype=torch.float64)
        for name, own in values.items():
            gates = gates.index_copy(
                -1,
                torch.tensor(self.units[name]),
                torch.as_tensor(own).double().cpu().expand(*leading, -1),
            )
        return self.table.at(gates) / self.batch + self.looking

    def above_least(self, name: str, masks: Tensor) -> Tensor:
        """MACs of every sample in one block, under masks, above those that are its least: float64 (B,)."""
        with torch.no_grad():
            most, least = self.blocks[name][1], self.blocks[name][0]
            whole = self.table.total / self.batch + self.looking
            above: Tensor = self.priced({name: masks}) - whole + (most - least)
            return above

    def marginal(self) -> dict[str, Tensor]:
        """What closing each unit alone saves per sample, by block: float64 (units,)."""
        found = self.table.marginal() / self.batch
        return {name: found[list(own)] for name, own in self.units.items()}


@dataclass(frozen=True)
class TokenCosts(UnitCosts):
    """The same where tokens choose blocks of neurons, for as many tokens as the example inputs have.

    `blocks` are MACs with one block of neurons open (the largest: any budget from there on can be kept), and
    with all.

    Attributes:
        sizes: neurons in each block, by layer.
    """

    sizes: Mapping[str, Sequence[int]] = field(repr=False)

    def priced(self, values: Mapping[str, Levels]) -> Tensor:
        """At masks of blocks of neurons: (blocks,), (B, blocks), or one row per token, whose mean counts.

        Exact: what neurons cost is a sum over neurons and tokens.
        """
        return super().priced({name: self._of_units(name, own) for name, own in values.items()})

    def marginal(self) -> dict[str, Tensor]:
        """What closing each block of neurons alone saves per sample, by layer: float64 (blocks,)."""
        return {
            name: torch.stack([part.sum() for part in own.split(list(self.sizes[name]))])
            for name, own in super().marginal().items()
        }

    def _of_units(self, name: str, masks: Levels) -> Tensor:
        own = of_samples(torch.as_tensor(masks).double().cpu())
        return own.repeat_interleave(torch.tensor(self.sizes[name]), dim=-1)


def of_samples(masks: Tensor) -> Tensor:
    """Masks of tokens as shares of each sample's tokens; those of samples, and one for all, as they are."""
    return masks.flatten(1, -2).mean(1) if masks.ndim > 2 else masks


def block_costs(
    table: CostTable,
    groups: Sequence[NestedGroup],
    counts: Counts,
    *,
    batch: int,
    looking: int,
) -> BlockCosts:
    """What each level of each block costs per sample.

    Args:
        table: of the model's MACs, for `batch` samples.
        groups: that adapt.
        counts: of each group, how many units each level keeps.
        batch: samples in the example inputs.
        looking: MACs per sample of what looks at the input.
    """
    ones = torch.ones(table.num_units, dtype=torch.float64)
    names = list(dict.fromkeys(group.block for group in groups))
    total = int(table.at(ones)) // batch
    blocks = {}
    for name in names:
        own = []
        for level in range(len(counts[0])):
            values = ones.clone()
            for group, kept in zip(groups, counts, strict=True):
                if group.block == name:
                    values[list(group.units[kept[level] :])] = 0
            own.append(int(table.at(values)) // batch)
        closed = ones.clone()
        for group in groups:
            if group.block == name:
                closed[list(group.units)] = 0
        without = int(table.at(closed)) // batch
        blocks[name] = torch.tensor(own) - without
    fixed = total - sum(int(own[-1]) for own in blocks.values())
    return BlockCosts(total, fixed + looking, looking, blocks)


def unit_costs(
    table: CostTable,
    groups: Sequence[NestedGroup],
    *,
    batch: int,
    looking: int,
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> UnitCosts:
    """What the units of each block cost per sample; other arguments as of `block_costs`.

    `sizes`: where tokens choose blocks of neurons, how many each holds.
    """
    # A width so small leaves one unit open.
    counts = uniform_counts(groups, (0.0, 1.0))
    ends = block_costs(table, groups, counts, batch=batch, looking=looking)
    units: dict[str, list[int]] = {}
    for group in groups:
        units.setdefault(group.block, []).extend(group.units)
    dense, fixed, rest = ends.dense, ends.fixed, (table, batch, units)
    if sizes is None:
        return UnitCosts(dense, fixed, looking, ends.blocks, *rest)
    # One neuron costs as much as another.
    blocks = {
        name: torch.stack([own[0] * max(sizes[name]), own[1]]) for name, own in ends.blocks.items()
    }
    return TokenCosts(dense, fixed, looking, blocks, *rest, sizes)


__all__ = ["BlockCosts", "TokenCosts", "UnitCosts", "block_costs", "of_samples", "unit_costs"]
