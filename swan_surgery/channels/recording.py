"""What one labelled run of a model records: joins, ties, pins, contractions, and every operation.

`Labels` is what a rule works on. A rule never sees more of a tensor than its shape and its fields.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field as dataclass_field
from typing import Any

import torch
from torch import Tensor

from swan_surgery.channels.fields import FILL, PLAIN, Fields, axes_of


@dataclass(frozen=True, slots=True)
class Reason:
    """Why channels are pinned: what happened, in which ATen operation, in which module."""

    text: str
    op: str
    module: str


@dataclass(frozen=True, slots=True)
class Call:
    """One ATen operation as it ran: what a rule needs to know."""

    index: int
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    module: str

    @property
    def name(self) -> str:
        """The operation without overload, as in `aten.add`."""
        return str(self.op.overloadpacket)

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name, however it was passed."""
        if name in self.kwargs:
            return self.kwargs[name]
        for position, argument in enumerate(self.op._schema.arguments):  # noqa: SLF001 - torch's only access
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return argument.default_value if argument.has_default_value() else default
        return default


@dataclass(frozen=True, slots=True)
class Contraction:
    """A conv, linear or matmul as it ran: its MACs are `factor` times the length of each axis.

    `axes` holds one label vector per axis that may shrink; the rest of the MACs is in `factor`.
    `produced` labels the output channels, `reads` the input channels, `summed` those input channels
    that are summed over (a depthwise convolution sums over none).
    """

    op: str
    module: str
    factor: int
    axes: tuple[Tensor | None, ...]
    produced: Tensor | None
    reads: Tensor | None
    summed: Tensor | None
    num_out: int
    num_in: int


@dataclass(slots=True)
class OpRecord:
    """One operation of the run: its fields before and after, and how to tie what it split.

    `numbers` holds the Python numbers of a pointwise operation, which must not follow a width.
    `beside_fill` holds labels that met constant padding here: they may go only if the padding
    shrinks with them.
    """

    name: str
    module: str
    inputs: tuple[Fields, ...]
    outputs: tuple[Fields, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    spec: Any = None
    is_depthwise: bool = False
    numbers: tuple[float, ...] = ()
    beside_fill: list[Tensor] = dataclass_field(default_factory=list)
    ties: list[list[tuple[Tensor, Tensor]]] = dataclass_field(default_factory=list)


@dataclass(slots=True)
class Recording:
    """Everything one run left behind."""

    joins: list[tuple[Tensor, Tensor]] = dataclass_field(default_factory=list)
    pins: list[tuple[Tensor, Reason]] = dataclass_field(default_factory=list)
    unknown: list[Reason] = dataclass_field(default_factory=list)
    contractions: list[Contraction] = dataclass_field(default_factory=list)
    ops: list[OpRecord] = dataclass_field(default_factory=list)


class Labels:
    """The fields of every live tensor, and the record of what rules concluded from them."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._fields: dict[int, tuple[Tensor, Fields]] = {}
        self._harmless: dict[int, Tensor] = {}
        self._views: dict[int, Tensor] = {}
        self._viewed: set[int] = set()

    def fields(self, tensor: Tensor) -> Fields:
        """The fields of a tensor; empty when no channel is known on it."""
        entry = self._fields.get(id(tensor))
        return entry[1] if entry is not None else ()

    def assign(self, tensor: Tensor, fields: Fields) -> None:
        """Attach fields; keeps the tensor alive so that its identity stays its own."""
        self._fields[id(tensor)] = (tensor, fields)

    def mark_harmless(self, tensor: Tensor) -> None:
        """Note that a tensor is constant (or random) along every axis: it fits any width."""
        self._harmless[id(tensor)] = tensor

    def is_harmless(self, tensor: Tensor) -> bool:
        """Whether the tensor may meet channels without pinning them."""
        return id(tensor) in self._harmless

    def note_view(self, base: Tensor, view: Tensor) -> None:
        """Remember that two tensors share memory."""
        self._views[id(view)] = base
        self._viewed.add(id(base))

    def shares_memory(self, tensor: Tensor) -> bool:
        """Whether the tensor is a view of another, or another is a view of it."""
        return id(tensor) in self._views or id(tensor) in self._viewed

    def spoil(self, tensor: Tensor) -> None:
        """Data was written into the tensor: neither it nor its bases are constant any more."""
        seen = set()
        while id(tensor) not in seen:
            seen.add(id(tensor))
            self._harmless.pop(id(tensor), None)
            tensor = self._views.get(id(tensor), tensor)

    def join(self, first: Tensor, second: Tensor, call: Call) -> None:
        """Positions of two (broadcastable) label tensors that name the same channel.

        A label that meets PLAIN data is pinned: removing the channel would leave that data alone.
        """
        first, second = torch.broadcast_tensors(first, second)
        both = (first > 0) & (second > 0)
        if bool(both.all()):
            self.recording.joins.append((first.reshape(-1), second.reshape(-1)))
            return
        self.recording.joins.append((first[both], second[both]))
        beside = torch.cat(
            [first[(first > 0) & (second == FILL)], second[(second > 0) & (first == FILL)]]
        )
        if beside.numel():
            self.recording.ops[call.index].beside_fill.append(beside)
        alone = torch.cat(
            [first[(first > 0) & (second == PLAIN)], second[(second > 0) & (first == PLAIN)]]
        )
        if alone.numel():
            self.pin(alone, "meets data that belongs to no channel", call)

    def pin(self, labels: Tensor, text: str, call: Call) -> None:
        """Channels that must stay, and why."""
        self.pin_because(labels, Reason(text, call.name, call.module))

    def pin_because(self, labels: Tensor, reason: Reason) -> None:
        """Pin with a ready reason."""
        labels = labels[labels > 0].reshape(-1)
        if labels.numel():
            self.recording.pins.append((labels, reason))

    def tie(self, field: Tensor, call: Call) -> None:
        """A labelled axis was split in several: what remains after pruning must be rectangular.

        One alternative per axis: that axis may shrink, and all positions that share an index on
        it are joined. The last axis comes first (channel shuffle); rehearsal picks what holds.
        """
        alternatives = [self._joined_along(field, axis, call) for axis in reversed(axes_of(field))]
        self.tie_by(alternatives, call)

    def tie_to_first(self, field: Tensor, call: Call) -> Tensor:
        """An axis was split over channels and positions (C, H, W): the first of them may shrink.

        Returns the field of the channels, which then lies along the first axis alone.
        """
        axes = axes_of(field)
        self.tie_by([self._joined_along(field, axes[0], call)], call)
        for other in axes[1:]:
            field = field.narrow(other, 0, 1)
        return field

    def _joined_along(self, field: Tensor, axis: int, call: Call) -> list[tuple[Tensor, Tensor]]:
        """Join all positions that share an index on one axis."""
        rest = field
        for other in axes_of(field):
            if other != axis:
                rest = rest.narrow(other, 0, 1)
        wide = rest.expand_as(field)
        both = (wide > 0) & (field > 0)
        mixed = (wide > 0) != (field > 0)
        if bool(mixed.any()):
            self.pin(torch.cat([wide[mixed], field[mixed]]), "split across padding", call)
        return [(wide[both], field[both])]

    def tie_by(self, alternatives: list[list[tuple[Tensor, Tensor]]], call: Call) -> None:
        """Add alternatives, best guess first, each a list of joins, to those of this operation."""
        ties = self.recording.ops[call.index].ties
        for index, joins in enumerate(alternatives):
            if index == len(ties):
                ties.append([])
            ties[index].extend(joins)

    def is_depthwise(self, call: Call) -> bool:
        """Whether a grouped convolution has one input channel per group at full width."""
        weight, groups = call.inputs[1], call.arg("groups", 1)
        per_group = (
            weight.shape[0] // groups if call.arg("transposed", default=False) else weight.shape[1]
        )
        depthwise = per_group == 1
        self.recording.ops[call.index].is_depthwise = depthwise
        return depthwise

    def contract(self, contraction: Contraction) -> None:
        """Record the cost of a conv, linear or matmul."""
        self.recording.contractions.append(contraction)


Rule = Callable[[Call, Labels], None]


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, dicts and plain objects, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from iter_tensors(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from iter_tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from iter_tensors(getattr(value, name))


__all__ = [
    "FILL",
    "PLAIN",
    "Call",
    "Contraction",
    "Fields",
    "Labels",
    "OpRecord",
    "Reason",
    "Recording",
    "Rule",
    "iter_tensors",
]
