"""What a gate bank starts from: the widths it must keep, and an order of importance."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swan_surgery.channels import PINNED, ChannelMap
from swan_surgery.gates.bank import INITIAL_LOGIT, GateBank


# Logits start apart by importance, so that a budget has an order to close units in.
_SPREAD = 0.5
# The rank of a unit that has no others in its group.
_ALONE = torch.tensor([0.5])


def make_bank(model: nn.Module, channels: ChannelMap, sites: Sequence[Tensor]) -> GateBank:
    """The gate bank of a model: logits in order of importance, on the model's device."""
    rows = widths(channels)
    bank = GateBank(channels.num_units, rows, sites, names_of(channels, rows))
    bank.logits.data = _started(importance_ranks(model, channels))
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    if reference is not None:
        # Half precision would merge the starting order of the gates: logits stay in float32 then.
        wide = torch.promote_types(reference.dtype, torch.float32)
        bank.to(device=reference.device, dtype=wide)
    return bank.train(model.training)


def stands_as_started(channels: ChannelMap, logits: Tensor) -> Tensor:
    """Which units have a logit that `make_bank` gives in their group, bool of shape (num_units,).

    By the values alone: weights that were trained or loaded since may have another order.
    """
    found = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for group in channels.unit_groups:
        members = torch.tensor(group, device=logits.device)
        ranks = torch.arange(len(group)) / (len(group) - 1) if len(group) > 1 else _ALONE
        steps = _started(ranks).to(logits)
        found[members] = torch.isin(logits.detach()[members], steps)
    return found


def _started(ranks: Tensor) -> Tensor:
    return torch.full_like(ranks, INITIAL_LOGIT) + _SPREAD * (2 * ranks - 1)


def magnitudes(model: nn.Module, channels: ChannelMap) -> Tensor:
    """Squared weights of all slots of every unit, float64 of shape (num_units,).

    Each tensor axis is divided by its mean first, so that every layer of a group has one vote.
    """
    parameters = dict(model.named_parameters())
    score = torch.zeros(channels.num_units, dtype=torch.float64)
    squared, squares = None, torch.empty(0)
    for entry in channels.tensors:
        parameter = parameters.get(entry.tensor)
        if parameter is None or parameter.is_meta or not parameter.is_floating_point():
            continue
        others = [axis for axis in range(parameter.ndim) if axis != entry.axis]
        if squared is not parameter:  # both axes of a weight follow each other
            squared, squares = parameter, parameter.detach().square()
        own = (squares.sum(others) if others else squares).double().cpu()
        own = torch.nan_to_num(own / own.mean().clamp(min=torch.finfo(torch.float64).tiny))
        units = torch.tensor(entry.units)
        score.index_add_(0, units[units >= 0], own[units >= 0])
    return score


def importance_ranks(model: nn.Module, channels: ChannelMap) -> Tensor:
    """Rank of every unit within its group by `magnitudes`, in [0, 1].

    A unit alone in its group ranks 0.5.
    """
    score = magnitudes(model, channels)
    ranks = torch.full((channels.num_units,), float(_ALONE))
    for group in channels.unit_groups:
        if len(group) > 1:
            members = torch.tensor(group)
            order = score[members].argsort(stable=True)
            ranks[members[order]] = torch.arange(len(group)) / (len(group) - 1)
    return ranks


def widths(channels: ChannelMap) -> list[Sequence[int]]:
    """The distinct sets of units whose width must not reach zero: axes without a pinned channel.

    Those of layers, and of parameters that the code uses by themselves. An input axis that holds a
    whole output axis needs no entry of its own.
    """
    found: dict[tuple[int, ...], None] = {}
    for layer in channels.layers:
        units = tuple(dict.fromkeys(layer.out_units))
        if units and PINNED not in units:
            found[units] = None
    outputs = [set(units) for units in found]
    others = [*(layer.in_units for layer in channels.layers), *(a.units for a in channels.tensors)]
    for positions in others:
        units = tuple(dict.fromkeys(positions))
        if not units or PINNED in units or units in found:
            continue
        own = set(units)
        if not any(own >= output for output in outputs if units[0] in output):
            found[units] = None
    return list(found)


def names_of(channels: ChannelMap, rows: Sequence[Sequence[int]]) -> list[list[str]]:
    """Per width the layers that have it on their output, else on their input, else the parameters."""
    places = {tuple(units): index for index, units in enumerate(rows)}
    outputs: list[list[str]] = [[] for _ in rows]
    inputs: list[list[str]] = [[] for _ in rows]
    for layer in channels.layers:
        for units, names in ((layer.out_units, outputs), (layer.in_units, inputs)):
            index = places.get(tuple(dict.fromkeys(units)))
            if index is not None:
                names[index].append(layer.name)
    bare: list[list[str]] = [[] for _ in rows]
    for entry in channels.tensors:
        index = places.get(tuple(dict.fromkeys(entry.units)))
        if index is not None:
            bare[index].append(entry.tensor)
    return [next(filter(None, own), []) for own in zip(outputs, inputs, bare, strict=True)]
