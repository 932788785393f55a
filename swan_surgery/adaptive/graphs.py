"""Samples that choose, in a graph that another runtime runs: every group is there, whether anybody is in it or not.

What stands in Python elsewhere (who is in a group, and which groups are empty) is data here: `nonzero` finds the rows,
and a layer of a group in which nobody is gets none. torch.export wants to know that tensors are not empty; it is told so,
and ONNX's operators, which have no such need, take none as well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from swan_surgery.adaptive.rows import Rows


_SOME = 2  # one is a number of its own to torch.export


def is_exporting() -> bool:
    """Whether torch.export, or torch.onnx on top of it, is tracing."""
    return torch.compiler.is_exporting()


def rows_where(mask: Tensor) -> Tensor:
    """The places of a mask [N] where it holds, int64."""
    places = mask.nonzero()[:, 0]
    torch._check(places.shape[0] >= _SOME)  # noqa: SLF001 - torch.export's own way to be told
    return places


def in_groups_of(
    levels: Tensor, count: int, at: Callable[[int, Any], Any], rows: Rows, call: Any
) -> Any:
    """A call whose samples run at levels of their own.

    Args:
        levels: int64 [B].
        count: how many there are.
        at: runs a call of some samples at a level.
        rows: which arguments hold one row per sample.
        call: of all samples.
    """
    outputs = [at(level, rows.select(call, rows_where(levels == level))) for level in range(count)]
    order = _places_in_groups(levels, count)
    shape = tree_flatten(outputs[0])[1]
    leaves = zip(*(tree_flatten(output)[0] for output in outputs), strict=True)
    return tree_unflatten([_in_order(own, order) for own in leaves], shape)


def _places_in_groups(levels: Tensor, count: int) -> Tensor:
    """Where each sample stands once those of the same level lie side by side, [B]."""
    is_of = (levels[:, None] == torch.arange(count, device=levels.device)).long()
    before = is_of.sum(0).cumsum(0) - is_of.sum(0)
    return (is_of * (before + is_of.cumsum(0) - 1)).sum(1)


def _in_order(leaves: Sequence[Any], order: Tensor) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    return torch.cat([*leaves]).index_select(0, order)


__all__ = ["in_groups_of", "is_exporting", "rows_where"]
