"""Sorts the entries of a channel map by the layers whose channels they concern."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from swan_surgery.channels.data.entries import (
    PINNED,
    AttributeWidth,
    Layer,
    Pin,
    RepeatedNumber,
    Statistic,
    UnknownOp,
)
from swan_surgery.channels.data.explanation import (
    Coupled,
    Explanation,
    FollowingAttribute,
    FollowingNumber,
    LayerExplanation,
    Pinned,
    WeightedStatistic,
)


_Entry = Layer | AttributeWidth | RepeatedNumber | Statistic
_KINDS = {"convolution": "conv", "addmm": "linear", "mm": "linear", "bmm": "matmul"}


def explain(
    layers: Sequence[Layer],
    *,
    pins: Iterable[Pin],
    attributes: Sequence[AttributeWidth],
    numbers: Sequence[RepeatedNumber],
    statistics: Sequence[Statistic],
    unknown: tuple[UnknownOp, ...],
    unused: tuple[str, ...] = (),
    lookups: tuple[str, ...] = (),
    way: str = "",
) -> Explanation:
    """Sort the entries of a channel map by the layers whose output channels they concern."""
    following = [number for number in numbers if number.units is not None]
    others: list[AttributeWidth | RepeatedNumber | Statistic]
    others = [*attributes, *following, *statistics]
    entries: list[_Entry] = [*layers, *others]
    touched = [layer.out_units for layer in layers] + [entry.units or () for entry in others]
    class_of, members = _classes(touched)
    pinned = _pins_by_layer(pins, unknown)
    explained = []
    for index, layer in enumerate(layers):
        met: Counter[int] = Counter()
        own = Counter(class_of[unit] for unit in layer.out_units if unit != PINNED)
        for number, count in own.items():
            for member in members[number]:
                met[member] += count
        found = [(entries[other], met[other]) for other in sorted(met) if other != index]
        explained.append(_explained(layer, found, pinned.get(layer.name, ())))
    kept = dict.fromkeys(_number(number) for number in numbers if number.units is None)
    never = dict.fromkeys(name.rpartition(".")[0] or name for name in unused)
    return Explanation(tuple(explained), tuple(kept), unknown, tuple(never), lookups, way)


def _classes(touched: Sequence[Iterable[int]]) -> tuple[Mapping[int, int], list[tuple[int, ...]]]:
    """Units that the same entries touch form a class: unit -> class, class -> entries."""
    signature: dict[int, list[int]] = defaultdict(list)
    for index, units in enumerate(touched):
        for unit in set(units):
            signature[unit].append(index)
    classes: dict[tuple[int, ...], int] = {}
    class_of = {
        unit: classes.setdefault(tuple(entries), len(classes))
        for unit, entries in signature.items()
        if unit != PINNED
    }
    return class_of, list(classes)


def _pins_by_layer(pins: Iterable[Pin], unknown: Iterable[UnknownOp]) -> Mapping[str, list[Pinned]]:
    lines: dict[tuple[str, str], str] = {}
    for entry in unknown:
        lines.setdefault((entry.op, entry.module), entry.line)
    found: dict[str, list[Pinned]] = defaultdict(list)
    for pin in pins:
        line = lines.get((pin.op, pin.module), "")
        found[pin.layer].append(Pinned(len(pin.channels), pin.reason, pin.op, pin.module, line))
    return found


def _explained(
    layer: Layer, met: Iterable[tuple[_Entry, int]], pinned: Iterable[Pinned]
) -> LayerExplanation:
    coupled: list[Coupled] = []
    attributes: dict[FollowingAttribute, None] = {}
    numbers: dict[FollowingNumber, None] = {}
    statistics: dict[WeightedStatistic, None] = {}
    for entry, count in met:
        if isinstance(entry, Layer):
            coupled.append(Coupled(entry.name, count))
        elif isinstance(entry, AttributeWidth):
            attributes[FollowingAttribute(entry.module, entry.name, entry.index)] = None
        elif isinstance(entry, RepeatedNumber):
            numbers[_number(entry)] = None
        else:
            statistics[WeightedStatistic(entry.module, entry.function)] = None
    gated = [unit for unit in layer.out_units if unit != PINNED]
    return LayerExplanation(
        name=layer.name,
        kind=_KINDS.get(layer.op.split(".")[0], layer.op),
        in_channels=len(layer.in_units),
        out_channels=len(layer.out_units),
        gated_channels=len(gated),
        num_units=len(set(gated)),
        coupled=tuple(coupled),
        pinned=tuple(pinned),
        attributes=tuple(attributes),
        numbers=tuple(numbers),
        statistics=tuple(statistics),
    )


def _number(entry: RepeatedNumber) -> FollowingNumber:
    return FollowingNumber(entry.module, entry.function, entry.number, entry.leaf)
