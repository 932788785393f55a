"""Example inputs of a model: arguments by position and by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from swan_surgery.errors import InputError


@dataclass(frozen=True, slots=True)
class Inputs:
    """Example inputs, split into positional and keyword arguments of the model's forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on_meta(self) -> "Inputs":
        """Floating-point tensors without data; integers stay: they may be positions to look up."""
        return self.map(lambda t: torch.empty_like(t, device="meta") if _has_no_use(t) else t.cpu())

    def map(self, function: Any) -> "Inputs":
        """Apply a function to every tensor inside."""

        def on_tensor(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        return Inputs(tree_map(on_tensor, self.args), tree_map(on_tensor, dict(self.kwargs)))


def doubled(tensor: Tensor) -> Tensor:
    """The tensor twice along its first axis: batch-norm wants two samples in training."""
    return torch.cat([tensor, tensor]) if tensor.ndim else tensor


def as_inputs(example_inputs: Any) -> Inputs:
    """A tensor is one argument, a tuple or list the arguments, a dict the keyword arguments.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    raise InputError(
        f"example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments; "
        f"got {type(example_inputs).__name__}"
    )


def _has_no_use(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.is_floating_point() or tensor.is_complex()
