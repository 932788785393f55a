"""The channel map: which channels live and die together, as frozen data.

Names, integers and shapes only; no tensor, no module. Sharing of gates, placement, cost and cutting
all read this one value.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from swan_surgery.channels.data.entries import (
    PINNED,
    AttributeWidth,
    CostAxis,
    CostTerm,
    Entry,
    FreeOutput,
    Layer,
    Pin,
    RepeatedNumber,
    Statistic,
    TensorAxis,
    UnknownOp,
)
from swan_surgery.channels.data.explaining import explain
from swan_surgery.channels.data.explanation import Explanation


__all__ = [
    "PINNED",
    "AttributeWidth",
    "ChannelMap",
    "CostAxis",
    "CostTerm",
    "FreeOutput",
    "Layer",
    "Pin",
    "RepeatedNumber",
    "Statistic",
    "TensorAxis",
    "UnknownOp",
]


# How a field that holds no entries looks under new unit numbers: (value, new) -> value.
_HOW = "renumbered"
_NO_UNITS = {_HOW: lambda value, _: value}


def _renumbered_set(units: frozenset[int], new: Mapping[int, int]) -> frozenset[int]:
    return frozenset(new[unit] for unit in units if unit in new)


@dataclass(frozen=True, repr=False)
class ChannelMap:
    """Units of a model and where they lie; `explain()` says it layer by layer.

    Attributes:
        num_units: number of units that may be closed.
        tensors: every axis of a parameter or buffer that holds at least one unit.
        layers: convolutions and linear layers in order of execution.
        pins: output channels without a unit, with the reason.
        costs: what each conv, linear and matmul costs at the example inputs, in eval mode.
        unknown: operations without a channel rule that met channels, with module and line of code.
        notes: what the user should know about the tracing itself.
        selects_by_data: how often some layers run depends on values (on boxes that score high).
        gated_axes: (parameter, axis) pairs that are summed over: scaling them gates what they read.
        ungated_reads: units that something else sums over, which no parameter gates.
        statistics: normalisations and reductions over units.
        attributes: Python integers that repeat a width and follow it.
        numbers: numbers in the code of modules that are replaced when a width shrinks.
        free_outputs: outputs that were given up and shrink: what lies on their axes.
        unused: parameters that no run of the map reached; they keep their shapes, whatever comes in.
        lookups: embeddings whose columns no layer makes or shares; they have no gates.
        way: how `swanify` put gates in, and why in that way; empty in a map alone.
    """

    num_units: int = field(metadata={_HOW: lambda _, new: len(new)})
    tensors: tuple[TensorAxis, ...]
    layers: tuple[Layer, ...]
    pins: tuple[Pin, ...]
    costs: tuple[CostTerm, ...]
    unknown: tuple[UnknownOp, ...] = ()
    notes: tuple[str, ...] = field(default=(), metadata=_NO_UNITS)
    selects_by_data: bool = field(default=False, metadata=_NO_UNITS)
    gated_axes: tuple[tuple[str, int], ...] = field(default=(), metadata=_NO_UNITS)
    ungated_reads: frozenset[int] = field(default=frozenset(), metadata={_HOW: _renumbered_set})
    statistics: tuple[Statistic, ...] = ()
    attributes: tuple[AttributeWidth, ...] = ()
    numbers: tuple[RepeatedNumber, ...] = ()
    free_outputs: tuple[FreeOutput, ...] = ()
    unused: tuple[str, ...] = field(default=(), metadata=_NO_UNITS)
    lookups: tuple[str, ...] = field(default=(), metadata=_NO_UNITS)
    way: str = field(default="", compare=False, metadata=_NO_UNITS)

    def __repr__(self) -> str:
        pinned = self.num_channels - self.num_gated_channels
        return (
            f"ChannelMap({len(self.layers)} layers, {self.num_gated_channels:,} of "
            f"{self.num_channels:,} channels gated by {self.num_units:,} units, {pinned:,} pinned, "
            f"{len(self.unknown_ops)} operations without a rule; explain() tells more)"
        )

    def explain(self) -> Explanation:
        """Layer by layer: who shares gates, what stays and why, what is rewritten and weighted.

        Frozen data; `print(channels.explain())` shows it as text.
        """
        return explain(
            self.layers,
            pins=self.pins,
            attributes=self.attributes,
            numbers=self.numbers,
            statistics=self.statistics,
            unknown=self.unknown,
            unused=self.unused,
            lookups=self.lookups,
            way=self.way,
        )

    @property
    def unknown_ops(self) -> tuple[tuple[str, str], ...]:
        """Operations without a channel rule that met channels, each with its module."""
        return tuple(dict.fromkeys((entry.op, entry.module) for entry in self.unknown))

    @cached_property
    def _slots(self) -> Mapping[int, tuple[tuple[str, int, int], ...]]:
        found: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
        for entry in self.tensors:
            for index, unit in enumerate(entry.units):
                if unit != PINNED:
                    found[unit].append((entry.tensor, entry.axis, index))
        return {unit: tuple(slots) for unit, slots in found.items()}

    @cached_property
    def _layers_by_name(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def units_on(self, tensor: str, axis: int) -> tuple[int, ...]:
        """The unit at each position of an axis; empty if it holds none."""
        return self._axes.get((tensor, axis), ())

    @cached_property
    def _axes(self) -> Mapping[tuple[str, int], tuple[int, ...]]:
        return {(entry.tensor, entry.axis): entry.units for entry in self.tensors}

    def slots(self, unit: int) -> tuple[tuple[str, int, int], ...]:
        """Every (tensor, axis, index) that disappears when a unit is removed."""
        return self._slots[unit]

    def layer(self, name: str) -> Layer:
        """A layer by its module name (a bare weight by its parameter name)."""
        return self._layers_by_name[name]

    @cached_property
    def unit_groups(self) -> tuple[tuple[int, ...], ...]:
        """Units that stand on the output axes of the same layers, each group sorted.

        A group is what shares one width: the trunk of a residual stage, the output of one layer.
        """
        signature: dict[int, list[int]] = defaultdict(list)
        for index, layer in enumerate(self.layers):
            for unit in dict.fromkeys(layer.out_units):
                if unit != PINNED:
                    signature[unit].append(index)
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for unit in range(self.num_units):
            groups[tuple(signature[unit])].append(unit)
        return tuple(tuple(members) for members in groups.values())

    @property
    def num_channels(self) -> int:
        """Output channels of all layers."""
        return sum(len(layer.out_units) for layer in self.layers)

    @property
    def num_gated_channels(self) -> int:
        """Output channels of all layers that belong to a unit."""
        return sum(unit != PINNED for layer in self.layers for unit in layer.out_units)

    def without(self, units: Iterable[int], reason: str, op: str) -> "ChannelMap":
        """The map with some units pinned; the others are numbered anew, in the same order."""
        gone = set(units)
        kept = (unit for unit in range(self.num_units) if unit not in gone)
        pins = []
        for layer in self.layers:
            lost = tuple(index for index, unit in enumerate(layer.out_units) if unit in gone)
            if lost:
                pins.append(Pin(layer.name, lost, reason, op, layer.name))
        fewer = self.renumbered({unit: index for index, unit in enumerate(kept)})
        return replace(fewer, pins=(*fewer.pins, *pins))

    def renumbered(self, new: Mapping[int, int]) -> "ChannelMap":
        """The map under new unit numbers, 0, 1, ...; units without one stay for good.

        Every field either says in its metadata how, or holds entries that know it themselves.
        """
        return replace(
            self,
            **{
                own.name: own.metadata.get(_HOW, _renumbered_entries)(getattr(self, own.name), new)
                for own in fields(self)
            },
        )


def _renumbered_entries(entries: Iterable[Entry], new: Mapping[int, int]) -> tuple[Entry, ...]:
    found = (entry.renumbered(new) for entry in entries)
    return tuple(entry for entry in found if entry is not None)
