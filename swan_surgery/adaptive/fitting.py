"""`fit_widths`: what looks at the input is fitted in closed form, and its thresholds to a budget."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.budgets import Distance, Efforts, check_budget, check_efforts, divergence
from swan_surgery.adaptive.calibrating import observe_
from swan_surgery.adaptive.checks import batches_of, check_adaptive
from swan_surgery.adaptive.distances import distances_of, outputs_of
from swan_surgery.adaptive.effort import Effort
from swan_surgery.adaptive.rollback import unchanged_if_it_fails
from swan_surgery.adaptive.shifting import shift_thresholds_
from swan_surgery.adaptive.thresholds import (
    Losses,
    Reading,
    binned,
    cheapest,
    fit_reading,
    outside,
    scaled,
    shares_below,
    temperature_of,
    thresholds_at,
)
from swan_surgery.adaptive.token_fitting import fit_tokens_
from swan_surgery.adaptive.unit_fitting import fit_units_
from swan_surgery.adaptive.watching import watching
from swan_surgery.adaptive.width_stats import WidthStats, hardly_varies, taken_by, width_stats
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, ModelError, SwanWarning
from swan_surgery.models.modes import evaluating


_ROUNDS = 4
# The deviation of a block's efforts, in units of T; T is about 1, so that efforts learn at the rates of logits.
_SPREAD = 4.0
# Structures whose gates are fitted by themselves.
_GATES = {"free": fit_units_, "blocks": fit_tokens_}


@dataclass(frozen=True)
class _Fitted:
    """One who looks: what it reads, what its levels lose, and what they cost."""

    reading: Reading
    losses: Losses
    macs: Tensor


def fit_widths(
    adapted: AdaptiveModel,
    loader: Iterable[Any],
    *,
    macs: float,
    max_macs: float | None = None,
    num_batches: int | None = None,
    distance: Distance | None = None,
    statistics: Iterable[Any] | None = None,
    efforts: Efforts = "fit",
) -> WidthStats:
    """Decide who takes which width, so that inputs cost `macs` of the given model on average.

    For every block and width next to the uniform one that is nearest to the budget, how far the model's
    output moves when the block alone takes it is measured per sample (with `per="network"`: every width). The effort e(x) is the ridge regression of what the widest
    of these saves on pooled features of the block's input; its thresholds are the monotone choice of widths
    with the least loss at one price per MAC for all blocks, set under the gates: with the efforts that
    samples have once the blocks before take theirs. A block whose features explain nothing on held-out
    samples takes one width for all.

    Free units: what closing each alone would move the output by is measured per sample (the curvature of the
    divergence, by gradients of the masks with everything open). Its ridge regression on the features gives w and
    z of p(x) = sigmoid(z + w . f(x)): open is what is worth more than one price per MAC, the same for all units,
    which is found under the gates.

    Blocks of neurons: how far what each gives a token lies from its mean is regressed on the token; open is what
    is worth one price per MAC, in shares of what its layer gives, the same for all layers.

    Args:
        adapted: calibrated (`calibrate_widths`); its efforts and thresholds change in place.
        loader: batches as `calibrate` takes them, held out from training if there are such; held in memory.
        macs: share of the given model's MACs that samples may cost on average, in (0, 1].
        max_macs: share that no sample may exceed, kept at run time as well; no ceiling by default. Blocks that
            run first take first of it; of units the least likely close, of all tokens of a sample together.
        num_batches: how many batches to use at most; all of them by default.
        distance: (output, output of the widest) -> [B]; by default the Kullback-Leibler divergence of
            softmax outputs over the last axis. Of nested widths only.
        statistics: batches with the training augmentation, on which each width's statistics are then
            measured among widths at random in the shares found (`calibrate_widths(among="mixed")`), of free
            units and blocks of neurons means and all batch-norms under the gates; thresholds are set once more.
        efforts: "learn": as "fit", but thresholds that all samples reach, or none, are finite, so that they have a slope
            where efforts learn next (`gate_penalty`). "keep": what looks at the input stays as it has learnt, and
            thresholds move together, by as many T. Of nested widths only.

    Returns:
        The widths taken, as measured on the batches (`width_stats`).

    Raises:
        ModelError: not an adaptive model, or a compact one.
        InputError: a share out of range, no batch, or a distance that is not finite, one per sample.
        BudgetError: the narrowest widths cost more.

    Warns:
        SwanWarning: widths hardly vary with the input, so that a static model does as well.

    Example:
        >>> stats = swan.fit_widths(adapted, held_out, macs=0.5)  # doctest: +SKIP
    """
    check_adaptive(adapted, to="fit widths of")
    if adapted.is_holding:
        raise ModelError(
            "widths are fitted where blocks look at their inputs: call fit_widths outside of adapted.holding(...)"
        )
    check_budget(adapted.costs, macs, max_macs)
    batches = batches_of(loader, num_batches)
    others = None if statistics is None else batches_of(statistics, None)
    fit_gates_ = _GATES.get(adapted.structure.kind)
    check_efforts(efforts, distance, adapted.structure.kind)
    own = (torch.inference_mode(mode=False), torch.no_grad(), streams_kept(), evaluating(adapted))
    with unchanged_if_it_fails(adapted):
        with own[0], own[1], own[2], own[3]:
            adapted.max_macs = None if max_macs is None else int(max_macs * adapted.costs.dense)
            if fit_gates_ is not None:
                adapted.execution = "masked"
                fit_gates_(adapted, batches, macs, others)
            else:
                adapted.execution = "group"
                _fit_levels_(adapted, batches, macs, distance or divergence, others, how=efforts)
        stats = width_stats(adapted, batches)
    if hardly_varies(stats):
        usual = "stats.usual" if fit_gates_ is not None else repr(dict(stats.usual))
        warnings.warn(
            f"widths hardly vary with the input (at most {stats.entropy:.2f} bits of entropy in a block): "
            f"adapted.at({usual}) is a static model that does as well",
            SwanWarning,
            stacklevel=2,
        )
    return stats


def _fit_levels_(
    adapted: AdaptiveModel,
    batches: list[Any],
    share: float,
    distance: Distance,
    others: list[Any] | None,
    *,
    how: Efforts,
) -> None:
    """Efforts and thresholds of nested widths."""
    if how == "keep":
        if others is not None:
            observe_(adapted, others, among="mixed", shares=width_stats(adapted, batches).shares)
        shift_thresholds_(adapted, batches, share * adapted.costs.dense)
        return
    budget = share * adapted.costs.dense - adapted.costs.fixed
    fitted = _fit(adapted, batches, share, distance)
    _set_thresholds_(adapted, batches, fitted, budget, are_finite=how == "learn")
    if others is not None:
        shares = width_stats(adapted, batches).shares
        observe_(adapted, others, among="mixed", shares=shares)
        _set_thresholds_(adapted, batches, fitted, budget, are_finite=how == "learn")


def _fit(
    adapted: AdaptiveModel, batches: list[Any], share: float, distance: Distance
) -> dict[str, _Fitted]:
    names = list(adapted.costs.blocks)
    count = len(adapted.widths)
    near = _nearest_level(adapted, share)
    looking = [name for name, block in adapted.blocks().items() if block.effort is not None]
    alone = adapted.structure.per == "block"
    with watching(adapted, looking) as features, adapted.holding(near):
        wanted = outputs_of(adapted, batches, -1)
        for kept in features.values():
            kept.clear()
        base = distances_of(adapted, batches, near, wanted, distance)
    # The sum of what single blocks lose foretells little far from where it was measured.
    tried = range(max(near - 1, 0), min(near + 2, count)) if alone else range(count)
    unknown = torch.full((len(base), count), torch.inf, dtype=torch.float64)
    losses = {name: unknown.clone() for name in looking}
    for name in looking:
        for level in tried:
            levels = dict.fromkeys(names, near) | {name: level} if alone else level
            same = alone and level == near
            own = base if same else distances_of(adapted, batches, levels, wanted, distance)
            losses[name][:, level] = own
    fitted = {}
    for name in looking:
        x, lost = torch.cat(features[name]), losses[name]
        if len(x) != len(lost):
            raise InputError(f"distance gave {len(lost)} numbers for {len(x)} samples")
        saved = lost[:, tried[0]] - lost[:, tried[-1]]
        reading = scaled(fit_reading(x, saved), x, _SPREAD)
        efforts = x.double() @ reading.weight + reading.bias
        macs = _macs_of(adapted, name)
        fitted[name] = _Fitted(
            reading, binned(efforts, lost, informed=bool(reading.explained > 0)), macs
        )
    return fitted


def _macs_of(adapted: AdaptiveModel, name: str) -> Tensor:
    """MACs of the levels that a block decides about."""
    if adapted.structure.per == "block":
        return adapted.costs.blocks[name]
    return torch.stack(list(adapted.costs.blocks.values())).sum(0)


def _nearest_level(adapted: AdaptiveModel, share: float) -> int:
    costs = adapted.costs
    totals = costs.fixed + torch.stack(list(costs.blocks.values())).sum(0)
    return int((totals - share * costs.dense).abs().argmin())


def _set_thresholds_(
    adapted: AdaptiveModel,
    batches: list[Any],
    fitted: Mapping[str, _Fitted],
    budget: float,
    *,
    are_finite: bool,
) -> None:
    """Thresholds under the gates; the budget that is aimed at gives way until the real one is met."""
    count = len(adapted.widths)
    for name, own in fitted.items():
        effort = _effort(adapted, name)
        effort.weight.copy_(own.reading.weight[None])
        effort.bias.copy_(own.reading.bias)
    aim = budget
    least = sum(float(own.macs[0]) for own in fitted.values())
    for _ in range(_ROUNDS):
        levels = cheapest(
            [own.losses for own in fitted.values()], [own.macs for own in fitted.values()], aim
        )
        shares = {
            name: shares_below(own.losses, chosen, count)
            for (name, own), chosen in zip(fitted.items(), levels, strict=True)
        }
        measured = _quantiles_(adapted, batches, shares, are_finite=are_finite)
        if measured <= budget:
            return
        aim = max(least, aim - 1.05 * (measured - budget))
    narrowest = {name: torch.ones(count - 1) for name in fitted}
    _quantiles_(adapted, batches, narrowest, are_finite=are_finite)


def _effort(adapted: AdaptiveModel, name: str) -> Effort:
    effort = adapted.blocks()[name].effort
    assert isinstance(effort, Effort)  # noqa: S101 - those that look were fitted
    return effort


def _quantiles_(
    adapted: AdaptiveModel, batches: list[Any], shares: Mapping[str, Tensor], *, are_finite: bool
) -> float:
    """Set thresholds at shares of the efforts that samples have under the gates; mean MACs of blocks."""
    mean = 0.0
    for _ in range(3):
        runs = [taken_by(adapted, batch) for batch in batches]
        for name, share in shares.items():
            effort = _effort(adapted, name)
            seen = torch.cat([own.efforts[name] for own in runs]).cpu()
            temperature = temperature_of(seen, _SPREAD)
            found = thresholds_at(seen, share)
            if are_finite:
                found = outside(seen, found, temperature)
            effort.thresholds.copy_(found)
            effort.temperature.fill_(temperature)
        macs = torch.cat([taken_by(adapted, batch).macs for batch in batches])
        mean = float(macs.double().mean()) - adapted.costs.fixed
    return mean


__all__ = ["fit_widths"]
