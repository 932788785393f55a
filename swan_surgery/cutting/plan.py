"""The decision as data: which units stay, and which positions of which tensors that means."""

import json
from dataclasses import asdict, dataclass

from torch import Tensor

from swan_surgery.channels import ChannelMap, RepeatedNumber
from swan_surgery.errors import EmptyLayerError, InputError


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
    def from_json(cls, text: str) -> "PruningPlan":
        """Read what `to_json` wrote.

        Raises:
            InputError: not a plan, or of another version.
        """
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise InputError(f"plan version {data['version']} is not {_VERSION}")
            kept = [_unpacked(bits) for bits in data["kept"]]
            positions = tuple(
                KeptPositions(str(tensor), int(axis), kept[index])
                for tensor, axis, index in data["positions"]
            )
            attributes = tuple(AttributeValue(*entry) for entry in data["attributes"])
            numbers = tuple(NumberValue(*entry) for entry in data["numbers"])
            units = _unpacked(data["open_units"])
            return cls(int(data["num_units"]), units, positions, attributes, numbers)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as err:
            if isinstance(err, InputError):
                raise
            raise InputError(f"not a pruning plan: {err}") from err


def _packed(positions: tuple[int, ...]) -> str:
    return f"{sum(1 << position for position in positions):x}"


def _unpacked(bits: str) -> tuple[int, ...]:
    return tuple(index for index, bit in enumerate(f"{int(bits, 16):b}"[::-1]) if bit == "1")


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
