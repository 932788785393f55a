"""Any set of a block's units: which positions it keeps of every tensor, and the module of that shape."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.candidates import NestedAxis, NestedGroup
from swan_surgery.adaptive.statics import shell_at
from swan_surgery.channels import ChannelMap
from swan_surgery.cutting.plan import PruningPlan, make_plan
from swan_surgery.models import shell_of


@dataclass(frozen=True, slots=True)
class GroupUnits:
    """Where the units of one group stand: from `start` on among those of the block, and on which axes.

    `axes` and `readers` are named as inside the block; `runs` are the inputs that a reader has of each unit.
    """

    start: int
    units: tuple[int, ...]
    axes: tuple[NestedAxis, ...]
    readers: tuple[str, ...]
    runs: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The first unit of the next group."""
        return self.start + len(self.units)


def units_of(groups: Sequence[NestedGroup], block: str) -> tuple[GroupUnits, ...]:
    """The groups of a block, one after the other."""
    cut = len(block) + 1 if block else 0
    found, start = [], 0
    for group in groups:
        if group.block != block:
            continue
        axes = tuple(NestedAxis(own.tensor[cut:], own.axis, own.run) for own in group.axes)
        readers = tuple(reader[cut:] for reader in group.readers)
        weights = [f"{reader}.weight" if reader else "weight" for reader in readers]
        # As many in one piece on each axis: also where a reader's outputs are units as well.
        inputs = {own.tensor: own.run for own in sorted(axes, key=lambda own: own.axis)}
        runs = tuple(inputs[weight] for weight in weights)
        found.append(GroupUnits(start, group.units, axes, readers, runs))
        start += len(group.units)
    return tuple(found)


def places_of(is_open: Tensor, run: int) -> Tensor:
    """Positions of open units that have `run` each, ascending."""
    (units,) = is_open.nonzero(as_tuple=True)
    return (units[:, None] * run + torch.arange(run, device=units.device)).flatten()


class Shells:
    """The block without data, with any number of units in each group; made once for each.

    Which units they are makes no difference to the shape: every group lies in one run on each axis.
    """

    def __init__(
        self, full: nn.Module, name: str, groups: Sequence[GroupUnits], channels: ChannelMap
    ) -> None:
        self.blank = shell_of(full)
        self.name, self.groups, self.channels = name, tuple(groups), channels
        self.made: dict[tuple[int, ...], nn.Module] = {}

    def of(self, counts: tuple[int, ...]) -> nn.Module:
        """With so many units open; whoever reads what is closed has a bias."""
        if counts not in self.made:
            mask = torch.ones(self.channels.num_units, dtype=torch.bool)
            for group, count in zip(self.groups, counts, strict=True):
                mask[list(group.units[count:])] = False
            readers = [reader for group in self.groups for reader in group.readers]
            plan = self._inside(make_plan(self.channels, mask))
            self.made[counts] = shell_at(self.blank, plan, readers)
        return self.made[counts]

    def _inside(self, plan: PruningPlan) -> PruningPlan:
        """What of a plan is about this block, named as inside it."""
        cut = len(self.name) + 1 if self.name else 0

        def has(module: str) -> bool:
            return not self.name or module == self.name or module.startswith(f"{self.name}.")

        return replace(
            plan,
            positions=tuple(
                replace(p, tensor=p.tensor[cut:]) for p in plan.positions if has(p.tensor)
            ),
            attributes=tuple(
                replace(a, module=a.module[cut:]) for a in plan.attributes if has(a.module)
            ),
            numbers=tuple(replace(n, module=n.module[cut:]) for n in plan.numbers if has(n.module)),
        )


__all__ = ["GroupUnits", "Shells", "places_of", "units_of"]
