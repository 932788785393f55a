"""Rehearses pruning on the labelled model: do all channels still meet their partners?

A recording says which channels belong together, but not whether the model's Python code follows when they
shrink: a width may stand there as a literal, a slice may end in the wrong place. So some units are closed, the
shell of the model is cut, run again, and every operation compared. What differs is named; its channels get pinned.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field as dataclass_field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from swan_surgery.channels.labels.fields import Fields, axes_of, compact
from swan_surgery.channels.labels.recording import Frame, ModuleRun, OpRecord, Returned
from swan_surgery.channels.labels.unit_labels import UnitLabels
from swan_surgery.channels.rehearsal.comparing import (
    counts,
    is_equal,
    is_same,
    numbers_in,
    same_numbers,
)
from swan_surgery.channels.rehearsal.failures import Diverged, Failure
from swan_surgery.channels.rules.registry import writes_in_place
from swan_surgery.channels.runs.tracing import LabelMode


@dataclass(frozen=True, slots=True)
class Prediction:
    """What every label becomes: `unit_of[label + 1]`; `stays` and `prunable` are by unit + 1."""

    unit_of: Tensor
    stays: Tensor
    prunable: Tensor
    own_units: dict[int, tuple[Tensor, Tensor]] = dataclass_field(default_factory=dict)  # shared
    known: dict[int, tuple[Tensor, "Remaining | None"]] = dataclass_field(default_factory=dict)

    def units(self, field: Tensor) -> Tensor:
        """The field in terms of units, before any of them is removed."""
        if id(field) not in self.own_units:
            self.own_units[id(field)] = (field, compact(self.unit_of[field + 1]))
        return self.own_units[id(field)][1]

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
        own = units.numpy()  # numpy is the quicker one for arrays of this size
        stays = self.stays.numpy()[own + 1]
        if stays.all():
            return Remaining(units, None)
        axes = axes_of(units)
        if len(axes) != 1:
            return None
        return Remaining(torch.from_numpy(own.compress(stays.reshape(-1), axes[0])), axes[0])


@dataclass(frozen=True, slots=True)
class Remaining:
    """A field in terms of units without those that are gone, and the axis that shrank for it."""

    field: Tensor
    axis: int | None


class RehearsalMode(LabelMode):
    """Runs the cut shell beside its recording; `failures` holds the operations that differ."""

    def __init__(
        self,
        expected: list[OpRecord],
        prediction: Prediction,
        runs: Sequence[ModuleRun] = (),
        device: Any = "meta",
    ) -> None:
        super().__init__(UnitLabels(expected))
        self.expected = expected
        self.prediction = prediction
        self.device = device
        self.skipped: str | None = None
        self.failures: list[Failure] = []
        self.frames.recover = self.recover
        self._waiting: dict[str, deque[ModuleRun]] = defaultdict(deque)
        for run in runs:
            self._waiting[run.module].append(run)

    @property
    def next_index(self) -> int:
        """The operation that would come next."""
        return min(len(self.labels.recording.ops), len(self.expected) - 1)

    def note(self, failure: Failure) -> None:
        """Note what did not follow; what comes of a skipped module's missing calls is left out."""
        if self.skipped is None:
            self.failures.append(failure)
            return
        module = failure.raised.module if failure.raised else self.expected[failure.index].module
        if not f"{self.skipped}.".startswith(f"{module}." if module else ""):
            self.failures.append(replace(failure, is_tentative=True))

    def take(self, module: str) -> ModuleRun | None:
        """The recorded run of a module that starts now."""
        waiting = self._waiting[module]
        return waiting.popleft() if waiting else None

    def skip(self, run: ModuleRun, failure: Failure) -> Any:
        """Return what a module should have returned, as if it had run; None if that is not known."""
        ops = self.labels.recording.ops
        returned = run.returned
        if returned is None or not run.start <= failure.index <= run.end:
            return None
        made = [
            (self.expected[index], number, self._predict(self.expected[index]))
            for index, number in returned.leaves
        ]
        if any(predicted is None for _, _, predicted in made):
            return None
        if not all(op.dtypes[number].is_floating_point for op, number, _ in made):
            return None  # positions have values
        self.note(failure)
        self.skipped = run.module
        ops[run.start :] = self.expected[run.start : run.end]
        return self._made_up(returned, self.device)

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
        while end < len(self.expected) and self._is_same_call(frame, self.expected[end].frame):
            end += 1
        returned = self.expected[end - 1].returned if end > start else None
        if returned is None:
            raise Diverged(min(start, len(self.expected) - 1))
        if any(self._predict(self.expected[index]) is None for index, _ in returned.leaves):
            raise Diverged(end - 1)
        self.note(Failure(end - 1, leaves=frame.leaves))
        ops.extend(self.expected[start:end])
        return self._made_up(returned, self.device)

    def _is_same_call(self, frame: Frame, other: Frame | None) -> bool:
        if self.skipped is None or other is None:
            return frame.is_same_call(other)
        # The calls of what was skipped were not counted.
        own, others = (frame.module, frame.function), (other.module, other.function)
        return own == others and frame.site == other.site

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
        if index >= len(self.expected) or not is_same(self.expected[index], record):
            raise Diverged(min(index, len(self.expected) - 1))
        expected = self.expected[index]
        predicted = self._predict(expected)
        if predicted is None:
            raise Diverged(index)
        if not same_numbers(record, expected):  # one follows a width: x / x.shape[1]
            self.note(Failure(index, leaves=numbers_in(record)))
        labels = self.labels
        assert isinstance(labels, UnitLabels)  # noqa: S101 - set in __init__
        if any(counts(op, labels.measured(t), t, args, kwargs) for t in inputs):
            self.note(Failure(index))  # x / torch.ones(x.shape[1]).sum()
        labels.conflict = False
        try:
            out = super().dispatch(record, inputs, op, args, kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return self._replace(index, op, args)
        leaves = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        pairs = list(zip(leaves, predicted, strict=False))
        if len(leaves) != len(predicted) or not all(self._fits(t, *p) for t, p in pairs):
            return self._replace(index, op, args)
        self._hand_on(index, pairs)
        return out

    def _hand_on(
        self, index: int, pairs: list[tuple[Tensor, tuple[Fields, tuple[int, ...]]]]
    ) -> None:
        """Compare what channels met, and let the results carry what the recording says."""
        labels, adopted = self.labels, self.expected[index].adopted
        assert isinstance(labels, UnitLabels)  # noqa: S101 - set in __init__
        own = [pair for place, pair in enumerate(pairs) if place not in adopted]
        if labels.conflict or not all(self._equal(t, fields) for t, (fields, _) in own):
            self.note(Failure(index, labels_only=True))
        for leaf, (fields, _) in own:
            labels.assign(leaf, fields)  # a width of one would lose its label
        for place, (leaf, (fields, shape)) in enumerate(pairs):
            axes = {axis for axis, size in enumerate(shape) if leaf.shape[axis] != size}
            if place in adopted:
                axes.update(axis for field in fields for axis in axes_of(field))
            if axes:
                labels.note_made_to_measure(leaf, frozenset(axes))

    def _fits(self, tensor: Tensor, fields: Fields, shape: tuple[int, ...]) -> bool:
        if tuple(tensor.shape) == shape:
            return True
        if fields or len(shape) != tensor.ndim or not self.labels.is_marked(tensor):
            return False
        varying = self.labels.varying(tensor)
        return all(shape[a] == tensor.shape[a] for a in varying)

    def _equal(self, tensor: Tensor, fields: Fields) -> bool:
        found = self.labels.fields(tensor)
        if len(found) == len(fields) and all(map(is_equal, found, fields)):
            return True
        own = {axes_of(field): field for field in map(compact, found)}
        wanted = {axes_of(field): field for field in map(compact, fields)}
        # A width of one leaves no axis to compare; a label on one side only says nothing then.
        return all(
            self._agree(own[axes], wanted[axes])
            if axes in own and axes in wanted
            else axes == () or self._is_fixed((own | wanted)[axes])
            for axes in own.keys() | wanted.keys()
        )

    def _is_fixed(self, units: Tensor) -> bool:
        """Whether none of these could go: tied to one another they leave no axis to compare."""
        return not bool(self.prediction.prunable[units + 1].any())

    def _agree(self, own: Tensor, wanted: Tensor) -> bool:
        """Channels that always stay may have lost their labels: tied to one another they look like one."""
        if own.shape != wanted.shape:
            return False
        lost = (own <= 0) & ~self.prediction.prunable[wanted + 1]
        return bool(((own == wanted) | lost).all())

    def _replace(self, index: int, op: Any, args: Any) -> Any:
        """Note the failure and return what the recording predicts, so that the run can go on."""
        record = self.labels.recording.ops[index]
        self.note(Failure(index, leaves=numbers_in(record)))
        expected = self.expected[index]
        if expected.spec is None or writes_in_place(op):
            raise Diverged(index)
        device = next(
            (leaf.device for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)), "meta"
        )
        leaves = tuple((index, number) for number in range(len(expected.shapes)))
        return self._made_up(Returned(expected.spec, leaves), device)

    def _made_up(self, returned: Returned, device: Any) -> Any:
        tensors = []
        for index, number in returned.leaves:
            expected = self.expected[index]
            predicted = self._predict(expected)
            assert predicted is not None  # noqa: S101 - checked by the callers
            fields, shape = predicted[number]
            made = torch.empty(shape, dtype=expected.dtypes[number], device=device)
            if number in expected.adopted:
                self.labels.mark_harmless(made)
            else:
                self.labels.assign(made, fields)
            self.makers.note_as(made, (index, number))
            tensors.append(made)
        return tree_unflatten(tensors, returned.spec)
