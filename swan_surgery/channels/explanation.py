"""What the channel map says about each layer, in words and counts: the answer to "why?"."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from swan_surgery.channels.map_entries import (
    PINNED,
    AttributeWidth,
    Layer,
    Pin,
    RepeatedNumber,
    Statistic,
    UnknownOp,
)


_Entry = Layer | AttributeWidth | RepeatedNumber | Statistic
_KINDS = {"convolution": "conv", "addmm": "linear", "mm": "linear", "bmm": "matmul"}


@dataclass(frozen=True, slots=True)
class Coupled:
    """Another layer, and how many output channels of this one hang on gates of that one."""

    layer: str
    num_channels: int

    def __str__(self) -> str:
        return f"{self.layer} ({self.num_channels})"


@dataclass(frozen=True, slots=True)
class Pinned:
    """How many output channels stay: why, and because of which operation in which module.

    `line` is the line of code that called an operation without a rule, "" for other reasons.
    """

    num_channels: int
    reason: str
    op: str
    module: str
    line: str

    def __str__(self) -> str:
        where = [self.op] if "." in self.op else []
        if self.module:
            where.append(f"in module {self.module!r}")
        if self.line:
            where.append(f"at {self.line}")
        because = f" ({' '.join(where)})" if where else ""
        return f"{self.num_channels} stay: {self.reason}{because}"


@dataclass(frozen=True, slots=True)
class FollowingAttribute:
    """A Python attribute of a module that is set anew when the layer shrinks."""

    module: str
    name: str
    index: int | None

    def __str__(self) -> str:
        item = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.name}{item}".removeprefix(".")


@dataclass(frozen=True, slots=True)
class FollowingNumber:
    """A number in the code of a module that is rewritten when the layer shrinks.

    Among the leaves of the `call`-th call of the torch function `function` in one run of `module`,
    the one at position `leaf`.
    """

    module: str
    function: str
    call: int
    leaf: int

    def __str__(self) -> str:
        where = f"in module {self.module!r}" if self.module else "in the model's own forward"
        return f"argument {self.leaf} of {self.function}() no. {self.call} {where}"


@dataclass(frozen=True, slots=True)
class WeightedStatistic:
    """A norm, mean or the like over the layer's channels, which counts each with its gate."""

    module: str
    function: str

    def __str__(self) -> str:
        return f"{self.function} in {self.module!r}" if self.module else self.function


@dataclass(frozen=True, slots=True)
class LayerExplanation:
    """What happens to the output channels of one convolution, linear layer or matrix product.

    Attributes:
        name: dotted name of the module, or of the weight where it has none.
        kind: conv, linear, matmul, or the operation.
        in_channels: channels it reads.
        out_channels: channels it makes.
        gated_channels: output channels that have a gate.
        num_units: gates that they hang on; fewer than channels where some share one.
        coupled: layers whose output channels hang on the same gates.
        pinned: the output channels that stay, by reason.
        attributes: Python attributes that are set anew when the layer shrinks.
        numbers: numbers in code that are rewritten when the layer shrinks.
        statistics: norms and reductions that count the layer's channels with their gates.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    gated_channels: int
    num_units: int
    coupled: tuple[Coupled, ...]
    pinned: tuple[Pinned, ...]
    attributes: tuple[FollowingAttribute, ...]
    numbers: tuple[FollowingNumber, ...]
    statistics: tuple[WeightedStatistic, ...]

    def remarks(self, most: int = 3) -> tuple[str, ...]:
        """One sentence for each thing there is to say; long lists end after `most` in "and 12 more"."""
        said = [
            ("shares gates with ", few(self.coupled, most)),
            ("", few(self.pinned, most)),
            ("sets ", few(self.attributes, most)),
            ("rewrites ", few(self.numbers, most)),
            ("weighs ", few(self.statistics, most)),
        ]
        return tuple(verb + what for verb, what in said if what)

    def __str__(self) -> str:
        gated = "no gate"
        if self.gated_channels:
            gated = f"{self.gated_channels} gated by {self.num_units} units"
        head = f"{self.name}: {self.kind} {self.in_channels} -> {self.out_channels}, {gated}"
        return "\n    ".join([head, *self.remarks()])


@dataclass(frozen=True, slots=True)
class Explanation:
    """A channel map layer by layer; `str()` is the readable form.

    Attributes:
        layers: in order of execution.
        kept_numbers: numbers that the code computes from a width and that must not follow it, like
            the scale of attention; they are rewritten to stay.
        unknown: operations without a channel rule, with module and line of code.
    """

    layers: tuple[LayerExplanation, ...]
    kept_numbers: tuple[FollowingNumber, ...]
    unknown: tuple[UnknownOp, ...]

    def layer(self, name: str) -> LayerExplanation:
        """A layer by name."""
        return next(layer for layer in self.layers if layer.name == name)

    def __str__(self) -> str:
        lines = [str(layer) for layer in self.layers]
        if self.kept_numbers:
            lines.append(f"rewritten to stay: {few(self.kept_numbers, 3)}")
        if self.unknown:
            lines.append("operations without a channel rule:")
            lines += [f"    {entry}" for entry in self.unknown]
        return "\n".join(lines)


def few(items: Sequence[object], most: int) -> str:
    """The first items, and how many more there are: `a, b and 12 more`."""
    shown = [str(item) for item in items[:most]]
    hidden = len(items) - len(shown)
    return ", ".join(shown) + (f" and {hidden} more" if hidden else "")


def explain(
    layers: Sequence[Layer],
    *,
    pins: Iterable[Pin],
    attributes: Sequence[AttributeWidth],
    numbers: Sequence[RepeatedNumber],
    statistics: Sequence[Statistic],
    unknown: tuple[UnknownOp, ...],
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
    return Explanation(tuple(explained), tuple(kept), unknown)


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
