"""What samples may choose, and how somebody says it for them: levels of nested widths, or masks of free units."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swan_surgery.adaptive.run import Levels
from swan_surgery.adaptive.structure import Structure, open_mask
from swan_surgery.errors import InputError


class Choices(ABC):
    """What the blocks of a structure can take."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.names = list(dict.fromkeys(group.block for group in structure.groups))

    def by_block(self, held: Levels | Mapping[str, Levels]) -> Mapping[str, Levels]:
        """What was said for all blocks, or for some by name, checked.

        Raises:
            InputError: it cannot be taken, or there is no such block.
        """
        if isinstance(held, Mapping):
            unknown = set(held) - set(self.names)
            if unknown:
                raise InputError(f"{min(unknown)!r} is no adaptive block; there are {self.names}")
            return {name: self.checked(own, name) for name, own in held.items()}
        return self.split(held)

    @abstractmethod
    def checked(self, held: Levels, name: str) -> Levels:
        """What was said for a block."""

    @abstractmethod
    def split(self, held: Levels) -> Mapping[str, Levels]:
        """What was said for all of them."""

    @abstractmethod
    def joined(self, taken: Mapping[str, Levels], count: int) -> Tensor:
        """What `count` samples took, one row each: levels (B, blocks), or masks (B, units)."""

    @abstractmethod
    def tried(self, batch: int, generator: torch.Generator) -> list[Any]:
        """Choices under which two executions are compared: the plain ones, and one at random per sample."""

    @abstractmethod
    def static(self, wanted: Any) -> tuple[dict[str, Levels], Tensor]:
        """One choice for all samples, as `AdaptiveModel.at` takes it: by block, and as an open mask."""

    @abstractmethod
    def kinds(self) -> dict[str, list[int]]:
        """By block, how many values each of its columns of `joined` may have."""

    @abstractmethod
    def shares(self, kinds: Sequence[Tensor]) -> tuple[float, ...]:
        """What `WidthStats` tells of a block, from the shares of the values in each of its columns."""

    def counted(self, column: Tensor, count: int) -> Tensor:
        """How many samples have each of `count` values in a column of `joined`: float64 (count,)."""
        return torch.bincount(column.long(), minlength=count).double()

    @abstractmethod
    def usual(self, name: str, kinds: Sequence[Tensor]) -> Any:
        """What most samples take in a block, from how often each column has each value; `static` takes it."""


class NestedChoices(Choices):
    """A level per block and sample."""

    def split(self, held: Levels) -> Mapping[str, Levels]:
        """One for all blocks, or int64 (B, blocks)."""
        if isinstance(held, Tensor) and held.ndim == 2:
            if held.shape[1] != len(self.names):
                raise InputError(
                    f"levels {tuple(held.shape)} are not one for each of {len(self.names)} blocks"
                )
            return {name: self.checked(held[:, i], name) for i, name in enumerate(self.names)}
        return dict.fromkeys(self.names, self.checked(held, ""))

    def checked(self, held: Levels, name: str) -> Levels:  # noqa: ARG002 - all blocks have the same levels
        """A whole number, or int64 (B,)."""
        widths = self.structure.widths
        count = len(widths)
        if isinstance(held, Tensor) and held.ndim:
            inside = (
                not held.is_floating_point()
                and held.dtype is not torch.bool
                and bool(((held >= 0) & (held < count)).all())
            )
            if not inside or held.ndim != 1:
                raise InputError(
                    f"levels must be whole numbers from 0 to {count - 1}, one per sample"
                )
            return held.long()
        level = held.item() if isinstance(held, Tensor) else held
        if type(level) is not int or not -count <= level < count:
            raise InputError(
                f"level {level!r} is none of the {count} widths {widths}: whole numbers from 0 to {count - 1} "
                f"(or -1), one for all or an int64 tensor with one per sample"
            )
        return level % count

    def joined(self, taken: Mapping[str, Levels], count: int) -> Tensor:
        """int64 (B, blocks)."""
        rows = [torch.as_tensor(own).cpu().expand(count) for own in taken.values()]
        return torch.stack(rows, 1)

    def tried(self, batch: int, generator: torch.Generator) -> list[Any]:
        """Each level for all, and levels at random."""
        count = len(self.structure.widths)
        drawn = torch.randint(count, (batch, len(self.names)), generator=generator)
        return [*range(count), drawn]

    def static(self, wanted: Any) -> tuple[dict[str, Levels], Tensor]:
        """A width for all blocks or by name."""
        widths = self.structure.widths
        own = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(self.names, wanted)
        if set(own) != set(self.names):
            raise InputError(f"say the width of every block: {self.names}")
        levels: dict[str, int] = {}
        for name in self.names:
            if own[name] not in widths:
                raise InputError(f"width {own[name]} is none of {widths}")
            levels[name] = widths.index(own[name])
        return {**levels}, open_mask(self.structure, levels)

    def kinds(self) -> dict[str, list[int]]:
        """One column per block."""
        return {name: [len(self.structure.widths)] for name in self.names}

    def shares(self, kinds: Sequence[Tensor]) -> tuple[float, ...]:
        """Of each width."""
        return tuple(kinds[0].tolist())

    def usual(self, name: str, kinds: Sequence[Tensor]) -> Any:  # noqa: ARG002 - all blocks have the same widths
        """A width."""
        return self.structure.widths[int(kinds[0].argmax())]


class FreeChoices(Choices):
    """A mask of a block's units per sample; at least one unit of each group is open."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.sizes: dict[str, list[int]] = {name: [] for name in self.names}
        for group in structure.groups:
            self.sizes[group.block].append(len(group.units))

    def split(self, held: Levels) -> Mapping[str, Levels]:
        """-1 for all units, or masks of the units of all blocks, one after the other."""
        if isinstance(held, Tensor) and held.ndim:
            counts = [sum(self.sizes[name]) for name in self.names]
            if held.shape[-1] != sum(counts):
                raise InputError(
                    f"a mask has one entry for each of {sum(counts)} units of all blocks; got {tuple(held.shape)}"
                )
            parts = zip(self.names, held.split(counts, dim=-1), strict=True)
            return {name: self.checked(part, name) for name, part in parts}
        return {name: self.checked(held, name) for name in self.names}

    def checked(self, held: Levels, name: str) -> Levels:
        """-1, bool (units,) or (B, units); floating with 0 and 1 where gradients are wanted."""
        sizes = self.sizes[name]
        if not isinstance(held, Tensor):
            if type(held) is not int or held != -1:
                raise InputError(
                    f"free units take masks, bool of shape ({sum(sizes)},) or (B, {sum(sizes)}) for block {name!r}, "
                    f"or -1 with all of them open; got {held!r}"
                )
            return torch.ones(sum(sizes), dtype=torch.bool)
        fits = held.ndim in (1, 2) and held.shape[-1] == sum(sizes)
        if not fits or not (held.dtype is torch.bool or held.is_floating_point()):
            raise InputError(
                f"masks of block {name!r} are bool of shape ({sum(sizes)},) or (B, {sum(sizes)}); got "
                f"{held.dtype} {tuple(held.shape)}"
            )
        if held.is_floating_point() and not bool(((held == 0) | (held == 1)).all()):
            raise InputError(f"masks of block {name!r} are 0 or 1 where they are no bool")
        if not all(bool(own.bool().any(-1).all()) for own in held.split(sizes, dim=-1)):
            raise InputError(
                f"a mask of block {name!r} closes all units of a group; one stays open"
            )
        return held

    def joined(self, taken: Mapping[str, Levels], count: int) -> Tensor:
        """Masks of all blocks one after the other, bool (B, units)."""
        rows = [torch.as_tensor(own).detach().cpu().bool() for own in taken.values()]
        return torch.cat([own.expand(count, -1) for own in rows], 1)

    def tried(self, batch: int, generator: torch.Generator) -> list[Any]:
        """All open, one mask for all, and masks at random."""
        sizes = [size for name in self.names for size in self.sizes[name]]
        drawn = torch.cat([drawn_masks(batch, size, generator) for size in sizes], 1)
        return [-1, drawn[0], drawn]

    def static(self, wanted: Any) -> tuple[dict[str, Levels], Tensor]:
        """A mask for all blocks, or masks by name."""
        if isinstance(wanted, Mapping) and set(wanted) != set(self.names):
            raise InputError(f"say the mask of every block: {self.names}")
        own = self.by_block(wanted)
        mask = torch.ones(self.structure.channels.num_units, dtype=torch.bool)
        for group, part in zip(self.structure.groups, self._parts(own), strict=True):
            if part.ndim != 1:
                raise InputError(f"a static model has one mask; got {tuple(part.shape)}")
            mask[list(group.units)] = part
        return dict(own), mask

    def kinds(self) -> dict[str, list[int]]:
        """One column per unit: closed or open."""
        return {name: [2] * sum(sizes) for name, sizes in self.sizes.items()}

    def shares(self, kinds: Sequence[Tensor]) -> tuple[float, ...]:
        """How often each unit is open."""
        return tuple(float(own[1]) for own in kinds)

    def usual(self, name: str, kinds: Sequence[Tensor]) -> Any:
        """What is open more often than not, and in any case one unit of each group."""
        often = torch.stack([own[1] - own[0] for own in kinds])
        return torch.cat([(own >= 0) | (own == own.max()) for own in often.split(self.sizes[name])])

    def _parts(self, own: Mapping[str, Levels]) -> Sequence[Tensor]:
        """Masks group by group, in the order of the structure's."""
        left = {
            name: list(torch.as_tensor(o).bool().cpu().split(self.sizes[name], -1))
            for name, o in own.items()
        }
        return [left[group.block].pop(0) for group in self.structure.groups]


def drawn_masks(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Masks at random, bool (B, size), each with a unit open."""
    found = torch.rand(batch, size, generator=generator) < 0.5
    sure = torch.randint(size, (batch, 1), generator=generator)
    return found.scatter(1, sure, True)  # noqa: FBT003 - torch's way


__all__ = ["Choices", "FreeChoices", "NestedChoices", "drawn_masks"]
