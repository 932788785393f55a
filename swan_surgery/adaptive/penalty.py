"""The paper's regularisers where gates look at the input: means over the samples of a batch (Eq. 9-14)."""

import torch
from torch import Tensor

from swan_surgery.adaptive.adaptive_model import AdaptiveModel, Taken
from swan_surgery.adaptive.checks import check_adaptive
from swan_surgery.adaptive.costs import UnitCosts
from swan_surgery.errors import InputError, ModelError
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
    """What free units cost a batch, to be added to its loss.

    Probabilities and MACs are means over the batch: E_x of Eq. 9-12. The budget is on hard MACs; its gradient
    goes straight through to the probabilities (Eq. 6).

    Args:
        adapted: the result of `adapt(structure="free")`.
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
        A scalar, float64, differentiable in z and w.

    Raises:
        ModelError: not an adaptive model of free units, or compact.
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
    if not isinstance(costs, UnitCosts):
        raise ModelError(
            'nested widths have no gates of their own: fit_widths fits them; swan.adapt(structure="free") has gates'
        )
    if macs is not None and not 0 < macs <= 1:
        raise InputError(f"macs must be a share of the given model's MACs in (0, 1]; got {macs}")
    if set(taken.efforts) != set(costs.blocks):
        raise InputError(
            "taken holds no logits of all blocks: call adapted.taken(inputs) without holding"
        )
    penalties = Penalties(l0, flops, target_active, target_weight)
    p = torch.cat([torch.sigmoid(taken.efforts[name]).mean(0) for name in costs.blocks])
    marginal = torch.cat([*costs.marginal().values()]).to(p.device)
    scale = {name: own(epoch) for name, own in ramps_of(_TERMS, ramp).items()}
    terms, _ = penalties.terms(p, marginal, scale)
    total = torch.stack([own.double() for own in terms.values()]).sum()
    if macs is None:
        return total
    mean = costs.priced(taken.choices).mean() / costs.dense
    factor = 1.0 if ramp is None else ramp(epoch)
    return total + factor * macs_weight * (mean - macs).clamp(min=0).square().to(total.device)


__all__ = ["gate_penalty"]
