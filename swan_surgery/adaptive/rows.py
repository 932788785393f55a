"""Rows of a call: which tensors among its arguments hold one row per sample, taken apart and put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True, slots=True)
class Rows:
    """Positions of the leaves of (args, kwargs) that hold one row per sample."""

    positions: tuple[int, ...]

    def first(self, call: Any) -> Tensor:
        """The first of these leaves."""
        leaf: Tensor = tree_flatten(call)[0][self.positions[0]]
        return leaf

    def take(self, call: Any, index: Tensor) -> Any:
        """The call for some of the samples, `index` int64 of shape (rows,)."""
        leaves, shape = tree_flatten(call)
        for position in self.positions:
            leaves[position] = leaves[position].index_select(0, index)
        return tree_unflatten(leaves, shape)


def put_together(outputs: Sequence[Any], indices: Sequence[Tensor]) -> Any:
    """The outputs of groups of samples as the output of all of them, in their order.

    Args:
        outputs: one per group; every leaf a tensor with one row per sample, or the same for all.
        indices: which samples each group holds, int64.
    """
    if len(outputs) == 1:
        return outputs[0]
    flat = [tree_flatten(output)[0] for output in outputs]
    shape = tree_flatten(outputs[0])[1]
    if torch.is_grad_enabled():
        order = torch.cat(list(indices)).argsort()
        joined = [_joined(leaves, order) for leaves in zip(*flat, strict=True)]
    else:
        joined = [_written(leaves, indices) for leaves in zip(*flat, strict=True)]
    return tree_unflatten(joined, shape)


def _joined(leaves: Sequence[Any], order: Tensor) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    return torch.cat(list(leaves)).index_select(0, order)


def _written(leaves: Sequence[Any], indices: Sequence[Tensor]) -> Any:
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
        whole.index_copy_(0, index, leaf)
    return whole


__all__ = ["Rows", "put_together"]
