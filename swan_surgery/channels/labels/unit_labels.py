"""Labels of a second run, when units are known: what joined before must be equal now."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call, OpRecord, Recording


class UnitLabels(Labels):
    """Labels are units here: what met in the recording must be equal now."""

    def __init__(self, expected: Sequence[OpRecord] = ()) -> None:
        """`expected`: the recording of the same run at full width, if this one is at another."""
        super().__init__(Recording())
        self.conflict = False
        self._expected = expected
        self._made_to_measure: dict[int, tuple[Tensor, frozenset[int]]] = {}

    def note_made_to_measure(self, tensor: Tensor, axes: frozenset[int]) -> None:
        """A constant without channels that follows a width along some axes nevertheless."""
        self._made_to_measure[id(tensor)] = (tensor, axes)

    def measured(self, tensor: Tensor) -> frozenset[int]:
        """The axes along which a constant was noted as one that follows a width."""
        entry = self._made_to_measure.get(id(tensor))
        return frozenset() if entry is None else entry[1]

    def twin(self, source: Tensor, copy: Tensor, is_view: bool) -> Tensor:  # noqa: FBT001
        """As of the source."""
        if axes := self.measured(source):
            self.note_made_to_measure(copy, axes)
        return super().twin(source, copy, is_view)

    def is_single(self, call: Call, *, now: bool) -> bool:
        """Groups that are cut to one channel each are still not single ones."""
        if self._expected:
            return self._expected[call.index].is_single
        return super().is_single(call, now=now)

    def join(self, first: Tensor, second: Tensor, call: Call) -> None:  # noqa: ARG002
        """Check instead of record."""
        one, two = first.numpy(), second.numpy()
        if first is not second and ((one > 0) & (two > 0) & (one != two)).any():
            self.conflict = True

    def pin_because(self, labels: Tensor, reason: Any) -> None:
        """Pins were decided by the recording."""

    def weigh(self, field: Tensor, call: Call) -> bool:  # noqa: ARG002
        """Statistics were recorded."""
        return True

    def tie_by(self, alternatives: list[list[tuple[Tensor, Tensor]]], call: Call) -> None:
        """Ties were decided by the recording."""
