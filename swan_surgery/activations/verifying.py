"""A swapped model computes what the given one computes."""

import torch
from torch import Tensor, nn

from swan_surgery.errors import PathError, VerificationError
from swan_surgery.models import Inputs, copy_of
from swan_surgery.models.evaluated import outputs_of


# Of the largest value: exact but for activations that are written in other terms (SMU as GELU).
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_COARSE = 2e-2


def verify_same(model: nn.Module, swapped: nn.Module, inputs: Inputs) -> float:
    """Compare a model and its swapped copy on example inputs, in eval mode; returns the largest difference.

    Raises:
        VerificationError: they differ by more than rounding, or the copy takes another path.
    """
    wanted = outputs_of(copy_of(model), inputs)
    try:
        found = outputs_of(swapped, inputs)
    except PathError as err:
        raise VerificationError(
            f"{err} Where an earlier cut or swap counts the calls of the same module, swap first and "
            f"cut then, all at once"
        ) from err
    worst = 0.0
    for one, two in zip(wanted, found, strict=True):
        error = _error(one, two)
        worst = max(worst, error)
        if not error <= _TOLERANCE.get(one.dtype, _COARSE):
            raise VerificationError(
                f"the model with other activations does not start as the given one: an output is off by "
                f"{error:.1e} of its largest value. An activation that works in place on something that "
                f"is read again cannot be swapped: leave it out with where="
            )
    return worst


def _error(one: Tensor, two: Tensor) -> float:
    if one.shape != two.shape or one.dtype != two.dtype:
        return float("inf")
    one, two = (t.to(torch.float64) for t in (one, two))
    same = (one == two) | (one.isnan() & two.isnan())
    if bool(same.all()):
        return 0.0
    scale = one[one.isfinite()].abs().max()
    return float((one - two).abs().masked_fill(same, 0.0).max() / scale)
