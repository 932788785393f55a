"""What widths are fitted to: a budget, and how far outputs may be from those of the widest."""

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from swan_surgery.adaptive.costs import BlockCosts
from swan_surgery.environment.kinds_of_numbers import is_number
from swan_surgery.errors import BudgetError, InputError


# (output, output of the widest) -> [B]
Distance = Callable[[Any, Any], Tensor]
Efforts = Literal["fit", "learn", "keep"]


def divergence(output: Any, wanted: Any) -> Tensor:
    """Kullback-Leibler divergence of softmax outputs over the last axis, mean over all but the first: [B].

    Of a single number in place of classes half its squared difference: the divergence of normal distributions.
    """
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise InputError(
            "the default distance needs one tensor of logits; pass distance=lambda out, widest: ..."
        )
    if output.shape[-1] == 1:
        apart: Tensor = output.double() - wanted.double()
        return apart.square().flatten(1).mean(1) / 2
    own, other = F.log_softmax(output.double(), -1), F.log_softmax(wanted.double(), -1)
    found = (other.exp() * (other - own)).sum(-1)
    return found.flatten(1).mean(1) if found.ndim > 1 else found


def check_efforts(efforts: object, distance: Distance | None, kind: str) -> None:
    """Refuse what a structure does not fit.

    Raises:
        InputError: says what there is.
    """
    if efforts not in ("fit", "learn", "keep"):
        raise InputError(f'efforts must be "fit", "learn" or "keep"; got {efforts!r}')
    if kind != "nested" and (distance is not None or efforts != "fit"):
        raise InputError(
            f"only nested widths take a distance and efforts={efforts!r}: free units are fitted to the curvature of the "
            "Kullback-Leibler divergence, blocks of neurons to what they give, and their gates can learn as they are"
        )
    if distance is not None and not callable(distance):
        raise InputError(
            f"distance is a function of (output, output of the widest); got {distance!r}"
        )
    if efforts == "keep" and distance is not None:
        raise InputError(
            'efforts="keep" measures no distance: thresholds move together; leave distance= out'
        )


def check_budget(costs: BlockCosts, macs: float, max_macs: float | None) -> None:
    """Refuse shares that are out of range or out of reach.

    Raises:
        InputError: outside (0, 1].
        BudgetError: below the narrowest widths of all blocks.
    """
    shares: tuple[tuple[str, Any], ...] = (("macs", macs), ("max_macs", max_macs))
    for name, share in shares:
        if share is None and name == "max_macs":
            continue
        if not is_number(share) or not 0 < share <= 1:
            raise InputError(
                f"{name} must be a share of the given model's MACs in (0, 1]; got {share}"
            )
        if share * costs.dense < costs.least:
            raise BudgetError(
                f"{name}={share:g} is {int(share * costs.dense):,} MACs per sample, but the narrowest widths "
                f"cost {costs.least:,} ({costs.least / costs.dense:.3f} of the given model)",
                unit="MACs",
                least=costs.least,
                most=costs.most,
            )


__all__ = ["Distance", "Efforts", "check_budget", "check_efforts", "divergence"]
