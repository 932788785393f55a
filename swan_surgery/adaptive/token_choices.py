"""What tokens may choose: masks of the blocks of neurons of feed-forward layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swan_surgery.adaptive.choices import Choices, FreeChoices, NestedChoices, drawn_masks
from swan_surgery.adaptive.costs import of_samples
from swan_surgery.adaptive.run import Levels
from swan_surgery.adaptive.structure import Structure
from swan_surgery.errors import InputError


class TokenChoices(FreeChoices):
    """A mask of a layer's blocks of neurons per token; at least one of them is open."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.sizes = {name: [len(structure.sizes[name])] for name in self.names}

    def checked(self, held: Levels, name: str) -> Levels:
        """-1, bool (blocks,), (B, blocks) or one row per token; floating where gradients are wanted."""
        (size,) = self.sizes[name]
        if not isinstance(held, Tensor):
            if type(held) is not int or held != -1:
                raise InputError(
                    f"tokens take masks of the {size} blocks of neurons of {name!r}, bool of shape ({size},), "
                    f"(B, {size}) or (B, ..., {size}), or -1 with all of them open; got {held!r}"
                )
            return torch.ones(size, dtype=torch.bool)
        kinds = held.dtype is torch.bool or held.is_floating_point()
        if not held.ndim or held.shape[-1] != size or not kinds:
            raise InputError(
                f"masks of the blocks of neurons of {name!r} are bool of shape ({size},), (B, {size}) or "
                f"(B, ..., {size}); got {held.dtype} {tuple(held.shape)}"
            )
        if not bool(held.bool().any(-1).all()):
            raise InputError(f"a mask of {name!r} closes all of its neurons; one block stays open")
        return held

    def joined(self, taken: Mapping[str, Levels], count: int) -> Tensor:
        """The share of a sample's tokens for which each block of neurons runs: float64 (B, blocks of all)."""
        rows = [torch.as_tensor(own).detach().cpu().double() for own in taken.values()]
        return torch.cat([of_samples(own).expand(count, -1) for own in rows], 1)

    def tried(self, batch: int, generator: torch.Generator) -> list[Any]:
        """All open, one mask for all, masks at random per sample, and per token."""
        by_token = {
            name: drawn_masks(batch * torch.Size(tokens).numel(), self.sizes[name][0], generator)
            .reshape(batch, *tokens, -1)
            for name, tokens in self.structure.tokens.items()
        }  # fmt: skip
        return [*super().tried(batch, generator), by_token]

    def static(self, wanted: Any) -> tuple[dict[str, Levels], Tensor]:
        """A mask of blocks of neurons for all layers, or masks by name."""
        if isinstance(wanted, Mapping) and set(wanted) != set(self.names):
            raise InputError(f"say the mask of every block: {self.names}")
        own = self.by_block(wanted)
        mask = torch.ones(self.structure.channels.num_units, dtype=torch.bool)
        for group in self.structure.groups:
            part = torch.as_tensor(own[group.block]).bool().cpu()
            if part.ndim != 1:
                raise InputError(f"a static model has one mask; got {tuple(part.shape)}")
            sizes = torch.tensor(self.structure.sizes[group.block])
            mask[list(group.units)] = part.repeat_interleave(sizes)
        return dict(own), mask

    def counted(self, column: Tensor, count: int) -> Tensor:  # noqa: ARG002 - closed and open
        """Samples' worth of tokens for which a block of neurons is closed, and open."""
        is_open = column.sum()
        return torch.stack([len(column) - is_open, is_open])


def choices_of(structure: Structure) -> Choices:
    """What may be chosen in a structure."""
    if structure.kind == "nested":
        return NestedChoices(structure)
    return TokenChoices(structure) if structure.kind == "blocks" else FreeChoices(structure)


__all__ = ["TokenChoices", "choices_of"]
