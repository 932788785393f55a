"""`adapt`: a copy of a model whose blocks give every input a width of its own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.assembling import assembled
from swan_surgery.adaptive.candidates import (
    NestedGroup,
    StaticGroup,
    candidates,
    static_group,
    unfit_blocks,
)
from swan_surgery.adaptive.checks import Choice, checked_choice
from swan_surgery.adaptive.neuron_blocks import cluster_scores, sizes_by_block
from swan_surgery.adaptive.probing import Probe, close, probe
from swan_surgery.adaptive.span_groups import odd_spans
from swan_surgery.adaptive.structure import Structure
from swan_surgery.adaptive.token_groups import by_token, odd_reader, tokens_of
from swan_surgery.channels import ChannelMap
from swan_surgery.costs.macs import cost_table
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, ModelError, NoGateableChannelsError
from swan_surgery.gates import GatedModel, magnitudes
from swan_surgery.gates.conversion import swanify, unswanify
from swan_surgery.models import Inputs, copy_of
from swan_surgery.models.architecture import architecture_of
from swan_surgery.models.checks import check_data
from swan_surgery.models.modes import evaluating
from swan_surgery.models.provenance import Provenance, note_, provenance_of


def adapt(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    structure: Literal["nested", "free", "blocks"] = "nested",
    per: Literal["block", "network"] = "block",
    widths: Sequence[float] | None = None,
    block_size: int = 128,
    scores: Tensor | None = None,
    ignore: Iterable[str] = (),
) -> AdaptiveModel:
    """Let every input choose how wide the blocks of a copy of `model` are (SWAN's p_i(x)).

    Nested: inner channels of a block (those whose producers and readers all lie inside one module) are put
    in order of importance; a sample takes the first ones. Free: each has a gate of its own,
    p_i(x) = sigmoid(z_i + w_i . f(x)), open where that is at least 1/2; f(x) are means and root mean squares
    of the channels of the block's input. Blocks: the inner units of feed-forward layers (a linear layer, or two
    that are multiplied, and the one that sums over them) are put together by what they read, `block_size` at a
    time, and every token runs the blocks of neurons that its gates open (sigmoid(z_i + w_i . x) >= 1/2, x the
    token). Where such a layer is no module of its own (BERT's, OPT's), the module around it runs as it is, and
    what lies between the linear layers must take each neuron by itself; else it stays static. All samples take all
    channels until `fit_widths` has seen data, or gates were trained: the result then computes what the given
    model computes.

    A closed channel reads its mean: what closed channels add to their reader on average goes into the
    reader's bias. `calibrate_widths` measures these means, and for nested widths batch-norm statistics, each
    width on its own; before that the means are zero.

    Args:
        model: an `nn.Module`, or a gated model (its weights as trained, without its gates).
        example_inputs: as in `swanify`; not needed for a gated model.
        structure: "nested": a sample takes a prefix of each block's channels. "free": any of them, by a gate
            per channel; for trials, as nested widths keep their speed in a batch and free channels do not.
            "blocks": for transformers, by token.
        per: "block": each block looks at its own input. "network": the first block looks, and all
            take the width it chooses; of "nested" only.
        widths: shares of the channels, ascending, the last one 1; (0.25, 0.5, 0.75, 1) by default. Of
            "nested" only.
        block_size: neurons in a block, of "blocks" only: 64 to 256 keep matrix products efficient.
        scores: importance per unit of `swan.swanify(model)`, as `swan.importance` gives it; by
            default the probabilities of a gated model that has closed some gates, else weight
            magnitudes. Of "nested" only: free channels stay in the given order.
        ignore: module names or glob patterns whose channels stay static.

    Raises:
        InputError: widths, block_size, scores or `structure` out of range.
        ModelError: what `swanify` refuses.
        NoGateableChannelsError: no group of channels lies inside one block; says why.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapted = swan.adapt(net, torch.zeros(2, 3))
        >>> adapted.costs.blocks[""]  # MACs at 2, 4, 6 and 8 channels
        tensor([10, 20, 30, 40])
    """
    choice = checked_choice(structure, per, widths, block_size)
    gated, base = _sources(model, example_inputs, ignore)
    return _adapted(gated, base, choice, _scores(gated, scores))


def adapt_in_order(
    model: nn.Module,
    example_inputs: Any,
    *,
    structure: str,
    per: str,
    widths: Sequence[float],
    block_size: int,
    ignore: Iterable[str],
) -> AdaptiveModel:
    """The same for a model whose channels are in order already: they stay as they are."""
    choice = checked_choice(structure, per, widths or None, block_size)
    gated, base = _sources(model, example_inputs, ignore)
    return _adapted(gated, base, choice, None)


def _adapted(
    gated: GatedModel, base: nn.Module, choice: Choice, scores: Tensor | None
) -> AdaptiveModel:
    """`scores`: None where channels are in order already."""
    channels, inputs = gated.channels, gated.own_inputs()
    check_data(base, inputs, to="adapt")
    with torch.inference_mode(mode=False), torch.no_grad():
        table = cost_table(gated).to(torch.device("cpu"))
        unfit = unfit_blocks(base, channels, table)
        if choice.kind == "blocks":
            found, static = candidates(base, channels, {}, by_token=True)
            found, refused, probed = by_token(
                base, inputs, found, channels, unfit, choice.block_size
            )
        else:
            found, static = candidates(base, channels, unfit)
            watched = [reader for group in found for reader in group.readers]
            probed = probe(base, inputs, blocks=[g.block for g in found], watched=watched)
            found, refused = _runnable(found, channels, probed)
        ordered = copy_of(base)
        _order_(ordered, found, _ranks(base, found, channels, choice, scores))
        found, odd = _verified(ordered, base, found, channels, probed, inputs)
        static = (*static, *refused, *odd)
        if not found:
            raise NoGateableChannelsError(
                "no channels can look at the input:\n" + "\n".join(f"  {own}" for own in static)
            )
        places = {name: place for place, name in enumerate(probed.calls)}
        found = tuple(sorted(found, key=lambda own: places[(*own.writers, own.block)[0]]))
        sizes: Mapping[str, tuple[int, ...]] = {}
        tokens: Mapping[str, tuple[int, ...]] = {}
        if choice.kind == "blocks":
            sizes = sizes_by_block(found, choice.block_size)
            tokens = {name: tokens_of(probed, name) for name in sizes}
        own = Structure(
            choice.kind,
            choice.per,
            choice.widths,
            found,
            static,
            channels,
            gated.example_inputs,
            gated.ignored,
            choice.block_size,
            sizes,
            tokens,
        )
        return assembled(ordered, table, own, probed)


def _ranks(
    base: nn.Module,
    groups: Sequence[NestedGroup],
    channels: ChannelMap,
    choice: Choice,
    scores: Tensor | None,
) -> Tensor:
    """By whose descending order units lie; equal ones leave the order as it is."""
    if scores is None or choice.kind == "free":
        return torch.zeros(channels.num_units)
    if choice.kind == "blocks":
        return cluster_scores(base, groups, channels.num_units, choice.block_size)
    return scores


def _sources(
    model: nn.Module, example_inputs: Any, ignore: Iterable[str]
) -> tuple[GatedModel, nn.Module]:
    """The gated model that maps and prices it, and a private copy of what is adapted."""
    if isinstance(model, AdaptiveModel):
        raise ModelError("the model is adaptive already; pass its dense_model() to adapt it anew")
    if isinstance(model, GatedModel):
        base = unswanify(model)
        gated = model
    else:
        # In place: no graph is needed, only the map and its costs.
        gated = swanify(model, example_inputs, ignore=ignore, in_place=True)
        base = copy_of(model)
    if provenance_of(base) is None:
        note_(base, Provenance(architecture_of(base)))
    return gated, base


def _scores(gated: GatedModel, scores: Any) -> Tensor:
    num_units = gated.gates.num_units
    if scores is None:
        if not bool(gated.gates.open_mask().all()):
            return gated.gates.probabilities().detach().double().cpu()
        return magnitudes(gated.model, gated.channels)
    if not isinstance(scores, Tensor) or scores.shape != (num_units,):
        seen = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"scores must be a tensor of shape ({num_units},), one per unit; got {seen}"
        )
    if not bool(scores.isfinite().all()):
        raise InputError("scores must be finite")
    given: Tensor = scores
    return given.detach().double().cpu()


def _runnable(
    found: Sequence[NestedGroup], channels: ChannelMap, probed: Probe
) -> tuple[tuple[NestedGroup, ...], tuple[StaticGroup, ...]]:
    """Groups whose block takes samples apart, and whose readers run once in it."""
    nested, static = [], []
    for group in found:
        reason = probed.refused.get(group.block) or odd_reader(group, probed)
        if reason is None:
            nested.append(group)
        else:
            static.append(static_group(channels, group.units, reason))
    return tuple(nested), tuple(static)


def _order_(model: nn.Module, groups: Iterable[NestedGroup], scores: Tensor) -> None:
    """Put the units of every group in order of importance, on all axes of all tensors."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for group in groups:
        order = scores[list(group.units)].argsort(descending=True, stable=True)
        for own in group.axes:
            places = (order[:, None] * own.run + torch.arange(own.run)).flatten()
            tensor = tensors[own.tensor]
            tensor.copy_(tensor.index_select(own.axis, places.to(tensor.device)))


def _verified(
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


__all__ = ["adapt"]
