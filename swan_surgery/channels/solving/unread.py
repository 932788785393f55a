"""Attributes that repeat a width and that no forward reads: other methods do (re-parameterisation).

The rehearsal cannot tell what they count, for nothing that runs depends on them. So they follow by what
they are called: `in_chs`, `out_channels`, `groups`, where all layers of the module that have such an axis
of that width keep the same units of it. Where these differ, the attribute stays as it was.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from swan_surgery.channels.solving.mapping import Solution
from swan_surgery.models.attributes import LAYERS, Attribute, whole_numbers_of


_INTO = {"in", "inp", "input", "inplanes"}
_OUT = {"out", "oup", "output", "outplanes"}
_GROUPS = {"groups"}
# A number is a width only if it is called one: there may be as many branches as some layer has channels.
_WIDTHS = {
    *("channels", "channel", "chs", "chans", "ch", "planes", "features", "dim", "dims", "width"),
    *("inp", "oup", "inplanes", "outplanes"),
}


def unread_widths(
    model: nn.Module, solution: Solution, reads: Callable[[], Collection[tuple[str, str]] | None]
) -> dict[Attribute, Tensor]:
    """What should follow, with the labels it counts.

    Args:
        model: at full width.
        solution: settled; what follows already is left out.
        reads: module and name of all attributes that its code reads in any mode that was mapped; None
            where nobody knows. Asked only if it matters.
    """
    found = dict(_candidates(model, solution))
    read = reads() if found else None
    if read is None:
        return {}
    return {own: labels for own, labels in found.items() if (own.module, own.name) not in read}


def _candidates(model: nn.Module, solution: Solution) -> Iterator[tuple[Attribute, Tensor]]:
    labelled = solution.labelled
    starts: Mapping[tuple[str, int], int] = {
        (name, axis): start
        for (name, axis, _), start in zip(labelled.axes, labelled.starts, strict=True)
    }
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) or type(module).__module__.startswith("torch."):
            continue
        for key, index, width in whole_numbers_of(module):
            own = Attribute(name, key, index)
            tokens = set(re.split(r"[_\d]+", key.lower()))
            if own in solution.followers or width < 2 or not tokens & (_WIDTHS | _GROUPS):
                continue
            fields = [
                torch.arange(start, start + each * width, each)
                for place, each in _axes(name, module, tokens, width)
                if (start := starts.get(place)) is not None
            ]
            units = {tuple(sorted(solution.component[f.numpy()].tolist())) for f in fields}
            if len(units) == 1 and solution.prunable[list(*units)].any():
                yield own, fields[0]


def _axes(
    name: str, module: nn.Module, tokens: set[str], width: int
) -> list[tuple[tuple[str, int], int]]:
    """Tensor, axis and positions per count: what an attribute of such a name and width may count."""
    wanted = tokens & (_INTO | _OUT | _GROUPS)
    layers: list[tuple[tuple[str, int], int]] = []
    norms: list[tuple[tuple[str, int], int]] = []
    for inner, layer in module.named_modules(prefix=name):
        weight = layer._parameters.get("weight")  # noqa: SLF001 - a computed one has no labels
        if not isinstance(layer, LAYERS) or weight is None:
            continue
        own = norms if isinstance(layer, _NormBase) else layers
        for called, axis, each in _sides(layer):
            if weight.shape[axis] == width * each and (not wanted or wanted & called):
                own.append(((f"{inner}.weight".strip("."), axis), each))
    return layers or norms  # a branch that only normalises has the channels of both sides


def _sides(layer: nn.Module) -> list[tuple[set[str], int, int]]:
    """What attributes are called that count an axis of a layer's weight, so many positions at a time."""
    if isinstance(layer, _NormBase):
        return [(_INTO | _OUT | _GROUPS, 0, 1)]
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        sides = [(_OUT, 0, 1)]
        if layer.groups == layer.in_channels:  # each channel for itself makes one or several
            sides.append((_INTO | _GROUPS, 0, layer.out_channels // layer.groups))
        return sides
    out, into = (1, 0) if getattr(layer, "transposed", False) else (0, 1)
    return [(_OUT, out, 1), (_INTO, into, 1)]
