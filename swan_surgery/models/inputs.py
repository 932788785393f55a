"""Example inputs of a model: arguments by position and by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from swan_surgery.errors import InputError


_SEQUENCE = 3  # [batch, length, features], or features before length


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


def at_other_sizes(inputs: Inputs, *, larger: bool = True) -> Iterator[Inputs]:
    """The inputs at other sizes of their images or texts, and twice as many of them.

    A model may not take all of them: those that are most unlike the given ones come first.

    Args:
        inputs: example inputs; axis 0 is taken for the batch, the last axes from the second on for space.
        larger: repeat them, which every network takes that halves its images; False halves them, which
            costs less where they have data.
    """
    spaces: list[Inputs] = []
    for square, middle in ((False, False), (True, False), (False, True)):
        factors = partial(_factors, square=square, middle=middle)
        space = inputs.map(partial(_repeated if larger else _shortened, factors=factors))
        if all(_shapes(space) != _shapes(other) for other in (inputs, *spaces)):
            spaces.append(space)
    yield from (space.map(doubled) for space in spaces)
    yield inputs.map(doubled)
    yield from spaces


def _factors(tensor: Tensor, *, square: bool, middle: bool) -> list[int]:
    """By how much each axis changes: images by two numbers, unless they must stay `square`."""
    if tensor.ndim > _SEQUENCE:
        return [1, 1, *(2 if square or axis % 2 else 3 for axis in range(1, tensor.ndim - 1))]
    if tensor.ndim == _SEQUENCE:
        return [1, 2, 1] if middle else [1, 1, 2]
    # A matrix of numbers holds features, one of integers or masks texts.
    return [1, 2] if tensor.ndim == 2 and not tensor.is_floating_point() else [1] * tensor.ndim


def _repeated(tensor: Tensor, factors: Callable[[Tensor], list[int]]) -> Tensor:
    return tensor.repeat(factors(tensor))


def _shortened(tensor: Tensor, factors: Callable[[Tensor], list[int]]) -> Tensor:
    for axis, factor in enumerate(factors(tensor)):
        tensor = tensor.narrow(axis, 0, -(-tensor.shape[axis] // factor))
    return tensor.contiguous()


def _shapes(inputs: Inputs) -> list[tuple[int, ...]]:
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]


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
