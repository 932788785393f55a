"""Example inputs of a model: arguments by position and by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from swan_surgery.errors import InputError


_SEQUENCE = 3  # [batch, length, features], or features before length
_LARGE = 128  # pixels, from where on an image may lose some
_MEDIUM = 48  # and from where on it need not double
_STRIDE = 32  # networks halve images up to five times


@dataclass(frozen=True, slots=True)
class Inputs:
    """Example inputs, split into positional and keyword arguments of the model's forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on_meta(self) -> "Inputs":
        """Floating-point tensors without data; integers stay: they may be positions to look up."""
        return self.map(lambda t: torch.empty_like(t, device="meta") if _has_no_use(t) else t.cpu())

    def on(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        """On a device, and in a floating-point type where they are of one."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))

    def fitting(self, module: nn.Module) -> "Inputs":
        """On a module's device and in its floating-point type, as its first parameter of one has them."""
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        return self if like is None else self.on(like.device, like.dtype)

    def copied(self) -> "Inputs":
        """Copies, for a run that may change its inputs in place."""
        return self.map(Tensor.clone)

    def run(self, module: Callable[..., Any]) -> Any:
        """What a module returns for copies of them, which it may change in place."""
        own = self.copied()
        return module(*own.args, **own.kwargs)

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
        larger: small images grow, which every network takes that halves them several times; False
            halves them, which costs less where they have data.
    """
    spaces: list[Inputs] = []
    for square, middle in ((False, False), (True, False), (False, True)):
        sizes = partial(_other_sizes, square=square, middle=middle, larger=larger)
        space = inputs.map(partial(_of_sizes, sizes=sizes))
        if all(_shapes(space) != _shapes(other) for other in (inputs, *spaces)):
            spaces.append(space)
    yield from (space.map(doubled) for space in spaces)
    yield inputs.map(doubled)
    yield from spaces


def _other_sizes(tensor: Tensor, *, square: bool, middle: bool, larger: bool) -> list[int]:
    """Images change by two amounts, unless they must stay `square`; large ones by little.

    So that they take the same path through the code: windows, say, that do or do not fit.
    """
    sizes = list(tensor.shape)
    if tensor.ndim > _SEQUENCE:
        least = min(sizes[2:])
        for axis in range(2, tensor.ndim):
            times = 2 if square or axis % 2 == 0 else 3
            if least >= _LARGE:
                sizes[axis] -= _STRIDE * (times - 1)
            elif least >= _MEDIUM and larger and not square:
                sizes[axis] += _STRIDE
            else:
                sizes[axis] = sizes[axis] * times if larger else -(-sizes[axis] // times)
    elif tensor.ndim == _SEQUENCE:
        axis = 1 if middle else 2
        sizes[axis] = sizes[axis] * 2 if larger else -(-sizes[axis] // 2)
    elif tensor.ndim == 2 and not tensor.is_floating_point():
        # A matrix of numbers holds features, one of integers or masks texts.
        sizes[1] = sizes[1] * 2 if larger else -(-sizes[1] // 2)
    return sizes


def _of_sizes(tensor: Tensor, sizes: Callable[[Tensor], list[int]]) -> Tensor:
    """Repeated and shortened to other sizes."""
    wanted = sizes(tensor)
    if list(tensor.shape) == wanted or not tensor.numel():
        return tensor
    times = [-(-new // old) for new, old in zip(wanted, tensor.shape, strict=True)]
    tensor = tensor.repeat(times)
    for axis, size in enumerate(wanted):
        tensor = tensor.narrow(axis, 0, size)
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
