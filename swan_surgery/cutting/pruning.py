"""`prune`: from open gates to a smaller dense model of the given class, verified."""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swan_surgery.costs.latency_table import LatencyTable
from swan_surgery.cutting.compensation import compensate as compensate_layers
from swan_surgery.cutting.configuring import configured_
from swan_surgery.cutting.plan import make_plan
from swan_surgery.cutting.step import apply_plan_, cut_step
from swan_surgery.cutting.verification import verify_pruned
from swan_surgery.errors import InputError, SwanWarning
from swan_surgery.gates import GatedModel, stands_as_started
from swan_surgery.gates.checks import check_gated
from swan_surgery.models.bare_norms import follow_widths_
from swan_surgery.models.checks import check_data
from swan_surgery.models.provenance import note_, provenance_of
from swan_surgery.selection.diminishing_returns import DiminishingReturns
from swan_surgery.selection.limits import Limit, Of, limits_of
from swan_surgery.selection.multiples import (
    coarsest,
    for_budget,
    multiples_of,
    name_undershoot,
)
from swan_surgery.selection.ordering import order_by_price, ranking
from swan_surgery.selection.uniform import uniform_of
from swan_surgery.selection.widest_mask import widest_mask
from swan_surgery.selection.widths import Widths, within_widths


def prune(
    gated: GatedModel,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    latency_table: LatencyTable | None = None,
    of: Of = "given",
    widths: Widths | None = None,
    round_to: int | Literal["auto"] = 1,
    uniform: bool = False,
    verify: bool = True,
    compensate: Iterable[Any] | None = None,
    reference: nn.Module | None = None,
) -> nn.Module:
    """Remove the closed channels: a plain model of the given class, `forward` and state-dict keys.

    The gated model is not changed. dtype, device, memory format, `requires_grad`, tied weights and
    the training mode stay as they were.

    Args:
        gated: the result of `swanify`, trained. Gates that were not trained stand in the order of their
            weights' sizes alone, which is warned of: `prune_by_score` and `swan.compress` choose better then.
        macs: share of the base model's MACs to keep at most, in (0, 1], or a number of MACs
            (at the example inputs; 2e9). Moves the threshold: units
            stay in order of p, as many as the budget allows, so closed units may open again; what
            is left of the budget is filled with the next units that fit. By default
            `gates.open_mask()` stays.
        params: the same for parameters; with several budgets, all are kept.
        latency_ms: milliseconds to take at most, by `latency_table`.
        latency_table: from `swan.measure_latency_table(gated)`.
        of: "original" takes the shares of `macs` and `params` of the model before it was ever cut, where
            this one is a cut already.
        widths: ceilings on single layers: names or glob patterns (the first that matches counts) -> at
            most so many units, or at most this share of them (a float), as in `{"layer3.*": 0.5}`.
            `{"*": 0.5}` alone halves every layer. Floors are `gates.min_width`'s.
        round_to: widths become multiples of this many channels (8 suits most hardware), by keeping
            the best of the closed units. "auto" takes the multiple that `latency_table` found to be
            the fastest per MAC; without a table 8, or 4, 2, 1 where that would leave more than a tenth of
            the budget unused.
        uniform: the same width in all layers of one role, which units ever stay in each. Of a model that
            is built from a configuration (transformers' are) what its numbers can say: they are
            rewritten, and its own `save_pretrained` and `from_pretrained` work. Of others, of layers called
            alike but for numbers.
        verify: run both models on the example inputs and compare (before weights are solved for).
        compensate: batches with which the weights behind the cut are solved for anew, as
            `swan.compensate` does.
        reference: what these then aim at: a plain model with the base model's shapes, such as the
            trained network that was gated. By default the gated model as its hard gates stand, so
            that what a budget closes beyond these is made up for.

    Raises:
        ModelError: `gated` is not a gated model, or on the meta device.
        GateError: NaN or infinite logits.
        InputError: `macs`, `params`, `latency_ms` or `round_to` out of range; `uniform=True` and
            no configuration says such widths.
        BudgetError: the budget cannot be reached.
        EmptyLayerError: a layer would keep no channel (`gates.min_width = 0`).
        VerificationError: the pruned model computes something else.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> gated.gates.logits.data[:5] = -3.0
        >>> swan.prune(gated)
        Sequential(
          (0): Linear(in_features=3, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    check_gated(gated)
    check_data(gated, to="prune")
    gated.gates.check()
    multiples = multiples_of(round_to, latency_table)
    limits = limits_of(
        gated,
        macs=macs,
        params=params,
        latency_ms=latency_ms,
        latency_table=for_budget(latency_table, latency_ms, round_to),
        of=of,
    )
    order = ranking(gated)
    least = gated.gates.least_mask(gated.gates.probabilities().detach())
    chosen = (order, limits, multiples, widths, least)
    stays = None if limits else gated.gates.open_mask()
    mask, small = _choose(gated, *chosen, stays=stays, uniform=uniform, verify=verify)
    _name_unlearnt(gated, mask)
    if compensate is not None:
        if reference is None:
            reference = cut_to(gated, mask | gated.gates.open_mask(), verify=False)
        compensate_layers(small, reference, compensate)
    return small


def prune_by_score(
    gated: GatedModel,
    scores: Tensor,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    latency_table: LatencyTable | None = None,
    of: Of = "given",
    widths: Widths | None = None,
    per_cost: bool = True,
    diminishing: bool = True,
    round_to: int | Literal["auto"] = 1,
    uniform: bool = False,
    verify: bool = True,
    compensate: Iterable[Any] | None = None,
) -> nn.Module:
    """One-shot pruning: keep the units with the highest scores within a budget; gates play no part.

    Args:
        gated: the result of `swanify`, trained or not.
        scores: one per unit, not negative, as `swan.importance` gives them.
        macs: share of the base model's MACs to keep at most, in (0, 1], or a number of MACs.
        params: share of its parameters to keep at most; with several budgets, all are kept.
        latency_ms: milliseconds to take at most, by `latency_table`.
        latency_table: from `swan.measure_latency_table(gated)`.
        of: "original" takes the shares of `macs` and `params` of the model before it was ever cut, where
            this one is a cut already.
        widths: ceilings on single layers: names or glob patterns (the first that matches counts) -> at
            most so many units, or at most this share of them (a float), as in `{"layer3.*": 0.5}`.
            `{"*": 0.5}` alone halves every layer. Floors are `gates.min_width`'s.
        per_cost: rank by score per cost saved, with costs taken anew as units go; False ranks by
            the score alone.
        diminishing: with returns that diminish within a layer: a unit's score counts by what it adds to
            those above it, more the fewer they are (`diminishing_returns`): a layer whose channels
            each matter little does not close for that alone. False takes scores as they are.
        round_to: widths become multiples of this many channels; "auto" as in `prune`.
        uniform: the same width in all layers of one role, and a configuration that says it, as in `prune`.
        verify: run both models on the example inputs and compare (before weights are solved for).
        compensate: batches with which the weights behind the cut are solved for anew, so that they give
            what the base model's gave: `swan.compensate`.

    Raises:
        ModelError: `gated` is not a gated model, or on the meta device.
        InputError: no budget, scores of another shape, negative or not finite, a share or
            `round_to` out of range.
        BudgetError: the budget cannot be reached.
        VerificationError: the pruned model computes something else.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> scores = swan.importance(gated, "magnitude")
        >>> swan.prune_by_score(gated, scores, macs=0.5)[0]
        Linear(in_features=3, out_features=4, bias=True)
    """
    check_gated(gated)
    check_data(gated, to="prune")
    multiples = multiples_of(round_to, latency_table)
    if scores.shape != (gated.gates.num_units,):
        raise InputError(
            f"scores must have shape ({gated.gates.num_units},), one per unit; got "
            f"{tuple(scores.shape)}"
        )
    if not bool((scores >= 0).all() & scores.isfinite().all()):
        raise InputError("scores must be finite and not negative")
    limits = limits_of(
        gated,
        macs=macs,
        params=params,
        latency_ms=latency_ms,
        latency_table=for_budget(latency_table, latency_ms, round_to),
        of=of,
    )
    if not limits and not widths:
        raise InputError("say how small the model shall get: macs=0.5 or params=0.5")
    if scores.numel() > 1 and bool((scores == scores[0]).all()):
        warnings.warn(
            f"all {len(scores)} scores are {float(scores[0]):.3g}, so they do not choose: does the loss depend "
            f"on the model's output, with a gradient that is not zero at the batches given?",
            SwanWarning,
            stacklevel=2,
        )
    scores = scores.to(gated.gates.logits.device)
    least = gated.gates.least_mask(scores)
    if diminishing:
        scores = DiminishingReturns(gated.channels.unit_groups, len(scores))(scores)
    order = order_by_price(scores, limits if per_cost else (), least)
    chosen = (order, limits, multiples, widths, least)
    _, small = _choose(gated, *chosen, uniform=uniform, verify=verify)
    if compensate is not None:
        compensate_layers(small, gated.base_model(), compensate)
    return small


def _name_unlearnt(gated: GatedModel, mask: Tensor) -> None:
    """Warn where some of the open gates close, and none of these has learnt anything."""
    is_open = gated.gates.open_mask()
    closes = is_open & ~mask.to(is_open.device)
    if not closes.any():
        return
    logits = gated.gates.logits.detach()
    own, count = logits[is_open], int(closes.sum())
    if bool((own == own[0]).all()):
        said = f"all have the logit {float(own[0]):.3g}, so which {count} of them close is chance"
    elif bool(stands_as_started(gated.channels, logits)[is_open].all()):
        said = (
            f"stand where swanify put them, so the sizes of weights choose the {count} that close"
        )
    else:
        return
    warnings.warn(
        f"the gates have not learnt: the {len(own)} open ones {said}. Train them (swan.Objective), score the "
        f"channels (swan.prune_by_score(gated, swan.importance(gated, ...), macs=0.5)), or call "
        f"swan.compress(model, data, macs=0.5)",
        SwanWarning,
        stacklevel=3,
    )


def _choose(
    gated: GatedModel,
    order: Tensor,
    limits: Sequence[Limit],
    multiples: Sequence[int],
    widths: Widths | None,
    least: Tensor,
    *,
    stays: Tensor | None = None,
    uniform: bool,
    verify: bool,
) -> tuple[Tensor, nn.Module]:
    """The widest mask and its cut; of `stays` alone, where that is given. Uniform ones also say their widths."""
    roles = uniform_of(gated) if uniform else None
    widest = partial(widest_mask, gated) if roles is None else roles.widest

    def mask_of(multiple: int) -> Tensor:
        allowed = within_widths(gated, order, widths or {}, round_to=multiple)
        floor = least
        if stays is not None:
            floor = allowed = stays & allowed.to(gated.device)
        return widest(order, limits, least=floor, allowed=allowed, round_to=multiple)

    mask, multiple = coarsest(multiples, mask_of, limits)
    if multiple > 1 or roles is not None:
        kind = f"multiples of {multiple} channels" if roles is None else "uniform widths"
        name_undershoot(mask, limits, kind)
    small = cut_to(gated, mask, verify=verify)
    if roles is not None:
        small = configured_(small, gated, roles.values(mask), verify=verify)
    return mask, small


def cut_to(gated: GatedModel, mask: Tensor, *, verify: bool = True) -> nn.Module:
    """Cut to an open mask, bool of shape (num_units,); the gated model stays as it is."""
    with torch.inference_mode(mode=False):  # what is made there could never be trained
        return _cut_to(gated, mask.clone(), verify=verify)


def _cut_to(gated: GatedModel, mask: Tensor, *, verify: bool) -> nn.Module:
    plan = make_plan(gated.channels, mask)
    pruned = apply_plan_(gated.base_model(), plan)
    follow_widths_(pruned, gated.own_inputs())
    if verify:
        verify_pruned(gated, pruned, plan)
    if (provenance := provenance_of(gated.model)) is not None:
        note_(pruned, provenance.followed_by(cut_step(gated, plan, mask)))
    return pruned
