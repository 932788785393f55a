"""The paper's regularisers where gates look at the input: means over the samples of a batch (Eq. 9-14)."""

from math import inf
from typing import Any

import torch
from torch import Tensor

from swan_surgery.adaptive.adaptive_model import AdaptiveModel, Taken
from swan_surgery.adaptive.checks import check_adaptive
from swan_surgery.adaptive.costs import UnitCosts
from swan_surgery.adaptive.effort import Effort
from swan_surgery.environment.kinds_of_numbers import is_number
from swan_surgery.errors import InputError
from swan_surgery.learning.penalties import Penalties
from swan_surgery.learning.ramps import CosineRamp, ramps_of


_TERMS = ("l0", "flops", "target_active")


def gate_penalty(
    adapted: AdaptiveModel,
    taken: Taken,
    *,
    macs: float | None = None,
    macs_weight: float = 10.0,
    l0: float = 0.0,
    flops: float = 0.0,
    target_active: float | None = None,
    target_weight: float = 1.0,
    ramp: CosineRamp | None = None,
    epoch: float = 0.0,
) -> Tensor:
    """What a batch costs, to be added to its loss: gates of units, of blocks of neurons, or efforts of nested widths.

    Probabilities and MACs are means over the batch: E_x of Eq. 9-12. The budget is on hard MACs; its gradient
    goes straight through to the probabilities (Eq. 6). Of nested widths p is that of the units that a width adds,
    sigmoid((e(x) - t) / T); fit them first (`fit_widths`), for thresholds that are infinite have no slope, and set
    `adapted.execution = "masked"`, for in groups efforts have gradients in eval mode alone.

    Args:
        adapted: the result of `adapt`.
        taken: of `adapted.taken(inputs)` in this step, whose `output` goes into the loss.
        macs: budget, a share of the given model's MACs in (0, 1]; what exceeds it is squared.
        macs_weight: of that.
        l0: on the mean probability (Eq. 9).
        flops: on the mean MACs at the probabilities, as a share of what gates can save (Eq. 10).
        target_active: mean probability above which the square counts (Eq. 11-12), in (0, 1].
        target_weight: of that.
        ramp: a factor on all terms by `epoch` (Eq. 13-14); in full from the start by default.
        epoch: fractional.

    Returns:
        A scalar, float64, differentiable in z and w, or in efforts.

    Raises:
        ModelError: not an adaptive model, or compact.
        InputError: a share or coefficient out of range, or `taken` holds no gates of this model that looked.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapted = swan.adapt(net, torch.zeros(2, 3), structure="free")
        >>> taken = adapted.taken(torch.randn(4, 3))
        >>> loss = taken.output.square().mean() + swan.gate_penalty(adapted, taken, macs=0.5)
        >>> loss.backward()  # z and w have gradients
    """
    check_adaptive(adapted, to="train")
    costs = adapted.costs
    share: Any = 1.0 if macs is None else macs
    if not is_number(share) or not 0 < share <= 1:
        raise InputError(f"macs must be a share of the given model's MACs in (0, 1]; got {macs}")
    for name, value in (("macs_weight", macs_weight), ("epoch", epoch)):
        if not 0 <= value < inf:
            raise InputError(f"{name} must not be negative, and finite; got {value}")
    if not isinstance(given := taken, Taken):
        raise InputError(f"taken is what adapted.taken(inputs) returns; got {type(given).__name__}")
    looking = {name for name, block in adapted.blocks().items() if block.effort is not None}
    if set(taken.efforts) != looking:
        raise InputError(
            "taken holds no logits of all blocks: call adapted.taken(inputs) without holding"
        )
    penalties = Penalties(l0, flops, target_active, target_weight)
    if isinstance(costs, UnitCosts):
        p = torch.cat([torch.sigmoid(taken.efforts[name]).mean(0) for name in costs.blocks])
        marginal, hard = torch.cat([*costs.marginal().values()]), costs.priced(taken.choices).mean()
    else:
        p, marginal = _of_levels(adapted, taken)
        hard = costs.at(taken.choices).double().mean()
        hard = hard + ((p - p.detach()).double().cpu() * marginal).sum()
    scale = {name: own(epoch) for name, own in ramps_of(_TERMS, ramp).items()}
    terms, _ = penalties.terms(p, marginal.to(p.device), scale)
    total = torch.stack([own.double() for own in terms.values()]).sum()
    if macs is None:
        return total
    factor = 1.0 if ramp is None else ramp(epoch)
    over = (hard / costs.dense - macs).clamp(min=0)
    return total + factor * macs_weight * over.square().to(total.device)


def _of_levels(adapted: AdaptiveModel, taken: Taken) -> tuple[Tensor, Tensor]:
    """Of nested widths, unit by unit: the probability over the batch, and the MACs that it adds; both (units,)."""
    structure, blocks = adapted.structure, adapted.blocks()
    chances, marginals = [], []
    for name, efforts in taken.efforts.items():
        looked_for = [name] if structure.per == "block" else [*blocks]
        counts = [
            own
            for own, group in zip(structure.counts, structure.groups, strict=True)
            if group.block in looked_for
        ]
        units = torch.tensor(counts).sum(0)
        macs = torch.stack([adapted.costs.blocks[own] for own in looked_for]).sum(0)
        added, grown = (torch.diff(own, prepend=own.new_zeros(1)) for own in (units, macs))
        effort = blocks[name].effort
        assert isinstance(effort, Effort)  # noqa: S101 - of nested widths
        p = effort.probabilities(efforts).mean(0)
        chances.append(p.repeat_interleave(added.to(p.device)))
        marginals.append((grown / added.clamp(min=1)).double().repeat_interleave(added))
    return torch.cat(chances), torch.cat(marginals)


__all__ = ["gate_penalty"]
