"""Units of a group in order of importance, on all axes of all tensors: blocks compute what they computed."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from swan_surgery.adaptive.candidates import NestedGroup, StaticGroup, static_group
from swan_surgery.adaptive.probing import Probe, close
from swan_surgery.adaptive.span_groups import odd_spans
from swan_surgery.channels import ChannelMap
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models import Inputs
from swan_surgery.models.modes import evaluating


def order_(model: nn.Module, groups: Iterable[NestedGroup], scores: Tensor) -> None:
    """Put the units of every group in order of importance, on all axes of all tensors."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for group in groups:
        order = scores[list(group.units)].argsort(descending=True, stable=True)
        for own in group.axes:
            places = (order[:, None] * own.run + torch.arange(own.run)).flatten()
            tensor = tensors[own.tensor]
            tensor.copy_(tensor.index_select(own.axis, places.to(tensor.device)))


def verified(
    ordered: nn.Module,
    base: nn.Module,
    found: Sequence[NestedGroup],
    channels: ChannelMap,
    probed: Probe,
    inputs: Inputs,
) -> tuple[tuple[NestedGroup, ...], tuple[StaticGroup, ...]]:
    """Blocks in another order compute what they computed; one that does not is put back, and stays static."""
    passing = [group for group in found if group.writers]
    odd = set(odd_spans(ordered, inputs, passing, probed))
    for name in odd:
        ordered.get_submodule(name).load_state_dict(base.get_submodule(name).state_dict())
    for name in dict.fromkeys(group.block for group in found if not group.writers):
        call = probed.calls[name]
        block = ordered.get_submodule(name)
        with streams_kept(), evaluating(block):
            args, kwargs = _fresh(call.arguments)
            same = _all_close(block(*args, **kwargs), call.output)
        if not same:
            odd.add(name)
            block.load_state_dict(base.get_submodule(name).state_dict())
    reason = "their block computes something else once they are in another order"
    static = (static_group(channels, g.units, reason) for g in found if g.block in odd)
    return tuple(group for group in found if group.block not in odd), tuple(static)


def _fresh(call: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)


def _all_close(found: Any, wanted: Any) -> bool:
    return all(
        close(a, b)
        for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True)
        if isinstance(a, Tensor)
    )


__all__ = ["order_", "verified"]
