"""Whether a model as a whole came nearer to its reference: its outputs are the judge, its old state the way back."""

from collections.abc import Callable, Sequence
from math import inf, isfinite

import torch
from torch import Tensor, nn

from swan_surgery.errors import InputError
from swan_surgery.models.outputs import iter_tensors


Call = Callable[[nn.Module], object]


class Judge:
    """Knows the outputs of a reference on some batches.

    Outputs of another shape, those that are no floating-point numbers, and where the reference gives infinity (masked
    scores) say nothing.

    Raises:
        InputError: the reference gives NaN.
    """

    def __init__(self, reference: nn.Module, calls: Sequence[Call]) -> None:
        self.calls = calls
        with torch.no_grad():
            self._wanted = [_values(call(reference)) for call in calls]
        if any(bool(own.isnan().any()) for wanted in self._wanted for own in wanted):
            raise InputError(
                "the reference's outputs on these batches hold NaN; look for NaN or infinity in them; nothing was changed"
            )

    def error(self, model: nn.Module) -> float:
        """Squared error of a model's outputs over their variance; NaN where there is nothing to compare.

        The variance is that of all values of an output. Infinite where the model gives NaN or infinity and the
        reference does not.
        """
        missed = spread = 0.0
        with torch.no_grad():
            for call, wanted in zip(self.calls, self._wanted, strict=True):
                for one, two in zip(_values(call(model)), wanted, strict=False):
                    if one.shape == two.shape:
                        says = two.isfinite()
                        own, other = one[says].double(), two[says].double()
                        missed += float((own - other).square().sum())
                        spread += float((other - other.mean()).square().sum()) if len(other) else 0
        if not isfinite(missed):
            return inf
        return missed / spread if spread else float("nan")


def state_of(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters and buffers, to come back to."""
    return [tensor.detach().clone() for tensor in _tensors(model)]


def come_back_(model: nn.Module, state: Sequence[Tensor]) -> None:
    """The inverse of `state_of`."""
    with torch.no_grad():
        for tensor, was in zip(_tensors(model), state, strict=True):
            tensor.copy_(was)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _values(output: object) -> list[Tensor]:
    return [tensor for tensor in iter_tensors(output) if tensor.is_floating_point()]
