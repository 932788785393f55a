"""Gates of free units in closed form: what each is worth to a sample, read off features, at one price per MAC."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.bisecting import write_lowest_price
from swan_surgery.adaptive.calibrating import observe_
from swan_surgery.adaptive.costs import UnitCosts
from swan_surgery.adaptive.thresholds import Reading, fit_reading
from swan_surgery.adaptive.watching import watching
from swan_surgery.calibration import calibrate, norms_of
from swan_surgery.errors import InputError
from swan_surgery.models.batches import run_on_batch


# Labels drawn per sample from what the model says.
_DRAWS = 4
# The mean size of a block's logits.
_LOGIT = 2.0
# Ratios of worth and cost of which quantiles are taken.
_MOST = 1_000_000


def fit_units_(
    adapted: AdaptiveModel, batches: list[Any], share: float, others: list[Any] | None
) -> None:
    """Set all gates, so that inputs cost `share` of the given model on average."""
    names = list(adapted.costs.blocks)
    with watching(adapted, names) as seen:
        worth = _worth(adapted, batches)
    features = {name: torch.cat(own).double() for name, own in seen.items()}
    readings = {name: fit_reading(features[name], worth[name]) for name in names}
    _price_(adapted, batches, readings, features, share)
    if others is not None:
        if norms_of(adapted):
            calibrate(adapted, others)
        observe_(adapted, others, among="mixed")
        _price_(adapted, batches, readings, features, share)


def _worth(adapted: AdaptiveModel, batches: list[Any]) -> Mapping[str, Tensor]:
    """What closing each unit alone moves the output by, per sample, by block: float64 [N, units].

    The Kullback-Leibler divergence to second order, half the expected square of the derivative of log p(y) by the
    unit's gate, y drawn from p (a normal distribution where the output is a single number). The gate moves between what
    the unit gives and its mean.
    """
    generator = torch.Generator().manual_seed(0)
    counts = [sum(own.effort.sizes) for own in adapted.blocks().values()]
    like = next(p for p in adapted.parameters() if p.is_floating_point())
    found = []
    for batch in tree_map(_normal, batches):
        first = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        masks = [like.new_ones(len(first), count).requires_grad_() for count in counts]
        held = dict(zip(adapted.costs.blocks, masks, strict=True))
        with torch.enable_grad(), adapted.holding(held):
            output = run_on_batch(adapted, batch)
            found.append(_curvature(output, masks, generator).cpu())
    joined = torch.cat(found)
    if not bool(joined.isfinite().all()):
        raise InputError("gradients of the model's outputs on these batches are not finite")
    return dict(zip(adapted.costs.blocks, joined.split(counts, dim=1), strict=True))


def _normal(leaf: Any) -> Any:
    """A tensor that autograd may keep, also where it was made in inference mode."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _curvature(output: Any, masks: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """float64 [B, units]."""
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise InputError(
            "free units are fitted to models that return one tensor of logits, [B, ..., classes]"
        )
    is_number = output.shape[-1] == 1  # of a normal distribution, whose mean it is
    logs = (output.double() if is_number else output.double().log_softmax(-1)).flatten(0, -2)
    odds = logs.detach().cpu() if is_number else logs.detach().exp().cpu()
    if not bool(odds.isfinite().all()):
        raise InputError("the model's outputs on these batches are not finite")
    positions = len(logs) // len(masks[0])
    total: Any = 0
    for draw in range(_DRAWS):
        if is_number:
            drawn = torch.randn(logs.shape, generator=generator, dtype=logs.dtype)
            score = (logs * drawn.to(logs.device)).sum()
        else:
            labels = torch.multinomial(odds, 1, generator=generator).to(logs.device)
            score = logs.gather(1, labels).sum()
        slopes = torch.autograd.grad(score, masks, retain_graph=draw < _DRAWS - 1)
        total = total + torch.cat(slopes, 1).double().square()
    found: Tensor = total
    return found / (2 * _DRAWS * positions)


def _price_(
    adapted: AdaptiveModel,
    batches: list[Any],
    readings: Mapping[str, Reading],
    features: Mapping[str, Tensor],
    share: float,
) -> None:
    """The lowest price per MAC, by bisection over its rank, whose gates keep the budget when they run."""
    assert isinstance(adapted.costs, UnitCosts)  # noqa: S101 - of free units
    costs = {name: own.clamp(min=1e-12) for name, own in adapted.costs.marginal().items()}
    values = {name: features[name] @ own.weight + own.bias for name, own in readings.items()}
    ratios = torch.cat([(values[name] / costs[name]).flatten() for name in readings])
    ratios = ratios[:: len(ratios) // _MOST + 1]
    budget = share * adapted.costs.dense

    def write(rank: float) -> None:
        # The dearest price closes all, also where no unit is worth anything.
        dearest = 2 * float(ratios.abs().max()) or 1.0
        price = float(torch.quantile(ratios, rank)) if rank < 1 else dearest
        for name, own in readings.items():
            gates = adapted.blocks()[name].effort
            size = float((values[name] - price * costs[name]).abs().mean()) / _LOGIT
            scale = 1 / size if size > 0 else 1.0
            gates.weight.copy_(own.weight.T * scale)
            gates.bias.copy_((own.bias - price * costs[name]) * scale)

    write_lowest_price(adapted, batches, write, budget, 1.0)


__all__ = ["fit_units_"]
