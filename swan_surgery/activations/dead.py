"""Selective activation of a pruned network: the channels that are dead most often let through what is negative.

After Liu et al., "AP: Selective Activation for De-sparsifying Pruned Networks" (TMLR 2023): a small network loses by
channels that its ReLU keeps at 0 for most inputs. How they choose and activate is not taken over in detail:
here the channels with the largest share of values at or below 0 get a slope, which is learnt.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.activations.hearing_data import run_hooked
from swan_surgery.activations.learnt import Activated
from swan_surgery.errors import InputError


def activate_dead(
    model: nn.Module, batches: Iterable[Any], *, part: float = 0.25, slope: float = 0.01
) -> None:
    """Activate the channels of a model's "ap" activations that are dead most often on data, and only these.

    There f(x) becomes f(x) + s (x - f(x)): a leaky ReLU where f is ReLU. The outputs change; what was chosen before is
    chosen no more.

    Args:
        model: with activations of `swap_activations(model, "ap", ...)`; they are changed.
        batches: inputs, or tuples whose first element is the input, or dicts of keyword arguments.
        part: of all channels of these activations, those with the largest share of values at or below 0.
        slope: s at first; it is learnt per channel from there on.

    Raises:
        InputError: the model has no such activation, there is no batch, or `part` is not between 0 and 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = swan.swap_activations(net, "ap", torch.randn(4, 3))
        >>> swan.activate_dead(small, [torch.randn(64, 3)], part=0.5)
    """
    if not 0 <= part <= 1:
        raise InputError(f"part is a share of the channels, from 0 to 1; got {part}")
    own = [module for module in model.modules() if isinstance(module, Activated)]
    if not own:
        raise InputError('the model has no "ap" activation; swan.swap_activations puts them in')
    closed: dict[int, Tensor] = {}
    seen: dict[int, int] = {}
    run_hooked(model, {m.base: _counting(m, closed, seen) for m in own}, batches)
    if not closed:
        raise InputError('no batch ran through an "ap" activation')
    heard = [module for module in own if id(module) in closed]
    rates = [closed[id(module)] / seen[id(module)] for module in heard]
    order = torch.cat(rates).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[: round(part * len(order))]] = True
    for module, which in zip(heard, chosen.split([len(rate) for rate in rates]), strict=True):
        module.chosen.copy_(which)
        module.slope.data.fill_(slope)


def _counting(
    module: Activated, closed: dict[int, Tensor], seen: dict[int, int]
) -> Callable[..., None]:
    def hook(_base: nn.Module, args: Any, _out: Tensor) -> None:
        rows = args[0].detach().movedim(module.axes.channels, 0).flatten(1)
        number = (rows <= 0).sum(dim=1).double().cpu()
        closed[id(module)] = closed.get(id(module), torch.zeros_like(number)) + number
        seen[id(module)] = seen.get(id(module), 0) + rows.shape[1]

    return hook
