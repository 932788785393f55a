"""Bounds of `Bounded` activations, learnt from data: what each channel reaches there."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.activations.hearing_data import run_hooked
from swan_surgery.activations.learnt import Bounded
from swan_surgery.errors import InputError


def fit_bounds(model: nn.Module, batches: Iterable[Any], *, margin: float = 1.0) -> None:
    """Set the bounds of all "bounded" activations of a model to the largest value that a channel reaches.

    On the batches given the outputs stay as they are (in eval mode, with `margin` >= 1).

    Args:
        model: with activations of `swap_activations(model, "bounded", ...)`; its bounds are changed.
        batches: inputs, or tuples whose first element is the input, or dicts of keyword arguments.
        margin: the bounds are this times what is reached.

    Raises:
        InputError: the model has no such activation, there is no batch, or `margin` is not positive.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> bounded = swan.swap_activations(net, "bounded", torch.randn(4, 3))
        >>> swan.fit_bounds(bounded, [torch.randn(64, 3)])
    """
    bounded = [module for module in model.modules() if isinstance(module, Bounded)]
    if not bounded:
        raise InputError(
            'the model has no "bounded" activation; swan.swap_activations puts them in'
        )
    if not margin > 0:
        raise InputError(f"margin must be above 0; got {margin}")
    reached: dict[int, Tensor] = {}
    run_hooked(model, {module.base: _noting(module, reached) for module in bounded}, batches)
    if not reached:
        raise InputError("no batch ran through a bounded activation")
    for own_module in bounded:
        if id(own_module) in reached:
            own_module.bound.data.copy_(margin * reached[id(own_module)])


def _noting(module: Bounded, reached: dict[int, Tensor]) -> Callable[..., None]:
    def hook(_base: nn.Module, _args: Any, out: Tensor) -> None:
        largest = out.detach().movedim(module.axes.channels, 0).flatten(1).amax(dim=1)
        known = reached.get(id(module))
        reached[id(module)] = largest if known is None else torch.maximum(known, largest)

    return hook
