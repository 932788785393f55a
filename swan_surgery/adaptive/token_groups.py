"""Which feed-forward layers let every token choose among their neurons, and why the others stay static."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.adaptive.assembling import reference, token_block
from swan_surgery.adaptive.candidates import NestedGroup, StaticGroup, static_group
from swan_surgery.adaptive.neuron_blocks import even_sizes
from swan_surgery.adaptive.probing import Call, Probe, close
from swan_surgery.channels import ChannelMap
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models.modes import evaluating


def by_token(
    model: nn.Module,
    groups: Sequence[NestedGroup],
    channels: ChannelMap,
    probed: Probe,
    block_size: int,
) -> tuple[tuple[NestedGroup, ...], tuple[StaticGroup, ...]]:
    """Groups that are the neurons of a feed-forward layer, and those that are not."""
    found, static = [], []
    for group in groups:
        reason = _refusal(model, group, groups, probed)
        if reason is None:
            sizes = even_sizes(len(group.units), block_size)
            reason = _unlike(model, group, channels, probed, sizes)
        if reason is None:
            found.append(group)
        else:
            static.append(static_group(channels, group.units, reason))
    return tuple(found), tuple(static)


def tokens_of(probed: Probe, block: str) -> tuple[int, ...]:
    """The axes of a block's tokens in the example inputs, behind that of samples."""
    return tuple(probed.rows[block].first(probed.calls[block].arguments).shape[1:-1])


def _refusal(
    model: nn.Module, group: NestedGroup, groups: Sequence[NestedGroup], probed: Probe
) -> str | None:
    """Why the inner units of a block cannot be chosen token by token; None if they can."""
    if sum(other.block == group.block for other in groups) > 1:
        return "their block has other inner channels as well"
    readers = {f"{reader}.weight" if reader else "weight" for reader in group.readers}
    (first, *others) = group.readers
    if others or type(model.get_submodule(first)) is not nn.Linear:
        return "they are read by something else than one linear layer"
    for own in group.axes:
        owner = model.get_submodule(own.tensor.rpartition(".")[0])
        wanted = 1 if own.tensor in readers else 0
        if own.run != 1 or own.axis != wanted or type(owner) is not nn.Linear:
            return f"{own.tensor!r} is no part of a feed-forward layer"
    if not any(own.axis == 0 for own in group.axes):
        return "no linear layer writes them"
    return _is_by_token(probed.calls[group.block])


def _is_by_token(call: Call) -> str | None:
    """Tokens stand on the axes before the last, in one tensor that goes in and one that comes out."""
    given = [leaf for leaf in tree_leaves(call.arguments) if isinstance(leaf, Tensor)]
    output = call.output
    if len(given) != 1 or not isinstance(output, Tensor):
        return "their block gets or gives more than one tensor"
    (x,) = given
    if x.ndim < 2 or x.shape[:-1] != output.shape[:-1]:
        return "their block does not give one row per token"
    return None


def _unlike(
    model: nn.Module,
    group: NestedGroup,
    channels: ChannelMap,
    probed: Probe,
    sizes: Sequence[int],
) -> str | None:
    """Whether what the blocks of neurons give sums up to what the layer gives: only a run can tell."""
    if len(sizes) < 2:
        return f"{len(group.units)} neurons make one block"
    call = probed.calls[group.block]
    block = token_block(model, group.block, [group], channels, sizes, probed, like=reference(model))
    x = probed.rows[group.block].first(call.arguments)
    every = torch.ones(*x.shape[:-1], len(sizes), dtype=torch.bool)
    try:
        with streams_kept(), evaluating(block.full):
            found = block.at(every, *call.arguments)
    except Exception as err:  # noqa: BLE001 - the model's own code, with tokens side by side
        return f"their block does not take tokens side by side ({type(err).__name__})"
    if found.shape != call.output.shape or not close(found, call.output):
        return "their block does more than sum over them, token by token"
    return None


__all__ = ["by_token", "tokens_of"]
