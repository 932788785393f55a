"""What a channel map is made of: frozen entries of names, integers and shapes.

Every entry knows itself under other unit numbers: `renumbered(new)`, where a unit without a new number
stays for good.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self


PINNED = -1


class Entry(Protocol):
    """What a channel map is made of."""

    def renumbered(self, new: Mapping[int, int]) -> Self | None:
        """The entry under new unit numbers; None where nothing is left to say."""


def renumber(units: tuple[int, ...], new: Mapping[int, int]) -> tuple[int, ...]:
    """Units under new numbers; those without one are `PINNED`."""
    return tuple(new.get(unit, PINNED) for unit in units)


@dataclass(frozen=True, slots=True)
class TensorAxis:
    """One axis of a parameter or buffer: the unit at each position, `PINNED` where there is none."""

    tensor: str
    axis: int
    units: tuple[int, ...]

    def renumbered(self, new: Mapping[int, int]) -> "TensorAxis | None":
        """Under new unit numbers; None if no unit is left on it."""
        units = renumber(self.units, new)
        return replace(self, units=units) if any(unit != PINNED for unit in units) else None


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear layer: the unit of each output and each input channel."""

    name: str
    weight: str
    op: str
    out_units: tuple[int, ...]
    in_units: tuple[int, ...]

    def renumbered(self, new: Mapping[int, int]) -> "Layer":
        """Under new unit numbers."""
        return replace(
            self, out_units=renumber(self.out_units, new), in_units=renumber(self.in_units, new)
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """Output channels of a layer that must stay: why, and because of which operation where."""

    layer: str
    channels: tuple[int, ...]
    reason: str
    op: str
    module: str

    def renumbered(self, new: Mapping[int, int]) -> "Pin":
        """As it is: it holds no units."""
        del new
        return self

    def __str__(self) -> str:
        where = f" in module {self.module!r}" if self.module else ""
        return (
            f"{self.layer}: {len(self.channels)} channels pinned: {self.reason} ({self.op}{where})"
        )


@dataclass(frozen=True, slots=True)
class CostAxis:
    """An axis that multiplies a layer's MACs: positions of each unit, and those that always stay."""

    units: tuple[int, ...]
    counts: tuple[int, ...]
    num_fixed: int

    def renumbered(self, new: Mapping[int, int]) -> "CostAxis":
        """The same axis under new unit numbers; a unit without one always stays."""
        pairs = list(zip(self.units, self.counts, strict=True))
        kept = [(new[unit], count) for unit, count in pairs if unit in new]
        fixed = sum(count for unit, count in pairs if unit not in new)
        units, counts = zip(*kept, strict=True) if kept else ((), ())
        return CostAxis(tuple(units), tuple(counts), self.num_fixed + fixed)


@dataclass(frozen=True, slots=True)
class CostTerm:
    """MACs of one conv, linear or matmul: `factor` times the open length of each axis.

    `macs` is that at full width, `share` how often the module runs: of 1 in a dense model, less where
    only some inputs, rows or boxes reach it.
    """

    module: str
    op: str
    factor: int
    axes: tuple[CostAxis, ...]
    macs: int
    share: float = 1

    def renumbered(self, new: Mapping[int, int]) -> "CostTerm":
        """Under new unit numbers; at full width it costs the same."""
        return replace(self, axes=tuple(axis.renumbered(new) for axis in self.axes))


@dataclass(frozen=True, slots=True)
class Statistic:
    """A mean, norm or the like over channels, that must count each channel with its gate.

    The `number`-th call of the torch function `function` in one run of `module`, in one mode.
    `units` lie in an array of `shape`, broadcastable to what is averaged; `site` is where it is called.
    """

    module: str
    function: str
    number: int
    training: bool
    shape: tuple[int, ...]
    units: tuple[int, ...]
    site: str = ""

    def renumbered(self, new: Mapping[int, int]) -> "Statistic":
        """Under new unit numbers."""
        return replace(self, units=renumber(self.units, new))


@dataclass(frozen=True, slots=True)
class AttributeWidth:
    """A Python integer of a module that repeats a width: the number of open channels in `units`.

    `index` is the element of a tuple or list, None for a plain integer.
    """

    module: str
    name: str
    index: int | None
    units: tuple[int, ...]

    def renumbered(self, new: Mapping[int, int]) -> "AttributeWidth":
        """Under new unit numbers."""
        return replace(self, units=renumber(self.units, new))


@dataclass(frozen=True, slots=True)
class RepeatedNumber:
    """A number in a module's code that repeats a width, or must not follow one.

    Among the leaves of the `number`-th call of the torch function `function` in one run of `module`,
    the one at position `leaf`. It becomes the number of open channels in `units`, or stays `value`. With a
    `power`, it stays what it was at every size of the inputs: what the code computes is multiplied by
    that power of (channels in `units` / open ones).
    """

    module: str
    function: str
    number: int
    leaf: int
    training: bool
    units: tuple[int, ...] | None
    value: float
    site: str = ""
    power: float = 0

    def renumbered(self, new: Mapping[int, int]) -> "RepeatedNumber":
        """Under new unit numbers."""
        return self if self.units is None else replace(self, units=renumber(self.units, new))


@dataclass(frozen=True, slots=True)
class FreeOutput:
    """An axis of an output that the user gave up: the unit at each position, in one mode.

    `axis` is None where channels are spread over several axes; `units` are then all that lie there.
    """

    name: str
    axis: int | None
    units: tuple[int, ...]
    training: bool

    def renumbered(self, new: Mapping[int, int]) -> "FreeOutput | None":
        """Under new unit numbers; None if no unit is left on it."""
        units = renumber(self.units, new)
        return replace(self, units=units) if any(unit != PINNED for unit in units) else None


@dataclass(frozen=True, slots=True)
class UnknownOp:
    """An operation without a channel rule that met channels; `line` is where the code calls it.

    `line` reads like `my_model.py:31   return torch.cumsum(x, 1)`.
    """

    op: str
    module: str
    line: str = ""

    def renumbered(self, new: Mapping[int, int]) -> "UnknownOp":
        """As it is: it holds no units."""
        del new
        return self

    def __str__(self) -> str:
        where = f"in module {self.module!r}" if self.module else "in the model's own forward"
        return f"{self.op}  {where}" + (f"  at {self.line}" if self.line else "")
