"""The decision as data: which units stay, and which positions of which tensors that means."""

import json
from dataclasses import asdict, dataclass
from math import gcd

import torch
from torch import Tensor

from swan_surgery.channels import PINNED, ChannelMap, RepeatedNumber
from swan_surgery.cost import cost_table
from swan_surgery.errors import BudgetError, EmptyLayerError, InputError
from swan_surgery.gates import GatedModel


_VERSION = 2


@dataclass(frozen=True, slots=True)
class KeptPositions:
    """Sorted positions that stay on one axis of one parameter or buffer."""

    tensor: str
    axis: int
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttributeValue:
    """The new value of a Python integer that repeats a width; `index` inside a tuple or list."""

    module: str
    name: str
    index: int | None
    value: int


@dataclass(frozen=True, slots=True)
class NumberValue:
    """The new value of a number in a module's code; see `RepeatedNumber`."""

    module: str
    function: str
    number: int
    leaf: int
    training: bool
    value: float
    site: str = ""


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """What stays: `open_units` sorted, `positions` of shorter axes; what follows in Python code."""

    num_units: int
    open_units: tuple[int, ...]
    positions: tuple[KeptPositions, ...]
    attributes: tuple[AttributeValue, ...] = ()
    numbers: tuple[NumberValue, ...] = ()

    def to_json(self) -> str:
        """The plan as versioned JSON."""
        return json.dumps({"version": _VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Read what `to_json` wrote.

        Raises:
            InputError: not a plan, or of another version.
        """
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise InputError(f"plan version {data['version']} is not {_VERSION}")
            positions = tuple(
                KeptPositions(entry["tensor"], entry["axis"], tuple(entry["kept"]))
                for entry in data["positions"]
            )
            attributes = tuple(AttributeValue(**entry) for entry in data["attributes"])
            numbers = tuple(NumberValue(**entry) for entry in data["numbers"])
            units = tuple(data["open_units"])
            return cls(data["num_units"], units, positions, attributes, numbers)
        except (json.JSONDecodeError, KeyError, TypeError) as err:
            raise InputError(f"not a pruning plan: {err}") from err


def make_plan(channels: ChannelMap, mask: Tensor) -> PruningPlan:
    """The plan of an open mask, bool of shape (num_units,).

    Raises:
        EmptyLayerError: a layer would keep no channel.
    """
    stays = [*mask.tolist(), True]  # the last entry answers for PINNED = -1
    for layer in channels.layers:
        for units in (layer.out_units, layer.in_units):
            if units and not any(stays[unit] for unit in units):
                raise EmptyLayerError(
                    f"layer {layer.name!r} would keep none of its {len(units)} channels; raise "
                    f"gates.min_width to at least 1, or its logits"
                )
    positions = []
    for entry in channels.tensors:
        kept = tuple(index for index, unit in enumerate(entry.units) if stays[unit])
        if len(kept) < len(entry.units):
            positions.append(KeptPositions(entry.tensor, entry.axis, kept))
    open_units = tuple(unit for unit in range(channels.num_units) if stays[unit])
    attributes = tuple(
        AttributeValue(a.module, a.name, a.index, sum(stays[unit] for unit in a.units))
        for a in channels.attributes
        if not all(stays[unit] for unit in a.units)
    )
    numbers = tuple(
        NumberValue(n.module, n.function, n.number, n.leaf, n.training, _number(n, stays), n.site)
        for n in channels.numbers
        if positions
    )
    return PruningPlan(channels.num_units, open_units, tuple(positions), attributes, numbers)


def _number(entry: RepeatedNumber, stays: list[bool]) -> float:
    return entry.value if entry.units is None else sum(stays[unit] for unit in entry.units)


def ranking(gated: GatedModel) -> Tensor:
    """Units by falling p; among equals those early in their group first, so that layers share."""
    p = gated.gates.probabilities().detach().double().cpu()
    place = torch.zeros_like(p)
    for group in gated.channels.unit_groups:
        place[list(group)] = torch.arange(len(group), dtype=p.dtype) / len(group)
    by_place = torch.argsort(place, stable=True)
    return by_place[torch.argsort(p[by_place], descending=True, stable=True)]


def round_widths(gated: GatedModel, mask: Tensor, round_to: int) -> Tensor:
    """Open the best closed units until every group's width is a multiple of `round_to` channels.

    A group that is too narrow for the next multiple opens whole.
    """
    if round_to == 1:
        return mask
    order = torch.empty(gated.channels.num_units, dtype=torch.int64)
    order[ranking(gated)] = torch.arange(gated.channels.num_units)
    channels_of = _channels_per_unit(gated.channels)
    rounded = mask.cpu().clone()
    for group in gated.channels.unit_groups:
        members = torch.tensor(group)
        step = round_to // gcd(round_to, channels_of[group[0]])
        num_open = int(rounded[members].sum())
        wanted = min(-(-num_open // step) * step, len(group))
        closed = members[~rounded[members]]
        best = closed[torch.argsort(order[closed])]
        rounded[best[: wanted - num_open]] = True
    return rounded.to(mask.device)


def _channels_per_unit(channels: ChannelMap) -> list[int]:
    """How many channels of the first layer that makes it one unit stands for."""
    found = [0] * channels.num_units
    for layer in channels.layers:
        fresh = {unit for unit in layer.out_units if unit != PINNED and not found[unit]}
        for unit in layer.out_units:
            if unit in fresh:
                found[unit] += 1
    return found


def mask_for_budget(gated: GatedModel, macs: float, round_to: int) -> Tensor:
    """The widest open mask, in order of `ranking`, whose MACs are at most `macs` of the base's.

    Raises:
        BudgetError: even the narrowest layers cost more; carries the reachable range.
    """
    table = cost_table(gated).to(torch.device("cpu"))
    order = ranking(gated)
    floor = gated.gates.mask_at(torch.tensor(float("inf"))).cpu()

    def mask_of(count: int) -> Tensor:
        mask = floor.clone()
        mask[order[:count]] = True
        return round_widths(gated, mask, round_to)

    def cost_of(count: int) -> int:
        return int(table.macs(mask_of(count).double()))

    budget = macs * table.total
    if cost_of(0) > budget:
        raise BudgetError(
            f"macs={macs:g} asks for at most {budget:,.0f} MACs, but with every layer at its "
            f"minimum width the model still costs {cost_of(0):,} "
            f"({cost_of(0) / table.total:.4f} of {table.total:,}); ask for at least that",
            min_macs=cost_of(0),
            max_macs=table.total,
        )
    low, high = 0, len(order)  # cost_of(low) fits; find the last count that does
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost_of(middle) <= budget else (low, middle - 1)
    return mask_of(low)
