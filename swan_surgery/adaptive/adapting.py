"""`adapt`: a copy of a model whose blocks give every input a width of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.allocation import Counts, checked_counts, scored_counts, uniform_counts
from swan_surgery.adaptive.assembling import as_given, assembled
from swan_surgery.adaptive.candidates import (
    NestedGroup,
    StaticGroup,
    candidates,
    static_group,
    unfit_blocks,
)
from swan_surgery.adaptive.checks import Choice, check_allocation, checked_choice
from swan_surgery.adaptive.neuron_blocks import cluster_scores, sizes_by_block
from swan_surgery.adaptive.ordering import order_, verified
from swan_surgery.adaptive.probing import Probe, probe
from swan_surgery.adaptive.structure import Structure
from swan_surgery.adaptive.token_groups import by_token, odd_reader, tokens_of
from swan_surgery.channels import ChannelMap
from swan_surgery.costs.macs import cost_table
from swan_surgery.errors import InputError, ModelError, NoGateableChannelsError
from swan_surgery.gates import GatedModel, magnitudes
from swan_surgery.gates.conversion import swanify, unswanify
from swan_surgery.models import copy_of
from swan_surgery.models.architecture import architecture_of
from swan_surgery.models.checks import check_data
from swan_surgery.models.provenance import Provenance, note_, provenance_of


Counting = Callable[[Sequence[NestedGroup]], Counts]


def adapt(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    structure: Literal["nested", "free", "blocks"] = "nested",
    per: Literal["block", "network"] = "block",
    widths: Sequence[float] | None = None,
    block_size: int = 128,
    scores: Tensor | None = None,
    allocation: Literal["scores", "uniform"] | None = None,
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
        widths: shares, ascending, the last one 1; (0.25, 0.5, 0.75, 1) by default. Of "nested" only.
        block_size: neurons in a block, of "blocks" only: 64 to 256 keep matrix products efficient.
        scores: importance per unit of `swan.swanify(model)`, as `swan.importance` gives it; by
            default the probabilities of a gated model that has closed some gates, else weight
            magnitudes. Of "nested" only: free channels stay in the given order.
        allocation: what a width is a share of. "scores": of the MACs of all channels that adapt; kept are
            those with most score per MAC (by falling probability of gates), as `prune_by_score` chooses, so that
            blocks which matter stay wider. "uniform": of the channels of each block. By default "scores" where
            there are some that are not negative, and "uniform" with weight magnitudes, which say little across layers.
        ignore: module names or glob patterns whose channels stay static.

    Raises:
        InputError: widths, block_size, scores, `allocation` or `structure` out of range.
        ModelError: what `swanify` refuses.
        NoGateableChannelsError: no group of channels lies inside one block; says why.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapted = swan.adapt(net, torch.zeros(2, 3))
        >>> adapted.costs.blocks[""]  # MACs at 2, 4, 6 and 8 channels
        tensor([10, 20, 30, 40])
    """
    choice = checked_choice(structure, per, widths, block_size)
    check_allocation(allocation, choice.kind)
    gated, base = _sources(model, example_inputs, ignore)
    given, have_learnt = _scores(gated, scores)
    if allocation is None:
        known = (scores is not None and bool((given >= 0).all())) or have_learnt
        allocation = "scores" if known else "uniform"
    elif allocation == "scores" and not bool((given >= 0).all()):
        raise InputError(
            f"scores must not be negative where they say how wide blocks are; the least is {float(given.min()):.3g} "
            f'(allocation="uniform" takes their order alone)'
        )
    counting: Counting = partial(uniform_counts, widths=choice.widths)
    if allocation == "scores":
        counting = partial(
            scored_counts, gated, widths=choice.widths, scores=given, per_cost=not have_learnt
        )
    return _adapted(gated, base, choice, given, counting)


def adapt_in_order(
    model: nn.Module,
    example_inputs: Any,
    *,
    structure: str,
    per: str,
    widths: Sequence[float],
    block_size: int,
    ignore: Iterable[str],
    counts: Counts | None,
) -> AdaptiveModel:
    """The same for a model whose channels are in order already: they stay as they are.

    `counts`: how many units of each group each width keeps; by default the same share of all.
    """
    choice = checked_choice(structure, per, widths or None, block_size)
    gated, base = _sources(model, example_inputs, ignore)

    def counting(groups: Sequence[NestedGroup]) -> Counts:
        if counts is None:
            return uniform_counts(groups, choice.widths)
        return checked_counts(counts, groups, choice.widths)

    return _adapted(gated, base, choice, None, counting)


def _adapted(
    gated: GatedModel,
    base: nn.Module,
    choice: Choice,
    scores: Tensor | None,
    counting: Counting,
) -> AdaptiveModel:
    """`scores`: None where channels are in order already. `counting` says how many units of its groups a width has."""
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
        order_(ordered, found, _ranks(base, found, channels, choice, scores))
        found, odd = verified(ordered, base, found, channels, probed, inputs)
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
            counting(found) if choice.kind == "nested" else (),
        )
        return as_given(assembled(ordered, table, own, probed), base, inputs)


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


def _scores(gated: GatedModel, scores: Any) -> tuple[Tensor, bool]:
    """One per unit, and whether gates that have closed some learnt them."""
    num_units = gated.gates.num_units
    if scores is None:
        if not bool(gated.gates.open_mask().all()):
            return gated.gates.probabilities().detach().double().cpu(), True
        return magnitudes(gated.model, gated.channels).double().cpu(), False
    if not isinstance(scores, Tensor) or scores.shape != (num_units,):
        seen = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"scores must be a tensor of shape ({num_units},), one per unit; got {seen}"
        )
    if not bool(scores.isfinite().all()):
        raise InputError("scores must be finite")
    given: Tensor = scores
    return given.detach().double().cpu(), False


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


__all__ = ["adapt"]
