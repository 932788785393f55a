"""What an adaptive model was made of, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from swan_surgery.adaptive.allocation import Counts
from swan_surgery.adaptive.candidates import NestedGroup, StaticGroup
from swan_surgery.channels import ChannelMap
from swan_surgery.models import Inputs


@dataclass(frozen=True)
class Structure:
    """What an adaptive model was made of, as data.

    Attributes:
        kind: "nested", "free" or "blocks".
        per: "block" or "network": who looks at the input.
        widths: ascending, the last one 1; none but of nested widths.
        groups: of channels that look at the input.
        counts: of each group, how many units each width keeps.
        static: groups that do not, with the reason.
        channels: the map of the given model.
        example_inputs: what it was mapped with.
        ignored: patterns of modules that were to stay static.
        block_size: neurons in a block, as asked for.
        sizes: neurons in each block of every feed-forward layer, where tokens choose among them.
        tokens: the axes of its tokens in the example inputs, behind that of samples.
    """

    kind: str
    per: str
    widths: tuple[float, ...]
    groups: tuple[NestedGroup, ...]
    static: tuple[StaticGroup, ...]
    channels: ChannelMap = field(repr=False)
    example_inputs: Inputs = field(repr=False)
    ignored: tuple[str, ...] = ()
    block_size: int = 1
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    counts: Counts = ()

    def samples(self) -> list[Tensor]:
        """The tensors of the example inputs."""
        leaves = tree_leaves((self.example_inputs.args, dict(self.example_inputs.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def units_by_block(structure: Structure) -> dict[str, list[int]]:
    """The units of each block, group by group, as the channel map numbers them."""
    found: dict[str, list[int]] = {}
    for group in structure.groups:
        found.setdefault(group.block, []).extend(group.units)
    return found


def open_mask(structure: Structure, levels: Mapping[str, int]) -> Tensor:
    """Open units when blocks have these levels, bool of shape (num_units,)."""
    mask = torch.ones(structure.channels.num_units, dtype=torch.bool)
    for group, counts in zip(structure.groups, structure.counts, strict=True):
        mask[list(group.units[counts[levels[group.block]] :])] = False
    return mask


__all__ = ["Structure", "open_mask", "units_by_block"]
