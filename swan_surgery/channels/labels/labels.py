"""The fields of every live tensor of a run, and what the rules conclude from them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from swan_surgery.calls.functions import is_statistic
from swan_surgery.channels.labels.fields import FILL, PLAIN, Fields, axes_of
from swan_surgery.channels.labels.recording import (
    Call,
    Contraction,
    Frame,
    OpRecord,
    Reason,
    Recording,
    Weighting,
)


class Labels:
    """The fields of every live tensor, and the record of what rules concluded from them.

    Attributes:
        frame: the torch function that is running, if it is one that is tracked.
        priced: the tracked torch function whose multiply-adds were recorded last.
        within_heads: operations that split an axis into heads, and the axes inside a head.
        is_probe: this run only looks for heads: fields stay as they are, however entangled.
        splits, heads: what a probe found: fields behind every split, and labels of one head each.
        used: identities of all tensors that entered an operation.
        keeps_draws: random values must come out the same, as in eval mode.
        mixes_activations: two tensors that are no parameters were multiplied as matrices.
    """

    def __init__(
        self,
        recording: Recording,
        within_heads: Mapping[int, tuple[int, ...]] | None = None,
        *,
        is_probe: bool = False,
    ) -> None:
        self.recording = recording
        self.frame: Frame | None = None
        self.priced: Frame | None = None
        self.within_heads = within_heads or {}
        self.is_probe = is_probe
        self.splits: list[tuple[int, Tensor]] = []
        self.heads: list[tuple[Tensor, Tensor]] = []
        self.mixes_activations = False
        self.keeps_draws = False
        self.used: set[int] = set()
        self._bare: dict[int, Tensor] = {}
        self._derived: dict[int, Tensor] = {}
        self._fields: dict[int, tuple[Tensor, Fields]] = {}
        self._origins: dict[int, list[Tensor]] = {}
        self._made: dict[int, tuple[Tensor, OpRecord, int]] = {}
        self._varying: dict[int, tuple[Tensor, frozenset[int]]] = {}
        self._views: dict[int, Tensor] = {}
        self._viewed: set[int] = set()

    def fields(self, tensor: Tensor) -> Fields:
        """The fields of a tensor; empty when no channel is known on it."""
        entry = self._fields.get(id(tensor))
        return entry[1] if entry is not None else ()

    def assign(self, tensor: Tensor, fields: Fields) -> None:
        """Attach fields; keeps the tensor alive so that its identity stays its own."""
        self._fields[id(tensor)] = (tensor, fields)

    def mark_harmless(self, tensor: Tensor, varying: frozenset[int] = frozenset()) -> None:
        """Note that a tensor is constant (or random) along its axes: it fits any width.

        Except along those axes that are `varying`.
        """
        self._varying[id(tensor)] = (tensor, varying)

    def is_marked(self, tensor: Tensor) -> bool:
        """Whether it is known along which axes the tensor varies."""
        return id(tensor) in self._varying

    def note_origins(self, tensor: Tensor, operands: list[Tensor]) -> None:
        """Remember from which tensors a constant was computed, position by position."""
        self._origins[id(tensor)] = operands

    def draw(self, call: Call) -> None:
        """An operation drew random values: one more or one less would change all that follow."""
        for tensor in call.outputs if self.keeps_draws else ():
            for field in self.fields(tensor):
                self.pin(field, "random values are drawn for each channel", call)
            along = frozenset(axis for axis, size in enumerate(tensor.shape) if size > 1)
            self.mark_harmless(tensor, along)

    def origins(self, tensor: Tensor) -> list[Tensor]:
        """What a constant was computed from; nothing for one that is no constant."""
        return self._origins.get(id(tensor), []) if self.is_marked(tensor) else []

    def note_made(self, tensor: Tensor, record: OpRecord, place: int) -> None:
        """Remember which operation made a constant, as its output at `place`."""
        self._made[id(tensor)] = (tensor, record, place)

    def adopt(self, tensor: Tensor, field: Tensor) -> None:
        """A constant was made for these channels, and by an operation that must follow them."""
        fields = (*self.fields(tensor), field)
        self.assign(tensor, fields)
        if id(tensor) in self._made:
            _, record, place = self._made[id(tensor)]
            record.adopt(place, fields)

    def varying(self, tensor: Tensor) -> frozenset[int]:
        """The axes along which a tensor holds data of its own."""
        entry = self._varying.get(id(tensor))
        if entry is not None:
            return entry[1]
        return frozenset(axis for axis, size in enumerate(tensor.shape) if size > 1)

    def is_harmless(self, tensor: Tensor) -> bool:
        """Whether the tensor may meet channels along any axis without pinning them."""
        return id(tensor) in self._varying and not self._varying[id(tensor)][1]

    def mark_bare(self, tensor: Tensor) -> None:
        """Note that a tensor is a parameter, or one moved about."""
        self._bare[id(tensor)] = tensor

    def is_bare(self, tensor: Tensor) -> bool:
        """Whether scaling a parameter scales this tensor."""
        return id(tensor) in self._bare

    def mark_derived(self, tensor: Tensor) -> None:
        """Note that a tensor is computed from parameters and buffers alone."""
        self._derived[id(tensor)] = tensor

    def is_derived(self, tensor: Tensor) -> bool:
        """Whether the tensor is a weight rather than an activation."""
        return id(tensor) in self._derived

    def note_view(self, base: Tensor, view: Tensor) -> None:
        """Remember that two tensors share memory."""
        self._views[id(view)] = base
        self._viewed.add(id(base))

    def shares_memory(self, tensor: Tensor) -> bool:
        """Whether the tensor is a view of another, or another is a view of it."""
        return id(tensor) in self._views or id(tensor) in self._viewed

    def twin(self, source: Tensor, copy: Tensor, is_view: bool) -> Tensor:  # noqa: FBT001
        """Let a detached or cloned tensor be what its source is; returns it."""
        self.assign(copy, self.fields(source))
        if is_view:
            self.note_view(source, copy)
        for marks in (self._bare, self._derived):
            if id(source) in marks:
                marks[id(copy)] = copy
        if id(source) in self._varying:
            self.mark_harmless(copy, self._varying[id(source)][1])
        if id(source) in self._made:
            self.note_made(copy, *self._made[id(source)][1:])
        return copy

    def root(self, tensor: Tensor) -> Tensor:
        """The tensor that this one is, after all, a view of; itself if of none."""
        seen = {id(tensor)}
        while id(base := self._views.get(id(tensor), tensor)) not in seen:
            seen.add(id(base))
            tensor = base
        return tensor

    def spoil(self, tensor: Tensor) -> None:
        """Data was written into the tensor: nothing that shares its memory is constant any more."""
        if not self.shares_memory(tensor):
            self._varying.pop(id(tensor), None)
            return
        root = self.root(tensor)
        for key in [key for key, (t, _) in self._varying.items() if self.root(t) is root]:
            del self._varying[key]

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

    def collapse(self, field: Tensor, call: Call) -> Tensor:
        """Join what lies within one head; returns the field without those axes."""
        for axis in self.within_heads[call.index]:
            first = field.narrow(axis, 0, 1)
            self.join(first.expand_as(field), field, call)
            field = first
        return field

    def alike(self, field: Tensor, axis: int, call: Call) -> Tensor:
        """A layer does the same to every sample: a channel on `axis` is the same one in all of them.

        Joins what blocks of channels hold at one position, where blocks were moved to the batch or to
        the rows (masks of a separation network, say); returns the field of `axis` alone.
        """
        others = [other for other in axes_of(field) if other < axis]
        if axis not in axes_of(field) or not others or self.is_probe:
            return field
        first = field
        for other in others:
            first = first.narrow(other, 0, 1)
        self.join(first.expand_as(field), field, call)
        return first

    def weigh(self, field: Tensor, call: Call) -> bool:
        """Record a statistic over channels; False if the function that runs cannot be weighted."""
        frame = self.frame
        if frame is None or not is_statistic(frame.function, call.name):
            return False
        self.recording.weightings.append(Weighting(frame, field, call.name, call.index))
        return True

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
        return self.is_single(call, now=per_group == 1)

    def is_single(self, call: Call, *, now: bool) -> bool:
        """Whether a group holds one channel at full width, given whether it does `now`."""
        self.recording.ops[call.index].is_single = now
        return now

    def contract(self, contraction: Contraction) -> None:
        """Record the cost of a conv, linear or matmul."""
        self.priced = self.frame
        self.recording.contractions.append(contraction)


Rule = Callable[[Call, Labels], None]
