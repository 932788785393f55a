"""Which groups of channels can look at the input, block by block; and why the others stay static."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from swan_surgery.adaptive.matrices import input_axis, is_turned
from swan_surgery.channels import PINNED, ChannelMap
from swan_surgery.costs.table import CostTable


# Blocks inside whose channels cost at least this part of the channels around them make those a stream.
_STREAM = 0.1
# What adds a bias to what it sums over, and does nothing else.
_READERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True, slots=True)
class NestedAxis:
    """An axis on which the units of a group lie one after the other, `run` positions each."""

    tensor: str
    axis: int
    run: int


@dataclass(frozen=True, slots=True)
class NestedGroup:
    """Units that share a width inside one block, in the order in which they lie on every axis.

    Attributes:
        block: the module that owns their producers and readers.
        units: as the channel map numbers them.
        axes: where they lie.
        readers: the convolutions and linear layers that sum over them.
        writers: the linear layers that write them, where tokens choose in passing and the rest of the block is
            left alone.
    """

    block: str
    units: tuple[int, ...]
    axes: tuple[NestedAxis, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StaticGroup:
    """Units that every input uses alike: the layers that write them, how many, and why."""

    layers: tuple[str, ...]
    num_units: int
    reason: str

    def __str__(self) -> str:
        return f"{', '.join(self.layers)}: {self.num_units} units stay static: {self.reason}"


class _StaysStatic(Exception):  # noqa: N818 - a reason, no error
    """Why a group cannot adapt."""


def unfit_blocks(model: nn.Module, channels: ChannelMap, table: CostTable) -> Mapping[str, str]:
    """Modules that hold groups of channels, and why they may not adapt as a whole: by what lies inside or around.

    Args:
        model: that is adapted.
        channels: its map.
        table: of its MACs.
    """
    owners = [_owner(model, tensors) for tensors in _axes_of_groups(channels)]
    found = _blocks(owners, _macs_of_groups(channels, table))
    return {name: reason for name, reason in found.items() if reason}


def candidates(
    model: nn.Module, channels: ChannelMap, unfit: Mapping[str, str], *, by_token: bool = False
) -> tuple[tuple[NestedGroup, ...], tuple[StaticGroup, ...]]:
    """Groups that could adapt by the channel map, and those that cannot.

    Args:
        model: that is adapted.
        channels: its map.
        unfit: modules whose channels may not, with the reason.
        by_token: tokens will choose: readers may be transformers' `Conv1D`, too.
    """
    nested, static = [], []
    for units, own in zip(channels.unit_groups, _axes_of_groups(channels), strict=True):
        try:
            block = _owner(model, own)
            _check_block(unfit, block)
            nested.append(_nested(model, channels, units, own, block, by_token=by_token))
        except _StaysStatic as reason:
            static.append(static_group(channels, units, str(reason)))
    return tuple(nested), tuple(static)


def _macs_of_groups(channels: ChannelMap, table: CostTable) -> list[float]:
    """What closing each group alone would save."""
    values = torch.ones(len(channels.unit_groups) + 1, table.num_units, dtype=torch.float64)
    for row, units in zip(values[1:], channels.unit_groups, strict=True):
        row[list(units)] = 0
    found = table.at(values)
    return [float(found[0] - own) for own in found[1:]]


def _blocks(owners: Sequence[str], macs: Sequence[float]) -> dict[str, str]:
    """Blocks by name: "" for those that may adapt, else why not.

    Channels around blocks are a residual stream; but around a squeeze-excite, or the MLP of an activation, they are
    what costs, and the inner ones stay as they are.
    """
    own: dict[str, float] = defaultdict(float)
    for name, saved in zip(owners, macs, strict=True):
        own[name] += saved
    found = dict.fromkeys(own, "")
    for name in sorted(own, key=len):
        if found[name]:
            continue
        inside = sorted(other for other in own if _lies_inside(other, name))
        if not inside:
            continue
        if sum(own[other] for other in inside) >= _STREAM * own[name]:
            found[name] = (
                f"they run between blocks ({inside[0]!r} is one), as a residual stream does"
            )
        else:
            reason = f"they cost little beside the channels of {name or 'the model'!r} around them"
            found.update(dict.fromkeys(inside, reason))
    return found


def _check_block(unfit: Mapping[str, str], block: str) -> None:
    if block in unfit:
        raise _StaysStatic(unfit[block])


def static_group(channels: ChannelMap, units: Iterable[int], reason: str) -> StaticGroup:
    """Units that stay static, for a reason."""
    own = frozenset(units)
    layers = tuple(layer.name for layer in channels.layers if own & set(layer.out_units))
    return StaticGroup(layers or ("(no layer)",), len(own), reason)


def _axes_of_groups(channels: ChannelMap) -> list[dict[tuple[str, int], tuple[int, ...]]]:
    """The axes on which each unit group lies."""
    group_of = {unit: g for g, units in enumerate(channels.unit_groups) for unit in units}
    found: list[dict[tuple[str, int], tuple[int, ...]]] = [{} for _ in channels.unit_groups]
    for entry in channels.tensors:
        for group in {group_of[unit] for unit in entry.units if unit != PINNED}:
            found[group][entry.tensor, entry.axis] = entry.units
    return found


def _owner(model: nn.Module, axes: Mapping[tuple[str, int], tuple[int, ...]]) -> str:
    """The smallest module that holds all tensors and can be called."""
    paths = [tensor.split(".")[:-1] for tensor, _ in axes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and isinstance(
        model.get_submodule(".".join(common)), (nn.ModuleList, nn.ModuleDict)
    ):
        common.pop()
    return ".".join(common)


def _lies_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _nested(
    model: nn.Module,
    channels: ChannelMap,
    units: tuple[int, ...],
    axes: Mapping[tuple[str, int], tuple[int, ...]],
    block: str,
    *,
    by_token: bool,
) -> NestedGroup:
    own = frozenset(units)
    if own & channels.ungated_reads:
        raise _StaysStatic("something that is no layer sums over them")
    if any(own & set(entry.units) for entry in channels.statistics):
        raise _StaysStatic("a norm takes its statistics over them")
    _check_code(channels, own, block)
    order = _order(axes, own)
    _check_tensors(model, axes)
    readers = _readers(model, channels, axes, by_token=by_token)
    runs = tuple(NestedAxis(t, axis, len(found) // len(order)) for (t, axis), found in axes.items())
    return NestedGroup(block, order, runs, readers)


def _check_code(channels: ChannelMap, own: frozenset[int], block: str) -> None:
    """Python code that repeats the width must run inside the block."""
    for attribute in channels.attributes:
        if own & set(attribute.units) and not _is_in(attribute.module, block):
            raise _StaysStatic(
                f"attribute {attribute.name!r} of {attribute.module!r}, outside their block, "
                f"follows their width"
            )
    for number in channels.numbers:
        if (
            number.units is not None
            and own & set(number.units)
            and not _is_in(number.module, block)
        ):
            raise _StaysStatic(
                f"a number in the code of {number.module!r}, outside their block, follows their width"
            )


def _is_in(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(f"{block}.")


def _order(axes: Mapping[tuple[str, int], tuple[int, ...]], own: frozenset[int]) -> tuple[int, ...]:
    """The units in the order of their positions, the same on every axis: a prefix is then a view."""
    orders = set()
    for (tensor, _), found in axes.items():
        if not own.issuperset(found):
            raise _StaysStatic(f"they share an axis of {tensor!r} with other channels")
        order = tuple(dict.fromkeys(found))
        run, rest = divmod(len(found), len(order))
        if rest or found != tuple(unit for unit in order for _ in range(run)):
            raise _StaysStatic(f"on {tensor!r} a unit does not lie in one piece")
        orders.add(order)
    if len(orders) != 1:
        raise _StaysStatic("their tensors hold them in different orders")
    (order,) = orders
    if len(order) < len(own):
        raise _StaysStatic("not all of them lie on every axis")
    if len(order) == 1:
        raise _StaysStatic("there is only one of them")
    return order


def _check_tensors(model: nn.Module, axes: Mapping[tuple[str, int], tuple[int, ...]]) -> None:
    names: dict[int, set[str]] = defaultdict(set)
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[id(tensor)].add(name)
    known = {name: own for own in names.values() for name in own}
    for held, _ in axes:
        if held not in known:
            raise _StaysStatic(f"{held!r} is a plain attribute, which no view replaces")
        if len(known[held]) > 1:
            raise _StaysStatic(f"{held!r} is tied")


def _readers(
    model: nn.Module,
    channels: ChannelMap,
    axes: Mapping[tuple[str, int], tuple[int, ...]],
    *,
    by_token: bool,
) -> tuple[str, ...]:
    readers = []
    for tensor, axis in axes:
        if (tensor, axis) not in channels.gated_axes:
            continue
        name, _, parameter = tensor.rpartition(".")
        module = model.get_submodule(name)
        plain = any(type(module).forward is kind.forward for kind in _READERS)
        plain = plain or (by_token and is_turned(module))
        grouped = isinstance(module, _ConvNd) and module.groups > 1
        if not plain or parameter != "weight" or axis != input_axis(module) or grouped:
            raise _StaysStatic(
                f"{tensor!r} reads them, which is not the weight of a plain convolution or linear layer"
            )
        readers.append(name)
    if not readers:
        raise _StaysStatic("no layer sums over them")
    return tuple(readers)


__all__ = [
    "NestedAxis",
    "NestedGroup",
    "StaticGroup",
    "candidates",
    "static_group",
    "unfit_blocks",
]
