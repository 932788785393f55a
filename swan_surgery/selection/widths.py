"""Ceilings on single layers: at most so many units, whatever the budget would allow."""

from collections.abc import Mapping
from fnmatch import fnmatch

import torch
from torch import Tensor

from swan_surgery.channels import PINNED
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel


Widths = Mapping[str, int | float]


def within_widths(gated: GatedModel, order: Tensor, widths: Widths, *, round_to: int = 1) -> Tensor:
    """Which units may stay open: the first of `order` in every layer that a ceiling is set for.

    Args:
        gated: the gated model.
        order: all units, those to keep first.
        widths: layer names or glob patterns, the first that matches counts -> at most so many units
            (an int), or at most this share of the layer's (a float in (0, 1]).
        round_to: ceilings come down to multiples of this, where they are no smaller.

    Returns:
        Bool of shape (num_units,); at least one unit of every layer is in it.

    Raises:
        InputError: a pattern that names no layer with gates, or a ceiling that is none.
    """
    names = [layer.name for layer in gated.channels.layers if set(layer.out_units) != {PINNED}]
    for pattern, most in widths.items():
        is_share = isinstance(most, float) and 0 < most <= 1
        if isinstance(most, bool) or not (is_share or (isinstance(most, int) and most >= 1)):
            raise InputError(
                f"widths gives {pattern!r} at most {most!r} units; it is a whole number of at least 1, or a "
                f"share in (0, 1] written as a float"
            )
        if not any(fnmatch(name, pattern) for name in names):
            raise InputError(
                f"widths names {pattern!r}, but no layer with gates is called so; there are "
                f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            )
    place = torch.empty(len(order), dtype=torch.int64)
    place[order.cpu()] = torch.arange(len(order))
    allowed = torch.ones(len(order), dtype=torch.bool)
    for layer in gated.channels.layers:
        most = next((own for at, own in widths.items() if fnmatch(layer.name, at)), 1.0)
        units = torch.tensor(sorted(set(layer.out_units) - {PINNED}), dtype=torch.int64)
        count = most if isinstance(most, int) else max(1, int(most * len(units) + 1e-9))
        count -= count % round_to if count >= round_to else 0
        best_first = units[place[units].argsort()]
        allowed[best_first[count:]] = False
    return allowed.to(order.device)


__all__ = ["Widths", "within_widths"]
