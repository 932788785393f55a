"""Training all widths together: the widest or the narrowest, and widths at random, every step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swan_surgery.adaptive.adaptive_model import AdaptiveModel
from swan_surgery.adaptive.checks import check_adaptive
from swan_surgery.environment.kinds_of_numbers import is_whole
from swan_surgery.errors import InputError, ModelError


def sandwich_loss(
    adapted: AdaptiveModel,
    loss: Callable[[AdaptiveModel], Tensor],
    *,
    step: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean loss at two widths of a step: an outer one, and one at random.

    The outer one is the widest in even steps and the narrowest in odd ones (the sandwich rule of
    arXiv:1903.05134, spread over two steps, so that a step costs about as much as one of the given
    model). At random means a width per block with `per="block"`, one for all with "network".

    Args:
        adapted: the result of `adapt`, in train mode.
        loss: (adaptive model) -> a scalar, one forward pass; as in
            `lambda m: 0.1 * F.cross_entropy(m(x), y) + 0.9 * swan.distillation_loss(m(x), teacher(x))`
            with m(x) computed once.
        step: counts from 0.
        generator: draws widths; torch's global one by default.

    Raises:
        ModelError: not an adaptive model, a compact one, or one of free units.
        InputError: `step` is negative.

    Example:
        >>> for step, (x, y) in enumerate(loader):  # doctest: +SKIP
        ...     loss = swan.sandwich_loss(adapted, lambda m: F.cross_entropy(m(x), y), step=step)
    """
    check_adaptive(adapted, to="train")
    if adapted.structure.kind != "nested":
        raise ModelError(
            "free units and blocks of neurons have no widths to train together; train on adapted.taken(x).output "
            "and swan.gate_penalty"
        )
    if not is_whole(step) or step < 0:
        raise InputError(f"step counts from 0, in whole numbers; got {step!r}")
    names, count = list(adapted.costs.blocks), len(adapted.widths)
    number = len(names) if adapted.structure.per == "block" else 1
    drawn = torch.randint(count, (number,), generator=generator).tolist()
    drawn = drawn if len(drawn) == len(names) else drawn * len(names)
    losses = []
    outer = -1 if step % 2 == 0 else 0
    for levels in (dict.fromkeys(names, outer), dict(zip(names, drawn, strict=True))):
        with adapted.holding(levels):
            found: Any = loss(adapted)
            if not isinstance(found, Tensor) or found.ndim:
                raise InputError(
                    f"loss(adapted) must be a scalar tensor; got {type(found).__name__}"
                )
            losses.append(found)
    for block in adapted.blocks().values():
        block.last = (
            None  # which of the two it was, a backward pass that runs a block again cannot tell
        )
    return torch.stack(losses).mean()


__all__ = ["sandwich_loss"]
