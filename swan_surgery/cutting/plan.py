"""The decision as data: which units stay, and which positions of which tensors that means."""

import json
from dataclasses import asdict, dataclass

from torch import Tensor

from swan_surgery.channels import ChannelMap, RepeatedNumber
from swan_surgery.errors import EmptyLayerError, InputError
from swan_surgery.models.steps import Shapes


_VERSION = 3


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
    """The new value of a number in a module's code, or a factor for it; see `RepeatedNumber`."""

    module: str
    function: str
    number: int
    leaf: int
    training: bool
    value: float
    site: str = ""
    is_factor: bool = False


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """What stays: `open_units` sorted, `positions` of shorter axes; what follows in Python code."""

    num_units: int
    open_units: tuple[int, ...]
    positions: tuple[KeptPositions, ...]
    attributes: tuple[AttributeValue, ...] = ()
    numbers: tuple[NumberValue, ...] = ()

    def to_json(self) -> str:
        """The plan as versioned JSON.

        Sets of positions are hexadecimal numbers, bit i for position i, and each stands there once:
        the axes of one width keep the same positions.
        """
        sets: dict[tuple[int, ...], int] = {}
        positions = [
            [entry.tensor, entry.axis, sets.setdefault(entry.kept, len(sets))]
            for entry in self.positions
        ]
        return json.dumps(
            {
                "version": _VERSION,
                "num_units": self.num_units,
                "open_units": _packed(self.open_units),
                "kept": [_packed(kept) for kept in sets],
                "positions": positions,
                "attributes": [list(asdict(entry).values()) for entry in self.attributes],
                "numbers": [list(asdict(entry).values()) for entry in self.numbers],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str, *, shapes: Shapes | None = None) -> "PruningPlan":
        """Read what `to_json` wrote.

        Args:
            text: the JSON.
            shapes: of the tensors that the plan is for; a plan that keeps what they do not have is
                refused before its positions are spelled out, whatever size the text claims.

        Raises:
            InputError: not a plan, of another version, or for other tensors.
        """
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise InputError(f"plan version {data['version']} is not {_VERSION}")
            kept = [_bits(digits) for digits in data["kept"]]
            units = _bits(data["open_units"])
            entries = [(str(t), int(axis), int(index)) for t, axis, index in data["positions"]]
            if shapes is not None:
                _check_sizes(shapes, int(data["num_units"]), units, kept, entries)
            sets = [_unpacked(bits) for bits in kept]
            positions = tuple(KeptPositions(t, axis, sets[index]) for t, axis, index in entries)
            attributes = tuple(AttributeValue(*entry) for entry in data["attributes"])
            numbers = tuple(NumberValue(*entry) for entry in data["numbers"])
            return cls(int(data["num_units"]), _unpacked(units), positions, attributes, numbers)
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as err:
            if isinstance(err, InputError):
                raise
            raise InputError(f"not a pruning plan: {err}") from err


def _check_sizes(
    shapes: Shapes,
    num_units: int,
    units: int,
    kept: list[int],
    entries: list[tuple[str, int, int]],
) -> None:
    """Every set of positions is that of an axis, and fits it; no axis is cut twice."""
    # Every unit lies somewhere, every layer keeps something.
    if not units.bit_length() <= num_units <= sum(map(sum, shapes.values())):
        raise InputError(f"{units.bit_length()} of {num_units} units are more than the model has")
    used = {index for _, _, index in entries}
    if used != set(range(len(kept))) or len({entry[:2] for entry in entries}) < len(entries):
        raise InputError("sets of positions and axes do not belong together")
    # Tensors that are plain attributes have no shape here: they are as wide as what meets them.
    widest = max(map(max, filter(None, shapes.values())), default=0)
    for tensor, axis, index in entries:
        shape = shapes.get(tensor, (widest,) * (axis + 1))
        if not 0 <= axis < len(shape) or kept[index].bit_length() > shape[axis]:
            raise InputError(f"{tensor!r} of shape {shape} has no such positions on {axis}")


def _packed(positions: tuple[int, ...]) -> str:
    return f"{sum(1 << position for position in positions):x}"


def _bits(digits: str) -> int:
    bits = int(digits, 16)
    if bits < 0:
        raise ValueError(f"{digits[:20]!r} is no set of positions")
    return bits


def _unpacked(bits: int) -> tuple[int, ...]:
    return tuple(index for index, bit in enumerate(f"{bits:b}"[::-1]) if bit == "1")


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
        if not kept:
            raise EmptyLayerError(
                f"{entry.tensor!r} would keep none of its {len(entry.units)} channels on axis "
                f"{entry.axis}; raise gates.min_width to at least 1, or its logits"
            )
        if len(kept) < len(entry.units):
            positions.append(KeptPositions(entry.tensor, entry.axis, kept))
    open_units = tuple(unit for unit in range(channels.num_units) if stays[unit])
    attributes = tuple(
        AttributeValue(a.module, a.name, a.index, sum(stays[unit] for unit in a.units))
        for a in channels.attributes
        if not all(stays[unit] for unit in a.units)
    )
    numbers = tuple(
        NumberValue(
            n.module,
            n.function,
            n.number,
            n.leaf,
            n.training,
            _number(n, stays),
            n.site,
            n.power != 0,
        )
        for n in channels.numbers
        if positions
    )
    return PruningPlan(channels.num_units, open_units, tuple(positions), attributes, numbers)


def _number(entry: RepeatedNumber, stays: list[bool]) -> float:
    if entry.units is None:
        return entry.value
    left = sum(stays[unit] for unit in entry.units)
    return (len(entry.units) / max(left, 1)) ** entry.power if entry.power else left
