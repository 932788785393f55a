"""Which feed-forward layers let every token choose among their neurons, and why the others stay static."""

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.adaptive.assembling import reference, token_block
from swan_surgery.adaptive.candidates import NestedGroup, StaticGroup, static_group
from swan_surgery.adaptive.choices import drawn_masks
from swan_surgery.adaptive.matrices import input_axis, is_linear
from swan_surgery.adaptive.neuron_blocks import even_sizes
from swan_surgery.adaptive.probing import Call, Probe, close, probe
from swan_surgery.adaptive.span_groups import in_passing, in_the_way, with_spans
from swan_surgery.channels import ChannelMap
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models import Inputs
from swan_surgery.models.modes import evaluating


def by_token(
    model: nn.Module,
    inputs: Inputs,
    groups: Sequence[NestedGroup],
    channels: ChannelMap,
    unfit: Mapping[str, str],
    block_size: int,
) -> tuple[tuple[NestedGroup, ...], tuple[StaticGroup, ...], Probe]:
    """Groups that are the neurons of a feed-forward layer, those that are not, and how the former are called.

    Args:
        model: a private copy.
        inputs: example inputs.
        groups: candidates.
        channels: the map of the model.
        unfit: modules that may not adapt as a whole, with the reason.
        block_size: neurons in a block.
    """
    shaped = {group: _misshape(model, group) for group in groups}
    neurons = [group for group, reason in shaped.items() if reason is None]
    passing = {group: in_passing(group) for group in neurons}
    layers = [name for own in passing.values() for name in (*own.writers, *own.readers)]
    names = [group.block for group in neurons if group.block not in unfit]
    probed = probe(model, inputs, blocks=names, watched=layers, by_token=layers)
    sizes = {group: even_sizes(len(group.units), block_size) for group in neurons}
    for group, own_sizes in sizes.items():
        shaped[group] = odd_reader(group, probed) or _one_block(group, own_sizes)
    spans = [own for group, own in passing.items() if shaped[group] is None]
    taken, reasons, called = with_spans(
        model, inputs, spans, channels, probed, block_size=block_size
    )
    found: list[NestedGroup] = []
    static: list[StaticGroup] = []
    units = {span.units: span for span in taken}
    for group, why in shaped.items():
        reason = why
        own = units.get(group.units)
        if own is None and reason is None:
            # What lies between does not take each neuron by itself: the whole module may take each token so.
            adapt = [one.block for one in (*taken, *found)]
            reason = unfit.get(group.block) or in_the_way(group, adapt)
            reason = reason or _refusal(model, group, groups, channels, probed, sizes[group])
            own = group if reason is None else None
        if own is None:
            reason = reasons.get(group.units) or str(reason)
            static.append(static_group(channels, group.units, reason))
        else:
            found.append(own)
    return tuple(found), tuple(static), called


def odd_reader(group: NestedGroup, probed: Probe) -> str | None:
    """Why the readers of a group cannot be told what they get; None if they can."""
    for reader in group.readers:
        if probed.counts[reader] != 1:
            return f"{reader!r}, which reads them, runs {probed.counts[reader]} times as a module"
    return None


def tokens_of(probed: Probe, block: str) -> tuple[int, ...]:
    """The axes of a block's tokens in the example inputs, behind that of samples."""
    shape = probed.rows[block].first(probed.calls[block].arguments).shape
    if len(shape) == 2 and shape[0] != 2 * probed.batch:  # all tokens of one sample after the other
        return (shape[0] // (2 * probed.batch),)
    return tuple(shape[1:-1])


def _misshape(model: nn.Module, group: NestedGroup) -> str | None:
    """Why units are no neurons between linear layers; None if they are."""
    readers = {f"{reader}.weight" if reader else "weight" for reader in group.readers}
    (first, *others) = group.readers
    if others or not is_linear(model.get_submodule(first)):
        return "they are read by something else than one linear layer"
    for own in group.axes:
        layer = model.get_submodule(own.tensor.rpartition(".")[0])
        if (
            own.run != 1
            or not is_linear(layer)
            or own.axis != _axis_of_units(layer, own.tensor, readers)
        ):
            return f"{own.tensor!r} is no part of a feed-forward layer"
    if all(own.tensor in readers for own in group.axes):
        return "no linear layer writes them"
    return None


def _axis_of_units(layer: nn.Module, tensor: str, readers: Container[str]) -> int:
    inputs = input_axis(layer)
    if tensor in readers:
        return inputs
    return 1 - inputs if tensor.endswith("weight") else 0


def _one_block(group: NestedGroup, sizes: Sequence[int]) -> str | None:
    return f"{len(group.units)} neurons make one block" if len(sizes) < 2 else None


def _refusal(
    model: nn.Module,
    group: NestedGroup,
    groups: Sequence[NestedGroup],
    channels: ChannelMap,
    probed: Probe,
    sizes: Sequence[int],
) -> str | None:
    """Why the neurons of a block cannot be chosen token by token; None if they can."""
    if group.block in probed.refused:
        return probed.refused[group.block]
    if sum(other.block == group.block for other in groups) > 1:
        return "their block has other inner channels as well"
    return _is_by_token(probed.calls[group.block]) or _unlike(model, group, channels, probed, sizes)


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
    call = probed.calls[group.block]
    block = token_block(model, group.block, [group], channels, sizes, probed, like=reference(model))
    x = probed.rows[group.block].first(call.arguments)
    every = torch.ones(*x.shape[:-1], len(sizes), dtype=torch.bool)
    some = drawn_masks(x[..., 0].numel(), len(sizes), torch.Generator().manual_seed(0))
    args, kwargs = call.arguments
    for masks in (every, some.reshape(every.shape)):
        try:
            with streams_kept(), evaluating(block.full):
                found = block.at(masks, args, kwargs)
                with block.masked(masks, None):
                    wanted = block.full(*args, **kwargs)
        except Exception as err:  # noqa: BLE001 - the model's own code, with tokens side by side
            return f"their block does not take tokens side by side ({type(err).__name__})"
        if found.shape != wanted.shape or not close(found, wanted):
            return "their block does more than sum over them, token by token"
    return None


__all__ = ["by_token", "odd_reader", "tokens_of"]
