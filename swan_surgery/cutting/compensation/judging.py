"""Whether a model as a whole came nearer to its reference: its outputs are the judge, its old state the way back."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from swan_surgery.models.outputs import iter_tensors


Call = Callable[[nn.Module], object]


class Judge:
    """Knows the outputs of a reference on some batches.

    Outputs of another shape, and those that are no floating-point numbers, say nothing.
    """

    def __init__(self, reference: nn.Module, calls: Sequence[Call]) -> None:
        self.calls = calls
        with torch.no_grad():
            self._wanted = [_values(call(reference)) for call in calls]

    def error(self, model: nn.Module) -> float:
        """Squared error of a model's outputs over their variance; NaN where there is nothing to compare.

        The variance is that of all values of an output.
        """
        missed = spread = 0.0
        with torch.no_grad():
            for call, wanted in zip(self.calls, self._wanted, strict=True):
                for one, two in zip(_values(call(model)), wanted, strict=False):
                    if one.shape == two.shape:
                        missed += float((one.double() - two.double()).square().sum())
                        spread += float((two.double() - two.double().mean()).square().sum())
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
