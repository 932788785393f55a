"""Linear layers whichever way round their weights lie."""

from typing import Any

from torch import Tensor, nn


def is_turned(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is [inputs, outputs]: transformers' `Conv1D`, of GPT-2."""
    own: Any = layer
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and own.weight.ndim == 2


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer and nothing else."""
    return type(layer) is nn.Linear or is_turned(layer)


def matrix_of(layer: nn.Module) -> Tensor:
    """Its weight as [outputs, inputs, ...], a view."""
    own: Any = layer
    found: Tensor = own.weight.T if is_turned(layer) else own.weight
    return found


def input_axis(layer: nn.Module) -> int:
    """The axis of its weight on which its inputs lie."""
    return 0 if is_turned(layer) else 1


__all__ = ["input_axis", "is_linear", "is_turned", "matrix_of"]
