"""What can be asked of any network without labels: how much its outputs change, and that they stay."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.errors import InputError
from swan_surgery.models.batches import run_on_batch
from swan_surgery.models.outputs import iter_tensors, spread_of


class Sensitivity:
    """A loss whose squared gradient is how much a gate moves the outputs.

    Every value of every output, over the output's spread, times a random sign: the mean of the squared
    gradient over the signs is the sum of the squared derivatives of all values (the Gauss-Newton diagonal of
    a squared error at its minimum, where the error's own gradient is zero). Each output counts alike, whatever
    its size.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """A scalar; each call draws new signs."""
        parts = []
        for y in _outputs(model, batch):
            drawn = torch.randint(0, 2, y.shape, generator=self._generator)
            signs = drawn.to(y.device, y.dtype).mul_(2).sub_(1)
            parts.append((y * signs).sum() / (spread_of(y) * y.numel() ** 0.5))
        return torch.stack([part.float() for part in parts]).sum()


def unlikeness(model: nn.Module, reference: nn.Module, batch: Any) -> Tensor:
    """Squared error of the outputs over the reference's variance; the mean over outputs, a scalar.

    Raises:
        InputError: outputs of other shapes.
    """
    with torch.no_grad():
        wanted = _outputs(reference, batch)
    found = _outputs(model, batch)
    if [y.shape for y in found] != [y.shape for y in wanted]:
        raise InputError(
            "the smaller model's outputs have other shapes than the model's, so they cannot be compared; "
            "pass a loss(model, batch)"
        )
    parts = [
        (y - w).square().mean() / spread_of(w).square() for y, w in zip(found, wanted, strict=True)
    ]
    return torch.stack([part.float() for part in parts]).mean()


def _outputs(model: nn.Module, batch: Any) -> Sequence[Tensor]:
    found = [y for y in iter_tensors(run_on_batch(model, batch)) if y.is_floating_point()]
    if not found:
        raise InputError(
            'loss="self" looks at the model\'s outputs, and none of them is a floating-point tensor; pass '
            "a loss(model, batch)"
        )
    # A number for the whole batch is a loss that the model computes along, if there is anything else.
    return [y for y in found if y.ndim] or found
