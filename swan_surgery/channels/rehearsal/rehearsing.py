"""Rehearses pruning on the labelled model: do all channels still meet their partners?

A recording says which channels belong together, but not whether the model's Python code follows
when they shrink: a width may stand there as a literal, a slice may end in the wrong place. So some
units are closed, the shell of the model is cut, run again, and every operation compared with what
the recording predicts. An operation that differs is named, and its channels get pinned.
"""

from dataclasses import dataclass, field as dataclass_field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from swan_surgery.calls.arguments import same_number
from swan_surgery.channels.labels.fields import Fields, axes_of, compact
from swan_surgery.channels.labels.recording import Frame, OpRecord
from swan_surgery.channels.labels.unit_labels import UnitLabels
from swan_surgery.channels.rules.registry import facts_named, facts_of
from swan_surgery.channels.runs.tracing import LabelMode


class Diverged(Exception):  # noqa: N818 - a signal inside the package, never shown
    """The rehearsed run left the recorded path at operation `index`."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


@dataclass(frozen=True, slots=True)
class Prediction:
    """What every label becomes: `unit_of[label + 1]`, and which units stay: `stays[unit + 1]`.

    `prunable[unit + 1]` says which could go at all.
    """

    unit_of: Tensor
    stays: Tensor
    prunable: Tensor
    known: dict[int, tuple[Tensor, "Remaining | None"]] = dataclass_field(default_factory=dict)

    def units(self, field: Tensor) -> Tensor:
        """The field in terms of units, before any of them is removed."""
        return compact(self.unit_of[field + 1])

    def after(
        self, fields: Fields, shape: tuple[int, ...]
    ) -> tuple[Fields, tuple[int, ...]] | None:
        """Fields and shape when the closed units are gone; None if what stays has holes."""
        sizes = list(shape)
        result = []
        for field in fields:
            # Many operations hand on the same field; kept here, it keeps its identity.
            if id(field) not in self.known:
                self.known[id(field)] = (field, self._remaining(self.units(field)))
            remaining = self.known[id(field)][1]
            if remaining is None:
                return None
            if remaining.axis is not None:
                sizes[remaining.axis] = remaining.field.shape[remaining.axis]
            result.append(remaining.field)
        return tuple(result), tuple(sizes)

    def _remaining(self, units: Tensor) -> "Remaining | None":
        stays = self.stays[units + 1]
        if bool(stays.all()):
            return Remaining(units, None)
        axes = axes_of(units)
        if len(axes) != 1:
            return None
        kept = stays.reshape(-1).nonzero().reshape(-1)
        return Remaining(units.index_select(axes[0], kept), axes[0])


@dataclass(frozen=True, slots=True)
class Remaining:
    """A field in terms of units without those that are gone, and the axis that shrank for it."""

    field: Tensor
    axis: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """An operation that did not follow: by its shapes, or only by which channels met.

    `leaves` are the numbers its torch function was called with, if that is tracked.
    """

    index: int
    labels_only: bool = False
    leaves: tuple[Any, ...] = ()


class RehearsalMode(LabelMode):
    """Runs the cut shell beside its recording; `failures` holds the operations that differ."""

    def __init__(self, expected: list[OpRecord], prediction: Prediction) -> None:
        super().__init__(UnitLabels(expected))
        self.expected = expected
        self.prediction = prediction
        self.failures: list[Failure] = []
        self.frames.recover = self.recover

    def recover(self, frame: Frame) -> Any:
        """A torch function refused the new width: note it, and return what the recording predicts."""
        self.is_paused = True  # no operation of ours belongs to the run
        try:
            return self._recovered(frame)
        finally:
            self.is_paused = False

    def _recovered(self, frame: Frame) -> Any:
        ops = self.labels.recording.ops
        start = end = len(ops)
        while end < len(self.expected) and frame.is_same_call(self.expected[end].frame):
            end += 1
        if end == start or self.expected[end - 1].spec is None:
            raise Diverged(min(start, len(self.expected) - 1))
        after = self._predict(self.expected[end - 1])
        if after is None:
            raise Diverged(end - 1)
        self.failures.append(Failure(end - 1, leaves=frame.leaves))
        ops.extend(self.expected[start:end])
        return self._made_up(end - 1, after, "meta")

    def _predict(self, expected: OpRecord) -> list[tuple[Fields, tuple[int, ...]]] | None:
        after = [
            self.prediction.after(fields, shape)
            for fields, shape in zip(expected.outputs, expected.shapes, strict=True)
        ]
        predicted = [item for item in after if item is not None]
        return predicted if len(predicted) == len(after) else None

    def run(self, op: Any, inputs: tuple[Tensor, ...], args: Any, kwargs: Any) -> Any:
        """Values of a cut model are others: what depends on them is replayed, so the path stays."""
        expected = self.expected[len(self.labels.recording.ops) - 1]
        if expected.by_value and not any(expected.outputs):
            return tree_map_only(Tensor, torch.clone, expected.by_value[0])
        return super().run(op, inputs, args, kwargs)

    def dispatch(
        self,
        record: OpRecord,
        inputs: tuple[Tensor, ...],
        op: Any,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Run, compare with the recording, and put things right for what follows."""
        index = len(self.labels.recording.ops) - 1
        if index >= len(self.expected) or not _is_same(self.expected[index], record):
            raise Diverged(min(index, len(self.expected) - 1))
        expected = self.expected[index]
        predicted = self._predict(expected)
        if predicted is None:
            raise Diverged(index)
        if not (
            _same_numbers(record.numbers, expected.numbers)
            and _same_values(record.values, expected.values)
        ):
            # A number follows a width: x / x.shape[1].
            self.failures.append(Failure(index, leaves=_leaves(record)))
        labels = self.labels
        assert isinstance(labels, UnitLabels)  # noqa: S101 - set in __init__
        if facts_of(op).counts and any(map(labels.is_made_to_measure, inputs)):
            self.failures.append(Failure(index))  # x / torch.ones(x.shape[1]).sum()
        labels.conflict = False
        try:
            out = super().dispatch(record, inputs, op, args, kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return self._replace(index, op, args, predicted)
        leaves = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        pairs = list(zip(leaves, predicted, strict=False))
        if len(leaves) != len(predicted) or not all(self._fits(t, *p) for t, p in pairs):
            return self._replace(index, op, args, predicted)
        if labels.conflict or not all(self._equal(t, fields) for t, (fields, _) in pairs):
            self.failures.append(Failure(index, labels_only=True))
        for leaf, (fields, shape) in pairs:
            self.labels.assign(leaf, fields)  # a width of one would lose its label
            if tuple(leaf.shape) != shape:
                labels.note_made_to_measure(leaf)
        return out

    def _fits(self, tensor: Tensor, fields: Fields, shape: tuple[int, ...]) -> bool:
        if tuple(tensor.shape) == shape:
            return True
        if fields or len(shape) != tensor.ndim or not self.labels.is_marked(tensor):
            return False
        varying = self.labels.varying(tensor)
        return all(shape[a] == tensor.shape[a] for a in varying)

    def _equal(self, tensor: Tensor, fields: Fields) -> bool:
        found = self.labels.fields(tensor)
        if len(found) == len(fields) and all(map(_is_equal, found, fields)):
            return True
        own = {axes_of(field): field for field in map(compact, found)}
        wanted = {axes_of(field): field for field in map(compact, fields)}
        # A width of one leaves no axis to compare; a label on one side only says nothing then.
        return all(
            self._agree(own[axes], wanted[axes]) if axes in own and axes in wanted else axes == ()
            for axes in own.keys() | wanted.keys()
        )

    def _agree(self, own: Tensor, wanted: Tensor) -> bool:
        """Channels that always stay may have lost their labels: tied to one another they look like one."""
        if own.shape != wanted.shape:
            return False
        lost = (own <= 0) & ~self.prediction.prunable[wanted + 1]
        return bool(((own == wanted) | lost).all())

    def _replace(
        self,
        index: int,
        op: Any,
        args: Any,
        predicted: list[tuple[Fields, tuple[int, ...]]],
    ) -> Any:
        """Note the failure and return what the recording predicts, so that the run can go on."""
        record = self.labels.recording.ops[index]
        self.failures.append(Failure(index, leaves=_leaves(record)))
        if self.expected[index].spec is None or torch.Tag.inplace in op.tags:
            raise Diverged(index)
        device = next(
            (leaf.device for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)), "meta"
        )
        return self._made_up(index, predicted, device)

    def _made_up(
        self, index: int, predicted: list[tuple[Fields, tuple[int, ...]]], device: Any
    ) -> Any:
        expected = self.expected[index]
        assert expected.spec is not None  # noqa: S101 - checked by the callers
        tensors = [
            torch.empty(shape, dtype=dtype, device=device)
            for (_, shape), dtype in zip(predicted, expected.dtypes, strict=True)
        ]
        for tensor, (fields, _) in zip(tensors, predicted, strict=True):
            self.labels.assign(tensor, fields)
        return tree_unflatten(tensors, expected.spec)


def _is_equal(one: Tensor, two: Tensor) -> bool:
    return one is two or (one.shape == two.shape and torch.equal(one, two))


def _same_values(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> bool:
    """Whether numbers in tensors are the same, where they are equally many."""
    return all(a.shape != b.shape or _close(a, b) for a, b in zip(one, two, strict=False))


def _close(one: Tensor, two: Tensor) -> bool:
    bound = 4 * torch.finfo(two.dtype).eps if two.is_floating_point() else 0
    return torch.allclose(one.double(), two.double(), rtol=bound, atol=0, equal_nan=True)


def _same_numbers(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return one == two or (len(one) == len(two) and all(map(same_number, one, two)))


def _is_same(expected: OpRecord, record: OpRecord) -> bool:
    """Whether two runs took the same step; which kind of view reshape makes is none of the model's."""
    return expected.name == record.name or (_is_reshape(expected) and _is_reshape(record))


def _is_reshape(record: OpRecord) -> bool:
    return record.name.endswith(".default") and facts_named(record.packet).is_reshape


def _leaves(record: OpRecord) -> tuple[Any, ...]:
    return () if record.frame is None else record.frame.leaves
