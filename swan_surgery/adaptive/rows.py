"""Rows of a call: which tensors among its arguments hold one row per sample, taken apart and put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from swan_surgery.errors import InputError, PathError


_FEWEST = 2  # axes: samples and channels


@dataclass(frozen=True, slots=True)
class Rows:
    """How a block is called.

    Attributes:
        positions: of the leaves of (args, kwargs) that hold one row per sample.
        shape: of (args, kwargs).
        tensors: positions of all leaves that are tensors.
        axes: of the first tensor that holds a row per sample.
    """

    positions: tuple[int, ...]
    shape: TreeSpec
    tensors: frozenset[int]
    axes: int

    @classmethod
    def of(cls, call: Any, positions: Sequence[int]) -> "Rows":
        """Of a call that was seen."""
        leaves, shape = tree_flatten(call)
        return cls(tuple(positions), shape, _tensors(leaves), leaves[positions[0]].ndim)

    def first(self, call: Any) -> Tensor:
        """The first of these leaves."""
        leaf: Tensor = tree_flatten(call)[0][self.positions[0]]
        return leaf

    def looked_at(self, call: Any, block: str, *, channels_last: bool) -> Tensor:
        """The first of these leaves, in which a block looks at its samples.

        Raises:
            InputError: it has other axes than it had with the example inputs: a sample without its batch, say.
        """
        first = self.first(call)
        if first.ndim < _FEWEST or (first.ndim != self.axes and not channels_last):
            raise InputError(
                f"block {block!r} gets {list(first.shape)}, {first.ndim} axes, and had {self.axes} with the example "
                f"inputs; an adaptive model runs on batches: model(x[None]) for one sample"
            )
        return first

    def leaves(self, call: Any) -> tuple[list[Any], TreeSpec]:
        """All leaves of a call, checked.

        Raises:
            PathError: tensors stand at other places than in the call that was seen.
        """
        leaves, shape = tree_flatten(call)
        if shape != self.shape or _tensors(leaves) != self.tensors:
            raise PathError(
                "a block that takes its samples apart gets other arguments than it did from the example inputs, "
                "where it was seen which of them hold a row per sample: adapt with inputs that hold them all"
            )
        return leaves, shape

    def take(self, call: Any, index: Sequence[int]) -> Any:
        """The call for some of the samples, ascending; without a copy where they lie side by side.

        Raises:
            PathError: tensors stand at other places than in the call that was seen.
        """
        leaves, shape = self.leaves(call)
        together = index[-1] - index[0] + 1 == len(index)
        for position in self.positions:
            leaf = leaves[position]
            if together:
                leaves[position] = leaf.narrow(0, index[0], len(index))
            else:
                places = torch.tensor(index, device=leaf.device)
                leaves[position] = leaf.index_select(0, places)
        return tree_unflatten(leaves, shape)

    def select(self, call: Any, places: Tensor) -> Any:
        """The call for the samples at places, int64 (number,), whatever their number."""
        leaves, shape = self.leaves(call)
        for position in self.positions:
            leaves[position] = leaves[position].index_select(0, places)
        return tree_unflatten(leaves, shape)


def _tensors(leaves: Sequence[Any]) -> frozenset[int]:
    return frozenset(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))


def in_groups(keys: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Samples of the same key, ascending; keys as they come first."""
    found: dict[Any, list[int]] = {}
    for sample, key in enumerate(keys):
        found.setdefault(key, []).append(sample)
    return list(found.items())


def in_runs(keys: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Neighbours of the same key: a key may come again, and all runs together are in order."""
    found: list[tuple[Any, list[int]]] = []
    for sample, key in enumerate(keys):
        if not found or found[-1][0] != key:
            found.append((key, []))
        found[-1][1].append(sample)
    return found


def put_together(outputs: Sequence[Any], indices: Sequence[Sequence[int]]) -> Any:
    """The outputs of groups of samples as the output of all of them, in their order.

    Args:
        outputs: one per group; every leaf a tensor with one row per sample, or the same for all.
        indices: which samples each group holds, ascending.
    """
    if len(outputs) == 1:
        return outputs[0]
    flat = [tree_flatten(output)[0] for output in outputs]
    shape = tree_flatten(outputs[0])[1]
    places = [place for index in indices for place in index]
    if places == sorted(places):
        joined = [_in_order(leaves) for leaves in zip(*flat, strict=True)]
    elif torch.is_grad_enabled():
        order = torch.tensor(places).argsort()
        joined = [_joined(leaves, order) for leaves in zip(*flat, strict=True)]
    else:
        joined = [_written(leaves, indices) for leaves in zip(*flat, strict=True)]
    return tree_unflatten(joined, shape)


def _in_order(leaves: Sequence[Any]) -> Any:
    return torch.cat(list(leaves)) if isinstance(leaves[0], Tensor) else leaves[0]


def _joined(leaves: Sequence[Any], order: Tensor) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    return torch.cat(list(leaves)).index_select(0, order.to(leaves[0].device))


def _written(leaves: Sequence[Any], indices: Sequence[Sequence[int]]) -> Any:
    first = leaves[0]
    if not isinstance(first, Tensor):
        return first
    count = sum(len(index) for index in indices)
    layout = (
        torch.channels_last
        if first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    whole = torch.empty(
        (count, *first.shape[1:]), dtype=first.dtype, device=first.device, memory_format=layout
    )
    for leaf, index in zip(leaves, indices, strict=True):
        whole.index_copy_(0, torch.tensor(index, device=first.device), leaf)
    return whole


__all__ = ["Rows", "in_groups", "in_runs", "put_together"]
